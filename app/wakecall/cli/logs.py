"""Lines on stderr: one for each thing that happens, and nothing that a peer sends can make two of one.

An event is a name and fields. As JSON it is one object; as text it is a sentence, where the verb has one, or else the name
and `field=value` pairs. Whatever else the program logs goes the same way.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from ..models import ChannelEvent, Event, InferSettled, KeyEvent, SessionEvent, SlotReleased, WakeSettled
from .common import printable, wants_color

__all__ = ["configure_logging", "log_broker_event", "log_event"]

_COLORS: Final = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}


def configure_logging(level: str, style: str, stream: TextIO | None = None) -> None:
    """Send what Wakecall logs to stderr.

    Args:
        level: debug, info, warning or error: ours. Other libraries are heard from `warning` on.
        style: text or json.
        stream: instead of stderr.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if style == "json" else TextFormatter(stream))
    # A stderr that is gone must not take the program with it, nor fill the last lines of a terminal.
    logging.raiseExceptions = False
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("wakecall").setLevel(level.upper())


def log_event(
    logger: logging.Logger, level: int, event: str, fields: Mapping[str, Any], sentence: str | None = None
) -> None:
    """Log an event; `sentence` is what text has instead of its name and fields."""
    if logger.isEnabledFor(level):
        text = sentence if sentence is not None else " ".join([event, *_pairs(fields)])
        logger.log(level, "%s", text, extra={"event": event, "fields": fields})


def log_broker_event(event: Event) -> None:
    """An observer of a broker (`Broker.add_observer`): one line for each outcome and each coming and going."""
    match event:
        case InferSettled():
            level = logging.WARNING if event.outcome == "failed" else logging.INFO
            fields: dict[str, Any] = {
                "request_id": event.request_id,
                "llm": event.llm,
                "outcome": event.outcome,
                "code": event.code,
                "phase": event.phase,
                "seconds": round(event.seconds, 3),
                "first_byte_s": None if event.first_byte_s is None else round(event.first_byte_s, 3),
                "engine_status": event.engine_status,
                "task_id": event.task_id,
                "key_id": event.key_id,
            }
            if event.attempts > 1:
                fields["attempts"] = event.attempts
            log_event(_events, level, "infer", fields)
        case SlotReleased():
            fields = {
                "llm": event.llm,
                "how": event.how,
                "seconds": round(event.seconds, 3),
                "task_id": event.task_id,
            }
            log_event(_events, logging.DEBUG, "slot_released", fields)
        case WakeSettled():
            level = logging.INFO if event.outcome == "succeeded" else logging.WARNING
            fields = {
                "llm": event.llm,
                "outcome": event.outcome,
                "seconds": round(event.seconds, 3),
                "waiters": event.waiters,
                "task_id": event.task_id,
            }
            log_event(_events, level, "wake", fields)
        case SessionEvent():
            fields = {"event": event.event, "session_id": event.session_id, "llms": event.llms}
            log_event(_events, logging.INFO, f"session_{fields.pop('event')}", fields)
        case KeyEvent():
            fields = {"key_id": event.key_id, "role": event.role, "owner": event.owner}
            log_event(_events, logging.INFO, f"key_{event.event}", fields)
        case ChannelEvent():
            fields = {"session_id": event.session_id, "epoch": event.epoch}
            if event.event == "ended":
                fields |= {"reason": event.reason, "failed": event.failed}
            log_event(_events, logging.INFO, f"channel_{event.event}", fields)


_events = logging.getLogger("wakecall.events")


def _pairs(fields: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_bare(value)}" for name, value in fields.items() if value is not None]


def _bare(value: Any) -> str:
    """A value that ends at the next space: in quotes where it would not."""
    text = str(value)
    if text and text.isprintable() and " " not in text and '"' not in text and "=" not in text:
        return text
    return json.dumps(text)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z INFO    text`; on a terminal just the local time of day, and colour for what is not well.

    A traceback stands below, indented, so that no line of it can pass for one of the log.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._terminal = stream.isatty()
        self._color = wants_color(stream)

    def format(self, record: logging.LogRecord) -> str:
        text = printable(record.getMessage())
        if self._terminal:
            at = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
            line = f"{at}  {text}"
        else:
            line = f"{_instant(record.created)} {record.levelname:<7} {text}"
        if record.exc_info:
            trace = self.formatException(record.exc_info).splitlines()
            line = "\n".join([line, *(f"    {printable(each)}" for each in trace)])
        color = _COLORS.get(record.levelno) if self._color else None
        return f"\x1b[{color}m{line}\x1b[0m" if color else line


class JsonFormatter(logging.Formatter):
    """One object a line: `at`, `level`, then `event` and its fields, or `logger` and `message`."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {"at": _instant(record.created), "level": record.levelname.lower()}
        event = getattr(record, "event", None)
        if event is not None:
            said |= {"event": event, **getattr(record, "fields", {})}
        else:
            said |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            said["traceback"] = self.formatException(record.exc_info)
        return json.dumps(said, default=str)


def _instant(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
