"""`POST …/tasks/{id}/cancelled`: the engine has stopped, so its slot is free."""

from __future__ import annotations

import pytest
import trio

from tests.http.served import Served, open_served, wait_until
from tests.http.test_app_keys import Keyed, Publishing, keyed
from tests.http.test_app_ops import samples
from tests.http.wire import Answer
from wakecall.config import BrokerConfig

__all__ = ["keyed"]

CALL = {"model": "qwen"}
ONE = {"name": "qwen", "max_concurrency": 1}


async def confirm(served: Served, task_id: str) -> Answer:
    return await served.ask("POST", f"/publisher/v1/tasks/{task_id}/cancelled")


async def slots(served: Served) -> tuple[int, int]:
    row = (await served.ask("GET", "/admin/v1/llms/qwen")).json
    return row["in_flight"], row["stopping"]


async def test_a_slot_is_taken_until_its_publisher_confirms(served: Served) -> None:
    async with served.publishing(ONE) as publisher:
        async with served.calling(CALL):
            frame = await publisher.next("infer")
        assert (await publisher.next("cancel")).task_id == frame.task_id
        assert await slots(served) == (0, 1)
        async with served.calling(CALL) as client:
            await wait_until(lambda: served.broker.statistics().waiting == 1)
            confirmed = await confirm(served, frame.task_id)
            assert (confirmed.status, confirmed.body) == (204, b"")
            second = await publisher.next("infer")
            assert second.task_id != frame.task_id
            assert await slots(served) == (1, 0)
            # Again, for whatever reason: it frees nothing that is another's.
            assert (await confirm(served, frame.task_id)).status == 204
            assert await slots(served) == (1, 0)
            await publisher.answer(second, {})
            assert (await client.read_head()).status == 200


async def test_without_a_confirmation_the_lease_ends() -> None:
    async with open_served(BrokerConfig(cancel_lease_s=0.2)) as served, served.publishing(ONE) as publisher:
        async with served.calling(CALL):
            frame = await publisher.next("infer")
        await publisher.next("cancel")
        async with served.calling(CALL):
            assert (await publisher.next("infer")).task_id != frame.task_id
            assert (await confirm(served, frame.task_id)).status == 204


async def test_a_task_that_its_publisher_has_ended_is_confirmed_as_well(served: Served) -> None:
    """A cancel and an answer may cross."""
    async with served.publishing() as publisher:
        async with served.calling(CALL) as client:
            frame = await publisher.next("infer")
            await publisher.answer(frame, {})
            await client.read_head()
        assert (await confirm(served, frame.task_id)).status == 204


@pytest.mark.parametrize("task_id", ["never", "a" * 128, "a" * 129, "a%20b", "%00"])
async def test_a_task_that_never_was_is_404(served: Served, task_id: str) -> None:
    answer = await confirm(served, task_id)
    assert (answer.status, answer.code) == (404, "task_not_found")


async def test_a_task_is_its_owners_to_confirm(keyed: Keyed) -> None:
    async with Publishing(keyed, ONE) as publisher:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keyed.ask, "client", "POST", "/v1/completions", CALL)
                frame = await publisher.next("infer")
                scope.cancel()
        await publisher.next("cancel")
        target = f"/publisher/v1/tasks/{frame.task_id}/cancelled"
        theirs = await keyed.ask("stranger", "POST", target)
        assert (theirs.status, theirs.code) == (404, "task_not_found")
        assert keyed.served.broker.llm_view("qwen").stopping == 1
        assert (await keyed.ask("publisher", "POST", target)).status == 204
        assert keyed.served.broker.llm_view("qwen").stopping == 0


async def test_metrics_tell_how_long_engines_went_on_for_nobody(served: Served) -> None:
    async def now() -> dict[str, float]:
        return samples((await served.ask("GET", "/metrics")).body)

    before = await now()
    for how in ("confirmed", "reported", "lost", "expired"):
        assert before[f'wakecall_cancel_seconds_count{{how="{how}"}}'] == 0
    async with served.publishing(ONE) as publisher:
        async with served.calling(CALL):
            frame = await publisher.next("infer")
        await publisher.next("cancel")
        assert (await now())["wakecall_slots_stopping"] == 1
        await confirm(served, frame.task_id)
        after = await now()
        assert after["wakecall_slots_stopping"] == 0
        assert after['wakecall_cancel_seconds_count{how="confirmed"}'] == 1
        assert after["wakecall_unwanted_seconds_total"] == after['wakecall_cancel_seconds_sum{how="confirmed"}'] > 0
        assert (after["wakecall_infer_attempts_total"], after["wakecall_infer_moves_total"]) == (1, 0)
        # What its publisher ends itself holds nothing.
        async with served.calling(CALL) as client:
            await publisher.answer(await publisher.next("infer"), {})
            await client.read_head()
        assert (await now())["wakecall_unwanted_seconds_total"] == after["wakecall_unwanted_seconds_total"]


async def test_metrics_count_the_publishers_that_an_infer_was_sent_to(served: Served) -> None:
    """One that says itself that it has no room is not the last one."""
    rows = {"name": "a", "pool": "all"}, {"name": "b", "pool": "all"}
    async with served.publishing(*rows) as publisher, served.calling({"model": "all"}) as client:
        first = await publisher.next("infer")
        await publisher.fail(first, message="busy", status=429)
        second = await publisher.next("infer")
        assert second.task_id != first.task_id
        assert {first.data["llm"], second.data["llm"]} == {"a", "b"}
        await publisher.answer(second, {"ok": True})
        assert (await client.read_head()).status == 200
        found = samples((await served.ask("GET", "/metrics")).body)
        assert (found["wakecall_infer_attempts_total"], found["wakecall_infer_moves_total"]) == (2, 1)
