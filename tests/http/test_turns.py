"""Whose large body is looked into next."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from tests.http.served import JSON, as_bytes, open_served, wait_until
from wakecall.http import calls, client
from wakecall.http.turns import Turns


class Stage:
    """Turns that each last until `end` is called, and the order in which they were had."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.turns = Turns()
        self.had: list[str] = []
        self._nursery = nursery
        self._end = trio.Event()

    async def ask(self, who: str) -> trio.CancelScope:
        """`who` is a key's letter, and a number. Back once he waits, or has the turn."""
        scope = trio.CancelScope()

        async def have() -> None:
            with scope:
                async with self.turns.turn(who[0]):
                    self.had.append(who)
                    self._end = trio.Event()
                    await self._end.wait()

        self._nursery.start_soon(have)
        await trio.testing.wait_all_tasks_blocked()
        return scope

    async def end(self) -> None:
        self._end.set()
        await trio.testing.wait_all_tasks_blocked()


async def run(use: Callable[[Stage], Any]) -> Stage:
    async with trio.open_nursery() as nursery:
        stage = Stage(nursery)
        await use(stage)
        nursery.cancel_scope.cancel()
    assert stage.turns.waiting == 0
    with trio.fail_after(1):
        async with stage.turns.turn("x"):
            pass
    return stage


async def test_the_line_goes_round_the_keys() -> None:
    """Another key waits for the one that is under way, however many of that one's came before; in a key: first come."""

    async def use(stage: Stage) -> None:
        for who in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
            await stage.ask(who)
        for _ in range(2):
            await stage.end()
        await stage.ask("d1")
        for _ in range(5):
            await stage.end()

    assert (await run(use)).had == ["a1", "b1", "c1", "a2", "b2", "d1", "a3", "a4"]


async def test_who_is_cancelled_leaves_the_line() -> None:
    """The one with the turn hands it on; the others go from where they wait, the last of a key with its line."""

    async def use(stage: Stage) -> None:
        scopes = {who: await stage.ask(who) for who in ("a1", "a2", "b1", "c1", "c2")}
        for who in ("b1", "c1"):
            scopes[who].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert stage.turns.waiting == 2
        scopes["a1"].cancel()
        await trio.testing.wait_all_tasks_blocked()
        await stage.end()

    assert (await run(use)).had == ["a1", "c2", "a2"]


@pytest.mark.parametrize("seed", range(20))
async def test_no_two_have_the_turn_and_nobody_is_forgotten(seed: int, autojump_clock: trio.testing.MockClock) -> None:
    """Whoever comes, leaves and is cancelled when."""
    chance = random.Random(seed)
    turns, holders, done = Turns(), 0, 0

    async def one(key: int, delay_s: float, patience_s: float) -> None:
        nonlocal holders, done
        await trio.sleep(delay_s)
        with trio.move_on_after(patience_s):
            async with turns.turn(key):
                assert holders == 0
                holders += 1
                try:
                    await trio.sleep(0.1)
                finally:
                    holders -= 1
        done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(one, chance.randrange(4), chance.randrange(20) / 10, chance.randrange(30) / 10)
    assert (done, turns.waiting) == (100, 0)
    with trio.fail_after(1):
        async with turns.turn(0):
            pass


async def test_another_keys_body_waits_for_the_one_that_is_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight large ones of one key are there before it. A publisher's register is in the same line, and has its turn too."""
    begun, go = trio.Event(), threading.Semaphore(0)
    seen: list[str] = []
    token = trio.lowlevel.current_trio_token()

    def slow(look: Any) -> Any:
        def looked(body: bytes, *others: Any) -> Any:
            seen.append(str(body[2:10], "ascii"))
            token.run_sync_soon(begun.set)
            assert go.acquire(timeout=10)
            return look(body, *others)

        return looked

    def large(mark: str) -> bytes:
        return as_bytes({mark.ljust(8, "-"): "x" * 300_000, "model": "nobody"})

    monkeypatch.setattr(client, "sniff", slow(client.sniff))
    monkeypatch.setattr(calls, "decode", slow(calls.decode))
    async with open_served() as served:
        keys = {
            name: f"x-api-key: {(await served.broker.create_key(role)).secret}"
            for name, role in (("hostile", "client"), ("other", "client"), ("publisher", "publisher"))
        }
        async with trio.open_nursery() as nursery:

            async def call(name: str, mark: str) -> None:
                method, target = ("POST", "/v1/chat/completions")
                if name == "publisher":
                    method, target = "PUT", "/publisher/v1/sessions/laptop"
                answer = await served.ask(method, target, keys[name], JSON, body=large(mark))
                assert answer.status in (400, 404)

            async def send(name: str, mark: str, in_line: int) -> None:
                nursery.start_soon(call, name, mark)
                await wait_until(lambda: calls.turns_of_the_loop().waiting == in_line)

            nursery.start_soon(call, "hostile", "hostile0")
            await begun.wait()
            for index in range(1, 8):
                await send("hostile", f"hostile{index}", index)
            await send("other", "other", 8)
            await send("publisher", "register", 9)
            for _ in range(10):
                go.release()
        assert seen[:4] == ["hostile0", "other---", "register", "hostile1"]
        assert len(seen) == 10
