"""Callers of all kinds, each of which gets one outcome of the protocol's table, or goes before it comes."""

from __future__ import annotations

import contextlib
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import trio

from tests.e2e.stack import BrokerProcess, connect
from tests.faultproxy import Fault, open_fault_proxy
from tests.http.wire import Answer, request_bytes

#: Each call is done within its deadlines, and then some.
PATIENCE_S = 40.0
#: More than any infer may take here, and the stall of a peer on top of it.
SLOWLY_S = 20.0
#: What may come of a call though it is a good one: its publisher is restarted, evicted, cut off, asleep, busy.
FATES = {
    (200, ""), (404, "model_not_found"), (429, "queue_full"), (502, "publisher_error"), (507, "publisher_error"),
    (503, "publisher_disconnected"), (503, "model_offline"), (503, "wake_failed"),
    (504, "wake_timeout"), (504, "deadline_exceeded"),
}  # fmt: skip


class Unexpected(AssertionError):
    """An answer that is not the protocol's."""


class Callers:
    """What the calls share.

    Args:
        broker: whom they call.
        models: whom they ask for: one of these.
        dice: decides.

    Attributes:
        outcomes: how often each came.
    """

    def __init__(self, broker: BrokerProcess, models: list[str], dice: random.Random) -> None:
        self.broker = broker
        self.models = models
        self.outcomes: Counter[str] = Counter()
        self._dice = dice
        self._kinds: dict[Callable[[], Awaitable[None]], int] = {
            self.plain: 30,
            self.stream: 25,
            self.large: 4,
            self.leave: 12,
            self.read_slowly: 3,
            self.fail: 8,
            self.mistake: 6,
            self.lose_connection: 4,
        }

    async def run(self) -> None:
        """Call until cancelled."""
        while True:
            (kind,) = self._dice.choices(list(self._kinds), list(self._kinds.values()))
            with trio.fail_after(PATIENCE_S):
                await kind()
            await trio.sleep(self._dice.expovariate(20))

    async def plain(self) -> None:
        await self._ask(act="plain")

    async def stream(self) -> None:
        await self._ask(act="stream", stream=True)

    async def large(self) -> None:
        """A body that is fetched, and one that comes back."""
        size = self._dice.randrange(70_000, 2_000_000)
        await self._ask(act="large", text="x" * size, stream=self._dice.random() < 0.3)

    async def fail(self) -> None:
        """The engine's own error, or an answer that breaks off in the middle."""
        await self._ask(act=self._dice.choice(["error", "break"]), stream=self._dice.random() < 0.5)

    async def leave(self) -> None:
        """Go at any time, plain and streamed."""
        with trio.move_on_after(self._dice.uniform(0, 0.3)) as patience:
            await self._ask(act="slow", stream=self._dice.random() < 0.5)
        if patience.cancelled_caught:
            self.outcomes["left"] += 1

    async def read_slowly(self) -> None:
        """Take a long stream in sips, and sometimes stand still until the broker has had enough."""
        async with connect(self.broker.port, receive_buffer=4096) as wire:
            # Closed at its end, so that a refusal, which is short, ends too.
            await wire.send(self._request(act="long", stream=True).replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
            with trio.move_on_after(SLOWLY_S) as patience:
                for _ in range(self._dice.randrange(5, 40)):
                    if not await wire.read_some(4096):
                        break
                    await trio.sleep(0.02)
            if patience.cancelled_caught:
                # A kernel that gives up a peer after TCP_USER_TIMEOUT tells it nothing. The broker must have let go.
                if self.broker.holds(wire.stream.socket.getsockname()):
                    raise Unexpected("a slow reader was left without a byte")
                self.outcomes["read slowly, was given up"] += 1
                return
            if self._dice.random() < 0.2:
                await trio.sleep(5)
        self.outcomes["read slowly, then left"] += 1

    async def mistake(self) -> None:
        """Bodies that no broker can take."""
        body, expected = self._dice.choice([
            (b'{"model": "nobody"}', (404, "model_not_found")),
            (b'{"model": "live-0", "stream": ', (400, "invalid_json")),
            (b'{"stream": true}', (400, "model_required")),
            (b'{"model": "live-0", "Model": "live-1"}', (400, "ambiguous_model")),
        ])  # fmt: skip
        answer = await self._send(_post(self.broker, body))
        self._check(answer, {expected})

    async def lose_connection(self) -> None:
        """A cut at any byte of the request or of the answer."""
        direction, most = self._dice.choice([("up", 400), ("down", 3000)])
        kind = self._dice.choice(["fin", "rst"])
        async with open_fault_proxy(self.broker.port) as proxy, connect(proxy.port) as wire:
            proxy.strike(Fault(direction, kind, self._dice.randrange(most)))  # type: ignore[arg-type]
            with contextlib.suppress(trio.BrokenResourceError):
                await wire.send(self._request(act="stream", stream=True))
                await wire.read_answer("POST")
        self.outcomes["connection lost"] += 1

    def _request(self, *, act: str, stream: bool = False, text: str = "") -> bytes:
        members = {"model": self._dice.choice(self.models), "act": act, "stream": stream, "text": text}
        return _post(self.broker, json.dumps(members).encode())

    async def _ask(self, *, act: str, stream: bool = False, text: str = "") -> None:
        try:
            answer = await self._send(self._request(act=act, stream=stream, text=text))
        except trio.BrokenResourceError:
            # Refused early, and sent on for longer than the broker listens.
            self.outcomes["refused during its upload"] += 1
            return
        self._check(answer, FATES | ({(500, "engine")} if act == "error" else set()))

    async def _send(self, request: bytes) -> Answer:
        async with connect(self.broker.port) as wire:
            await wire.send(request)
            return await wire.read_answer("POST")

    def _check(self, answer: Answer, expected: set[tuple[int, str]]) -> None:
        if answer.is_cut:
            _, error, event = answer.body.partition(b"event: error\ndata: ")
            if not error or answer.status != 200:
                raise Unexpected(f"cut without a word: {answer.status} {answer.body[-200:]!r}")
            outcome = 200, f"then {json.loads(event)['error']['code']}"
            expected = {(200, f"then {code}") for _, code in expected | {(500, "upstream_500")}}
        elif answer.status >= 400:
            outcome = answer.status, json.loads(answer.body)["error"]["code"]
        else:
            outcome = answer.status, ""
        if outcome not in expected:
            raise Unexpected(f"{outcome}: {answer.body[:300]!r}")
        self.outcomes[" ".join(str(each) for each in outcome if each)] += 1


def _post(broker: BrokerProcess, body: bytes) -> bytes:
    host = f"127.0.0.1:{broker.port}"
    return request_bytes("POST", "/v1/chat/completions", "content-type: application/json", body=body, host=host)
