"""Errors that are the user's to mend."""

from collections.abc import Iterator

__all__ = ["LengthError", "NonFiniteError", "UserError", "chain_of"]


class UserError(ValueError):
    """A mistake of the user; commands show its message as one line."""


class LengthError(UserError):
    """The refusal of an event by a part of a flow that takes events of one length only."""


class NonFiniteError(UserError):
    """The refusal of numbers that are not finite: what is computed from them means nothing."""


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
