"""The files of a database that is open: whether those that its path names are still the ones that were opened.

A file that is open can be deleted, moved away or replaced; whoever holds it writes on into what nobody will ever find
again, and SQLite acknowledges that. So the names are looked up before each write: three `stat`s and a read of 16 bytes.
"""

from __future__ import annotations

import os
from typing import Final

from .base import StoreError

__all__ = ["MAGIC", "OpenFiles"]

MAGIC: Final = b"SQLite format 3\0"

# The database, its log, and the index of the log. SQLite has all three for as long as a database in WAL mode is open.
_SUFFIXES: Final = ("", "-wal", "-shm")


class OpenFiles:
    """Made once SQLite has them open. It holds a descriptor of the database: closing that drops the locks which SQLite has
    on the file, so `close` comes after SQLite's own.

    Args:
        path: as it was given, for messages.
        real: without links.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str, real: str) -> None:
        self._path = path
        self._real = real
        self._file = os.open(real, os.O_RDONLY | os.O_CLOEXEC)
        self._known = self._look()

    def check(self) -> bool:
        """Whether all is as it was. False: the log or its index has been deleted, and nothing worse.

        Raises:
            StoreError: what the path names is not what is open, or it is a database no longer.
        """
        if os.pread(self._file, len(MAGIC), 0) != MAGIC:
            raise StoreError(f"{self._path} has been overwritten. Put back what was in it, or restart on another file.")
        found = self._look()
        if found == self._known:
            return True
        (database, *beside), (known, *known_beside) = found, self._known
        if database is None:
            raise StoreError(f"{self._path} has been deleted or moved. Put it back, or restart.")
        if database != known:
            raise StoreError(f"{self._path} has been replaced. Put the first one back, or restart on this one.")
        if any(each is not None and each != before for each, before in zip(beside, known_beside, strict=True)):
            raise StoreError(f"The log of {self._path} has been replaced. Restart.")
        return False

    def learn(self) -> None:
        """Take the files that are there now for ours."""
        self._known = self._look()

    def close(self) -> None:
        os.close(self._file)

    def _look(self) -> list[tuple[int, int] | None]:
        return [_identity(self._real + suffix) for suffix in _SUFFIXES]


def _identity(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino
