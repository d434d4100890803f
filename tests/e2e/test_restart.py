"""`kill -9` of the broker: its file knows what was published, its publishers come back by themselves."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import trio

from tests.e2e.clients import ask_chat, start_crowd
from tests.e2e.scripted_engine import open_scripted_engine
from tests.e2e.stack import closed_port, open_broker_process, open_publisher_process, within

#: Promised are seconds: the agent's pause between two attempts has grown with the time that the broker was away.
SECONDS = 12.0


@within(60)
async def test_publishers_are_back_by_themselves_after_a_broker_was_killed(tmp_path: Path) -> None:
    """On the same file and port: everything is inactive at first; then each row is reactivated as what it was."""
    db = tmp_path / "w.db"
    async with open_scripted_engine() as engine, trio.open_nursery() as nursery:
        async with open_broker_process(db) as broker:
            port = broker.port
            sleeping = "--name", "sleeper", "--hibernating", "--wake-command", "exit 1"
            publishers = (
                open_publisher_process(tmp_path / "one", broker.url, engine.base_url, "--name", "awake"),
                open_publisher_process(tmp_path / "two", broker.url, f"http://127.0.0.1:{closed_port()}", *sleeping),
            )
            async with publishers[0] as first, publishers[1] as second:
                await broker.wait_llm("awake", routable=True, status="active")
                await broker.wait_llm("sleeper", routable=True, status="hibernating")
                sessions = {row["name"]: row["session_id"] for row in await broker.list("llms")}
                broker.send(signal.SIGKILL)
                await broker.wait()

                # Held, so that what the new broker believes by itself can be seen.
                for publisher in (first, second):
                    publisher.send(signal.SIGSTOP)
                async with open_broker_process(db, port=port) as restarted:
                    assert {(row["name"], row["status"], row["routable"]) for row in await restarted.list("llms")} == {
                        ("awake", "inactive", False),
                        ("sleeper", "inactive", False),
                    }
                    assert (await ask_chat(restarted, "awake")).code == "model_offline"
                    for publisher in (first, second):
                        publisher.send(signal.SIGCONT)
                    started = time.monotonic()
                    await restarted.wait_llm("awake", routable=True, status="active")
                    await restarted.wait_llm("sleeper", routable=True, status="hibernating")
                    assert time.monotonic() - started < SECONDS
                    assert {row["name"]: row["session_id"] for row in await restarted.list("llms")} == sessions
                    crowd = start_crowd(nursery, restarted, "awake", 1)
                    await (await engine.next()).respond_json(200, {"ok": True})
                    await crowd.done.wait()
                    assert crowd.codes == {(200, "")}
                    assert (await ask_chat(restarted, "sleeper")).code == "wake_failed"
                    for publisher in (first, second):
                        assert publisher.process.returncode is None


@within(60)
async def test_a_publisher_that_starts_first_waits_for_its_broker(tmp_path: Path) -> None:
    """Order does not matter: it says that it waits, and is there when the broker is."""
    port = closed_port()
    async with open_scripted_engine() as engine:
        url = f"http://127.0.0.1:{port}"
        async with open_publisher_process(tmp_path, url, engine.base_url, "--name", "m") as publisher:
            await publisher.wait_line("(?i)broker", publisher.err)
            async with open_broker_process(tmp_path / "w.db", port=port) as broker:
                await broker.wait_llm("m", routable=True)
