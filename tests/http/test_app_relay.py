"""An answer on its way to a client: held or forwarded, whole or cut, over real sockets."""

from __future__ import annotations

import trio

from tests.http.served import Served

CALL = {"model": "qwen", "messages": []}
STREAM = {"model": "qwen", "messages": [], "stream": True}


async def test_a_plain_answer_comes_whole_with_its_length(served: Served) -> None:
    async with served.publishing() as publisher, trio.open_nursery() as nursery:

        async def publish() -> None:
            frame = await publisher.next("infer")
            assert frame.data["path"] == "/v1/chat/completions"
            answer = await publisher.answer(frame, b'{"a": 1}')
            assert (answer.status, answer.json) == (200, {"outcome": "completed"})

        nursery.start_soon(publish)
        answer = await served.call(CALL)
        assert (answer.status, answer.body) == (200, b'{"a": 1}')
        assert answer.headers["content-length"] == "8"
        assert answer.headers["content-type"] == "application/json"
