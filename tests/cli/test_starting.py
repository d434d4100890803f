"""How `serve` starts: what it does with the garbage collector, that nobody who embeds a broker has it done to him, and that
it can be stopped before it is there."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import trio

from wakecall import BrokerConfig, MemoryStore, ServeConfig, open_broker
from wakecall.cli import serve
from wakecall.cli.serve import _frozen_start
from wakecall.models import Snapshot


@pytest.fixture
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_what_was_there_at_the_start_is_never_gone_through_again() -> None:
    with _frozen_start():
        assert not gc.isenabled()
        made: list[object] = [[]]
        made.append(made)
    assert gc.isenabled()
    assert not any(each is made for each in gc.get_objects())
    assert gc.get_freeze_count()


@pytest.mark.usefixtures("thawed")
def test_a_start_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ValueError, match="no"), _frozen_start():
        raise ValueError("no")
    assert gc.isenabled()


@pytest.mark.usefixtures("thawed")
async def test_an_embedders_collector_is_left_alone() -> None:
    before = gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()
    async with open_broker():
        assert (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()) == before


@pytest.mark.usefixtures("thawed")
async def test_it_can_be_stopped_before_it_has_read_what_there_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Endless(MemoryStore):
        async def load(self) -> Snapshot:
            os.kill(os.getpid(), signal.SIGTERM)
            await trio.sleep_forever()
            raise AssertionError

    @asynccontextmanager
    async def open_endless(path: str) -> AsyncIterator[MemoryStore]:
        yield Endless()

    monkeypatch.setattr(serve, "open_sqlite_store", open_endless)
    with trio.fail_after(10):
        await serve._run(ServeConfig(port=0), BrokerConfig(), "some.db")
    assert "listens" not in capsys.readouterr().out
