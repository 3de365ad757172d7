"""Errors that are reported to people in one line."""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, with which value, what to do."""


class UsageError(UserError):
    """A mistake on the command line or in a recipe."""


class Stopped(Exception):
    """Work that was asked to stop did, and can be gone on with. The message says how; it is empty where another process
    says so."""
