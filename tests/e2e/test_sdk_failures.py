"""The unmodified SDKs, with their retries on, against every way in which a call can fail.

After the head of a stream each raises a proper API error, and one call is one `infer` frame: what may have generated is
never sent again.
"""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
import trio

from tests.e2e.clients import QUESTION
from tests.e2e.generators import closing_generators
from tests.e2e.scripted_engine import EVENT
from tests.e2e.stack import BrokerProcess, open_broker_process, within
from tests.e2e.wire_publisher import WireChannel, WirePublisher, open_wire_publisher

MESSAGE_START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"x","type":"message","role":"assistant",'
    b'"model":"m","content":[],"stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
)
RESPONSE_CREATED = (
    b'event: response.created\ndata: {"type":"response.created","sequence_number":0,"response":{"id":"x",'
    b'"object":"response","created_at":1,"model":"m","output":[],"parallel_tool_calls":true,"tool_choice":"auto",'
    b'"tools":[],"status":"in_progress"}}\n\n'
)


@dataclass(frozen=True)
class SDKCall:
    """One SDK's way to call.

    Attributes:
        first: the first event of a stream of its API.
        errors: what it raises.
        consume: make the call and read its stream to the end, if it is one; `on_event` takes what it hands out.
    """

    first: bytes
    errors: type[Exception]
    consume: Callable[[str, Callable[[Any], None]], Awaitable[None]]


async def chat(url: str, on_event: Callable[[Any], None]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        async with await client.chat.completions.create(model="m", messages=QUESTION, stream=True) as stream:
            async for chunk in stream:
                on_event(chunk)


async def responses(url: str, on_event: Callable[[Any], None]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        async with await client.responses.create(model="m", input="hello", stream=True) as stream:
            async for event in stream:
                on_event(event)


async def messages(url: str, on_event: Callable[[Any], None]) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as client:
        async with client.messages.stream(model="m", messages=QUESTION, max_tokens=5) as stream:
            async for event in stream:
                on_event(event)


async def chat_synchronous(url: str, on_event: Callable[[Any], None]) -> None:
    def use() -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            with client.chat.completions.create(model="m", messages=QUESTION, stream=True) as stream:
                for chunk in stream:
                    trio.from_thread.run_sync(on_event, chunk)

    await trio.to_thread.run_sync(use)


SDKS = {
    "chat": SDKCall(EVENT, openai.APIError, chat),
    "responses": SDKCall(RESPONSE_CREATED, openai.APIError, responses),
    "messages": SDKCall(MESSAGE_START, anthropic.APIError, messages),
    "chat, synchronous": SDKCall(EVENT, openai.APIError, chat_synchronous),
}


async def chat_plain(url: str, on_event: Callable[[Any], None]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        await client.chat.completions.create(model="m", messages=QUESTION)


async def messages_plain(url: str, on_event: Callable[[Any], None]) -> None:
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none") as client:
        await client.messages.create(model="m", messages=QUESTION, max_tokens=5)


PLAIN = (
    SDKCall(b"", openai.APIStatusError, chat_plain),
    SDKCall(b"", anthropic.APIStatusError, messages_plain),
)


@asynccontextmanager
async def open_call(broker: BrokerProcess, sdk: SDKCall) -> AsyncIterator[Call]:
    """A call under way; what came of it is known after the block."""
    call = Call(sdk)
    async with closing_generators(), trio.open_nursery() as nursery:
        nursery.start_soon(call.run, broker.url)
        yield call


class Call:
    """One call of an SDK, its events and its end."""

    def __init__(self, sdk: SDKCall) -> None:
        self.sdk = sdk
        self.events: list[Any] = []
        self.begun = trio.Event()
        self.error: Exception | None = None

    async def run(self, url: str) -> None:
        try:
            await self.sdk.consume(url, self._take)
        except Exception as error:  # what it is, is the question
            self.error = error

    def _take(self, event: Any) -> None:
        self.events.append(event)
        self.begun.set()

    def check(self, code: str) -> None:
        """It raised its SDK's own API error, which names the code; no clean end, no half-parsed event."""
        assert isinstance(self.error, self.sdk.errors), repr(self.error)
        assert not isinstance(self.error, openai.APIConnectionError | anthropic.APIConnectionError), repr(self.error)
        assert code in told(self.error), told(self.error)


def told(error: Exception) -> str:
    """All that an API error says."""
    return f"{error} {getattr(error, 'body', '')} {getattr(error, 'code', '')}"


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncIterator[BrokerProcess]:
    """Its patience is short, so that deadlines and comments come soon; but not so short that an SDK that loads its types at
    its first event, on a machine with much to do, is taken for a publisher who has fallen silent."""
    settings = {"waiting_s": 0.2, "first_byte_s": 3.0, "idle_s": 3.0, "wake_s": 3.0}
    async with open_broker_process(tmp_path / "w.db", **settings) as broker:
        yield broker


Failure = Callable[[WirePublisher, WireChannel, Any, dict[str, Any]], Awaitable[None]]


async def break_off(publisher: WirePublisher, channel: WireChannel, upload: Any, frame: dict[str, Any]) -> None:
    upload.break_off()


async def break_off_within_an_event(
    publisher: WirePublisher, channel: WireChannel, upload: Any, frame: dict[str, Any]
) -> None:
    await upload.send(b'data: {"choices":[{"ind')
    upload.break_off()


async def report(publisher: WirePublisher, channel: WireChannel, upload: Any, frame: dict[str, Any]) -> None:
    assert (await publisher.fail(frame, "the gpu is on fire")).status == 200


async def lose_channel(publisher: WirePublisher, channel: WireChannel, upload: Any, frame: dict[str, Any]) -> None:
    channel.reset()


async def say_goodbye(publisher: WirePublisher, channel: WireChannel, upload: Any, frame: dict[str, Any]) -> None:
    assert (await publisher.goodbye()).status == 204


async def fall_silent(publisher: WirePublisher, channel: WireChannel, upload: Any, frame: dict[str, Any]) -> None:
    """The publisher sends nothing more: the idle deadline."""


AFTER_THE_HEAD: dict[str, tuple[Failure, str]] = {
    "the upload breaks off": (break_off, "publisher_error"),
    "the upload breaks off within an event": (break_off_within_an_event, "publisher_error"),
    "the publisher reports a failure": (report, "the gpu is on fire"),
    "the channel is lost": (lose_channel, "publisher_disconnected"),
    "goodbye": (say_goodbye, "publisher_disconnected"),
    "the publisher pauses for too long": (fall_silent, "deadline_exceeded"),
}


@within(60)
@pytest.mark.parametrize(("failure", "code"), AFTER_THE_HEAD.values(), ids=AFTER_THE_HEAD.keys())
async def test_a_stream_that_fails_raises_an_api_error_and_is_not_retried(
    broker: BrokerProcess, failure: Failure, code: str
) -> None:
    """The head is out and an event read; then it fails. Every SDK, one frame each."""
    for index, sdk in enumerate(SDKS.values()):
        async with open_wire_publisher(broker, "m", session_id=f"s{index}") as (publisher, channel):
            async with open_call(broker, sdk) as call:
                frame = await channel.next("infer")
                async with publisher.open_result(frame) as upload:
                    await upload.send(sdk.first)
                    await call.begun.wait()
                    await failure(publisher, channel, upload, frame)
                    if failure is fall_silent:
                        assert (await channel.next("cancel"))["reason"] == "deadline_exceeded"
            call.check(code)
            assert len(channel.all("infer")) == 1
        await broker.wait_llm("m", status="inactive")
    assert (await broker.metrics())["wakecall_infers_accepted_total"] == len(SDKS)


@within(60)
async def test_a_stream_that_a_stopping_broker_cuts_raises_an_api_error(tmp_path: Path) -> None:
    """`shutting_down`, as an event; what was under way is not sent to the next broker on that port."""
    for sdk in (SDKS["chat"], SDKS["messages"]):
        async with open_broker_process(tmp_path / "w.db", grace_s=0.2) as broker, AsyncExitStack() as stack:
            publisher, channel = await stack.enter_async_context(open_wire_publisher(broker, "m"))
            async with open_call(broker, sdk) as call:
                upload = await stack.enter_async_context(publisher.open_result(await channel.next("infer")))
                await upload.send(sdk.first)
                await call.begun.wait()
                broker.send(signal.SIGTERM)
            call.check("shutting_down")
            assert await broker.wait() == 0


@within(60)
async def test_errors_after_the_waiting_comments_raise_too(broker: BrokerProcess) -> None:
    """The head went out with `: waiting`: whatever comes of the call then has to be told inside the stream."""
    json = b'{"error": {"message": "the model needs more memory", "type": "x", "param": null, "code": null}}'

    async def engine_error(publisher: WirePublisher, frame: dict[str, Any]) -> None:
        assert (await publisher.result(frame, json, status=500)).status == 200

    async def not_a_stream(publisher: WirePublisher, frame: dict[str, Any]) -> None:
        # Its head alone decides, and 410 says so to an upload of which there is more to come.
        assert (await publisher.result(frame, b'{"choices": []}')).status in (200, 410)

    async def nothing(publisher: WirePublisher, frame: dict[str, Any]) -> None:
        """No first byte: the deadline."""

    cases = (
        (engine_error, ("upstream_500", "the model needs more memory")),
        (not_a_stream, ("publisher_error",)),
        (nothing, ("deadline_exceeded",)),
    )
    async with open_wire_publisher(broker, "m") as (publisher, channel):
        for end, codes in cases:
            for sdk in SDKS.values():
                before = len(channel.all("infer"))
                async with open_call(broker, sdk) as call:
                    frame = await channel.next("infer")
                    await wait_head(broker, frame)
                    await end(publisher, frame)
                for code in codes:
                    call.check(code)
                assert call.events == [] or sdk is SDKS["messages"], "a comment is no chunk"
                assert len(channel.all("infer")) == before + 1


async def wait_head(broker: BrokerProcess, frame: dict[str, Any]) -> None:
    """Return once the task is old enough for its client to have been sent comments."""
    while True:
        (task,) = [task for task in await broker.list("tasks") if task["task_id"] == frame["task_id"]]
        if task["age_s"] > 0.45:
            return
        await trio.sleep(0.02)


@within(60)
async def test_a_wake_that_fails_is_tried_once_per_call(broker: BrokerProcess) -> None:
    """Reported or overdue, before or after the comments: one call is one wake, whatever the SDK does about 5xx."""
    async with open_wire_publisher(broker, {"name": "m", "status": "hibernating"}) as (publisher, channel):
        for sdk in SDKS.values():
            async with open_call(broker, sdk) as call:
                wake = await channel.next("wake")
                assert (await publisher.fail(wake, "no power")).status == 200
            call.check("no power")
            async with open_call(broker, sdk) as call:
                await channel.next("wake")
            call.check("wake_timeout")
        assert channel.events.count("wake") == 2 * len(SDKS)
        assert channel.events.count("infer") == 0


@within(60)
async def test_a_plain_call_that_may_have_generated_is_not_retried(broker: BrokerProcess) -> None:
    """503, 502 and the engine's own 500: each is the SDK's status error after one frame."""

    async def lost(publisher: WirePublisher, channel: WireChannel, frame: dict[str, Any]) -> None:
        channel.reset()

    async def half(publisher: WirePublisher, channel: WireChannel, frame: dict[str, Any]) -> None:
        async with publisher.open_result(frame, content_type="application/json") as upload:
            await upload.send(b'{"id": ')
            upload.break_off()

    async def refused(publisher: WirePublisher, channel: WireChannel, frame: dict[str, Any]) -> None:
        assert (await publisher.result(frame, b'{"error": {"message": "out of memory"}}', status=500)).status == 200

    async def busy(publisher: WirePublisher, channel: WireChannel, frame: dict[str, Any]) -> None:
        assert (await publisher.fail(frame, "out of memory", status=507)).status == 200

    cases = (
        (half, 502, "publisher_error"),
        (refused, 500, "out of memory"),
        (busy, 507, "out of memory"),
        (lost, 503, "publisher_disconnected"),
    )
    for sdk in PLAIN:
        async with open_wire_publisher(broker, "m") as (publisher, channel):
            for count, (end, status, code) in enumerate(cases, 1):
                async with open_call(broker, sdk) as call:
                    await end(publisher, channel, await channel.next("infer"))
                call.check(code)
                assert getattr(call.error, "status_code", None) == status
                assert len(channel.all("infer")) == count
        await broker.wait_llm("m", status="inactive")
