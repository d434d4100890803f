"""What the broker counts of a real engine's answers is what the SDKs read in them."""

from __future__ import annotations

from pathlib import Path

import anthropic
import openai

from tests.e2e.engine import Engine
from tests.e2e.stack import BrokerProcess, open_broker_process, open_publisher_process, within

QUESTION = [{"role": "user", "content": "How is a machine called that nobody can call?"}]
NAME = "noise"


class Counted:
    """What the broker has counted, each time that it is asked."""

    def __init__(self, broker: BrokerProcess) -> None:
        self._broker = broker
        self._before = (0, 0, 0, 0)

    async def more(self) -> tuple[int, int, int, int]:
        """Requests, unknown, tokens in and out since the last time."""
        # An SDK has read enough at the last event, which is before the upload has ended.
        await self._broker.wait_idle()
        found = (await self._broker.http.get("/admin/v1/usage?by=llm&since=48h")).raise_for_status().json()["data"]
        [row] = [row for row in found if row["llm"] == NAME]
        now = (row["requests"], row["unknown"], row["tokens_in"], row["tokens_out"])
        more = tuple(after - before for after, before in zip(now, self._before, strict=True))
        self._before = now
        return more  # type: ignore[return-value]


@within(60)
async def test_usage_is_what_the_engine_says(tmp_path: Path, engine: Engine) -> None:
    """Plain and streamed, of every API that the engine has; a stream that is not asked to say it is unknown."""
    async with (
        open_broker_process(tmp_path / "w.db") as broker,
        open_publisher_process(tmp_path, broker.url, f"{engine.base_url}/v1"),
        openai.AsyncOpenAI(base_url=f"{broker.url}/v1", api_key="none") as sdk,
        anthropic.AsyncAnthropic(base_url=broker.url, api_key="none") as other,
    ):
        await broker.wait_llm(NAME, routable=True)
        counted = Counted(broker)

        chat = await sdk.chat.completions.create(model=NAME, messages=QUESTION, max_tokens=7)
        assert chat.usage is not None
        assert await counted.more() == (1, 0, chat.usage.prompt_tokens, 7)

        response = await sdk.responses.create(model=NAME, input="hello", max_output_tokens=16)
        assert response.usage is not None
        assert await counted.more() == (1, 0, response.usage.input_tokens, response.usage.output_tokens)

        message = await other.messages.create(model=NAME, messages=QUESTION, max_tokens=9)
        cached = (message.usage.cache_read_input_tokens or 0) + (message.usage.cache_creation_input_tokens or 0)
        assert await counted.more() == (1, 0, message.usage.input_tokens + cached, message.usage.output_tokens)

        async with await sdk.chat.completions.create(
            model=NAME, messages=QUESTION, max_tokens=20, stream=True, stream_options={"include_usage": True}
        ) as stream:
            said = [chunk.usage async for chunk in stream if chunk.usage is not None][-1]
        assert await counted.more() == (1, 0, said.prompt_tokens, said.completion_tokens)

        async with await sdk.chat.completions.create(
            model=NAME, messages=QUESTION, max_tokens=20, stream=True
        ) as silent:
            assert [chunk async for chunk in silent if chunk.usage is not None] == []
        assert await counted.more() == (1, 1, 0, 0)

        async with await sdk.responses.create(model=NAME, input="hello", max_output_tokens=16, stream=True) as events:
            [last] = [event.response async for event in events if event.type == "response.completed"]
        assert last.usage is not None
        assert await counted.more() == (1, 0, last.usage.input_tokens, last.usage.output_tokens)

        async with other.messages.stream(model=NAME, messages=QUESTION, max_tokens=11) as texts:
            whole = await texts.get_final_message()
        cached = (whole.usage.cache_read_input_tokens or 0) + (whole.usage.cache_creation_input_tokens or 0)
        assert await counted.more() == (1, 0, whole.usage.input_tokens + cached, whole.usage.output_tokens)
        assert whole.usage.output_tokens > 0
