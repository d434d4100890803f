"""What a log line may hold: whatever a peer sends, it stays one line."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from wakecall.cli.logs import configure_logging, log_broker_event, log_event
from wakecall.models import ChannelEvent, Event, InferSettled, SessionEvent, SlotReleased, WakeSettled

NASTY = 'a\nb\r\x1b[31mc\x00\u2028d\x9b \udc80 ="'


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Where the log goes; the root logger is as it was afterwards."""
    root = logging.getLogger()
    handlers, level, ours = root.handlers[:], root.level, logging.getLogger("wakecall").level
    raising = logging.raiseExceptions
    yield io.StringIO()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("wakecall").setLevel(ours)
    logging.raiseExceptions = raising


@pytest.mark.parametrize("style", ["text", "json"])
def test_nothing_breaks_a_line(log: io.StringIO, style: str) -> None:
    """A message, a field, an exception: control characters are escaped in each."""
    configure_logging("info", style, log)
    logger = logging.getLogger("wakecall.test")
    logger.warning("said: %s", NASTY)
    log_event(logger, logging.INFO, "event", {"nasty": NASTY})
    log_event(logger, logging.INFO, "event", {}, NASTY)
    lines = log.getvalue().split("\n")
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)


def test_a_traceback_cannot_pass_for_lines_of_the_log(log: io.StringIO) -> None:
    configure_logging("info", "text", log)
    try:
        raise ValueError("oh\n2026-01-01T00:00:00.000Z INFO    infer request_id=forged")
    except ValueError:
        logging.getLogger("wakecall.test").exception("it failed")
    first, *rest = log.getvalue().splitlines()
    assert first.endswith("ERROR   it failed")
    assert rest
    assert all(line.startswith("    ") and line.isprintable() for line in rest)


@pytest.mark.parametrize(
    ("event", "level", "said"),
    [
        (SessionEvent("registered", "s", 2), "INFO", "session_registered session_id=s llms=2"),
        (SessionEvent("evicted", "s", 0), "INFO", "session_evicted session_id=s llms=0"),
        (ChannelEvent("open", "s", 7), "INFO", "channel_open session_id=s epoch=7"),
        (
            ChannelEvent("ended", "s", 7, "stale", 3),
            "INFO",
            "channel_ended session_id=s epoch=7 reason=stale failed=3",
        ),
        (
            InferSettled("t", "r", "m", "completed", "completed", "idle", 1.23456, 0.5, 200),
            "INFO",
            "infer request_id=r llm=m outcome=completed code=completed phase=idle seconds=1.235 first_byte_s=0.5"
            " engine_status=200 task_id=t",
        ),
        (
            InferSettled("t", None, "m", "failed", "model_offline", "queue", 0.0, None, None),
            "WARNING",
            "infer llm=m outcome=failed code=model_offline phase=queue seconds=0.0 task_id=t",
        ),
        (
            InferSettled("t", None, "m", "completed", "completed", "idle", 1.0, 0.5, 200, attempts=1),
            "INFO",
            "infer llm=m outcome=completed code=completed phase=idle seconds=1.0 first_byte_s=0.5 engine_status=200"
            " task_id=t",
        ),
        (
            InferSettled("t", None, "m", "completed", "completed", "idle", 1.0, 0.5, 200, attempts=3),
            "INFO",
            "infer llm=m outcome=completed code=completed phase=idle seconds=1.0 first_byte_s=0.5 engine_status=200"
            " task_id=t attempts=3",
        ),
        (
            SlotReleased("t", "m", "confirmed", 1.23456),
            "DEBUG",
            "slot_released llm=m how=confirmed seconds=1.235 task_id=t",
        ),
        (
            WakeSettled("t", "m", "succeeded", 2.0, 50),
            "INFO",
            "wake llm=m outcome=succeeded seconds=2.0 waiters=50 task_id=t",
        ),
        (
            WakeSettled("t", "m", "timed_out", 2.0, 1),
            "WARNING",
            "wake llm=m outcome=timed_out seconds=2.0 waiters=1 task_id=t",
        ),
    ],
)
def test_each_event_of_the_broker_is_one_line(log: io.StringIO, event: Event, level: str, said: str) -> None:
    configure_logging("debug", "text", log)
    log_broker_event(event)
    (line,) = log.getvalue().splitlines()
    at, found_level, text = line.split(maxsplit=2)
    assert at.endswith("Z")
    assert (found_level, text) == (level, said)


def test_as_json_an_event_keeps_its_fields(log: io.StringIO) -> None:
    """Numbers stay numbers, and what is not known is null."""
    configure_logging("info", "json", log)
    log_broker_event(InferSettled("t", None, "m", "failed", "wake_failed", "wake", 1.5, None, None))
    said = json.loads(log.getvalue())
    assert said.pop("at").endswith("Z")
    assert said == {
        "level": "warning",
        "event": "infer",
        "request_id": None,
        "llm": "m",
        "outcome": "failed",
        "code": "wake_failed",
        "phase": "wake",
        "seconds": 1.5,
        "first_byte_s": None,
        "engine_status": None,
        "task_id": "t",
        "key_id": None,
    }


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("no_color", "colored"), [("", True), ("1", False)])
@pytest.mark.usefixtures("log")
def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch, no_color: str, colored: bool) -> None:
    """`NO_COLOR` set to anything means none; what is well has none anyway."""
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    configure_logging("info", "text", stream)
    logging.getLogger("wakecall.test").info("well")
    logging.getLogger("wakecall.test").warning("ill")
    well, ill = stream.getvalue().splitlines()
    assert "\x1b" not in well
    assert ("\x1b" in ill) is colored
