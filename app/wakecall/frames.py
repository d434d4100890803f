"""What goes down a channel, and its bytes: server-sent events (WHATWG HTML, 9.2) of one ASCII JSON line each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

from .models import InferRequest

__all__ = [
    "KEEPALIVE",
    "ByeReason",
    "CancelReason",
    "Frame",
    "bye",
    "cancel",
    "encode",
    "hello",
    "infer",
    "results",
    "wake",
]

CancelReason = Literal["client_disconnected", "deadline_exceeded", "lost_race", "shutdown"]
ByeReason = Literal["superseded", "stale", "goodbye", "evicted", "shutdown"]

#: A comment: whoever waits for frames hears that the line is alive.
KEEPALIVE: Final = b": keep-alive\n\n"

#: What this broker has that not every one of version 1 had: a publisher may use it, and need not.
FEATURES: Final = ("results",)

#: What an infer's frame weighs beside its body: names, ids and punctuation, generously.
_FRAME_OVERHEAD: Final = 1024

#: What any other frame weighs. A `cancel` cannot be held back, so that many callers leaving at once must not weigh much.
_SMALL_FRAME: Final = 256


#: Made once: `json.dumps` makes one for every frame. Ours hold no circles to look for.
_encoder: Final = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), allow_nan=False, check_circular=False)


class Frame(NamedTuple):
    """One message of a channel.

    Args:
        event: `hello`, `infer`, `wake`, `cancel`, `results` or `bye`.
        data: the JSON object, as protocol.md lists it for this event.
        id: `EPOCH-SEQ`.
        weight: about how many bytes of memory it holds while nobody takes it.
    """

    event: str
    data: dict[str, Any]
    id: str
    weight: int = _SMALL_FRAME


def encode(frame: Frame) -> bytes:
    """The frame's bytes. JSON is written in ASCII, so no line separator of any kind can end the line early."""
    return f"id: {frame.id}\nevent: {frame.event}\ndata: {_encoder.encode(frame.data)}\n\n".encode("ascii")


def hello(id: str, session_id: str, epoch: int, heartbeat_interval_s: float, keepalive_s: float) -> Frame:
    """The first frame: from here on the channel is open."""
    data = {
        "session_id": session_id,
        "epoch": epoch,
        "heartbeat_interval_s": heartbeat_interval_s,
        "keepalive_s": keepalive_s,
        "features": list(FEATURES),
    }
    return Frame("hello", data, id)


def infer(
    id: str,
    task_id: str,
    llm: str,
    model: str,
    request: InferRequest,
    deadline_s: float,
    max_inline_body_bytes: int,
) -> Frame:
    """An infer. Its body rides along as text where it is short enough and UTF-8; else the publisher fetches it."""
    headers = {"content-type": request.content_type}
    weight = _FRAME_OVERHEAD + len(model) + len(request.content_type)
    if request.accept is not None:
        headers["accept"] = request.accept
        weight += len(request.accept)
    data: dict[str, Any] = {
        "task_id": task_id,
        "llm": llm,
        "model": model,
        "method": request.method,
        "path": request.path,
        "headers": headers,
        "stream": request.stream,
        "deadline_s": round(deadline_s, 3),
    }
    if len(request.body) <= max_inline_body_bytes:
        try:
            data["body"] = request.body.decode()
            weight += len(request.body)
        except UnicodeDecodeError:
            pass  # not text: the publisher fetches the bytes
    return Frame("infer", data, id, weight)


def wake(id: str, task_id: str, llm: str, model: str, deadline_s: float, hibernate: Sequence[str] = ()) -> Frame:
    """A wake, which all who wait for the row share. `hibernate`: rows that are to be put to sleep first."""
    data: dict[str, Any] = {"task_id": task_id, "llm": llm, "model": model, "deadline_s": round(deadline_s, 3)}
    if hibernate:
        data["hibernate"] = list(hibernate)
    return Frame("wake", data, id)


def cancel(id: str, task_id: str, reason: CancelReason) -> Frame:
    """A task that was sent has ended without its publisher."""
    return Frame("cancel", {"task_id": task_id, "reason": reason}, id)


def results(id: str, taken: int) -> Frame:
    """So many records of the shared upload have been taken since it began."""
    return Frame("results", {"taken": taken}, id)


def bye(id: str, reason: ByeReason) -> Frame:
    """The last frame: the stream ends after it."""
    return Frame("bye", {"reason": reason}, id)
