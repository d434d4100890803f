"""Plain answers of a real agent, on its one shared upload."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import trio

from tests.e2e.clients import ask_chat
from tests.e2e.stack import (
    clean_environment,
    open_broker_process,
    open_process,
    open_publisher_process,
    open_tap,
    within,
)
from tests.http.wire import Answer

CALLS = 40


@within(60)
async def test_plain_answers_go_on_one_upload_and_a_stop_loses_none(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "wakecall.cli.demo_engine", "--port", "0", "--delay-s", "0"]
    answers: list[Answer] = []
    async with (
        open_process("demo engine", command, clean_environment(tmp_path)) as engine,
        open_broker_process(tmp_path / "w.db") as broker,
        open_tap(broker.port) as tap,
    ):
        url = (await engine.wait_line(r"http://\S+", engine.out))[0]
        async with open_publisher_process(tmp_path, tap.url, url, "--name", "m") as publisher:
            await broker.wait_llm("m", routable=True)
            while b'"taken":0}' not in tap.down:
                await ask_chat(broker, "m")
            own = tap.up.count(b"/result HTTP/1.1")
            async with trio.open_nursery() as nursery:

                async def ask() -> None:
                    answers.append(await ask_chat(broker, "m"))

                for _ in range(CALLS):
                    nursery.start_soon(ask)
            assert [answer.status for answer in answers] == [200] * CALLS
            assert all(answer.json["choices"][0]["message"]["content"] for answer in answers)
            assert tap.up.count(b"/results HTTP/1.1") == 1
            assert tap.up.count(b"/result HTTP/1.1") == own, "none had a request of its own"
            assert tap.up.count(b'{"task_id":') >= CALLS
            assert (await publisher.end(signal.SIGTERM))[0] == 0
        counted = await broker.metrics()
        assert counted["wakecall_infers_ended_total{outcome=failed}"] == 0
