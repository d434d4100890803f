"""Where rows and sessions outlive the broker: the interface, and a store in memory.

A store is told what has been decided and never decides. It is used by one writer, one call at a time; nothing in the
interface assumes SQL or one process.
"""

from __future__ import annotations

from .base import MemoryStore, Store, StoreError, StoreInUse

__all__ = ["MemoryStore", "Store", "StoreError", "StoreInUse"]
