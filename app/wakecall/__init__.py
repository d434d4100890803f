"""Wakecall: a broker for virtual LLMs. One OpenAI-compatible address for models on machines that nobody can call."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .broker import Broker, open_broker
    from .config import BrokerConfig
    from .errors import WakecallError
    from .hosting import Upstream, UpstreamAnswer
    from .http import create_app
    from .keyring import Caller, Claim
    from .local import InferReply
    from .models import InferRequest, Key, LLMSpec, NewKey, Status
    from .results import Results
    from .serving import BadCertificate, CannotBind, InvalidOrigin, KeysRequired, Reload, ServeConfig, Stop, serve
    from .session import Channel
    from .store import MemoryStore, Store, StoreError
    from .store.sqlite import open_sqlite_store
    from .task import Infer, Reader, Reply
    from .upload import Upload
    from .upstream import open_httpx_upstream

__version__ = "0.1.0"

__all__ = [
    "BadCertificate",
    "Broker",
    "BrokerConfig",
    "Caller",
    "CannotBind",
    "Channel",
    "Claim",
    "Infer",
    "InferReply",
    "InferRequest",
    "InvalidOrigin",
    "Key",
    "KeysRequired",
    "LLMSpec",
    "MemoryStore",
    "NewKey",
    "Reader",
    "Reload",
    "Reply",
    "Results",
    "ServeConfig",
    "Status",
    "Stop",
    "Store",
    "StoreError",
    "Upload",
    "Upstream",
    "UpstreamAnswer",
    "WakecallError",
    "create_app",
    "open_broker",
    "open_httpx_upstream",
    "open_sqlite_store",
    "serve",
]

# Each name loads its module on first use: an embedder without HTTP pays for no web server, and `wakecall --help` not even
# for Trio.
_HOMES = {
    "BadCertificate": ".serving",
    "Broker": ".broker",
    "BrokerConfig": ".config",
    "Caller": ".keyring",
    "CannotBind": ".serving",
    "Channel": ".session",
    "Claim": ".keyring",
    "Infer": ".task",
    "InferReply": ".local",
    "InferRequest": ".models",
    "InvalidOrigin": ".serving",
    "Key": ".models",
    "KeysRequired": ".serving",
    "LLMSpec": ".models",
    "MemoryStore": ".store",
    "NewKey": ".models",
    "Reader": ".task",
    "Reload": ".serving",
    "Reply": ".task",
    "Results": ".results",
    "ServeConfig": ".serving",
    "Status": ".models",
    "Stop": ".serving",
    "Store": ".store",
    "StoreError": ".store",
    "Upload": ".upload",
    "Upstream": ".hosting",
    "UpstreamAnswer": ".hosting",
    "WakecallError": ".errors",
    "create_app": ".http",
    "open_broker": ".broker",
    "open_httpx_upstream": ".upstream",
    "open_sqlite_store": ".store.sqlite",
    "serve": ".serving",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Kept, so that it is not asked for again.
    value = globals()[name] = getattr(import_module(_HOMES[name], __name__), name)
    return value
