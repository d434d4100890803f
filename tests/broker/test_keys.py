"""Keys: who passes, how often, and what ends with one."""

import pytest
import trio

from tests.broker.helpers import CALL, codes, observe, start_call, start_calls, statuses
from wakecall import BrokerConfig, LLMSpec, MemoryStore, Status
from wakecall.errors import (
    InvalidApiKey,
    InvalidRequest,
    LLMNameTaken,
    ModelNotFound,
    NotFound,
    RateLimitExceeded,
    SessionNotFound,
    StoreUnavailable,
    TooMany,
)
from wakecall.keys import digest_of
from wakecall.models import KeyEvent
from wakecall.store import StoreError
from wakecall.testing import FakePublisher, open_test_broker

INACTIVE = Status.INACTIVE


class FailingStore(MemoryStore):
    fails = False

    async def write(self, batch):
        if self.fails:
            raise StoreError("the disk is full")
        await super().write(batch)


# Who passes ---------------------------------------------------------------------------------------------------------


async def test_without_keys_everybody_may_do_everything(autojump_clock):
    async with open_test_broker() as broker:
        assert broker.is_open
        for presented in (None, "", "whatever"):
            caller = broker.authenticate(presented)
            assert (caller.owner, caller.key_id) == ("local", None)
            assert caller.roles == {"client", "publisher", "admin", "monitor"}


async def test_with_the_first_key_nobody_passes_without_one(autojump_clock):
    async with open_test_broker() as broker:
        made = await broker.create_key("admin")
        assert not broker.is_open
        caller = broker.authenticate(made.secret)
        assert (caller.key_id, caller.roles) == (made.key.key_id, {"admin", "monitor"})
        for wrong in (
            None,
            "",
            made.secret[:-1],
            made.secret + "a",
            made.secret.upper(),
            made.key.digest,
            made.key.key_id,
        ):
            with pytest.raises(InvalidApiKey):
                broker.authenticate(wrong)


async def test_a_key_is_its_own_owner_unless_it_is_said_whose_it_is(autojump_clock):
    async with open_test_broker() as broker:
        alone = await broker.create_key("publisher")
        assert broker.authenticate(alone.secret).owner == alone.key.key_id
        of_anna = await broker.create_key("publisher", owner="anna")
        assert broker.authenticate(of_anna.secret).owner == "anna"


async def test_a_key_that_is_revoked_opens_nothing_and_the_broker_stays_closed(autojump_clock):
    """Whatever is revoked, down to the last one."""
    async with open_test_broker() as broker:
        keys = [await broker.create_key("client") for _ in range(2)]
        for made in keys:
            await broker.revoke_key(made.key.key_id)
            with pytest.raises(InvalidApiKey):
                broker.authenticate(made.secret)
        assert broker.key_views() == []
        with pytest.raises(InvalidApiKey):
            broker.authenticate(None)
        with pytest.raises(NotFound):
            await broker.revoke_key(keys[0].key.key_id)


async def test_a_key_expires_to_the_second_and_stays_listed(autojump_clock):
    async with open_test_broker() as broker:
        made = await broker.create_key("client", expires_in_s=3600)
        await trio.sleep(3599.5)
        assert broker.authenticate(made.secret).key_id == made.key.key_id
        await trio.sleep(0.5)
        with pytest.raises(InvalidApiKey, match="expired"):
            broker.authenticate(made.secret)
        (view,) = broker.key_views()
        assert view.expired
        assert not broker.is_open


async def test_keys_outlive_the_broker_and_only_as_digests(autojump_clock):
    store = MemoryStore()
    async with open_test_broker(store=store) as broker:
        made = await broker.create_key(
            "client", name="Anna's laptop", llms=["qwen*"], rpm=5, max_in_flight=2, expires_in_s=3600
        )
        gone = await broker.create_key("client")
        await broker.revoke_key(gone.key.key_id)
    (stored,) = (await store.load()).keys
    assert stored == made.key
    assert stored.digest == digest_of(made.secret)
    assert made.secret not in repr((stored, made))
    assert stored.digest not in repr(made)
    async with open_test_broker(store=store) as broker:
        assert broker.authenticate(made.secret).may_use("qwen2")
        with pytest.raises(InvalidApiKey):
            broker.authenticate(gone.secret)
        await trio.sleep(3600)
        with pytest.raises(InvalidApiKey):
            broker.authenticate(made.secret)


async def test_an_expired_key_in_the_store_does_not_open_the_broker(autojump_clock):
    store = MemoryStore()
    async with open_test_broker(store=store) as broker:
        await broker.create_key("client", expires_in_s=1)
        await trio.sleep(2)
    async with open_test_broker(store=store) as broker:
        assert not broker.is_open


async def test_a_key_that_cannot_be_kept_is_none(autojump_clock):
    """Whoever asked did not get it, and a broker that was open still is."""
    store = FailingStore()
    async with open_test_broker(store=store) as broker:
        store.fails = True
        with pytest.raises(StoreUnavailable):
            await broker.create_key("admin")
        assert broker.key_views() == []
        assert broker.is_open
        store.fails = False
        await trio.sleep(10)
    assert (await store.load()).keys == ()


class HungStore(MemoryStore):
    def __init__(self):
        super().__init__()
        self.free = trio.Event()
        self.free.set()

    async def write(self, batch):
        await self.free.wait()
        await super().write(batch)


async def test_a_key_whose_maker_leaves_is_none(nursery, autojump_clock):
    """While it is committed: he did not get it, and a broker that was open still is."""
    store = HungStore()
    async with open_test_broker(store=store) as broker:
        store.free = trio.Event()
        with trio.move_on_after(5):
            await broker.create_key("admin")
        assert broker.key_views() == []
        assert broker.is_open
        store.free.set()
    assert (await store.load()).keys == ()


async def test_a_key_that_is_revoked_before_it_is_made_closes_nothing(nursery, autojump_clock):
    store = HungStore()
    async with open_test_broker(store=store) as broker:
        store.free = trio.Event()
        caught = []

        async def make():
            try:
                await broker.create_key("admin")
            except NotFound as error:
                caught.append(error)

        async with trio.open_nursery() as makers:
            makers.start_soon(make)
            await trio.testing.wait_all_tasks_blocked()
            (view,) = broker.key_views()
            makers.start_soon(broker.revoke_key, view.key.key_id)
            await trio.testing.wait_all_tasks_blocked()
            store.free.set()
        assert len(caught) == 1
        assert broker.is_open


async def test_who_passed_a_while_ago_is_asked_again(autojump_clock):
    async with open_test_broker() as broker:
        anybody = broker.authenticate(None)
        broker.check(anybody)
        made = await broker.create_key("client", expires_in_s=60)
        with pytest.raises(InvalidApiKey):
            broker.check(anybody)
        caller = broker.authenticate(made.secret)
        broker.check(caller)
        await trio.sleep(60)
        with pytest.raises(InvalidApiKey, match="expired"):
            broker.check(caller)
        await broker.revoke_key(made.key.key_id)
        with pytest.raises(InvalidApiKey, match="revoked"):
            broker.check(caller)


async def test_with_the_first_key_the_channels_without_one_end(autojump_clock):
    """Of publishers over a wire; one in the same process is its program's, and stays."""
    async with open_test_broker() as broker, FakePublisher(broker, "inside", ["phi"]) as inside:
        await broker.register("outside", [LLMSpec("qwen")])
        outside = broker.open_channel_nowait("outside", needs_open=True)
        await trio.testing.wait_all_tasks_blocked()
        assert statuses(broker)["qwen"] is Status.ACTIVE
        await broker.create_key("admin")
        assert outside.ended == "stale"
        assert statuses(broker) == {"phi": Status.ACTIVE, "qwen": INACTIVE}
        assert inside.channel.ended is None


async def test_a_key_that_cannot_be_written_off_is_revoked_all_the_same(autojump_clock):
    store = FailingStore()
    async with open_test_broker(store=store) as broker:
        made = await broker.create_key("client")
        store.fails = True
        with pytest.raises(StoreUnavailable):
            await broker.revoke_key(made.key.key_id)
        with pytest.raises(InvalidApiKey):
            broker.authenticate(made.secret)
        store.fails = False
        await trio.sleep(10)
    assert (await store.load()).keys == ()


@pytest.mark.parametrize(
    ("role", "asked", "param"),
    [
        ("god", {}, "role"),
        ("client", {"name": "x" * 129}, "name"),
        ("client", {"owner": "a b"}, "owner"),
        ("client", {"owner": ""}, "owner"),
        ("client", {"llms": []}, "llms"),
        ("client", {"llms": ["qwen", "a b"]}, "llms[1]"),
        ("admin", {"llms": ["qwen"]}, "llms"),
        ("client", {"rpm": 0}, "rpm"),
        ("client", {"max_in_flight": -1}, "max_in_flight"),
        ("client", {"rpm": 1_000_001}, "rpm"),
        ("publisher", {"rpm": 1}, "rpm"),
        ("admin", {"max_in_flight": 1}, "max_in_flight"),
        ("client", {"expires_in_s": 0.0}, "expires_in_s"),
        ("client", {"expires_in_s": 1e300}, "expires_in_s"),
        ("client", {"expires_in_s": float("nan")}, "expires_in_s"),
    ],
)
async def test_a_key_that_cannot_be_is_not_made(role, asked, param, autojump_clock):
    async with open_test_broker() as broker:
        with pytest.raises(InvalidRequest) as caught:
            await broker.create_key(role, **asked)
        assert caught.value.param == param
        assert broker.is_open


async def test_keys_have_a_bound_and_patterns_too(autojump_clock):
    async with open_test_broker(BrokerConfig(max_keys=2)) as broker:
        await broker.create_key("client", llms=["a"] * 64)
        with pytest.raises(TooMany):
            await broker.create_key("client", llms=["a"] * 65)
        last = await broker.create_key("client")
        with pytest.raises(TooMany):
            await broker.create_key("client")
        await broker.revoke_key(last.key.key_id)
        await broker.create_key("client")


# What a client may ----------------------------------------------------------------------------------------------------


async def test_a_key_bound_to_models_sees_and_calls_those_alone(autojump_clock):
    """What it may not use is as if it were not there."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen", "phi", "org/qwen"]) as publisher:
        caller = broker.authenticate((await broker.create_key("client", llms=["qwen*", "phi2"])).secret)
        assert [llm.name for llm in broker.llms(caller)] == ["qwen"]
        assert broker.llm("qwen", caller).name == "qwen"
        for name in ("phi", "org/qwen", "never"):
            with pytest.raises(ModelNotFound):
                broker.llm(name, caller)
            with broker.claim(caller) as claim, pytest.raises(ModelNotFound):
                broker.infer_nowait(name, CALL, claim=claim)
        assert publisher.events("infer") == []
        assert broker.statistics().accepted == 0
        assert caller.in_flight == 0


async def test_as_many_calls_at_a_time_as_a_key_allows_whatever_becomes_of_them(autojump_clock):
    """A call counts from its claim to its outcome: completed, failed, cancelled, refused, or never made an infer."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        caller = broker.authenticate((await broker.create_key("client", max_in_flight=2)).secret)
        first = broker.infer_nowait("qwen", CALL, claim=broker.claim(caller))
        second = broker.infer_nowait("qwen", CALL, claim=broker.claim(caller))
        with pytest.raises(RateLimitExceeded, match="2 requests under way") as refused:
            broker.claim(caller)
        assert refused.value.retry_after_s == 1
        await publisher.answer(await publisher.next("infer"), b"{}")
        assert first.is_over
        with broker.claim(caller), pytest.raises(RateLimitExceeded):
            broker.claim(caller)
        third = broker.infer_nowait("qwen", CALL, claim=broker.claim(caller))
        second.cancel()
        second.cancel()
        assert caller.in_flight == 1
        third.cancel()
        assert caller.in_flight == 0
        with broker.claim(caller) as claim, pytest.raises(ModelNotFound):
            broker.infer_nowait("never", CALL, claim=claim)
        assert caller.in_flight == 0


async def test_a_claim_is_for_one_call_and_not_for_one_after_its_end(autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]):
        caller = broker.authenticate((await broker.create_key("client", max_in_flight=1)).secret)
        claim = broker.claim(caller)
        infer = broker.infer_nowait("qwen", CALL, claim=claim)
        with pytest.raises(RuntimeError):
            broker.infer_nowait("qwen", CALL, claim=claim)
        infer.cancel()
        with broker.claim(caller) as unused:
            pass
        for over in (claim, unused):
            with pytest.raises(RuntimeError):
                broker.infer_nowait("qwen", CALL, claim=over)
        assert caller.in_flight == 0
        assert broker.statistics().accepted == 1


async def test_a_refusal_for_what_is_under_way_says_how_the_rate_stands(autojump_clock):
    async with open_test_broker() as broker:
        caller = broker.authenticate((await broker.create_key("client", rpm=9, max_in_flight=1)).secret)
        with broker.claim(caller), pytest.raises(RateLimitExceeded) as refused:
            broker.claim(caller)
        assert (refused.value.rate.limit, refused.value.rate.remaining) == (9, 8)


async def test_a_name_longer_than_any_is_none_for_a_key_bound_to_models(autojump_clock):
    """It is not even looked through: against many stars that could take seconds."""
    async with open_test_broker() as broker:
        caller = broker.authenticate((await broker.create_key("client", llms=["*-N-small"] * 64)).secret)
        assert caller.may_use("a-N-small")
        assert not caller.may_use("-N-smal" * 5_000_000 + "-N-small")


async def test_a_call_that_its_publisher_loses_counts_no_more(autojump_clock):
    async with open_test_broker() as broker:
        caller = broker.authenticate((await broker.create_key("client", max_in_flight=1)).secret)
        async with FakePublisher(broker, "laptop", ["qwen"]) as publisher:
            broker.infer_nowait("qwen", CALL, claim=broker.claim(caller))
            publisher.disconnect()
            assert caller.in_flight == 0


async def test_requests_a_minute_are_counted_whatever_becomes_of_them(autojump_clock):
    async with open_test_broker() as broker:
        caller = broker.authenticate((await broker.create_key("client", rpm=2)).secret)
        for remaining in (1, 0):
            with broker.claim(caller) as claim:
                assert claim.rate.remaining == remaining
        with pytest.raises(RateLimitExceeded) as refused:
            broker.claim(caller)
        assert refused.value.retry_after_s == pytest.approx(30)
        assert refused.value.rate.limit == 2
        assert caller.in_flight == 0
        await trio.sleep(30)
        broker.claim(caller).release()


async def test_a_keys_limits_are_its_own(autojump_clock):
    """Another of the same owner has its own."""
    async with open_test_broker() as broker:
        one, two = [
            broker.authenticate((await broker.create_key("client", owner="anna", rpm=1)).secret) for _ in range(2)
        ]
        broker.claim(one).release()
        broker.claim(two).release()


async def test_an_infer_under_way_outlives_its_key(nursery, autojump_clock):
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen"]) as publisher:
        made = await broker.create_key("client")
        infer = broker.infer_nowait("qwen", CALL, claim=broker.claim(broker.authenticate(made.secret)))
        await broker.revoke_key(made.key.key_id)
        await publisher.answer(await publisher.next("infer"), b"{}")
        reply = await infer.wait_head()
        assert await reply.read() == b"{}"


# What ends with a publisher's key -------------------------------------------------------------------------------------


async def test_revoking_a_publishers_key_ends_its_sessions_at_once_and_no_others(nursery, autojump_clock):
    """In that very step: rows withdrawn, infers failed, the channel told, the session gone."""
    async with open_test_broker() as broker:
        key = (await broker.create_key("publisher", owner="anna")).key
        other = (await broker.create_key("publisher", owner="anna")).key
        events = observe(broker)
        async with (
            FakePublisher(broker, "laptop", ["qwen"], owner="anna", key_id=key.key_id) as laptop,
            FakePublisher(broker, "desk", ["phi"], owner="anna", key_id=other.key_id) as desk,
        ):
            mine, siblings = start_call(nursery, broker, "qwen"), start_call(nursery, broker, "phi")
            frame = await desk.next("infer")
            await laptop.next("infer")
            await broker.revoke_key(key.key_id)
            await mine.over.wait()
            assert mine.code == "publisher_disconnected"
            assert (await laptop.next("bye")).data["reason"] == "evicted"
            assert statuses(broker) == {"qwen": INACTIVE, "phi": Status.ACTIVE}
            with pytest.raises(SessionNotFound):
                await laptop.heartbeat()
            await desk.answer(frame, b"{}")
            await siblings.over.wait()
            assert siblings.body == b"{}"
        assert KeyEvent("revoked", key.key_id, "publisher", "anna") in events


async def test_a_session_is_the_keys_that_registered_it_last(autojump_clock):
    """So a publisher changes its key without a break: register with the new one, then revoke the old one."""
    async with open_test_broker() as broker:
        old, new = [(await broker.create_key("publisher", owner="anna")).key.key_id for _ in range(2)]
        async with FakePublisher(broker, "laptop", ["qwen"], owner="anna", key_id=old) as publisher:
            publisher.key_id = new
            await publisher.register(["qwen"])
            await publisher.connect()
            await broker.revoke_key(old)
            assert statuses(broker) == {"qwen": Status.ACTIVE}
            assert publisher.channel.ended is None


async def test_a_channel_ends_with_the_key_that_opened_it(autojump_clock):
    """Also where another one registered the session: that goes on, and waits for a channel."""
    async with open_test_broker() as broker:
        registering, opening = [(await broker.create_key("publisher", owner="anna")).key.key_id for _ in range(2)]
        async with FakePublisher(broker, "laptop", ["qwen"], owner="anna", key_id=registering) as publisher:
            publisher.key_id = opening
            channel = await publisher.connect()
            await broker.revoke_key(opening)
            assert channel.ended == "evicted"
            publisher.key_id = registering
            await publisher.connect()
            assert statuses(broker) == {"qwen": Status.ACTIVE}


async def test_a_publishers_key_that_expires_takes_its_sessions_with_it_at_that_moment(autojump_clock):
    store = MemoryStore()
    async with open_test_broker(store=store) as broker:
        key = (await broker.create_key("publisher", owner="anna", expires_in_s=30)).key
        events = observe(broker)
        async with FakePublisher(broker, "laptop", ["qwen"], owner="anna", key_id=key.key_id) as publisher:
            await trio.sleep(29)
            assert publisher.channel.ended is None
            await trio.sleep(1.1)
            assert publisher.channel.ended == "evicted"
            assert statuses(broker) == {"qwen": INACTIVE}
        assert events[-1] == KeyEvent("expired", key.key_id, "publisher", "anna")


async def test_a_key_that_expired_while_the_broker_was_down_has_no_session_left(autojump_clock):
    store = MemoryStore()
    async with open_test_broker(store=store) as broker:
        key = (await broker.create_key("publisher", owner="anna", expires_in_s=30)).key
        async with FakePublisher(broker, "laptop", ["qwen"], owner="anna", key_id=key.key_id):
            pass
        await broker.register("laptop", [LLMSpec("qwen")], owner="anna", key_id=key.key_id)
    await trio.sleep(60)
    async with open_test_broker(store=store) as broker:
        events = observe(broker)
        await trio.sleep(1)
        assert broker.session_views() == []
        assert events == [], "that was told when it happened, or nobody was there"


# Owners -----------------------------------------------------------------------------------------------------------------


async def test_a_session_that_is_handed_over_is_its_new_owners_with_all_its_rows(nursery, autojump_clock):
    """Whoever held its channel does so no more."""
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", ["qwen", "phi"]) as publisher:
        calls = await start_calls(nursery, broker, 2)
        shown = await broker.hand_over_session("laptop", "anna")
        assert shown.record.owner == "anna"
        for call in calls:
            await call.over.wait()
        assert codes(calls) == {"publisher_disconnected"}
        assert publisher.channel.ended == "evicted"
        assert {llm.owner for llm in broker.llms()} == {"anna"}
        with pytest.raises(SessionNotFound):
            await publisher.heartbeat()
        publisher.owner = "anna"
        await publisher.connect()
        assert statuses(broker) == {"qwen": Status.ACTIVE, "phi": Status.ACTIVE}
        await broker.hand_over_session("laptop", "anna")
        assert publisher.channel.ended is None, "nothing changes for whom it is already"


async def test_the_old_owners_key_has_no_hold_on_what_was_handed_over(autojump_clock):
    async with open_test_broker() as broker:
        old = (await broker.create_key("publisher", owner="anna", expires_in_s=60)).key
        async with FakePublisher(broker, "laptop", ["qwen"], owner="anna", key_id=old.key_id) as publisher:
            await broker.hand_over_session("laptop", "ben")
            publisher.owner, publisher.key_id = "ben", "key_of_ben"
            await publisher.connect()
            await trio.sleep(70)
            await broker.revoke_key(old.key_id)
            assert publisher.channel.ended is None
            assert statuses(broker) == {"qwen": Status.ACTIVE}


async def test_a_row_that_is_handed_over_waits_for_its_new_owners_register(nursery, autojump_clock):
    async with open_test_broker() as broker:
        async with FakePublisher(broker, "laptop", ["qwen", "phi"]) as publisher:
            await broker.hand_over_llm("qwen", "anna")
            assert statuses(broker) == {"qwen": INACTIVE, "phi": Status.ACTIVE}
            with pytest.raises(LLMNameTaken):
                await publisher.register(["qwen", "phi"])
            async with FakePublisher(broker, "annas", ["qwen"], owner="anna"):
                assert statuses(broker) == {"qwen": Status.ACTIVE, "phi": Status.ACTIVE}
                assert (await publisher.heartbeat()).llms == {"phi": Status.ACTIVE}


async def test_what_was_sent_of_a_row_that_is_handed_over_ends(nursery, autojump_clock):
    """Its slots are the new owner's."""
    spec = LLMSpec("qwen", max_concurrency=1)
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", [spec]) as publisher:
        call = start_call(nursery, broker)
        await publisher.next("infer")
        await broker.hand_over_llm("qwen", "anna")
        await call.over.wait()
        assert call.code == "publisher_disconnected"
        await publisher.next("cancel")
        async with FakePublisher(broker, "annas", [spec], owner="anna") as annas:
            second = start_call(nursery, broker)
            await annas.answer(await annas.next("infer"), b"{}")
            await second.over.wait()
            assert second.body == b"{}"


async def test_a_row_handed_over_while_it_wakes_fails_those_who_wait(nursery, autojump_clock):
    spec = LLMSpec("qwen", status=Status.HIBERNATING)
    async with open_test_broker() as broker, FakePublisher(broker, "laptop", [spec]) as publisher:
        call = start_call(nursery, broker)
        await publisher.next("wake")
        await broker.hand_over_llm("qwen", "anna")
        await call.over.wait()
        assert call.code == "model_offline"
        assert publisher.events("cancel") != []


async def test_a_public_row_can_be_handed_over_too(autojump_clock):
    async with open_test_broker() as broker:
        await broker.put_public_llm("gpt", type="openai", model="gpt-x", url="https://api.example/v1")
        shown = await broker.hand_over_llm("gpt", "anna")
        assert (shown.llm.owner, shown.llm.status) == ("anna", Status.ACTIVE)


async def test_what_an_owner_may_have_bounds_what_he_is_given(autojump_clock):
    config = BrokerConfig(max_sessions_per_owner=1, max_llms_per_session=2)
    async with open_test_broker(config) as broker:
        await broker.register("one", [LLMSpec("a"), LLMSpec("b")], owner="anna")
        await broker.register("two", [LLMSpec("c")], owner="ben")
        before = broker.session_views()
        with pytest.raises(TooMany):
            await broker.hand_over_session("two", "anna")
        with pytest.raises(TooMany):
            await broker.hand_over_llm("c", "anna")
        for owner in ("", "a b"):
            with pytest.raises(InvalidRequest):
                await broker.hand_over_session("two", owner)
            with pytest.raises(InvalidRequest):
                await broker.hand_over_llm("c", owner)
        with pytest.raises(SessionNotFound):
            await broker.hand_over_session("three", "anna")
        with pytest.raises(ModelNotFound):
            await broker.hand_over_llm("d", "anna")
        assert broker.session_views() == before


async def test_what_was_handed_over_counts_for_its_new_owner_and_no_more_for_the_old(autojump_clock):
    store = MemoryStore()
    config = BrokerConfig(max_sessions_per_owner=1, max_llms_per_session=1)
    async with open_test_broker(config, store) as broker:
        await broker.register("one", [LLMSpec("a")], owner="anna")
        await broker.hand_over_session("one", "ben")
        await broker.register("two", [LLMSpec("b")], owner="anna")
        with pytest.raises(TooMany):
            await broker.register("three", [], owner="ben")
    assert {each.session_id: each.owner for each in (await store.load()).sessions} == {"one": "ben", "two": "anna"}
