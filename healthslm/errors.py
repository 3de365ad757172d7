"""Errors that are reported in one line, without a traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, with which value, what to do."""


class UsageError(UserError):
    """A mistake on the command line or in a recipe."""


class Stopped(Exception):
    """A run stopped on request and can be resumed. The message says how; it is empty if another process says so."""


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is not known, with the most similar name that is."""
    return f"unknown {kind} {name!r}, did you mean {difflib.get_close_matches(name, known, n=1, cutoff=0)[0]!r}?"


def one_line(error: Exception) -> str:
    """The message of an error, such as one of a library, in one line."""
    return " ".join(str(error).split())
