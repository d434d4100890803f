"""Two agents that answer to one name, with a real engine behind them; and one of them is killed while both have work."""

from __future__ import annotations

import signal
from pathlib import Path

import trio

from tests.e2e.clients import ask_chat
from tests.e2e.engine import Engine
from tests.e2e.stack import BrokerProcess, open_broker_process, open_publisher_process, within
from tests.http.wire import Answer

CLIENTS = 60
SLOTS = 2


@within(60)
async def test_a_killed_member_takes_with_it_what_it_had_been_given_and_nothing_else(
    tmp_path: Path, engine: Engine
) -> None:
    """60 callers at once, 2 slots each: whoever still waits is served by the other; the broker sends nothing twice."""
    answers: list[Answer] = []
    member = ("--pool", "noise", "--max-concurrency", str(SLOTS), "--model", engine.model)
    async with (
        open_broker_process(tmp_path / "w.db") as broker,
        open_publisher_process(tmp_path / "a", broker.url, engine.base_url, "--name", "noise-a", *member) as doomed,
        open_publisher_process(tmp_path / "b", broker.url, engine.base_url, "--name", "noise-b", *member),
    ):
        await broker.wait_llm("noise-a", routable=True)
        await broker.wait_llm("noise-b", routable=True)
        async with trio.open_nursery() as nursery:

            async def ask(number: int) -> None:
                answers.append(await ask_chat(broker, "noise", stream=number % 2 == 0, max_tokens=24))
                if len(answers) == CLIENTS // 6:
                    doomed.send(signal.SIGKILL)

            for number in range(CLIENTS):
                nursery.start_soon(ask, number)
        await broker.wait_llm("noise-a", routable=False)
        await check(broker, answers)
        assert (await ask_chat(broker, "noise")).status == 200


async def check(broker: BrokerProcess, answers: list[Answer]) -> None:
    """At most as many failed as the dead one had slots, each as one whose publisher was lost; all others have an answer."""
    bad = [answer for answer in answers if answer.status != 200 or answer.is_cut]
    assert len(answers) == CLIENTS
    assert len(bad) <= SLOTS, [answer.body for answer in bad]
    for answer in bad:
        assert b"publisher_disconnected" in answer.body or b"publisher_error" in answer.body
    counted = await broker.metrics()
    assert counted["wakecall_infers_accepted_total"] == CLIENTS
    assert counted["wakecall_infers_ended_total{outcome=completed}"] == CLIENTS - len(bad)
    assert counted["wakecall_infers_ended_total{outcome=failed}"] == len(bad)
