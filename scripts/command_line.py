"""The command line of every script: dataclass defaults < `--recipe FILE` (YAML) < options on the command line.

A script calls `run(function, OptionsClass)`. Each field of the dataclass is an option: `held_out` is `held_out:` in a
recipe and `--held-out` on the command line; fields of a nested dataclass are `optimizer:` with keys below it and
`--optimizer.learning-rate`. A list takes several values (`--held-out A B`), a switch needs none (`--resume`,
`--resume false`), a dictionary is written as JSON. The docstring under a field is its text in `--help`.

Paths on the command line are relative to the current folder. In a recipe they are relative to the recipe's folder: all
values of fields of type `Path`, and any other text that begins with `./` or `../`, which becomes an absolute path. So
`model: ../runs/a/best` is a folder, never a name on the Hub, and `model: openai-community/gpt2` a name on the Hub.
"""

import argparse
import dataclasses
import difflib
import inspect
import logging
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import docstring_parser
import jsonargparse
import yaml

from healthslm.errors import UserError

Options = TypeVar("Options")
REQUIRED = dataclasses.MISSING


class UsageError(UserError):
    """A mistake on the command line or in a recipe."""


@dataclasses.dataclass
class Field:
    """One option: a field of the options dataclass, or of a dataclass nested in it."""

    name: str  # dotted, as in optimizer.learning_rate
    annotation: Any
    default: Any
    help: str

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def types(self) -> tuple[Any, ...]:
        """The alternatives of a union, or the type itself."""
        is_union = typing.get_origin(self.annotation) in (typing.Union, types.UnionType)
        return typing.get_args(self.annotation) if is_union else (self.annotation,)

    @property
    def type_name(self) -> str:
        return inspect.formatannotation(self.annotation).replace("pathlib.", "")

    @property
    def nargs(self) -> str | None:
        if any(typing.get_origin(kind) in (list, tuple) for kind in self.types):
            return "*"
        return "?" if bool in self.types else None

    @property
    def holds_paths(self) -> bool:
        return any(kind is Path or Path in typing.get_args(kind) for kind in self.types)


def run(
    function: Callable[[Options], None], options_class: type[Options], arguments: Sequence[str] | None = None
) -> None:
    """Call `function` with the options, and report what goes wrong for the user in one line, without a traceback.

    Exits with 1 on an error of the user or the file system, 2 on wrong usage, 130 when interrupted. Any other exception
    is a mistake of ours and keeps its traceback.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("healthslm").setLevel(logging.INFO)
    try:
        function(parse(options_class, sys.argv[1:] if arguments is None else arguments))
    except UsageError as error:
        _exit(f"{error} (see --help)", 2)
    except UserError as error:
        _exit(str(error), 1)
    except OSError as error:
        if error.filename is None:
            raise
        _exit(f"{os.fspath(error.filename)}: {error.strerror}", 1)
    except KeyboardInterrupt:
        _exit("interrupted", 130)


def parse(options_class: type[Options], arguments: Sequence[str]) -> Options:
    """Make the options from the defaults, the recipe named in `arguments`, and the other `arguments`."""
    fields = {field.name: field for field in _fields(options_class)}
    given = _read_command_line(fields, arguments)
    recipe = given.pop("recipe", None)
    values = _read_recipe(fields, Path(recipe)) if recipe else {}
    values.update(given)

    missing = [field.flag for field in fields.values() if field.default is REQUIRED and values.get(field.name) is None]
    if missing:
        raise UsageError(f"missing: {', '.join(missing)}")
    typed = jsonargparse.ArgumentParser(exit_on_error=False)
    typed.add_class_arguments(options_class)
    try:
        options = typed.instantiate(typed.parse_object(_nest(values)))
    except argparse.ArgumentError as error:
        match = re.match(r'Parser key "([\w.]+)"', str(error))
        if not match:
            raise
        field = fields[match[1]]
        place = field.flag if field.name in given else f"{recipe}: {field.name}"
        raise UsageError(f"{place}: expected {field.type_name}, got {values[field.name]!r}") from error
    return options_class(**vars(options))


def _fields(options_class: type, prefix: str = "", instance: Any = None) -> Iterator[Field]:
    annotations = typing.get_type_hints(options_class)
    documented = [docstring_parser.parse_from_object(base) for base in reversed(options_class.__mro__[:-1])]
    texts = {parameter.arg_name: parameter.description for docstring in documented for parameter in docstring.params}
    for field in dataclasses.fields(options_class):
        annotation = annotations[field.name]
        if instance is not None:
            default = getattr(instance, field.name)
        else:
            default = field.default if field.default_factory is REQUIRED else field.default_factory()
        if dataclasses.is_dataclass(annotation):
            yield from _fields(annotation, f"{prefix}{field.name}.", None if default is REQUIRED else default)
        else:
            yield Field(prefix + field.name, annotation, default, " ".join((texts.get(field.name) or "").split()))


def _read_command_line(fields: dict[str, Field], arguments: Sequence[str]) -> dict[str, Any]:
    """Return the options that stand on the command line, as text by their names, `recipe` among them."""

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise UsageError(message)

    parser = Parser(
        description=sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="FILE", help="YAML file of options; those on the command line win.")
    for field in fields.values():
        state = "required" if field.default is REQUIRED else f"default: {_shown(field.default)}"
        text = f"{field.help} ({field.type_name}, {state})".replace("%", "%%").strip()
        metavar = field.name.rpartition(".")[2].upper()
        parser.add_argument(
            field.flag,
            dest=field.name,
            nargs=field.nargs,
            const="true" if field.nargs == "?" else None,
            metavar=metavar,
            help=text,
        )
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("--"):
            raise UsageError(f"unexpected argument {flag!r}")
        raise UsageError(_unknown(flag, ["--recipe", *(field.flag for field in fields.values())]))
    return vars(namespace)


def _shown(default: Any) -> str:
    if isinstance(default, list | tuple):
        return " ".join(str(item) for item in default) or "none"
    return "none" if default is None else str(default)


def _read_recipe(fields: dict[str, Field], path: Path) -> dict[str, Any]:
    """Return the recipe's values by their dotted names, with its paths made relative to the current folder."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: a recipe holds lines `option: value`")

    def values(mapping: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in mapping.items():
            name = f"{prefix}{key}"
            if name in fields:
                yield name, _with_paths_from(path.parent, value, fields[name].holds_paths)
            elif isinstance(value, dict) and any(known.startswith(f"{name}.") for known in fields):
                yield from values(value, f"{name}.")
            else:
                raise UsageError(f"{path}: {_unknown(name, list(fields))}")

    return dict(values(recipe))


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


def _nest(values: dict[str, Any]) -> dict[str, Any]:
    """Turn {"optimizer.betas": x} into {"optimizer": {"betas": x}}."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        group = nested
        for key in groups:
            group = group.setdefault(key, {})
        group[last] = value
    return nested


def _unknown(name: str, known: list[str]) -> str:
    return f"unknown option {name!r}: did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]!r}?"


def _exit(message: str, status: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)
