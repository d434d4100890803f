"""`GET /v1/models`: on its caller's account, and never long at a time."""

from __future__ import annotations

import msgspec
import pytest
import trio.testing

from tests.http.served import Served, head, open_served, wait_until
from wakecall.http.answers import StreamBody
from wakecall.http.listing import ITEMS_AT_A_TIME, list_answer

MANY = ITEMS_AT_A_TIME * 3 + 7


async def fill(served: Served) -> list[str]:
    names = [f"m{number:04d}" for number in range(MANY)]
    for name in names:
        await served.broker.put_public_llm(name, type="openai", model="x" * 500, url="https://api.example/v1")
    return names


@pytest.mark.parametrize("kept", ["all", "some", "the last", "none"])
@pytest.mark.parametrize("count", [0, 1, ITEMS_AT_A_TIME, ITEMS_AT_A_TIME + 1, 2 * ITEMS_AT_A_TIME, MANY])
async def test_a_list_is_made_in_pieces(count: int, kept: str) -> None:
    """Whatever is left out of it, it is the same JSON; no piece looks at more than so many, and none is empty."""
    wanted = {"all": range(count), "some": range(3, count, 7), "the last": range(count)[-1:], "none": range(0)}[kept]
    seen: list[int] = []
    released = 0

    def show(item: int) -> object | None:
        seen.append(item)
        return {"id": item} if item in wanted else None

    def release() -> None:
        nonlocal released
        released += 1

    answer = list_answer(range(count), show, lambda: release)
    body = answer.response
    if count <= ITEMS_AT_A_TIME:
        text = await answer.get_data()
        assert answer.headers["content-length"] == str(len(text))
    else:
        assert isinstance(body, StreamBody)
        pieces = []
        async with body as stream:
            while True:
                before = len(seen)
                piece = await anext(stream, b"")
                assert len(seen) - before <= ITEMS_AT_A_TIME
                if not piece:
                    break
                pieces.append(piece)
        assert released == 1
        text = b"".join(pieces)
    assert seen == list(range(count))
    assert msgspec.json.decode(text) == {"data": [{"id": each} for each in wanted], "object": "list"}


async def test_a_long_list_is_whole_and_shows_each_key_its_own() -> None:
    async with open_served() as served:
        names = await fill(served)
        assert [each["id"] for each in (await served.ask("GET", "/v1/models")).json["data"]] == names
        key = f"x-api-key: {(await served.broker.create_key('client', llms=['*7', 'm0100'])).secret}"
        answer = await served.ask("GET", "/v1/models", key)
        assert [each["id"] for each in answer.json["data"]] == [n for n in names if n.endswith("7") or n == "m0100"]
        async with served.server.connect() as wire:
            await wire.send(head("HEAD", "/v1/models", key) + head("GET", "/v1/models/m0007", key))
            assert (await wire.read_answer("HEAD")).body == b""
            assert (await wire.read_answer()).json["id"] == "m0007"


async def test_lists_count_against_the_rate_of_their_key(mock_clock: trio.testing.MockClock) -> None:
    """The list and a model of it, and each answer says how the rate stands; the next one is 429, and none of the work."""
    async with open_served(patience_s=1000) as served:
        await served.broker.put_public_llm("gpt", type="openai", model="gpt", url="https://api.example/v1")
        key = f"x-api-key: {(await served.broker.create_key('client', rpm=2)).secret}"
        for left, target in ((1, "/v1/models"), (0, "/v1/models/gpt")):
            answer = await served.ask("GET", target, key)
            assert answer.status == 200
            assert answer.headers["x-ratelimit-limit-requests"] == "2"
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
        for target in ("/v1/models", "/v1/models/gpt"):
            refused = await served.ask("GET", target, key)
            assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
            assert refused.headers["retry-after"] == "30"
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        mock_clock.jump(30)
        assert (await served.ask("GET", "/v1/models", key)).status == 200


async def test_a_long_list_is_under_way_until_its_client_has_it_or_leaves() -> None:
    """Else whoever reads none of them had as many at a time as he liked."""
    async with open_served() as served:
        await fill(served)
        made = await served.broker.create_key("client", max_in_flight=1)
        key = f"x-api-key: {made.secret}"

        def in_flight() -> int:
            return sum(view.in_flight for view in served.broker.key_views())

        async with served.server.connect(receive_buffer=4096) as wire:
            for _ in range(100):
                await wire.send(head("GET", "/v1/models", key))
            await wait_until(lambda: in_flight() == 1)
            await trio.testing.wait_all_tasks_blocked(0.05)
            assert in_flight() == 1
            assert (await served.ask("GET", "/v1/models", key)).code == "rate_limit_exceeded"
        await wait_until(lambda: in_flight() == 0)
        assert (await served.ask("GET", "/v1/models", key)).status == 200
        await wait_until(lambda: in_flight() == 0)
