"""Many at once, leaving whenever they like, a publisher that freezes: in the end nothing is left over, and nothing lost."""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

import trio

from tests.e2e.clients import ask_chat, open_chat, start_crowd
from tests.e2e.scripted_engine import open_scripted_engine
from tests.e2e.stack import (
    BrokerProcess,
    clean_environment,
    open_broker_process,
    open_process,
    open_publisher_process,
    within,
)

CLIENTS = 200


async def check_all_accounted_for(broker: BrokerProcess) -> dict[str, float]:
    """Invariant 1 of the design, when nothing is under way: accepted = completed + failed + cancelled."""
    await broker.wait_idle()
    counted = await broker.metrics()
    ended = [counted[f"wakecall_infers_ended_total{{outcome={how}}}"] for how in ("completed", "failed", "cancelled")]
    assert counted["wakecall_infers_accepted_total"] == sum(ended)
    assert counted["wakecall_infers_in_flight"] == counted["wakecall_infers_waiting"] == 0
    return counted


@within(60)
async def test_a_storm_of_clients_that_leave_leaves_nothing_behind(tmp_path: Path) -> None:
    """Plain and streamed, queued and served, each with a patience of its own, through one slow engine with 8 slots."""
    dice = random.Random(20240607)
    command = [sys.executable, "-m", "wakecall.cli.demo_engine", "--port", "0", "--delay-s", "0.002"]
    statuses: list[int] = []
    async with (
        open_process("demo engine", command, clean_environment(tmp_path)) as engine,
        open_broker_process(tmp_path / "w.db") as broker,
    ):
        url = (await engine.wait_line(r"http://\S+", engine.out))[0]
        async with open_publisher_process(
            tmp_path, broker.url, url, "--name", "m", "--max-concurrency", "8"
        ) as publisher:
            await broker.wait_llm("m", routable=True)
            await ask_chat(broker, "m")
            descriptors = broker.descriptors, publisher.descriptors

            async def call(patience_s: float, stream: bool) -> None:
                with trio.move_on_after(patience_s):
                    async with open_chat(broker, "m", stream=stream, max_tokens=40) as wire:
                        answer = await wire.read_answer("POST")
                        assert not answer.is_cut
                        statuses.append(answer.status)

            async with trio.open_nursery() as nursery:
                for _ in range(CLIENTS):
                    nursery.start_soon(call, dice.choice([0.02, 0.1, 0.3, 1.0, 30.0]), dice.random() < 0.5)
            assert set(statuses) == {200}
            counted = await check_all_accounted_for(broker)
            completed = counted["wakecall_infers_ended_total{outcome=completed}"]
            cancelled = counted["wakecall_infers_ended_total{outcome=cancelled}"]
            assert len(statuses) <= completed - 1
            assert counted["wakecall_infers_ended_total{outcome=failed}"] == 0
            assert cancelled > CLIENTS / 10, "hardly anybody left: this was no storm"
            row = await broker.llm("m")
            assert (row["status"], row["in_flight"], row["waiting"]) == ("active", 0, 0)
            assert (await ask_chat(broker, "m")).status == 200
            await broker.wait_descriptors(descriptors[0] + 64)  # the publisher keeps some connections for later
        await broker.wait_descriptors(descriptors[0])


@within(60)
async def test_a_publisher_that_freezes_is_offline_and_comes_back_by_itself(tmp_path: Path) -> None:
    """A suspended machine says nothing at all: after the timeout its callers get a 503; resumed, it is there again."""
    settings = {"heartbeat_timeout_s": 1.5, "heartbeat_interval_s": 0.3, "sweep_interval_s": 0.2, "keepalive_s": 0.3}
    async with open_scripted_engine() as engine, open_broker_process(tmp_path / "w.db", **settings) as broker:
        async with open_publisher_process(tmp_path, broker.url, engine.base_url, "--name", "m") as publisher:
            before = await broker.wait_llm("m", routable=True)
            async with trio.open_nursery() as nursery:
                crowd = start_crowd(nursery, broker, "m", 1)
                await engine.next()
                publisher.send(signal.SIGSTOP)
                await crowd.done.wait()
                assert crowd.codes == {(503, "publisher_disconnected")}
            await broker.wait_llm("m", status="inactive", routable=False)
            assert (await ask_chat(broker, "m")).code == "model_offline"
            publisher.send(signal.SIGCONT)
            after = await broker.wait_llm("m", status="active", routable=True)
            assert after["session_id"] == before["session_id"]
            async with trio.open_nursery() as nursery:
                crowd = start_crowd(nursery, broker, "m", 1)
                await (await engine.next()).respond_json(200, {"ok": True})
            assert crowd.codes == {(200, "")}
            await check_all_accounted_for(broker)
