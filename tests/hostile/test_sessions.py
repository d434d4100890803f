"""Sessions that are nobody's or somebody else's, registers that race, and registers whose answer never arrived."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from tests.hostile.connections import Told, told, told_of
from tests.hostile.sibling import sibling
from tests.http.served import JSON, Served, as_bytes, head, open_served, wait_until
from wakecall.models import LLM, Batch, SessionRecord, Status
from wakecall.store import MemoryStore
from wakecall.store.sqlite import open_sqlite_store
from wakecall.testing import FakePublisher

CALL = {"model": "qwen"}

NOT_FOUND = Told(404, "session_not_found", "kept")


async def knock(served: Served, session_id: str) -> list[Told]:
    """Speak of a session on each path that wants one to be there."""
    session = f"/publisher/v1/sessions/{session_id}"
    return [
        await told(served, "POST", f"{session}/heartbeat", JSON, body=as_bytes({"llms": {"theirs": "hibernating"}})),
        await told(served, "GET", f"{session}/frames"),
        await told(served, "DELETE", session),
    ]


def known(served: Served) -> tuple[dict[str, LLM], dict[str, SessionRecord]]:
    """All that the broker knows of rows and sessions, the sibling's apart."""
    rows = {llm.name: llm for llm in served.broker.llms() if llm.name != "sibling"}
    sessions = {view.record.session_id: view.record for view in served.broker.session_views()}
    sessions.pop("sibling", None)
    return rows, sessions


# Nobody's and others' -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "session_id", ["nobody", "a.b", "a" * 129, "%2e%2e", "a%00b", "%F0%9F%98%80", "laptop%0d%0ax:%20y"]
)
async def test_an_unknown_session_is_404_on_every_path(session_id: str) -> None:
    """Also one that no session could be called; an operator's eviction likewise. None of it makes a session."""
    async with open_served() as served, sibling(served):
        assert await knock(served, session_id) == [NOT_FOUND] * 3
        assert await told(served, "DELETE", f"/admin/v1/sessions/{session_id}") == NOT_FOUND
        assert known(served) == ({}, {})


async def test_a_session_that_said_goodbye_is_unknown_on_every_path() -> None:
    async with open_served() as served, sibling(served), served.publishing() as publisher:
        assert await told(served, "DELETE", "/publisher/v1/sessions/laptop") == (204, "", "kept")
        assert (await publisher.next("bye")).data == {"reason": "goodbye"}
        assert await publisher.reading.rest() == (b"", False)
        assert await knock(served, "laptop") == [NOT_FOUND] * 3


async def test_another_owners_session_is_taken_here_and_not_there_elsewhere() -> None:
    """409 `session_taken` to a register under its id, 404 on its other paths; 409 `llm_name_taken` to one with its row.
    Its rows and its record are as they were, its channel is open, and what it was sent is answered."""
    async with open_served() as served, sibling(served) as s:
        async with FakePublisher(served.broker, "box", ["theirs"], owner="another") as box:
            async with served.calling({"model": "theirs"}) as client:
                frame = await box.next("infer")
                before = known(served)
                for llms in ([], [{"name": "theirs", "status": "hibernating"}], [{"name": "mine"}]):
                    body = as_bytes({"llms": llms})
                    taken = await told(served, "PUT", "/publisher/v1/sessions/box", JSON, body=body)
                    assert taken == (409, "session_taken", "kept")
                assert await knock(served, "box") == [NOT_FOUND] * 3
                for llms in ([{"name": "theirs"}], [{"name": "mine"}, {"name": "theirs", "status": "hibernating"}]):
                    body = as_bytes({"llms": llms})
                    taken = await told(served, "PUT", "/publisher/v1/sessions/laptop", JSON, body=body)
                    assert taken == (409, "llm_name_taken", "kept")
                assert known(served) == before
                await s.beat()
                await box.answer(frame, b'{"still": "theirs"}')
                await client.read_head()
                assert (client.status, await client.rest()) == (200, (b'{"still": "theirs"}', False))
            assert [each.event for each in box.frames] == ["hello", "infer"]


async def test_another_owners_row_is_never_adopted_also_when_nobody_is_there() -> None:
    """Between sessions of one owner an inactive row changes hands; between owners it does not."""
    async with open_served() as served, sibling(served):
        async with FakePublisher(served.broker, "box", ["theirs"], owner="another") as box:
            await box.goodbye()
        assert served.broker.llm("theirs").status is Status.INACTIVE
        body = as_bytes({"llms": [{"name": "theirs"}]})
        taken = await told(served, "PUT", "/publisher/v1/sessions/laptop", JSON, body=body)
        assert taken == (409, "llm_name_taken", "kept")
        assert served.broker.llm("theirs").owner == "another"


# Races --------------------------------------------------------------------------------------------------------------


async def test_of_registers_that_race_for_a_name_one_has_it(tmp_path: Path) -> None:
    """The others get 409 `llm_name_taken` and nothing at all, not even what they alone asked for; so it stands in the file
    too, and the winner is the one who is called."""
    async with open_sqlite_store(tmp_path / "w.db") as store, open_served(store=store) as served, sibling(served):
        outcomes: dict[str, Told] = {}
        ready = trio.Event()

        async def race(session_id: str) -> None:
            body = as_bytes({"llms": [{"name": f"own-{session_id}"}, {"name": "qwen"}]})
            async with served.server.connect() as wire:
                target = f"/publisher/v1/sessions/{session_id}"
                await wire.send(head("PUT", target, JSON, f"content-length: {len(body)}") + body[:-1])
                await ready.wait()
                await wire.send(body[-1:])
                outcomes[session_id] = await told_of(wire, await wire.read_answer("PUT"))

        async with trio.open_nursery() as nursery:
            for number in range(12):
                nursery.start_soon(race, f"racer-{number}")
            await trio.testing.wait_all_tasks_blocked(0.02)
            ready.set()
        (winner,) = (session_id for session_id, each in outcomes.items() if each == (200, "", "kept"))
        assert {each for name, each in outcomes.items() if name != winner} == {(409, "llm_name_taken", "kept")}
        rows, sessions = known(served)
        assert set(rows) == {f"own-{winner}", "qwen"}
        assert set(sessions) == {winner}
        assert rows["qwen"].session_id == winner
        stored = await store.load()
        assert [row for row in stored.llms if row.name != "sibling"] == [rows[name] for name in sorted(rows)]
        assert [each.session_id for each in stored.sessions] == [winner, "sibling"]
        async with served.channel(winner) as publisher, served.calling(CALL) as client:
            await publisher.answer(await publisher.next("infer"), b"{}")
            await client.read_head()
            assert client.status == 200


async def test_two_registers_of_one_session_at_once_leave_it_as_one_of_them_said() -> None:
    """A publisher is to wait for its answer; one that does not gets 200 for each, and what is there is the last one's."""
    async with open_served() as served, sibling(served), served.publishing({"name": "a"}) as publisher:
        async with trio.open_nursery() as nursery:
            for name in "abcdef":
                nursery.start_soon(served.register, "laptop", {"name": name})
        live = [llm.name for llm in served.broker.llms() if llm.status is Status.ACTIVE and llm.name != "sibling"]
        assert len(live) == 1
        async with served.calling({"model": live[0]}) as client:
            frame = await publisher.next("infer")
            assert frame.data["llm"] == live[0]
            await publisher.answer(frame, b"{}")
            await client.read_head()
            assert client.status == 200


# Lost answers -------------------------------------------------------------------------------------------------------


class GatedStore(MemoryStore):
    """A store whose writes stand still while the gate is shut."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = trio.Event()
        self.gate.set()
        self.entered = trio.Event()

    def shut(self) -> None:
        self.gate, self.entered = trio.Event(), trio.Event()

    async def write(self, batch: Batch) -> None:
        self.entered.set()
        await self.gate.wait()
        await super().write(batch)


LLMS = [{"name": "qwen", "type": "ollama", "max_concurrency": 2}, {"name": "asleep", "status": "hibernating"}]
REGISTER = as_bytes({"llms": LLMS})


async def test_a_register_whose_answer_is_lost_stands_and_is_repeated_without_harm() -> None:
    """Its sender is gone while the commit is under way. The repetition gets 200 and `reactivated`, and changes nothing but
    the heartbeats: one session, the same rows."""
    store = GatedStore()
    async with open_served(store=store) as served, sibling(served) as s:
        store.shut()
        async with served.server.connect() as wire:
            target = "/publisher/v1/sessions/laptop"
            await wire.send(head("PUT", target, JSON, f"content-length: {len(REGISTER)}") + REGISTER)
            await store.entered.wait()
            wire.reset()
        await s.beat()
        store.gate.set()
        first, _ = known(served)
        answer = await served.register("laptop", *LLMS)
        assert answer.status == 200
        assert answer.json["llms"] == [
            {"name": "qwen", "status": "active", "outcome": "reactivated"},
            {"name": "asleep", "status": "hibernating", "outcome": "reactivated"},
        ]
        rows, sessions = known(served)
        assert set(sessions) == {"laptop"}
        for name, row in rows.items():
            assert row.last_heartbeat_at >= first[name].last_heartbeat_at
            assert row.created_at == first[name].created_at
        stored = await store.load()
        assert [row.name for row in stored.llms] == ["asleep", "qwen", "sibling"]
        assert [each.session_id for each in stored.sessions] == ["laptop", "sibling"]


async def test_a_register_repeated_while_the_first_is_still_being_committed_waits_for_it() -> None:
    """Two that ask the same get the same, once it is down: no 409 against oneself."""
    store = GatedStore()
    async with open_served(store=store) as served, sibling(served) as s:
        store.shut()
        answers: list[Told] = []

        async def register() -> None:
            answers.append(await told(served, "PUT", "/publisher/v1/sessions/laptop", JSON, body=REGISTER))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(register)
            await store.entered.wait()
            nursery.start_soon(register)
            await s.beat()
            assert answers == []
            store.gate.set()
        assert answers == [(200, "", "kept")] * 2
        assert [row.name for row in (await store.load()).llms] == ["asleep", "qwen", "sibling"]


async def test_a_register_repeated_at_work_disturbs_nothing_of_its_own() -> None:
    """The answer to a later register is lost: its channel, the infer and the wake on it, and its rows go on regardless."""
    async with open_served() as served, sibling(served), served.publishing(*LLMS) as publisher:
        async with served.calling(CALL) as client, served.calling({"model": "asleep"}) as waker:
            frames = {frame.event: frame for frame in (await publisher.next(), await publisher.next())}
            for _ in range(2):
                async with served.server.connect() as wire:
                    before = served.broker.llm("qwen").last_heartbeat_at
                    target = "/publisher/v1/sessions/laptop"
                    await wire.send(head("PUT", target, JSON, f"content-length: {len(REGISTER)}") + REGISTER)
                    await wait_until(lambda before=before: served.broker.llm("qwen").last_heartbeat_at > before)
                    wire.reset()
            assert (await publisher.answer(frames["infer"], b"{}")).status == 200
            assert (await publisher.answer(frames["wake"])).status == 200
            assert (await publisher.answer(await publisher.next("infer"), b"{}")).status == 200
            for each in (client, waker):
                await each.read_head()
                assert (each.status, await each.rest()) == (200, (b"{}", False))


@pytest.mark.parametrize("end", ["fin", "rst"])
async def test_a_register_that_breaks_off_changes_nothing(end: str) -> None:
    """Half a register is none. Who says no more hears 400 `invalid_request` and the end of the connection."""
    async with open_served() as served, sibling(served) as s, served.publishing() as publisher:
        before = known(served)
        async with served.server.connect() as wire:
            target = "/publisher/v1/sessions/laptop"
            await wire.send(head("PUT", target, JSON, f"content-length: {len(REGISTER)}") + REGISTER[:-1])
            await trio.testing.wait_all_tasks_blocked(0.02)
            if end == "rst":
                wire.reset()
            else:
                await wire.half_close()
                assert await told_of(wire, await wire.read_answer("PUT")) == (400, "invalid_request", "fin")
        await s.beat()
        assert known(served) == before
        async with served.calling(CALL) as client:
            await publisher.answer(await publisher.next("infer"), b"{}")
            await client.read_head()
            assert client.status == 200
