"""Aliases, holds and pauses: what they are, how long they stay, and what cannot be."""

import math

import pytest
import trio

from tests.broker.test_store import FakeStore
from wakecall import BrokerConfig, LLMSpec, Status, open_broker
from wakecall.errors import (
    InvalidRequest,
    ModelNotFound,
    NotFound,
    SessionNotFound,
    StoreUnavailable,
    TooMany,
    WakecallError,
)
from wakecall.keyring import Caller
from wakecall.models import Alias, Key
from wakecall.testing import FakePublisher, open_test_broker

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE


def holds(broker):
    return {view.llm.name: (view.llm.hold, view.llm.paused) for view in broker.llm_views()}


def everything(broker):
    return broker.llm_views(), broker.alias_views(), broker.session_views()


# Aliases ------------------------------------------------------------------------------------------------------------


async def test_an_alias_is_made_changed_and_deleted_and_outlives_the_broker(autojump_clock):
    store = FakeStore()
    async with open_test_broker(store=store) as broker:
        made = await broker.put_alias("gpt", ["qwen", "org/pool", "phi"])
        assert (made.alias.targets, made.routable) == (("qwen", "org/pool", "phi"), False)
        assert store._aliases == {"gpt": made.alias}
        await trio.sleep(5)
        changed = await broker.put_alias("gpt", ["phi"])
        assert changed.alias == Alias("gpt", ("phi",), made.alias.created_at)
        await broker.put_alias("a", ["x"])
    async with open_test_broker(store=store) as broker:
        assert [view.alias.name for view in broker.alias_views()] == ["a", "gpt"]
        assert broker.alias_views()[1].alias == changed.alias
        await broker.delete_alias("gpt")
        with pytest.raises(NotFound) as caught:
            await broker.delete_alias("gpt")
        assert caught.value.code == "not_found"
        assert list(store._aliases) == ["a"]


async def test_an_alias_is_routable_as_soon_as_one_of_its_targets_is(autojump_clock):
    async with open_test_broker() as broker:
        await broker.put_alias("to-a-row", ["nobody", "qwen"])
        await broker.put_alias("to-a-pool", ["nobody", "org/pool"])

        def routable():
            return {view.alias.name: view.routable for view in broker.alias_views()}

        assert routable() == {"to-a-row": False, "to-a-pool": False}
        async with FakePublisher(broker, "laptop", [LLMSpec("qwen", pool="org/pool")]):
            assert routable() == {"to-a-row": True, "to-a-pool": True}
        assert routable() == {"to-a-row": False, "to-a-pool": False}


@pytest.mark.parametrize(
    ("name", "targets", "error", "param"),
    [
        ("a b", ["qwen"], InvalidRequest, "name"),
        ("", ["qwen"], InvalidRequest, "name"),
        ("x" * 129, ["qwen"], InvalidRequest, "name"),
        ("new", [], InvalidRequest, "target"),
        ("new", ["a b"], InvalidRequest, "target"),
        ("new", ["qwen", "a//b"], InvalidRequest, "fallbacks[0]"),
        ("new", ["qwen", "phi", "qwen"], InvalidRequest, "fallbacks[1]"),
        ("new", [f"m{n}" for n in range(10)], TooMany, "fallbacks"),
        # No alias of an alias, whichever of the two was first.
        ("new", ["there"], InvalidRequest, "target"),
        ("new", ["qwen", "there"], InvalidRequest, "fallbacks[0]"),
        ("led-to", ["qwen"], InvalidRequest, "name"),
    ],
)
async def test_an_alias_that_cannot_be_is_refused_and_changes_nothing(autojump_clock, name, targets, error, param):
    async with open_test_broker() as broker:
        await broker.put_alias("there", ["led-to"])
        before = everything(broker)
        with pytest.raises(error) as caught:
            await broker.put_alias(name, targets)
        assert type(caught.value) is error
        assert caught.value.param == param
        assert everything(broker) == before
        assert len((await broker.put_alias("new", [f"m{n}" for n in range(9)])).alias.targets) == 9


async def test_an_alias_may_have_a_rows_name_and_lead_to_that_row(autojump_clock):
    """So an operator gives a row fallbacks without anybody's calls changing."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]):
        view = await broker.put_alias("qwen", ["qwen", "cloud"])
        assert view.routable
        assert [(model.name, model.kind, model.status) for model in broker.models()] == [("qwen", "alias", ACTIVE)]
        assert broker.llm("qwen").name == "qwen"


async def test_aliases_are_bounded(autojump_clock):
    async with open_test_broker(BrokerConfig(max_aliases=2)) as broker:
        await broker.put_alias("a", ["x"])
        await broker.put_alias("b", ["x"])
        with pytest.raises(TooMany):
            await broker.put_alias("c", ["x"])
        await broker.put_alias("b", ["y"])
        await broker.delete_alias("a")
        await broker.put_alias("c", ["x"])


async def test_aliases_that_come_and_go_do_not_fill_the_memory_while_the_store_is_down(autojump_clock, monkeypatch):
    monkeypatch.setattr("wakecall.journal._MOST_UNWRITTEN", 3)
    store = FakeStore()
    async with open_test_broker(store=store) as broker:
        store.failing = True
        for number in range(4):
            with pytest.raises(StoreUnavailable):
                await broker.put_alias(f"a{number}", ["x"])
            with pytest.raises(StoreUnavailable):
                await broker.delete_alias(f"a{number}")
        with pytest.raises(StoreUnavailable):
            await broker.put_alias("one-more", ["x"])
        assert broker.alias_views() == []
        store.failing = False
        await trio.sleep(10)
        await broker.put_alias("one-more", ["x"])


# Names that can be called -------------------------------------------------------------------------------------------


async def test_rows_pools_and_aliases_are_listed_as_one(autojump_clock):
    async with open_test_broker() as broker:
        rows = [LLMSpec("b/1", type="vllm", pool="b"), LLMSpec("b/2", pool="b", status=HIBERNATING), LLMSpec("solo")]
        async with FakePublisher(broker, "laptop", rows) as publisher:
            await trio.sleep(7)
            await broker.put_alias("a", ["gone", "b"])
            await broker.put_alias("to-nobody", ["gone"])

            def listed():
                return {model.name: (model.kind, model.status, model.type) for model in broker.models()}

            assert list(listed()) == ["a", "b", "b/1", "b/2", "solo", "to-nobody"]
            assert listed() == {
                "a": ("alias", ACTIVE, ""),
                "b": ("pool", ACTIVE, ""),
                "b/1": ("virtual", ACTIVE, "vllm"),
                "b/2": ("virtual", HIBERNATING, ""),
                "solo": ("virtual", ACTIVE, ""),
                "to-nobody": ("alias", INACTIVE, ""),
            }
            assert broker.model("b").created_at == broker.llm("b/1").created_at
            assert broker.model("a").created_at == broker.now()
            await publisher.heartbeat({"b/1": HIBERNATING})
            assert (listed()["b"][1], listed()["a"][1]) == (HIBERNATING, HIBERNATING)
            with pytest.raises(ModelNotFound):
                broker.model("gone")
            caller = Caller(Key("key_1", "client", "me", "digest", 0.0, llms=("a", "b/*")))
            assert [model.name for model in broker.models(caller)] == ["a", "b/1", "b/2"]
            with pytest.raises(ModelNotFound):
                broker.model("b", caller)
        assert {name: kind_and_status[1] for name, kind_and_status in listed().items()} == dict.fromkeys(
            listed(), INACTIVE
        )


# Holds and pauses ---------------------------------------------------------------------------------------------------


async def test_a_hold_and_a_pause_stay_whatever_the_publisher_does(autojump_clock):
    """Registers with every status, heartbeats, a lost channel, a goodbye, another session; and the broker's own restart."""
    store = FakeStore()
    async with open_test_broker(store=store) as broker:
        async with FakePublisher(broker, "laptop", ["qwen", "phi", "solo"]) as publisher:
            held = await broker.hold("qwen", "drain")
            assert [(view.llm.name, view.llm.hold) for view in held] == [("qwen", "drain")]
            paused = await broker.pause_session("laptop", ["phi", "qwen"])
            assert {name: llm.paused for name, llm in paused.items()} == {"phi": True, "qwen": True, "solo": False}
            stays = {"qwen": ("drain", True), "phi": (None, True), "solo": (None, False)}
            assert holds(broker) == stays
            assert {name: (llm.hold, llm.paused) for name, llm in store._llms.items()} == stays
            for status in (HIBERNATING, ACTIVE, None):
                await publisher.register([LLMSpec("qwen", status=status, max_concurrency=3), "phi", "solo"])
                assert holds(broker) == stays
            await publisher.heartbeat({"qwen": HIBERNATING, "phi": ACTIVE})
            assert holds(broker) == stays
            await publisher.register(["solo"])
            publisher.disconnect()
            assert holds(broker) == stays
            await publisher.goodbye()
        async with FakePublisher(broker, "another", ["qwen", "phi"]):
            assert holds(broker) == stays
    async with open_test_broker(store=store) as broker:
        assert holds(broker) == stays
        await broker.resume("qwen")
        assert holds(broker)["qwen"] == (None, True)
        async with FakePublisher(broker, "another", ["qwen", "phi"]):
            rows = await broker.resume_session("another")
            assert [(name, llm.paused) for name, llm in rows.items()] == [("phi", False), ("qwen", False)]
            assert holds(broker) == dict.fromkeys(stays, (None, False))


async def test_one_hold_takes_the_place_of_the_other_and_a_resume_is_for_both(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]):
        await broker.hold("qwen", "drain")
        await broker.hold("qwen", "pause")
        assert holds(broker) == {"qwen": ("pause", False)}
        for _ in range(2):
            [view] = await broker.resume("qwen")
            assert view.llm.hold is None


async def test_a_pools_name_holds_all_its_rows(autojump_clock):
    rows = [LLMSpec("b/2", pool="b"), LLMSpec("b/1", pool="b"), LLMSpec("solo")]
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", rows):
        assert [view.llm.name for view in await broker.hold("b", "pause")] == ["b/1", "b/2"]
        assert holds(broker) == {"b/1": ("pause", False), "b/2": ("pause", False), "solo": (None, False)}
        await broker.resume("b/1")
        await broker.hold("b/2", "drain")
        assert [(view.llm.name, view.llm.hold) for view in await broker.resume("b")] == [("b/1", None), ("b/2", None)]


async def test_an_operators_own_row_can_be_held_too(autojump_clock):
    async with open_test_broker() as broker:
        await broker.put_public_llm("gpt", type="openai", model="gpt", url="https://api.example/v1")
        await broker.hold("gpt", "drain")
        await broker.put_public_llm("gpt", type="openai", model="gpt-2", url="https://api.example/v1")
        assert holds(broker) == {"gpt": ("drain", False)}


@pytest.mark.parametrize(
    ("act", "error", "param"),
    [
        (lambda broker: broker.hold("nobody", "drain"), ModelNotFound, "llm"),
        (lambda broker: broker.resume("alias"), ModelNotFound, "llm"),
        (lambda broker: broker.pause_session("nobody"), SessionNotFound, None),
        (lambda broker: broker.pause_session("laptop", owner="somebody"), SessionNotFound, None),
        (lambda broker: broker.resume_session("laptop", owner="somebody"), SessionNotFound, None),
        (lambda broker: broker.pause_session("laptop", ["qwen", "solo"]), ModelNotFound, "llms[1]"),
        (lambda broker: broker.pause_session("laptop", ["qwen", "a b"]), InvalidRequest, "llms[1]"),
        (lambda broker: broker.pause_session("laptop", ["qwen"] * 257), TooMany, "llms"),
    ],
)
async def test_what_cannot_be_held_or_paused_is_refused_and_changes_nothing(autojump_clock, act, error, param):
    async with (
        open_test_broker() as broker,
        FakePublisher(broker, "laptop", ["qwen"]),
        FakePublisher(broker, "other", ["solo"]),
    ):
        await broker.put_alias("alias", ["qwen"])
        before = everything(broker)
        with pytest.raises(error) as caught:
            await act(broker)
        assert type(caught.value) is error
        assert caught.value.param == param
        assert everything(broker) == before


async def test_no_row_named_is_no_row_paused(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]):
        assert [llm.paused for llm in (await broker.pause_session("laptop", [])).values()] == [False]
        assert [llm.paused for llm in (await broker.pause_session("laptop", ["qwen", "qwen"])).values()] == [True]


async def test_a_hold_that_cannot_be_committed_is_503_and_stays(autojump_clock):
    store = FakeStore()
    async with open_broker(store) as broker, FakePublisher(broker, "laptop", ["qwen"]):
        store.failing = True
        with pytest.raises(StoreUnavailable):
            await broker.hold("qwen", "drain")
        with pytest.raises(StoreUnavailable):
            await broker.pause_session("laptop")
        assert holds(broker) == {"qwen": ("drain", True)}
        store.failing = False
        await trio.sleep(10)
        assert (store._llms["qwen"].hold, store._llms["qwen"].paused) == ("drain", True)


# What a register may say --------------------------------------------------------------------------------------------

BUDGETS = ("queue_s", "first_byte_s", "idle_s", "total_s")


async def test_a_register_says_pool_group_and_budgets_and_what_it_leaves_out_is_gone(autojump_clock):
    said = LLMSpec("qwen", pool="org/big", group="gpu:0", queue_s=1, first_byte_s=2.5, idle_s=3, total_s=86_400)
    async with open_test_broker() as broker:
        await broker.register("laptop", [said])
        row = broker.llm("qwen")
        assert (row.pool, row.group, *(getattr(row, name) for name in BUDGETS)) == (
            "org/big",
            "gpu:0",
            1,
            2.5,
            3,
            86_400,
        )
        assert [(view.name, view.owner, view.llms) for view in broker.pool_views()] == [("org/big", "local", ("qwen",))]
        await broker.register("laptop", [LLMSpec("qwen")])
        row = broker.llm("qwen")
        assert (row.pool, row.group, *(getattr(row, name) for name in BUDGETS)) == (None,) * 6
        assert broker.pool_views() == []


@pytest.mark.parametrize(
    ("member", "value"),
    [
        *((name, value) for name in ("pool", "group") for value in ("", "a b", "x" * 129, "é")),
        *((name, value) for name in BUDGETS for value in (0, -1, math.inf, math.nan)),
    ],
)
async def test_a_register_with_what_cannot_be_is_refused(autojump_clock, member, value):
    async with open_test_broker() as broker:
        with pytest.raises(WakecallError) as caught:
            await broker.register("laptop", [LLMSpec("qwen"), LLMSpec("phi", **{member: value})])
        assert (type(caught.value), caught.value.param) == (InvalidRequest, f"llms[1].{member}")
        assert broker.llms() == []
