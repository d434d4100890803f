"""The SDKs' generators, closed where their stream ends.

Both SDKs drop the generators of a stream that they leave, each waiting for the next one inside. Left to the collector they
are finalized in whatever order it finds them, and CPython 3.12.1 has been seen to die of it.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

_SDKS: Final = ("openai", "anthropic", "httpx2", "httpcore2")


@asynccontextmanager
async def closing_generators() -> AsyncIterator[None]:
    """Close, outermost first, every asynchronous generator of an SDK that began within the block."""
    hooks = sys.get_asyncgen_hooks()
    begun: list[AsyncGenerator[Any, Any]] = []

    def note(generator: AsyncGenerator[Any, Any]) -> None:
        if generator.ag_frame.f_globals.get("__name__", "").partition(".")[0] in _SDKS:
            begun.append(generator)
        hooks.firstiter(generator)

    sys.set_asyncgen_hooks(firstiter=note)
    try:
        yield
    finally:
        sys.set_asyncgen_hooks(firstiter=hooks.firstiter)
        for generator in begun:
            await generator.aclose()
