"""What a caller says of his call in headers, what tells his conversation, and what he hears while he waits."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import trio

from tests.http.served import JSON, Served, WirePublisher, open_served, wait_until
from tests.http.test_app_keys import Keyed, Publishing, keyed
from tests.http.test_app_leaving import NoAnswer
from wakecall.config import BrokerConfig
from wakecall.http.client import RELAYED
from wakecall.http.relay import EventsBody, pass_on
from wakecall.models import InferRequest

__all__ = ["keyed"]

PATH = "/v1/chat/completions"
CALL = {"model": "qwen", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**CALL, "stream": True}
PRIORITY, TIMEOUT = "x-wakecall-priority", "x-wakecall-timeout-s"


async def request_of(served: Served, publisher: WirePublisher, body: Any, *headers: str, path: str = PATH) -> Any:
    """A call as the broker holds it, and its frame."""
    async with served.calling(body, path, JSON, *headers):
        frame = await publisher.next("infer")
        request = served.broker.task_request(frame.task_id)
    await publisher.next("cancel")
    return request, frame


# Headers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RELAYED)
async def test_class_and_time_are_read_on_every_relayed_path_and_stay_here(served: Served, path: str) -> None:
    """No publisher hears of them, nor of what tells the conversation."""
    async with served.publishing() as publisher:
        said = f"{PRIORITY}: batch", f"{TIMEOUT}: 1234.5", "accept: */*"
        request, frame = await request_of(served, publisher, CALL, *said, path=path)
        assert isinstance(request, InferRequest)
        assert (request.priority, request.timeout_s) == ("batch", 1234.5)
        assert request.affinity is not None
        assert frame.data["headers"] == {"content-type": "application/json", "accept": "*/*"}
        told = json.dumps({name: value for name, value in frame.data.items() if name not in ("body", "deadline_s")})
        for hidden in ("wakecall", "batch", "1234", "priority", "affinity", request.affinity.hex()):
            assert hidden not in told
        assert 0 < frame.data["deadline_s"] <= 1234.5


async def test_left_out_a_call_is_interactive_and_has_the_time_that_there_is(served: Served) -> None:
    async with served.publishing() as publisher:
        request, _ = await request_of(served, publisher, CALL)
        assert (request.priority, request.timeout_s) == ("interactive", None)
        request, _ = await request_of(served, publisher, CALL, f"{PRIORITY}: interactive", f"{TIMEOUT}: 86400")
        assert (request.priority, request.timeout_s) == ("interactive", 86_400)


@pytest.mark.parametrize("seconds", ["0.5", "1", "10.25", "9999", "10000", "86399.999", "86400", "86400.00"])
async def test_a_time_is_a_plain_number_of_seconds(served: Served, seconds: str) -> None:
    async with served.publishing() as publisher:
        request, _ = await request_of(served, publisher, CALL, f"{TIMEOUT}: {seconds}")
        assert request.timeout_s == float(seconds)


@pytest.mark.parametrize(
    ("header", "values"),
    [
        (PRIORITY, ["", "Batch", "batch, interactive", "low", "1", "interactive;q=1", "b\xe4tch"]),
        (
            TIMEOUT,
            # Nothing, zero, what is negative, what is not finite, other notations, other units, too much.
            [
                "",
                "0",
                "0.000",
                "-1",
                "+1",
                "nan",
                "NaN",
                "inf",
                "Infinity",
                "1e3",
                "0x10",
                "1,5",
                "1_000",
                ".5",
                "5.",
                "30s",
                "007",
                "1 2",
                "\xb2",
                "86400.1",
                "86400.000001",
                "86401",
                "90000",
                "100000",
            ],
        ),
    ],
)
async def test_anything_else_is_400_and_names_the_header(served: Served, header: str, values: list[str]) -> None:
    async with served.publishing():
        for value in [*values, "9" * 400, "1." + "0" * 400]:
            answer = await served.call(CALL, PATH, JSON, f"{header}: {value}")
            assert (answer.status, answer.code) == (400, "invalid_request"), value
            assert answer.json["error"]["param"] == header
        for value in ("batch", "1"):
            twice = await served.call(CALL, PATH, JSON, f"{header}: {value}", f"{header}: {value}")
            assert (twice.status, twice.json["error"]["param"]) == (400, header)
        assert served.broker.statistics().accepted == 0


async def test_a_bad_header_is_refused_before_the_body_is_read(served: Served) -> None:
    answer = await served.call(b"{", PATH, JSON, f"{PRIORITY}: no")
    assert (answer.code, answer.json["error"]["param"]) == ("invalid_request", PRIORITY)


async def test_elsewhere_the_headers_mean_nothing(served: Served) -> None:
    for target in ("/v1/models", "/admin/v1/llms", "/healthz"):
        assert (await served.ask("GET", target, f"{PRIORITY}: no", f"{TIMEOUT}: no")).status == 200


async def test_the_callers_own_time_ends_his_call(served: Served) -> None:
    async with served.publishing({"name": "qwen", "max_concurrency": 1}) as publisher, served.calling(CALL):
        await publisher.next("infer")
        late = await served.call(CALL, PATH, JSON, f"{TIMEOUT}: 0.2")
        assert (late.status, late.code) == (504, "deadline_exceeded")
        assert late.headers["x-should-retry"] == "false"


async def test_the_callers_own_time_rules_over_the_answer_too(served: Served) -> None:
    async with served.publishing() as publisher, served.calling(CALL, PATH, JSON, f"{TIMEOUT}: 0.3") as client:
        frame = await publisher.next("infer")
        assert frame.data["deadline_s"] <= 0.3
        assert (await publisher.next("cancel")).data["reason"] == "deadline_exceeded"
        answer = await client.wire.read_answer("POST")
        assert (answer.status, answer.json["error"]["phase"]) == (504, "total")


# Conversations ------------------------------------------------------------------------------------------------------


async def test_calls_of_one_conversation_have_something_in_common(keyed: Keyed) -> None:
    """And with another key's nothing, though they say the same."""
    keyed.secrets["other"] = (await keyed.served.broker.create_key("client")).secret
    turn = {"role": "assistant", "content": "hi"}, {"role": "user", "content": "more"}
    longer = {"model": "qwen", "temperature": 0, "messages": [*CALL["messages"], *turn]}
    other = {"model": "qwen", "messages": [{"role": "user", "content": "Hello"}]}
    affinities = []
    owner = next(view.key.owner for view in keyed.served.broker.key_views() if view.key.role == "publisher")
    async with Publishing(keyed) as publisher:
        for whose, body in (("client", CALL), ("client", longer), ("client", other), ("other", CALL)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keyed.ask, whose, "POST", PATH, body)
                frame = await publisher.next("infer")
                affinities.append(keyed.served.broker.task_request(frame.task_id, owner=owner).affinity)
                await publisher.answer(frame, {})
    assert affinities[0] == affinities[1]
    assert len({None, *affinities}) == 4


# Waiting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "said"),
    [
        (None, ": waiting"),
        ((3, 11.2), ": waiting; position 3, about 12 s"),
        ((1, 0.0), ": waiting; position 1, about 1 s"),
        ((1000, None), ": waiting; position 1000"),
    ],
)
async def test_the_comment_says_what_is_known(
    autojump_clock: trio.testing.MockClock, place: tuple[int, float | None] | None, said: str
) -> None:
    infer: Any = NoAnswer()
    asked: list[Any] = []

    def place_of(infer: Any) -> tuple[int, float | None] | None:
        asked.append(infer)
        return place

    config, exchange = BrokerConfig(), object()
    for path in (PATH, "/v1/messages"):
        answer = await pass_on(infer, exchange, path, config, wants_stream=True, place_of=place_of)  # type: ignore[arg-type]
        body = answer.response
        assert isinstance(body, EventsBody)
        expected = f"{said}\n\n".encode() if path == PATH else b'event: ping\ndata: {"type": "ping"}\n\n'
        assert [await anext(body) for _ in range(2)] == [expected] * 2
        await body.aclose()
    assert asked == [infer, infer]


async def test_who_waits_in_line_hears_his_place_and_who_does_not_hears_none() -> None:
    config = BrokerConfig(waiting_s=0.05)
    async with open_served(config) as served, served.publishing({"name": "qwen", "max_concurrency": 1}) as publisher:
        async with served.calling(STREAM) as first:
            frame = await publisher.next("infer")
            async with served.calling(STREAM) as second:
                await wait_until(lambda: served.broker.statistics().waiting == 1)
                async with served.calling(STREAM) as third:
                    for client, place in ((first, None), (second, 1), (third, 2)):
                        await client.read_head()
                        comment = await client.piece()
                        if place is None:
                            assert comment == b": waiting\n\n"
                        else:
                            assert re.fullmatch(rb": waiting; position %d(, about \d+ s)?\n\n" % place, comment)
                waiting = [each for each in await tasks(served) if each["state"] == "queued"]
                assert waiting[0]["position"] == 1
                assert waiting[0]["estimate_s"] is None or waiting[0]["estimate_s"] >= 0
                sent = [each for each in await tasks(served) if each["state"] == "sent"]
                assert [(each["position"], each["estimate_s"]) for each in sent] == [(None, None)]
            await publisher.answer(frame, b"data: 1\n\n", "content-type: text/event-stream")
            text, cut = await first.rest()
            assert text.replace(b": waiting\n\n", b"") == b"data: 1\n\n"
            assert not cut


async def tasks(served: Served) -> Any:
    return (await served.ask("GET", "/admin/v1/tasks")).json["data"]
