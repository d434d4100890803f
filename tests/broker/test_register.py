"""`PUT …/sessions/{id}`: the protocol's table, all or nothing."""

import pytest
import trio

from tests.broker.helpers import CALL, start_call, start_calls, statuses, view
from wakecall import BrokerConfig, LLMSpec, MemoryStore, Status
from wakecall.errors import (
    InvalidRequest,
    LLMIsPublic,
    LLMNameTaken,
    ModelOffline,
    SessionTaken,
    ShuttingDown,
    TooMany,
)
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE


def everything(broker):
    return broker.llm_views(), broker.session_views(), broker.statistics()


async def test_a_new_name_is_inserted_as_a_virtual_row(autojump_clock):
    async with open_test_broker() as broker:
        registered = await broker.register("laptop", [LLMSpec("qwen"), LLMSpec("phi", status=HIBERNATING)])
        assert registered.session_id == "laptop"
        assert registered.heartbeat_interval_s == 30
        assert [(llm.name, llm.status, llm.outcome) for llm in registered.llms] == [
            ("qwen", ACTIVE, "created"),
            ("phi", HIBERNATING, "created"),
        ]
        row = broker.llm("qwen")
        assert (row.kind, row.owner, row.session_id) == ("virtual", "local", "laptop")
        assert (row.model, row.last_heartbeat_at) == ("qwen", broker.now())


async def test_a_row_of_the_same_session_is_reactivated_in_place(autojump_clock):
    """Sticky: the same record comes back, whatever it was in the meantime, and says what the register says."""
    async with open_test_broker() as broker:
        async with FakePublisher(broker, "laptop", ["qwen"]):
            made = broker.llm("qwen").created_at
        assert statuses(broker) == {"qwen": INACTIVE}
        await trio.sleep(60)
        spec = LLMSpec("qwen", status=HIBERNATING, model="qwen2.5:7b", max_concurrency=2, wake_s=40, cancel="drain")
        registered = await broker.register("laptop", [spec])
        assert [(llm.status, llm.outcome) for llm in registered.llms] == [(HIBERNATING, "reactivated")]
        row = broker.llm("qwen")
        assert (row.created_at, row.last_heartbeat_at, row.inactive_since) == (made, broker.now(), None)
        assert (row.model, row.max_concurrency, row.wake_s, row.cancel) == ("qwen2.5:7b", 2, 40, "drain")


async def test_an_inactive_row_of_another_session_is_adopted(autojump_clock):
    async with open_test_broker() as broker:
        async with FakePublisher(broker, "old", ["qwen"]):
            pass
        async with FakePublisher(broker, "new", []) as new:
            registered = await new.register(["qwen"])
            assert [(llm.status, llm.outcome) for llm in registered.llms] == [(ACTIVE, "adopted")]
            assert view(broker).llm.session_id == "new"
            assert view(broker).routable
            assert {s.record.session_id: s.llms for s in broker.session_views()} == {"old": (), "new": ("qwen",)}
            # The one that lost it neither revives nor takes it.
            await broker.heartbeat("old", {"qwen": HIBERNATING})
            assert statuses(broker) == {"qwen": ACTIVE}
            with pytest.raises(LLMNameTaken):
                await broker.register("old", [LLMSpec("qwen")])


@pytest.mark.parametrize("status", [ACTIVE, HIBERNATING])
async def test_another_sessions_live_row_is_taken(autojump_clock, status):
    async with open_test_broker() as broker:
        await broker.register("one", [LLMSpec("qwen", status=status)])
        with pytest.raises(LLMNameTaken) as caught:
            await broker.register("two", [LLMSpec("phi"), LLMSpec("qwen")])
        assert (caught.value.status, caught.value.param) == (409, "llms[1].name")
        assert broker.llm("qwen").session_id == "one"


async def test_any_row_of_another_owner_is_taken_even_an_inactive_one(autojump_clock):
    async with open_test_broker() as broker:
        async with FakePublisher(broker, "theirs", ["qwen"], owner="them"):
            pass
        assert statuses(broker) == {"qwen": INACTIVE}
        with pytest.raises(LLMNameTaken):
            await broker.register("ours", [LLMSpec("qwen")])


async def test_a_public_row_is_the_operators(autojump_clock):
    async with open_test_broker() as broker:
        await broker.put_public_llm("gpt", type="openai", model="gpt", url="http://127.0.0.1:1/v1")
        with pytest.raises(LLMIsPublic) as caught:
            await broker.register("laptop", [LLMSpec("gpt")])
        assert caught.value.status == 409
        assert broker.llm("gpt").kind == "public"


async def test_another_owners_session_id_is_taken(autojump_clock):
    async with open_test_broker() as broker:
        await broker.register("laptop", [LLMSpec("qwen")], owner="them")
        before = everything(broker)
        with pytest.raises(SessionTaken) as caught:
            await broker.register("laptop", [LLMSpec("phi")])
        assert caught.value.status == 409
        assert everything(broker) == before


BAD = {
    "taken": LLMSpec("theirs"),
    "public": LLMSpec("gpt"),
    "no name": LLMSpec("a//b"),
    "empty name": LLMSpec(""),
    "long name": LLMSpec("a" * 129),
    "twice": LLMSpec("qwen"),
    "inactive": LLMSpec("new", status=INACTIVE),
    "no slot": LLMSpec("new", max_concurrency=0),
    "slots": LLMSpec("new", max_concurrency=100_001),
    "wake": LLMSpec("new", wake_s=0),
    "wake for ever": LLMSpec("new", wake_s=float("inf")),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_one_bad_row_and_nothing_changes(autojump_clock, bad):
    """All or nothing: no row is made, changed, withdrawn or bumped, and no session appears."""
    async with open_test_broker() as broker:
        await broker.put_public_llm("gpt", type="openai", model="gpt", url="http://127.0.0.1:1/v1")
        await broker.register("other", [LLMSpec("theirs")])
        await broker.register("laptop", [LLMSpec("qwen"), LLMSpec("phi")])
        await trio.sleep(5)
        before = everything(broker)
        for session_id in ("laptop", "never-seen"):
            with pytest.raises((InvalidRequest, LLMNameTaken, LLMIsPublic)):
                await broker.register(session_id, [LLMSpec("qwen", status=HIBERNATING), LLMSpec("brand-new"), bad])
        assert everything(broker) == before


@pytest.mark.parametrize("session_id", ["", "a b", "ä", "a" * 129, "../x"])
async def test_a_session_id_is_well_formed(autojump_clock, session_id):
    async with open_test_broker() as broker:
        with pytest.raises(InvalidRequest):
            await broker.register(session_id, [])
        assert broker.session_views() == []


async def test_registering_again_is_harmless(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen", "phi"]) as publisher:
        before = [v.llm for v in broker.llm_views()]
        again = await publisher.register(["qwen", "phi"])
        assert [llm.outcome for llm in again.llms] == ["reactivated", "reactivated"]
        assert [v.llm for v in broker.llm_views()] == before
        assert [frame.event for frame in publisher.frames] == ["hello"]


async def test_a_status_left_out_keeps_the_rows_own(autojump_clock):
    async with open_test_broker() as broker:
        publisher = FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING), LLMSpec("phi")])
        async with publisher:
            await publisher.register(["qwen", "phi"])
            assert statuses(broker) == {"qwen": HIBERNATING, "phi": ACTIVE}
        assert statuses(broker) == {"qwen": INACTIVE, "phi": INACTIVE}
        # Lost, and back as what it was.
        registered = await broker.register("laptop", [LLMSpec("qwen"), LLMSpec("phi")])
        assert [llm.status for llm in registered.llms] == [HIBERNATING, ACTIVE]


async def test_registering_bumps_the_rows_it_names(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        await trio.sleep(40)
        await publisher.register(["qwen"])
        assert view(broker).llm.last_heartbeat_at == broker.now()
        await trio.sleep(80)
        assert statuses(broker) == {"qwen": ACTIVE}


async def test_a_row_left_out_stays_withdrawn_through_heartbeats_and_a_new_channel(autojump_clock):
    async with open_test_broker() as broker:
        async with FakePublisher(broker, "laptop", ["qwen", "phi"]) as publisher:
            await publisher.register(["phi"])
            assert statuses(broker) == {"qwen": INACTIVE, "phi": ACTIVE}
            reply = await publisher.heartbeat({"qwen": ACTIVE})
            assert reply.llms == {"qwen": INACTIVE, "phi": ACTIVE}
            await publisher.connect()
            assert statuses(broker) == {"qwen": INACTIVE, "phi": ACTIVE}
            with pytest.raises(ModelOffline):
                broker.infer_nowait("qwen", CALL)
            # Only a register brings it back, and as a new one: it forgot what it was.
            registered = await publisher.register(["qwen", "phi"])
            assert [llm.status for llm in registered.llms] == [ACTIVE, ACTIVE]
            assert view(broker).routable


async def test_withdrawing_leaves_in_flight_alone_and_fails_what_waits(autojump_clock):
    """So a publisher drains by an empty PUT: what it was sent goes on to its end."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", max_concurrency=1)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        sent, queued = await start_calls(nursery, broker, 2)
        frame = await publisher.next("infer")
        await publisher.register([])
        await queued.over.wait()
        assert (queued.code, queued.error.retry_after_s) == ("model_offline", 2)
        assert view(broker).in_flight == 1
        await publisher.answer(frame, b"whole")
        await sent.over.wait()
        assert sent.body == b"whole"
        assert view(broker).in_flight == 0
        assert publisher.events("cancel") == []


async def test_a_register_that_withdraws_a_waking_row_fails_its_waiters_and_lets_the_wake_go_on(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", [LLMSpec("qwen", status=HIBERNATING)]) as publisher,
        trio.open_nursery() as nursery,
    ):
        call = start_call(nursery, broker)
        wake = await publisher.next("wake")
        await publisher.register([])
        await call.over.wait()
        assert call.code == "model_offline"
        assert view(broker).waking
        await publisher.answer(wake)
        assert statuses(broker) == {"qwen": INACTIVE}
        assert not view(broker).waking


async def test_a_row_with_work_on_its_old_session_is_adopted_without_it(autojump_clock):
    """What the old session was sent goes on there, holds its slot, and ends there."""
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "old", [LLMSpec("qwen", max_concurrency=1)]) as old,
        FakePublisher(broker, "new", []) as new,
        trio.open_nursery() as nursery,
    ):
        first = start_call(nursery, broker)
        frame = await old.next("infer")
        await old.register([])
        await new.register([LLMSpec("qwen", max_concurrency=1)])
        second = start_call(nursery, broker)
        await trio.testing.wait_all_tasks_blocked()
        assert (view(broker).in_flight, view(broker).waiting) == (1, 1)
        await old.answer(frame, b"from the old one")
        await new.answer(await new.next("infer"), b"from the new one")
        await first.over.wait()
        await second.over.wait()
        assert (first.body, second.body) == (b"from the old one", b"from the new one")


async def test_an_adopted_rows_wake_is_called_off_where_it_was_asked(autojump_clock):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "old", [LLMSpec("qwen", status=HIBERNATING)]) as old,
        FakePublisher(broker, "new", []) as new,
        trio.open_nursery() as nursery,
    ):
        start_call(nursery, broker)
        wake = await old.next("wake")
        await old.register([])
        await new.register([LLMSpec("qwen", status=HIBERNATING)])
        assert (await old.next("cancel")).data["task_id"] == wake.data["task_id"]
        assert not view(broker).waking
        call = start_call(nursery, broker)
        await new.answer(await new.next("wake"))
        await new.answer(await new.next("infer"), b"up")
        await call.over.wait()
        assert call.body == b"up"


async def test_a_register_names_at_most_256_rows(autojump_clock):
    async with open_test_broker() as broker:
        full = [LLMSpec(f"m{i}") for i in range(256)]
        with pytest.raises(TooMany):
            await broker.register("laptop", [*full, LLMSpec("one-more")])
        assert broker.llms() == []
        await broker.register("laptop", full)
        assert len(broker.llms()) == 256


async def test_a_session_may_change_all_its_names_and_its_heartbeats_stay_short(autojump_clock):
    """The withdrawn stay, inactive, until their retention is over; but only as many as the bound weigh on the session."""
    config = BrokerConfig(max_llms_per_session=3)
    store = MemoryStore()
    async with open_test_broker(config, store) as broker:
        for generation in "abc":
            await broker.register("laptop", [LLMSpec(f"{generation}{i}") for i in range(2)])
            await trio.sleep(1)
        assert len(broker.llms()) == 6
        beaten = set((await broker.heartbeat("laptop")).llms)
        assert len(beaten) == 3
        assert beaten > {"c0", "c1"}
        assert beaten & {"b0", "b1"}
        # One that was let go of is reactivated all the same.
        registered = await broker.register("laptop", [LLMSpec("a0")])
        assert registered.llms[0].outcome == "reactivated"
    async with open_test_broker(config, store) as broker:
        # A restart knows no more of a session than its memory did.
        await broker.register("laptop", [LLMSpec(f"d{i}") for i in range(3)])
        await broker.goodbye("laptop")
        await broker.register("laptop", [LLMSpec(f"e{i}") for i in range(3)])
    async with open_test_broker(config, store) as broker:
        await broker.register("laptop", [LLMSpec(f"e{i}") for i in range(3)])
        await trio.sleep(4 * 3600 + 30)
        assert {name for name, status in statuses(broker).items() if status is ACTIVE} <= {"e0", "e1", "e2"}


async def test_an_owner_has_at_most_1000_sessions(autojump_clock):
    async with open_test_broker() as broker:
        for i in range(1000):
            await broker.register(f"s{i}", [])
        with pytest.raises(TooMany):
            await broker.register("one-more", [])
        await broker.register("s7", [LLMSpec("qwen")])  # one that is there is no further one
        await broker.register("one-more", [], owner="another")
        await broker.goodbye("s8")
        await broker.register("yet-another", [])
        assert len(broker.session_views()) == 1001


async def test_sessions_that_come_and_go_cannot_fill_the_memory_with_their_rows(autojump_clock):
    """A goodbye leaves its rows for their retention, so an owner's rows have a bound of their own."""
    config = BrokerConfig(max_sessions_per_owner=2, max_llms_per_session=3)
    async with open_test_broker(config) as broker:
        for i in range(2):
            await broker.register(f"s{i}", [LLMSpec(f"m{i}-{j}") for j in range(3)])
            await broker.goodbye(f"s{i}")
        with pytest.raises(TooMany):
            await broker.register("s3", [LLMSpec("seventh")])
        assert len(broker.llms()) == 6
        await broker.register("s3", [LLMSpec("m0-0")], owner="local")  # adopting makes no row
        await broker.register("theirs", [LLMSpec("seventh")], owner="another")
        await trio.sleep(4 * 3600 + 200)
        await broker.register("s3", [LLMSpec("eighth")])


async def test_a_session_that_said_goodbye_may_come_back_and_has_its_rows(autojump_clock):
    async with open_test_broker() as broker:
        async with FakePublisher(broker, "laptop", ["qwen"]) as publisher:
            await publisher.goodbye()
            assert broker.session_views() == []
            assert statuses(broker) == {"qwen": INACTIVE}
        async with FakePublisher(broker, "laptop", []) as publisher:
            registered = await publisher.register(["qwen"])
            assert [llm.outcome for llm in registered.llms] == ["reactivated"]
            assert view(broker).routable


async def test_a_stopping_broker_registers_nothing(autojump_clock):
    async with open_test_broker() as broker:
        await broker.drain(0)
        with pytest.raises(ShuttingDown):
            await broker.register("laptop", [LLMSpec("qwen")])
        assert broker.llms() == []
