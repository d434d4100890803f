"""An error of ours as the log tells it: types and places, never messages, for those may quote a request."""

from __future__ import annotations

import traceback
from collections.abc import Iterator

__all__ = ["leaves_of", "place_of", "stacks_of"]


def leaves_of(error: BaseException) -> Iterator[BaseException]:
    """The errors that are no groups, of which a group is made."""
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves_of(each)
    else:
        yield error


def stacks_of(error: BaseException) -> str:
    """The type and the stack of each leaf."""
    return "".join(
        f"{type(leaf).__name__}\n{''.join(traceback.format_tb(leaf.__traceback__))}" for leaf in leaves_of(error)
    ).rstrip()


def place_of(error: BaseException) -> str:
    """The type of each leaf and where it was raised, in one line."""
    return "; ".join(map(_place_of_leaf, leaves_of(error)))


def _place_of_leaf(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    return f"{type(error).__name__}{where}"
