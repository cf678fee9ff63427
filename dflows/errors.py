"""Errors that are the user's to mend."""

__all__ = ["UserError"]


class UserError(ValueError):
    """A mistake in what the user asked for; commands show its message as one line."""
