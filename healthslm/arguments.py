"""Options from the command line and from recipes, by jsonargparse: defaults < `--recipe FILE` (YAML) < command line.

Each field of an options dataclass is an option: `held_out` is `held_out:` in a recipe and `--held-out` on the command
line. The docstring under a field is its text in `--help`. A list takes several values (`--held-out A B`), a switch
needs none (`--resume`, `--resume false`), and a dictionary is written as YAML. A field with
`metadata={"positional": "RUN"}` is written without its name, and as `RUN` in the first line of `--help`.

Paths on the command line are relative to the current folder, and paths in a recipe to the recipe's folder: the values
of fields of type `Path`, and any text that begins with `./` or `../`, which becomes an absolute path. So
`model: ../runs/a/best` is a folder wherever the command is started, and `model: openai-community/gpt2` is a name.
"""

import inspect
import json
import os
import re
import typing
from argparse import ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse
import yaml
from jsonargparse.typing import register_type

from healthslm.errors import UsageError, UserError, one_line, unknown
from healthslm.options import OptionError
from healthslm.repository import model_repository

Options = TypeVar("Options")


def parse(
    options_class: type[Options], arguments: Sequence[str], command: str = "", summary: str | None = ""
) -> Options:
    """Read the arguments of a command as the options of a dataclass; `command` and `summary` are shown by `--help`.

    Raises:
        UsageError: An option is unknown, missing or has a value that it can't have; the message names it.
    """
    parser = _make_parser(options_class, command, summary)
    types, groups = typing.get_type_hints(options_class), _group(options_class, arguments)
    try:
        values = vars(parser.parse_args(_spell_out(types, groups)))
    except (ArgumentError, UnicodeDecodeError) as error:
        raise UsageError(_explain(one_line(error), types, groups)) from error
    del values["recipe"]
    with naming_options(options_class, arguments):
        return options_class(**values)


@contextmanager
def naming_options(options_class: type, arguments: Sequence[str]) -> Iterator[None]:
    """Name the options to change, as the user wrote them, if the block finds one invalid or a GPU's memory too small.

    Raises:
        UsageError: The block raised an OptionError.
        UserError: A GPU ran out of memory.
    """
    try:
        yield
    except OptionError as error:
        raise UsageError(f"{_place(error.name, _group(options_class, arguments))}: {error.problem}") from error
    except RuntimeError as error:
        if "out of memory" not in str(error):  # several classes of PyTorch, which takes seconds to import
            raise
        cures = [f"lower {as_flag(field.name)}" for field in fields(options_class) if field.metadata.get("memory")]
        cures += ["use --device cpu"] if hasattr(options_class, "device") else []
        raise UserError(f"out of GPU memory: {' or '.join(cures or ['close other programs that use it'])}") from error


def as_flag(name: str) -> str:
    """The name of an option on the command line."""
    return "--" + name.replace("_", "-")


class _HelpFormatter(jsonargparse.DefaultHelpFormatter, RawDescriptionHelpFormatter):
    def _get_type_str(self, action: Any) -> str | None:
        """The type as people read it: "Path" and "int | null, at least 1"."""
        text = re.sub(r"<class '(\w+)'>", r"\1", super()._get_type_str(action) or "")
        return re.sub(r"(?:Optional\[)?Annotated\[(.+), (.+?)\]+$", r"\1, \2", text) or None

    def _expand_help(self, action: Any) -> str:
        """The text of an option, with the folder of this repository in words."""
        return super()._expand_help(action).replace(f"default: {model_repository()}", "default: this repository")


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
    names = [field.metadata["positional"] for field in fields(options_class) if field.metadata.get("positional")]
    parser = _Parser(
        prog=command or None,
        usage=" ".join(["%(prog)s", *names, "[options]"]) if names else None,
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


def _group(options_class: type, arguments: Sequence[str]) -> list[list[str]]:
    """The arguments by option, the recipe first: `--steps=3 --recipe A` is [["--recipe", "A"], ["--steps", "3"]]."""
    positional = [as_flag(field.name) for field in fields(options_class) if field.metadata.get("positional")]
    groups: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or argument == "-h":
            groups.append(argument.split("=", 1))
        elif groups:
            groups[-1].append(argument)
        else:
            groups.append([*positional, argument])
    return sorted(groups, key=lambda group: group[0] != "--recipe")


def _spell_out(types: dict[str, Any], groups: list[list[str]]) -> list[str]:
    """The arguments as jsonargparse reads them: lists as JSON, and switches with a value."""
    arguments: list[str] = []
    for flag, *values in groups:
        kind = types.get(flag.removeprefix("--").replace("-", "_"))
        parts = (kind, *typing.get_args(kind))
        if any(typing.get_origin(part) in (list, tuple) for part in parts):
            values = [json.dumps(values)]
        elif bool in parts and not values:
            values = ["true"]
        arguments += [f"{flag}={values[0]}", *values[1:]] if values and flag.startswith("--") else [flag, *values]
    return arguments


def _explain(problem: str, types: dict[str, Any], groups: list[list[str]]) -> str:
    """Reword what jsonargparse found wrong, and name the option as the user wrote it."""
    if found := re.match(r"unrecognized arguments: (--[^ =]+)", problem):
        return unknown("option", found[1], ["--recipe", *map(as_flag, types)])
    if found := re.match(r"Option '(.+)' is not accepted", problem):
        return f"{_recipe(groups)}: {unknown('option', found[1], types)}"
    if found := re.match(r"the following arguments are required: (.+)", problem):
        return "missing: " + " ".join(map(as_flag, found[1].split(", ")))
    if found := re.match(r'Parser key "(?!recipe")(\w+)"(?:.*value: (.*))?', problem):
        kind = re.sub(r"\b[a-z_]+\.", "", inspect.formatannotation(types[found[1]]))
        return f"{_place(found[1], groups)}: expected {kind}" + (f", got {found[2]}" if found[2] else "")
    if found := re.match(r"(?:argument )?(--.*|unrecognized arguments: .*)", problem):
        return found[1]
    problem = re.sub(r'Parser key "recipe": |in "<unicode string>", ', "", problem)
    problem = re.sub(r"Unexpected config:.*", "expected lines `option: value`", problem)
    return f"{_recipe(groups)}: {problem.replace('Problems parsing config', 'not valid YAML')}"


def _place(name: str, groups: list[list[str]]) -> str:
    """Where the user gave an option: on the command line, or in the recipe."""
    flag, recipe = as_flag(name), _recipe(groups)
    return f"{recipe}: {name}" if recipe and flag not in [group[0] for group in groups] else flag


def _recipe(groups: list[list[str]]) -> str:
    """The last recipe that the user gave, or an empty text."""
    return ["", *(group[1] for group in groups if group[0] == "--recipe" and len(group) > 1)][-1]
