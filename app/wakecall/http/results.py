"""`POST …/results`: the shared upload of a publisher."""

from __future__ import annotations

from typing import Literal

import msgspec
import trio

from ..broker import Broker
from ..errors import InvalidRequest, ResultInProgress, SessionNotFound, StoreUnavailable, UnsupportedEncoding
from .answers import Answer, json_answer
from .calls import Call, refuse_encoded
from .routes import Media, Routes

__all__ = ["add_results_route"]

_RECORDS = Media("Whole answers, one behind the other, as `protocol.md` has them.", {"application/octet-stream": None})


class Ended(msgspec.Struct, frozen=True):
    """The upload has ended, or its channel has. All that was taken of it counts."""

    taken: int
    outcome: Literal["ended"] = "ended"


def add_results_route(routes: Routes, broker: Broker) -> None:
    """Put the shared upload's route into `routes`; its records go to `broker`."""

    @routes.add(
        "POST",
        "/publisher/v1/sessions/<session_id>/results",
        role="publisher",
        body=_RECORDS,
        answer=Ended,
        errors=(SessionNotFound, ResultInProgress, InvalidRequest, UnsupportedEncoding, StoreUnavailable),
    )
    async def session_results(call: Call, session_id: str) -> Answer:
        """Answer many tasks on one upload."""
        refuse_encoded(call)
        key_id = call.caller.key_id
        with broker.open_results(session_id, owner=call.owner, key_id=key_id, needs_open=key_id is None) as results:
            waiting = trio.CancelScope()
            results.on_over(waiting.cancel)
            with waiting:
                async for piece in call.exchange.stream_body():
                    results.feed(piece)
                    if results.is_over:
                        break
                await results.finish()
            return json_answer(Ended(results.counted))
