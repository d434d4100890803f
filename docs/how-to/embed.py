"""A broker inside a program of your own, with a model that is a function. Run it: `python docs/how-to/embed.py`."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import httpx2
import trio

from wakecall import Broker, BrokerConfig, InferRequest, ServeConfig, WakecallError, open_broker, serve


async def shout(request: InferRequest) -> bytes | AsyncIterator[bytes]:
    """The model: it gets the client's request as it came, and answers as an OpenAI-compatible engine would."""
    words = json.loads(request.body)["messages"][-1]["content"].upper().split()
    if request.stream:
        return stream(words)
    message = {"role": "assistant", "content": " ".join(words)}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


async def stream(words: list[str]) -> AsyncIterator[bytes]:
    for word in words:
        choice = {"index": 0, "delta": {"content": word + " "}, "finish_reason": None}
        yield b"data: " + json.dumps({"object": "chat.completion.chunk", "choices": [choice]}).encode() + b"\n\n"
    yield b"data: [DONE]\n\n"


async def wake() -> None:
    """Called once, before the first request. What it raises fails the requests that wait, with its text."""
    print("waking")


def question(text: str, *, stream: bool) -> bytes:
    return json.dumps({"model": "shout", "stream": stream, "messages": [{"role": "user", "content": text}]}).encode()


async def call_from_inside(broker: Broker) -> None:
    """No socket: the request is bytes, the answer is bytes as they come."""
    request = InferRequest("/v1/chat/completions", question("hello from inside", stream=True), stream=True)
    async with broker.infer("shout", request) as reply:
        print("status", reply.status, reply.headers["content-type"])
        async for piece in reply:
            for line in piece.decode().splitlines():
                if line.startswith("data: {"):
                    print("  ", json.loads(line.removeprefix("data: "))["choices"][0]["delta"]["content"])
        await reply.wait_done()  # raises if the answer did not come to a good end


async def call_over_http(broker: Broker) -> None:
    """The same broker on a socket: any OpenAI client can call it now."""
    async with trio.open_nursery() as nursery:
        urls: list[str] = await nursery.start(serve, broker, ServeConfig(port=0))
        async with httpx2.AsyncClient(base_url=urls[0]) as client:
            body = question("hello over http", stream=False)
            answer = await client.post(
                "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
            )
            print("over HTTP:", answer.json()["choices"][0]["message"]["content"])
        nursery.cancel_scope.cancel()


async def main() -> None:
    async with open_broker(config=BrokerConfig(wake_s=30)) as broker:
        async with broker.publish("shout", shout, hibernating=True, on_wake=wake, max_concurrency=4):
            print("the row is", broker.llm("shout").status)
            await call_from_inside(broker)
            print("the row is", broker.llm("shout").status)
            await call_over_http(broker)
        try:
            async with broker.infer("shout", InferRequest("/v1/chat/completions", question("hi", stream=False))):
                pass
        except WakecallError as error:
            print("after its block:", error.code)


if __name__ == "__main__":
    trio.run(main)
