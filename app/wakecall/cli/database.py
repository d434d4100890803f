"""The file in which `serve` keeps what outlives it, for the verbs that open it."""

from __future__ import annotations

from typing import Final

import platformdirs

__all__ = ["DEFAULT_DB", "IN_MEMORY", "default_db"]

#: The name that keeps nothing, as SQLite has it.
IN_MEMORY: Final = ":memory:"
#: What the help says of the default.
DEFAULT_DB: Final = "wakecall.db in your state directory"


def default_db() -> str:
    """Where it is, if nobody names another place."""
    return str(platformdirs.user_state_path("wakecall") / "wakecall.db")
