"""What the engine of `wakecall demo` answers: a request's bytes in, a `Reply` out. No socket, no Trio."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import secrets
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

MODEL = "wakecall-demo"
DIMENSIONS = 64
QUOTED = 200
"""Characters of the question that the answer repeats at the most."""

encode = msgspec.json.encode


class Part(msgspec.Struct):
    """A piece of a message's content; what is no text (an image, a tool's result) counts as none."""

    type: str = "text"
    text: str = ""


class Message(msgspec.Struct):
    role: str
    content: str | list[Part] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return " ".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ChatRequest(msgspec.Struct):
    """`POST /v1/chat/completions` and `/v1/messages`: the members that change the answer; the rest is ignored."""

    messages: list[Message]
    model: str = MODEL
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    def question(self) -> str:
        return next((message.text() for message in reversed(self.messages) if message.role == "user"), "")


class CompletionRequest(msgspec.Struct):
    """`POST /v1/completions`."""

    prompt: str
    model: str = MODEL
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None


class EmbeddingRequest(msgspec.Struct):
    """`POST /v1/embeddings`."""

    input: str | list[str]
    model: str = MODEL
    encoding_format: Literal["float", "base64"] = "float"


@dataclass(frozen=True)
class Reply:
    """An answer as it will go out.

    It is known as a whole before its first byte goes out, so it is plain data: whoever sends it sets the pace.

    Attributes:
        body: its parts, each with the number of words that have to be "thought of" before it is sent.
    """

    body: list[tuple[int, bytes]]
    status: int = 200
    content_type: bytes = b"application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True)
class Answer:
    """The words of one answer, and how many words (its tokens) the question had."""

    words: list[str]
    prompt_tokens: int
    cut: bool

    @property
    def text(self) -> str:
        return "".join(self.words)


def split_words(text: str) -> list[str]:
    """The words of a text, each with the white space before it: joined, they are the text again."""
    return re.findall(r"\s*\S+", text)


def think(question: str, max_tokens: int | None) -> Answer:
    """The answer to a question.

    Args:
        question: the user's words.
        max_tokens: how many words it may have; `None` for no limit.
    """
    quoted = " ".join(question.split())
    if len(quoted) > QUOTED:
        quoted = f"{quoted[:QUOTED]}…"
    asked = f"You asked: “{quoted}”" if quoted else "You asked nothing"
    words = split_words(
        "You called a machine that cannot be called: its publisher dialled out to the broker and held the line, your"
        " request came down that line, and these words go back up to you one by one. "
        f"{asked}, and the honest answer is that I do not know: I am Wakecall's demo engine, a small program and no"
        " language model. Publish a real one in my place, and it will answer you the same way."
    )
    limit = len(words) if max_tokens is None else max(1, max_tokens)
    return Answer(words[:limit], len(question.split()), cut=limit < len(words))


def new_id(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def sse(data: dict[str, Any], event: str | None = None) -> bytes:
    """One event of a stream, as the SSE standard has it."""
    return (b"event: " + event.encode() + b"\n" if event else b"") + b"data: " + encode(data) + b"\n\n"


def plain(value: dict[str, Any], *, words: int = 0) -> Reply:
    return Reply([(words, encode(value))])


def stream(before: Iterable[bytes], words: Iterable[bytes], after: Iterable[bytes]) -> Reply:
    body = [(0, b"".join(before)), *((1, event) for event in words), (0, b"".join(after))]
    return Reply(body, content_type=b"text/event-stream", headers=((b"cache-control", b"no-store"),))


def usage_of(answer: Answer) -> dict[str, int]:
    prompt, completion = answer.prompt_tokens, len(answer.words)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def openai_answer(
    request: ChatRequest | CompletionRequest,
    answer: Answer,
    head: dict[str, Any],
    whole: dict[str, Any],
    piece: Callable[[str | None], dict[str, Any]],
) -> Reply:
    """An answer of OpenAI's API (https://platform.openai.com/docs/api-reference/chat), plain or streamed.

    Args:
        head: members that the answer and each of its chunks share.
        whole: the plain answer's choice, without its `index` and `finish_reason`.
        piece: a chunk's choice likewise, from a word; `None` for one without any.
    """
    reason = "length" if answer.cut else "stop"
    head = {**head, "created": int(time.time()), "model": request.model}
    if not request.stream:
        choice = {"index": 0, **whole, "finish_reason": reason}
        return plain({**head, "choices": [choice], "usage": usage_of(answer)}, words=len(answer.words))
    with_usage = request.stream_options is not None and bool(request.stream_options.include_usage)

    def chunk(word: str | None, finish_reason: str | None = None) -> bytes:
        return sse({**head, "choices": [{"index": 0, **piece(word), "finish_reason": finish_reason}]})

    after = [chunk(None, reason)]
    if with_usage:
        after.append(sse({**head, "choices": [], "usage": usage_of(answer)}))
    return stream([chunk("")], [chunk(word) for word in answer.words], [*after, b"data: [DONE]\n\n"])


def chat(body: bytes) -> Reply:
    request = msgspec.json.decode(body, type=ChatRequest)
    answer = think(request.question(), request.max_completion_tokens or request.max_tokens)
    kind = "chat.completion.chunk" if request.stream else "chat.completion"

    def delta(word: str | None) -> dict[str, Any]:
        if word is None:
            return {"delta": {}}
        return {"delta": {"content": word} if word else {"role": "assistant", "content": ""}}

    whole = {"message": {"role": "assistant", "content": answer.text}, "logprobs": None}
    return openai_answer(request, answer, {"id": new_id("chatcmpl-"), "object": kind}, whole, delta)


def completions(body: bytes) -> Reply:
    request = msgspec.json.decode(body, type=CompletionRequest)
    answer = think(request.prompt, request.max_tokens)
    head = {"id": new_id("cmpl-"), "object": "text_completion"}
    whole = {"text": answer.text, "logprobs": None}
    return openai_answer(request, answer, head, whole, lambda word: {"text": word or "", "logprobs": None})


def messages(body: bytes) -> Reply:
    """Anthropic's API (https://docs.anthropic.com/en/api/messages), plain or streamed."""
    request = msgspec.json.decode(body, type=ChatRequest)
    answer = think(request.question(), request.max_tokens)
    stop = {"stop_reason": "max_tokens" if answer.cut else "end_turn", "stop_sequence": None}
    usage = {"input_tokens": answer.prompt_tokens, "output_tokens": len(answer.words)}
    message = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": request.model}
    if not request.stream:
        content = [{"type": "text", "text": answer.text}]
        return plain({**message, "content": content, **stop, "usage": usage}, words=len(answer.words))

    def event(kind: str, **members: Any) -> bytes:
        return sse({"type": kind, **members}, event=kind)

    start: dict[str, Any] = {**message, "content": [], "stop_reason": None, "stop_sequence": None}
    start["usage"] = {**usage, "output_tokens": 0}
    return stream(
        [
            event("message_start", message=start),
            event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        ],
        [event("content_block_delta", index=0, delta={"type": "text_delta", "text": word}) for word in answer.words],
        [
            event("content_block_stop", index=0),
            event("message_delta", delta=stop, usage={"output_tokens": len(answer.words)}),
            event("message_stop"),
        ],
    )


def embed(text: str) -> list[float]:
    """A unit vector of `DIMENSIONS` numbers: each word adds its digest. The same text gives the same vector, always."""
    total = [0] * DIMENSIONS
    for word in text.lower().split() or [""]:
        digest = hashlib.blake2b(word.encode(), digest_size=DIMENSIONS).digest()
        total = [number + byte - 128 for number, byte in zip(total, digest, strict=True)]
    length = math.sqrt(sum(number * number for number in total)) or 1.0
    return [number / length for number in total]


def embeddings(body: bytes) -> Reply:
    request = msgspec.json.decode(body, type=EmbeddingRequest)
    texts = [request.input] if isinstance(request.input, str) else request.input
    data = []
    for index, text in enumerate(texts):
        vector: list[float] | str = embed(text)
        if request.encoding_format == "base64":
            # Little-endian float32, which is how OpenAI's SDK asks for it unless told otherwise.
            vector = base64.b64encode(struct.pack(f"<{DIMENSIONS}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    tokens = sum(len(text.split()) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return plain({"object": "list", "model": request.model, "data": data, "usage": usage})


def models(_body: bytes) -> Reply:
    return plain({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "wakecall"}]})


def error(status: int, message: str, *, path: str = "") -> Reply:
    """An error in the shape of the API that the path belongs to."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    if path == "/v1/messages":
        value: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": message}}
    else:
        value = {"error": {"message": message, "type": kind, "param": None, "code": None}}
    return Reply([(0, encode(value))], status=status)


ROUTES: dict[str, tuple[str, Callable[[bytes], Reply]]] = {
    "/v1/models": ("GET", models),
    "/v1/chat/completions": ("POST", chat),
    "/v1/completions": ("POST", completions),
    "/v1/messages": ("POST", messages),
    "/v1/embeddings": ("POST", embeddings),
}


def reply_to(method: str, path: str, body: bytes) -> Reply:
    """The answer to a request; never raises for what a client sent."""
    if path not in ROUTES:
        return error(404, f"There is no {path} here.", path=path)
    wanted, route = ROUTES[path]
    if method != wanted:
        return error(405, f"{path} takes {wanted}.", path=path)
    try:
        return route(body)
    except (msgspec.DecodeError, RecursionError) as problem:
        return error(400, str(problem), path=path)
