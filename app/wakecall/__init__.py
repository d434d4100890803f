"""Wakecall: a broker for virtual LLMs. One OpenAI-compatible address for models on machines that nobody can call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .broker import Broker, open_broker
from .config import BrokerConfig
from .errors import WakecallError
from .local import InferReply
from .models import InferRequest, LLMSpec, Status
from .session import Channel
from .store import MemoryStore, Store, StoreError
from .task import Infer, Reader, Reply
from .upload import Upload

if TYPE_CHECKING:
    from .http import create_app
    from .serve import ServeConfig, serve
    from .store.sqlite import open_sqlite_store

__version__ = "0.1.0"

__all__ = [
    "Broker",
    "BrokerConfig",
    "Channel",
    "Infer",
    "InferReply",
    "InferRequest",
    "LLMSpec",
    "MemoryStore",
    "Reader",
    "Reply",
    "ServeConfig",
    "Status",
    "Store",
    "StoreError",
    "Upload",
    "WakecallError",
    "create_app",
    "open_broker",
    "open_sqlite_store",
    "serve",
]

# The web server, HTTP client and SQLite load on first use: an embedder without HTTP does not pay for them.
_LAZY = {
    "ServeConfig": "wakecall.serve",
    "create_app": "wakecall.http",
    "open_sqlite_store": "wakecall.store.sqlite",
    "serve": "wakecall.serve",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
