"""Ids of tasks: 144 random bits each, so that none is used twice, across restarts and brokers."""

from __future__ import annotations

import base64
import os
from typing import Final

__all__ = ["TaskIds"]

_BYTES: Final = 18  # 24 characters, and no padding between them
_CHARACTERS: Final = 24
_AT_A_TIME: Final = 200


class TaskIds:
    """Draws them from the system many at a time: to ask it for each cost as much as all else that an id does."""

    __slots__ = ("_drawn", "_left", "_pid")

    def __init__(self) -> None:
        self._drawn = ""
        self._left = 0
        self._pid = 0

    def new(self) -> str:
        """One that there has not been."""
        # A forked process would go on with the same ones.
        if not self._left or self._pid != os.getpid():
            self._drawn = base64.urlsafe_b64encode(os.urandom(_AT_A_TIME * _BYTES)).decode("ascii")
            self._left = _AT_A_TIME
            self._pid = os.getpid()
        self._left -= 1
        start = self._left * _CHARACTERS
        return self._drawn[start : start + _CHARACTERS]
