"""Errors that are reported in one line, without a traceback."""


class UserError(Exception):
    """An error that the user can fix. The message is one line: what is wrong, where, with which value, what to do."""


class UsageError(UserError):
    """A mistake on the command line or in a recipe."""


class Stopped(Exception):
    """A run stopped on request and can be resumed. The message says how; it is empty if another process says so."""
