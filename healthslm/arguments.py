"""Options from the command line and from recipes, by jsonargparse: defaults < `--recipe FILE` (YAML) < command line.

Each field of an options dataclass is an option: `held_out` is `held_out:` in a recipe and `--held-out` on the command
line. The docstring under a field is its text in `--help`. A list takes several values (`--held-out A B`), a switch
needs none (`--resume`, `--resume false`), and a dictionary is written as YAML. A field with
`metadata={"positional": True}` is written without its name.

Paths on the command line are relative to the current folder, and paths in a recipe to the recipe's folder: the values
of fields of type `Path`, and any text that begins with `./` or `../`, which becomes an absolute path. So
`model: ../runs/a/best` is a folder wherever the command is started, and `model: openai-community/gpt2` is a name.
"""

import dataclasses
import difflib
import inspect
import json
import os
import re
import typing
from argparse import ArgumentError, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from healthslm.errors import UsageError
from healthslm.options import OptionError

Options = TypeVar("Options")


def parse(
    options_class: type[Options], arguments: Sequence[str], command: str = "", summary: str | None = ""
) -> Options:
    """Read the arguments of a command as the options of a dataclass; `command` and `summary` are shown by `--help`.

    Raises:
        UsageError: An option is unknown, missing or has a value that it can't have; the message names it.
    """
    parser = _make_parser(options_class, command, summary)
    try:
        values = vars(parser.parse_args(_spell_out(options_class, arguments)))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UsageError(_explain(str(error), options_class, arguments)) from error
    del values["recipe"]
    with naming_options(arguments):
        return options_class(**values)


@contextmanager
def naming_options(arguments: Sequence[str]) -> Iterator[None]:
    """Raise an OptionError in the block as a UsageError that names the option as the user wrote it."""
    try:
        yield
    except OptionError as error:
        raise UsageError(f"{_place(error.name, arguments)}: {error.problem}") from error


def as_flag(name: str) -> str:
    """The name of an option on the command line."""
    return "--" + name.replace("_", "-")


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, RawDescriptionHelpFormatter):
    def _get_type_str(self, action: Any) -> str | None:
        """The type as people read it: "Path" and "int | null, at least 1"."""
        text = re.sub(r"<class '(\w+)'>", r"\1", super()._get_type_str(action) or "")
        return re.sub(r"(?:Optional\[)?Annotated\[(.+), (.+?)\]+$", r"\1, \2", text) or None


class _Parser(jsonargparse.ArgumentParser):
    def add_argument(self, *names: str, **settings: Any) -> Any:
        """Add an option with dashes in its name; a list is written as `--held-out A B` and not as `--held-out+ A`."""
        if names[-1].endswith("+"):
            names, settings["metavar"] = names[:-1], "VALUE ..."
        return super().add_argument(*(name.replace("_", "-") for name in names), **settings)


def _make_parser(options_class: type, command: str, summary: str | None) -> _Parser:
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    jsonargparse.set_loader("recipe", _load_recipe, (yaml.YAMLError,))
    read_path = partial(_read_path, start=Path.cwd())
    register_type(Path, str, read_path, type_check=isinstance, fail_already_registered=False)
    parser = _Parser(
        prog=command or None,
        description=summary,
        formatter_class=_HelpFormatter,
        parser_mode="recipe",
        print_config=None,
        exit_on_error=False,
        allow_abbrev=False,
    )
    help_text = "YAML file of options; options on the command line take precedence."
    parser.add_argument("--recipe", action="config", metavar="FILE", help=help_text)
    parser.add_class_arguments(options_class, as_group=False)
    return parser


def _load_recipe(text: str) -> Any:
    """Load YAML with absolute paths for text that begins with dots. A recipe's folder is the current one meanwhile."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(item) for item in value]
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        return os.path.abspath(value) if isinstance(value, str) and value.startswith(("./", "../")) else value

    return resolve(jsonargparse.get_loader("yaml")(text))


def _read_path(text: str, start: Path) -> Path:
    """A path of the command line as it is; one of a recipe relative to `start`, or absolute if it is not in there."""
    if Path.cwd() == start:
        return Path(text)
    path = Path(os.path.abspath(text))
    return path.relative_to(start) if path.is_relative_to(start) else path


def _spell_out(options_class: type, arguments: Sequence[str]) -> list[str]:
    """The arguments as jsonargparse reads them: lists as JSON, switches with a value, the recipe before the others."""
    types = typing.get_type_hints(options_class)
    fields = dataclasses.fields(options_class)
    positional = [as_flag(field.name) for field in fields if field.metadata.get("positional")]
    groups: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or argument == "-h":
            groups.append([argument])
        elif groups:
            groups[-1].append(argument)
        else:
            groups.append([*positional, argument])
    for group in groups:
        kind = types.get(group[0].removeprefix("--").replace("-", "_"))
        parts = (kind, *typing.get_args(kind))
        if any(typing.get_origin(part) in (list, tuple) for part in parts):
            group[:] = [f"{group[0]}={json.dumps(group[1:])}"]
        elif bool in parts and len(group) == 1:
            group.append("true")
    return [text for group in sorted(groups, key=lambda group: not group[0].startswith("--recipe")) for text in group]


def _explain(problem: str, options_class: type, arguments: Sequence[str]) -> str:
    """What jsonargparse found wrong, in one line that names the option as the user wrote it."""
    types = typing.get_type_hints(options_class)
    if unknown := re.search(r"unrecognized arguments: (--[^ =]+)", problem):
        return _unknown(unknown[1], ["--recipe", *map(as_flag, types)])
    if unknown := re.search(r"Option '(.+?)' is not accepted", problem):
        return f"{_recipe(arguments)}: {_unknown(unknown[1], types)}"
    if required := re.search(r"arguments are required: (.+)", problem):
        return "missing: " + " ".join(map(as_flag, required[1].split(", ")))
    invalid = re.match(r'Parser key "(\w+)"', problem)
    if invalid and invalid[1] in types:
        kind = re.sub(r"([a-z_]\w*\.)+(?=[A-Z])", "", inspect.formatannotation(types[invalid[1]]))
        value = "".join(re.findall(r"value: (.*)", problem)[-1:])
        return f"{_place(invalid[1], arguments)}: expected {kind}" + (f", got {value}" if value else "")
    if of_command_line := re.fullmatch(r"argument (--.*)|(unrecognized arguments: .*)", problem):
        return of_command_line[1] or of_command_line[2]
    problem = re.sub(r'Parser key "recipe":\s|in "<unicode string>", ', "", problem)
    problem = re.sub(r"(?s)Unexpected config: .*", "expected lines `option: value`", problem)
    problem = problem.replace("Problems parsing config", "not valid YAML")
    return " ".join(f"{_recipe(arguments)}: {problem}".split())


def _place(name: str, arguments: Sequence[str]) -> str:
    """Where the user gave an option: on the command line, or in the recipe."""
    flag, recipe = as_flag(name), _recipe(arguments)
    on_command_line = not recipe or any(argument.partition("=")[0] == flag for argument in arguments)
    return flag if on_command_line else f"{recipe}: {name}"


def _recipe(arguments: Sequence[str]) -> str:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", nargs="?", default="", const="")
    return parser.parse_known_args(arguments)[0].recipe


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"unknown option {name!r}, did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]!r}?"
