"""The command line of every script: dataclass defaults < `--recipe FILE` (YAML) < options on the command line.

A script calls `run(function, OptionsClass)`. Each field of the dataclass is an option: `held_out` is `held_out:` in a
recipe and `--held-out` on the command line; the fields of a nested dataclass are keys below `optimizer:`, and
`--optimizer.learning-rate`. A list takes several values (`--held-out A B`), a switch needs none (`--resume`,
`--resume false`), a dictionary is written as JSON. A field with `metadata={"positional": True}` is written without its
name. The docstring under a field is its text in `--help`, which also shows its range, see `healthslm.options`.
`metadata={"memory": True}` marks an option to lower where the GPU's memory runs out.

Paths on the command line are relative to the current folder. In a recipe they are relative to the recipe's folder: the
values of all fields of type `Path`, and any other text that begins with `./` or `../`, which becomes an absolute path.
So `model: ../runs/a/best` is a folder wherever the script is started, and `model: openai-community/gpt2` is a name.
"""

import argparse
import dataclasses
import difflib
import errno
import inspect
import logging
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import docstring_parser
import jsonargparse
import yaml

from healthslm.errors import Stopped, UserError
from healthslm.options import OptionError, option_ranges

# Where it is installed on a CPU with bf16, every import of Transformers tells of a kernel that it misses.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

Options = TypeVar("Options")

STOPPED = 75
"""Exit status of work that stopped on request and wants to be gone on with: EX_TEMPFAIL of sysexits.h."""


class UsageError(UserError):
    """A mistake on the command line or in a recipe."""


@dataclasses.dataclass
class Field:
    """An option: one field of the options dataclass, or of a dataclass nested in it."""

    name: str  # dotted where nested: optimizer.learning_rate
    type: str  # as one writes it: list[Path] | None
    default: Any  # dataclasses.MISSING where the option is required
    text: str
    range: str  # as one reads it, empty for any value
    is_positional: bool = False
    saves_memory: bool = False  # where it is lower

    @property
    def flag(self) -> str:
        """As it is written on the command line: a positional one as its value's place in `--help`."""
        return self.name.upper() if self.is_positional else "--" + self.name.replace("_", "-")


def run(function: Callable[[Options], None], options_class: type[Options]) -> None:
    """Call `function` with the options that the user gave, and report the user's errors in one line.

    The exit status is 1 after an error of the user's or of the file system, 2 after wrong usage, 75 when work stopped
    on request and can be gone on with, and what shells expect when interrupted or when nobody reads the output. Any
    other exception is a mistake of ours and keeps its traceback.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("healthslm").setLevel(logging.INFO)
    try:
        options = parse(options_class, sys.argv[1:])
        with _naming_options(options_class, sys.argv[1:]):
            function(options)
    except UsageError as error:
        _exit(f"error: {error} (see --help)", 2)
    except UserError as error:
        _exit(f"error: {error}", 1)
    except BrokenPipeError:  # head, or whoever reads our output, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        _exit(f"error: {error.filename or 'cannot write'}: {error.strerror}", 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # PyTorch's, which is not imported here: that takes seconds
            raise
        _exit(f"error: out of GPU memory: {_ways_out(options_class)}", 1)
    except Stopped as stopped:
        _exit(str(stopped), STOPPED)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def parse(options_class: type[Options], arguments: list[str]) -> Options:
    """Build the options from the defaults, the recipe that `arguments` name, and the other `arguments`."""
    fields = {field.name: field for field in _fields(options_class)}
    given = _read_command_line(fields, arguments)
    recipe = given.get("recipe")
    values = (_read_recipe(fields, Path(recipe)) if recipe else {}) | given
    values.pop("recipe", None)
    required = [field for field in fields.values() if field.default is dataclasses.MISSING]
    missing = [field.flag for field in required if values.get(field.name) is None]
    if missing:
        raise UsageError(f"missing: {' '.join(missing)}")

    converter = jsonargparse.ArgumentParser(exit_on_error=False)
    converter.add_class_arguments(options_class)
    with _naming_options(options_class, arguments):
        try:
            options = converter.instantiate(converter.parse_object(values))
        except argparse.ArgumentError as error:
            key = re.match(r'Parser key "([\w.]+)"', str(error))
            if key is None or key[1] not in fields:
                raise
            raise OptionError(key[1], f"expected {fields[key[1]].type}, got {values[key[1]]!r}") from error
        return options_class(**vars(options))


@contextmanager
def _naming_options(options_class: type, arguments: list[str]) -> Iterator[None]:
    """Raise what is wrong with an option as a UsageError that names the option as the user wrote it."""
    try:
        yield
    except OptionError as error:
        fields = {field.name: field for field in _fields(options_class)}
        given = _read_command_line(fields, arguments)
        # A nested dataclass knows its fields by their own names.
        field = next(field for field in fields.values() if error.name in (field.name, field.name.rpartition(".")[2]))
        in_recipe = "recipe" in given and field.name not in given
        place = f"{given['recipe']}: {field.name}" if in_recipe else field.flag
        raise UsageError(f"{place}: {error.problem}") from error


def _fields(options_class: type, prefix: str = "", instance: Any = None) -> Iterator[Field]:
    """Yield the options in the order of their definition; `instance` holds the defaults of a nested dataclass."""
    annotations, ranges = typing.get_type_hints(options_class), option_ranges(options_class)
    docstrings = [docstring_parser.parse_from_object(base) for base in reversed(options_class.__mro__[:-1])]
    texts = {entry.arg_name: entry.description for docstring in docstrings for entry in docstring.params}
    for field in dataclasses.fields(options_class):
        name, annotation = prefix + field.name, annotations[field.name]
        if instance is not None:
            default = getattr(instance, field.name)
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if dataclasses.is_dataclass(annotation):
            yield from _fields(annotation, f"{name}.", default)
        else:
            type_text = re.sub(r"([a-z_]\w*\.)+(?=[A-Z])", "", inspect.formatannotation(annotation))
            text = " ".join((texts.get(field.name) or "").split())
            allowed, metadata = str(ranges.get(field.name, "")), field.metadata
            is_positional, saves_memory = metadata.get("positional", False), metadata.get("memory", False)
            yield Field(name, type_text, default, text, allowed, is_positional, saves_memory)


def _read_command_line(fields: dict[str, Field], arguments: list[str]) -> dict[str, Any]:
    """Return the options among `arguments` by their names, as text or lists of text; `recipe` is one of them."""
    parser = argparse.ArgumentParser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--recipe", metavar="FILE", help="YAML file of options; those on the command line win.")
    for field in fields.values():
        state = "required" if field.default is dataclasses.MISSING else f"default: {_show(field.default)}"
        facts = ", ".join(filter(None, [field.type, field.range, state]))
        settings: dict[str, Any] = {"help": f"{field.text} ({facts})".lstrip().replace("%", "%%")}
        if field.type.startswith(("list[", "tuple[")):
            settings |= {"nargs": "*", "action": "extend"}
        elif field.type.startswith("bool"):
            settings |= {"nargs": "?", "const": "true"}
        settings["metavar"] = field.name.rpartition(".")[2].upper()
        if field.is_positional:
            parser.add_argument(field.name, nargs="?", **settings)  # which a recipe may give as well
        else:
            parser.add_argument(field.flag, dest=field.name, **settings)
    try:
        namespace, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}") from error
    if unknown and not unknown[0].startswith("-"):
        raise UsageError(f"unexpected argument {unknown[0]!r}")
    if unknown:
        flags = ["--recipe", *(field.flag for field in fields.values() if not field.is_positional)]
        raise UsageError(_unknown(unknown[0].partition("=")[0], flags))
    return vars(namespace)


def _read_recipe(fields: dict[str, Field], path: Path) -> dict[str, Any]:
    """Return the recipe's values by their dotted names."""

    def flatten(mapping: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            if name in fields:
                yield name, _with_paths_from(path.parent, value, "Path" in fields[name].type)
            elif isinstance(value, dict) and any(known.startswith(f"{name}.") for known in fields):
                yield from flatten(value, f"{name}.")
            else:
                raise UsageError(f"{path}: {_unknown(name, list(fields))}")

    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: expected lines `option: value`")
    return dict(flatten(recipe))


def _with_paths_from(folder: Path, value: Any, is_path: bool) -> Any:
    if isinstance(value, list):
        return [_with_paths_from(folder, item, is_path) for item in value]
    if isinstance(value, dict):
        return {key: _with_paths_from(folder, item, is_path) for key, item in value.items()}
    if isinstance(value, str) and is_path:
        return os.path.normpath(folder / value)
    if isinstance(value, str) and value.startswith(("./", "../")):
        return os.path.abspath(folder / value)
    return value


def _unknown(name: str, known: list[str]) -> str:
    return f"unknown option {name!r}, did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]!r}?"


def _ways_out(options_class: type) -> str:
    """What to do where the GPU's memory runs out."""
    fields = list(_fields(options_class))
    ways = [f"lower {field.flag}" for field in fields if field.saves_memory]
    ways += ["use --device cpu" for field in fields if field.name == "device"]
    return " or ".join(ways or ["close other programs that use it"])


def _show(default: Any) -> str:
    if isinstance(default, list | tuple):
        return " ".join(map(str, default)) or "none"
    return "none" if default is None else str(default)


def _report_missing_package(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Tell in one line of a package that a script imports and that is not installed; all else keeps its traceback."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if kind is not ModuleNotFoundError or package in ("", "healthslm"):
        sys.__excepthook__(kind, error, traceback)
    else:
        every = "pip install -c constraints.txt -e '.[all]'"
        print(f"error: {package}, which this command needs, is not installed: {every} installs all", file=sys.stderr)


sys.excepthook = _report_missing_package  # a script imports what it needs before it calls `run`


def _exit(message: str, status: int) -> NoReturn:
    if message:
        print(message, file=sys.stderr)
    sys.exit(status)
