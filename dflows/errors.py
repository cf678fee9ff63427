"""Errors that are the user's to mend."""

__all__ = ["LengthError", "NonFiniteError", "UserError"]


class UserError(ValueError):
    """A mistake of the user; commands show its message as one line."""


class LengthError(UserError):
    """The refusal of an event by a part of a flow that takes events of one length only."""


class NonFiniteError(UserError):
    """The refusal of numbers that are not finite: what is computed from them means nothing."""
