"""Errors that are reported to people in one line."""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, with which value, what to do."""
