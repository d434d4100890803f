"""What every store promises: each test runs over each of them."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.store.records import (
    ALIAS_FIELDS,
    KEY_FIELDS,
    LLM_FIELDS,
    OPENERS,
    SESSION_FIELDS,
    USAGE_FIELDS,
    OpenStore,
    alias,
    alias_tables,
    batch_of,
    batches,
    cell_tables,
    database_in,
    hours,
    instants,
    key,
    key_tables,
    llm,
    session,
    session_tables,
    tables,
    texts,
)
from wakecall import lifecycle
from wakecall.ledger import CellKey, Usage
from wakecall.models import LLM, Alias, Batch, Key, Kind, SessionRecord, Snapshot, Status
from wakecall.store import Store
from wakecall.sweep import decide

ACTIVE, HIBERNATING, INACTIVE = Status.ACTIVE, Status.HIBERNATING, Status.INACTIVE


@pytest.fixture(params=OPENERS)
def open_store(request: pytest.FixtureRequest) -> OpenStore:
    return OPENERS[request.param]


def in_new_store(open_store: OpenStore, use: Callable[[Store], Awaitable[None]]) -> None:
    """Run `use` on a store that holds nothing: one for each of Hypothesis' examples."""

    async def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            async with open_store(database_in(Path(folder))) as store:
                await use(store)

    trio.run(run)


def names(rows: tuple[LLM, ...]) -> list[str]:
    return [row.name for row in rows]


def test_the_strategies_cover_every_field() -> None:
    """A field that somebody adds is a field that these tests write and read."""
    assert set(LLM_FIELDS) == {each.name for each in fields(LLM)}
    assert set(SESSION_FIELDS) == {each.name for each in fields(SessionRecord)}
    assert set(KEY_FIELDS) == {each.name for each in fields(Key)}
    assert set(ALIAS_FIELDS) == {each.name for each in fields(Alias)}
    assert set(USAGE_FIELDS) == {each.name for each in fields(Usage)}


async def test_a_new_store_is_empty(open_store: OpenStore, tmp_path: Path) -> None:
    """Nothing is there before something was written."""
    async with open_store(database_in(tmp_path)) as store:
        assert await store.load() == Snapshot()
        assert await store.rows_of_session("laptop") == ()
        assert await store.stale_rows(1e12) == ()
        assert await store.expired_rows(1e12) == ()
        assert await store.usage(0, "key") == await store.usage(0, "llm") == await store.usage_cells(0) == {}


@settings(max_examples=60, deadline=None)
@given(rows=tables, sessions=session_tables, keys=key_tables, aliases=alias_tables, usage=cell_tables)
@example(rows=[], sessions=[], keys=[], aliases=[], usage={})
@pytest.mark.parametrize("open_store", OPENERS.values(), ids=OPENERS.keys())
def test_what_was_written_is_loaded_to_the_last_bit(
    open_store: OpenStore,
    rows: list[LLM],
    sessions: list[SessionRecord],
    keys: list[Key],
    aliases: list[Alias],
    usage: dict[CellKey, Usage],
) -> None:
    """Every field comes back as it was, type and all; rows and aliases by name, sessions and keys by id."""

    async def use(store: Store) -> None:
        await store.write(batch_of(rows, sessions, keys, aliases, usage))
        loaded = await store.load()
        assert loaded.llms == tuple(sorted(rows, key=lambda x: x.name))
        assert loaded.sessions == tuple(sorted(sessions, key=lambda x: x.session_id))
        assert loaded.keys == tuple(sorted(keys, key=lambda x: x.key_id))
        assert loaded.aliases == tuple(sorted(aliases, key=lambda x: x.name))
        assert await store.usage_cells(0) == usage
        for row in loaded.llms:
            assert type(row.status) is Status
            assert type(row.kind) is Kind
            assert type(row.paused) is bool
            assert row.remembers is None or type(row.remembers) is Status

    in_new_store(open_store, use)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(batches, max_size=6))
@pytest.mark.parametrize("open_store", OPENERS.values(), ids=OPENERS.keys())
def test_the_last_state_of_each_record_stands(open_store: OpenStore, steps: list[Batch]) -> None:
    """Batches apply in their order; None deletes, and so does an hour from which on usage is kept; the rest stays."""

    async def use(store: Store) -> None:
        rows: dict[str, LLM | None] = {}
        sessions: dict[str, SessionRecord | None] = {}
        keys: dict[str, Key | None] = {}
        aliases: dict[str, Alias | None] = {}
        usage: dict[CellKey, Usage] = {}
        for batch in steps:
            await store.write(batch)
            rows |= batch.llms
            sessions |= batch.sessions
            keys |= batch.keys
            aliases |= batch.aliases
            usage |= batch.usage
            usage = {cell: each for cell, each in usage.items() if cell[0] >= batch.usage_before}
            loaded = await store.load()
            assert loaded.llms == tuple(rows[key] for key in sorted(rows) if rows[key])
            assert loaded.sessions == tuple(sessions[key] for key in sorted(sessions) if sessions[key])
            assert loaded.keys == tuple(keys[key] for key in sorted(keys) if keys[key])
            assert loaded.aliases == tuple(aliases[name] for name in sorted(aliases) if aliases[name])
            assert await store.usage_cells(0) == usage

    in_new_store(open_store, use)


async def test_a_batch_that_is_written_again_changes_nothing(open_store: OpenStore, tmp_path: Path) -> None:
    """The writer repeats a batch whose commit it did not hear of."""
    async with open_store(database_in(tmp_path)) as store:
        await store.write(
            batch_of(
                [llm("gone"), llm("kept")],
                [session("gone"), session("kept")],
                [key("gone"), key("kept")],
                [alias("gone"), alias("kept")],
                {(7, "", "gone"): Usage(requests=1), (8, "", "kept"): Usage(requests=2)},
            )
        )
        batch = Batch(
            {"gone": None, "never": None, "new": llm("new")},
            {"gone": None, "new": session("new")},
            {"gone": None, "new": key("new")},
            {"gone": None, "new": alias("new")},
            {(8, "", "kept"): Usage(requests=3), (8, "", "new"): Usage(requests=4)},
            usage_before=8,
        )
        await store.write(batch)
        once = await store.load()
        await store.write(batch)
        assert await store.load() == once
        assert await store.usage(0, "llm") == {"kept": Usage(requests=3), "new": Usage(requests=4)}
        assert names(once.llms) == ["kept", "new"]
        assert [each.session_id for each in once.sessions] == ["kept", "new"]
        assert [each.key_id for each in once.keys] == ["kept", "new"]
        assert [each.name for each in once.aliases] == ["kept", "new"]


@settings(max_examples=60, deadline=None)
@given(rows=tables, batch=batches, at=instants)
@pytest.mark.parametrize("open_store", OPENERS.values(), ids=OPENERS.keys())
def test_what_was_live_is_lost_before_all_else(open_store: OpenStore, rows: list[LLM], batch: Batch, at: float) -> None:
    """As the lifecycle's table has it, and no other field is touched; what the batch says of a row itself comes after."""

    async def use(store: Store) -> None:
        await store.write(batch_of(rows))
        await store.write(replace(batch, lost_at=at))
        expected: dict[str, LLM | None] = {}
        for row in rows:
            if row.kind is Kind.VIRTUAL and row.status is not INACTIVE:
                after = lifecycle.step(lifecycle.RowState(row.status), lifecycle.RowEvent.LOST)
                row = replace(row, status=after.status, remembers=after.remembers, inactive_since=at)
            expected[row.name] = row
        expected |= batch.llms
        assert (await store.load()).llms == tuple(row for _, row in sorted(expected.items()) if row is not None)

    in_new_store(open_store, use)


async def test_an_empty_batch_is_fine(open_store: OpenStore, tmp_path: Path) -> None:
    """Nothing to write is no error."""
    async with open_store(database_in(tmp_path)) as store:
        await store.write(Batch())
        assert await store.load() == Snapshot()


async def test_a_name_is_exact(open_store: OpenStore, tmp_path: Path) -> None:
    """Neither case nor normal form is folded: two names are two rows."""
    different = ["qwen", "Qwen", "é", "e\u0301", "a", "a\0", "ａ"]
    async with open_store(database_in(tmp_path)) as store:
        await store.write(batch_of([llm(name) for name in different]))
        assert names((await store.load()).llms) == sorted(different)


async def test_rows_of_a_session_are_its_rows_by_name(open_store: OpenStore, tmp_path: Path) -> None:
    """Whatever their status; none of another session's, none without one."""
    async with open_store(database_in(tmp_path)) as store:
        await store.write(
            batch_of(
                [
                    llm("c"),
                    llm("a", status=INACTIVE, inactive_since=1.0),
                    llm("B", status=HIBERNATING),
                    llm("other", session_id="laptop2"),
                    llm("public", kind=Kind.PUBLIC, session_id=None),
                ]
            )
        )
        assert names(await store.rows_of_session("laptop")) == ["B", "a", "c"]
        assert names(await store.rows_of_session("nobody")) == []


async def test_a_row_that_changes_its_session_follows_it(open_store: OpenStore, tmp_path: Path) -> None:
    """An adopted row is its new session's alone."""
    async with open_store(database_in(tmp_path)) as store:
        await store.write(batch_of([llm("a"), llm("b")]))
        await store.write(batch_of([llm("a", session_id="desk")]))
        assert names(await store.rows_of_session("laptop")) == ["b"]
        assert names(await store.rows_of_session("desk")) == ["a"]


async def test_stale_rows_are_live_virtual_ones_at_or_before_the_cutoff(open_store: OpenStore, tmp_path: Path) -> None:
    """The oldest first, then by name; a public or an inactive row is never stale."""
    async with open_store(database_in(tmp_path)) as store:
        await store.write(
            batch_of(
                [
                    llm("younger", last_heartbeat_at=20.5),
                    llm("tie-b", last_heartbeat_at=20.0),
                    llm("tie-a", last_heartbeat_at=20.0, status=HIBERNATING),
                    llm("oldest", last_heartbeat_at=-3.0),
                    llm("public", last_heartbeat_at=1.0, kind=Kind.PUBLIC),
                    llm("inactive", last_heartbeat_at=1.0, status=INACTIVE, inactive_since=2.0),
                ]
            )
        )
        assert names(await store.stale_rows(20.0)) == ["oldest", "tie-a", "tie-b"]
        assert names(await store.stale_rows(19.9)) == ["oldest"]
        assert names(await store.stale_rows(1e9)) == ["oldest", "tie-a", "tie-b", "younger"]
        await store.write(batch_of([llm("oldest", last_heartbeat_at=30.0)]))
        assert names(await store.stale_rows(20.0)) == ["tie-a", "tie-b"]


async def test_expired_rows_are_inactive_virtual_ones_at_or_before_the_cutoff(
    open_store: OpenStore, tmp_path: Path
) -> None:
    """The longest inactive first, then by name; a public or a live row never expires, nor one without an instant."""
    async with open_store(database_in(tmp_path)) as store:
        inactive = llm(status=INACTIVE)
        await store.write(
            batch_of(
                [
                    replace(inactive, name="later", inactive_since=20.5),
                    replace(inactive, name="tie-b", inactive_since=20.0),
                    replace(inactive, name="tie-a", inactive_since=20.0, remembers=ACTIVE),
                    replace(inactive, name="first", inactive_since=-3.0),
                    replace(inactive, name="public", inactive_since=1.0, kind=Kind.PUBLIC),
                    replace(inactive, name="never"),
                    llm("live", inactive_since=1.0),
                ]
            )
        )
        assert names(await store.expired_rows(20.0)) == ["first", "tie-a", "tie-b"]
        assert names(await store.expired_rows(19.9)) == ["first"]
        await store.write(Batch({"first": None, "tie-a": llm("tie-a")}))
        assert names(await store.expired_rows(1e9)) == ["tie-b", "later"]


@settings(max_examples=80, deadline=None)
@given(rows=tables, cutoff=instants, session_id=texts | st.sampled_from(["s1", "s2"]))
def test_all_stores_answer_alike(rows: list[LLM], cutoff: float, session_id: str) -> None:
    """Whatever is in them and whatever they are asked: the same, and what the interface says."""
    virtual = [row for row in rows if row.kind is Kind.VIRTUAL]
    stale = [row for row in virtual if row.status in (ACTIVE, HIBERNATING) and row.last_heartbeat_at <= cutoff]
    expired = [
        row
        for row in virtual
        if row.status is INACTIVE and row.inactive_since is not None and row.inactive_since <= cutoff
    ]
    own = [row for row in rows if row.session_id == session_id]

    async def use(store: Store) -> None:
        await store.write(batch_of(rows))
        assert await store.rows_of_session(session_id) == tuple(sorted(own, key=lambda x: x.name))
        assert await store.stale_rows(cutoff) == tuple(sorted(stale, key=lambda x: (x.last_heartbeat_at, x.name)))
        assert await store.expired_rows(cutoff) == tuple(sorted(expired, key=lambda x: (x.inactive_since, x.name)))

    for open_store in OPENERS.values():
        in_new_store(open_store, use)


@settings(max_examples=60, deadline=None)
@given(usage=cell_tables, since=hours)
@example(usage={(480_001, "", "a"): Usage(requests=1), (480_000, "k", "a"): Usage(requests=2)}, since=480_001)
def test_usage_is_summed_from_an_hour_on(usage: dict[CellKey, Usage], since: int) -> None:
    """By key and by LLM, sorted, in every store alike; what is before that hour is not in it."""
    expected: tuple[dict[str, Usage], dict[str, Usage]] = ({}, {})
    for (hour, *names_of), each in usage.items():
        if hour >= since:
            for sums, name in zip(expected, names_of, strict=True):
                sums[name] = sums.get(name, Usage()) + each

    async def use(store: Store) -> None:
        await store.write(batch_of(usage=usage))
        for by, sums in zip(("key", "llm"), expected, strict=True):
            found = await store.usage(since, by)  # type: ignore[arg-type]
            assert list(found.items()) == sorted(sums.items())
        assert await store.usage_cells(since) == {cell: each for cell, each in usage.items() if cell[0] >= since}

    for open_store in OPENERS.values():
        in_new_store(open_store, use)


near_now = st.floats(1.7e9, 1.7e9 + 1000)


@settings(max_examples=80, deadline=None)
@given(
    heartbeats=st.lists(near_now, max_size=8),
    now=near_now,
    timeout_s=st.floats(0.001, 500),
    on_the_edge=st.booleans(),
)
def test_the_queries_are_the_sweep(heartbeats: list[float], now: float, timeout_s: float, on_the_edge: bool) -> None:
    """A store that is asked with the sweep's cutoff answers what the sweep decides in memory, to the last bit."""
    if on_the_edge:
        heartbeats = [*heartbeats, now - timeout_s]
    rows = [llm(f"{index}", last_heartbeat_at=at) for index, at in enumerate(heartbeats)]
    rows.sort(key=lambda x: (x.last_heartbeat_at, x.name))
    decision = decide(
        rows, [], [], now=now, heartbeat_timeout_s=timeout_s, inactive_retention_s=timeout_s, deletes=True
    )

    async def use(store: Store) -> None:
        await store.write(batch_of(rows))
        assert tuple(names(await store.stale_rows(now - timeout_s))) == decision.stale

    for open_store in OPENERS.values():
        in_new_store(open_store, use)


async def test_closing_twice_is_fine(open_store: OpenStore, tmp_path: Path) -> None:
    """`aclose` within the block, and again at its end."""
    async with open_store(database_in(tmp_path)) as store:
        await store.write(batch_of([llm()]))
        await store.aclose()
        await store.aclose()
