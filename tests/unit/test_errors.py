"""The errors, against the lists and tables of the protocol."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from collections import Counter

import pytest

from wakecall import errors
from wakecall.errors import (
    InferCancelled,
    InferFailed,
    InternalError,
    PublisherDisconnected,
    PublisherError,
    PublisherLostWhileWaking,
    QueueFull,
    RequestError,
    ShutDownAtWork,
    TaskOver,
    Unavailable,
    WakecallError,
)

# Protocol, Conventions: beside those of the tables.
CONVENTIONS = {
    "invalid_request": 400,
    "invalid_json": 400,
    "too_many": 400,
    "invalid_api_key": 401,
    "forbidden": 403,
    "not_found": 404,
    "method_not_allowed": 405,
    "request_timeout": 408,
    "request_too_large": 413,
    "rate_limit_exceeded": 429,
    "internal_error": 500,
    "store_unavailable": 503,
}
# Publishers, results, operators, and what a client's request must hold.
ELSEWHERE = {
    "llm_name_taken": 409,
    "llm_is_public": 409,
    "llm_is_virtual": 409,
    "session_taken": 409,
    "session_not_found": 404,
    "task_not_found": 404,
    "task_already_settled": 409,
    "task_cancelled": 410,
    "result_in_progress": 409,
    "offset_gap": 409,
    "model_required": 400,
    "ambiguous_model": 400,
    "unsupported_encoding": 415,
}
# Clients, the table: status, x-should-retry, Retry-After.
CLIENTS: dict[str, tuple[int, bool | None, float | None]] = {
    "model_not_found": (404, None, None),
    "model_offline": (503, None, 2.0),
    "publisher_disconnected": (503, False, None),
    "wake_failed": (503, False, None),
    "wake_timeout": (504, False, None),
    "deadline_exceeded": (504, False, None),
    "queue_full": (429, None, 1.0),
    "shutting_down": (503, None, 5.0),
    "publisher_error": (502, False, None),
}
GROUPS = {WakecallError, RequestError, TaskOver, InferFailed, Unavailable}
ALL = [each for _, each in inspect.getmembers(errors, inspect.isclass) if issubclass(each, WakecallError)]
LEAVES = [each for each in ALL if each not in GROUPS]
#: Three that no table lists: an outcome, never an answer; the other row of `publisher_disconnected`; and a shutdown that
#: takes what was sent, where the table's row would have it generated twice.
APART = {InferCancelled, PublisherLostWhileWaking, ShutDownAtWork}


def test_every_code_of_the_protocol_is_one_class() -> None:
    """None is missing, none is there twice, and none is made up."""
    codes = Counter(each.code for each in LEAVES if each not in APART)
    assert codes == Counter([*CONVENTIONS, *ELSEWHERE, *CLIENTS])


@pytest.mark.parametrize("error", [each for each in LEAVES if each not in APART], ids=lambda each: each.code)
def test_an_error_is_answered_as_the_protocol_says(error: type[WakecallError]) -> None:
    """Its status, whether an SDK may retry, and after how long."""
    raised = error()
    if error.code in CLIENTS:
        status, should_retry, retry_after_s = CLIENTS[error.code]
        assert (raised.status, error.should_retry, raised.retry_after_s) == (status, should_retry, retry_after_s)
    else:
        assert raised.status == (CONVENTIONS | ELSEWHERE)[error.code]
        assert error.should_retry is None


def test_a_publisher_lost_before_it_could_generate_may_be_tried_again() -> None:
    """The same code, other headers: nothing was sent, so nothing is generated twice."""
    lost = PublisherLostWhileWaking()
    assert isinstance(lost, PublisherDisconnected)
    assert (lost.code, lost.status, lost.should_retry, lost.retry_after_s) == ("publisher_disconnected", 503, None, 2.0)


def test_whatever_may_have_generated_is_not_repeated() -> None:
    """Both SDKs repeat 408, 409, 429 and 5xx: unless told otherwise that would be two generations for one call."""
    may_be_repeated = {each.code for each in LEAVES if each.default_status >= 500 and each.should_retry is not False}
    assert may_be_repeated == {
        "model_offline",
        "publisher_disconnected",
        "shutting_down",
        "store_unavailable",
        "internal_error",
    }
    assert PublisherDisconnected.should_retry is False
    assert ShutDownAtWork.should_retry is False


def test_the_tree_is_cut_by_whose_doing_it_was() -> None:
    """Every error is in one of the four branches, but for our own bugs."""
    for each in LEAVES:
        branches = [group for group in GROUPS - {WakecallError} if issubclass(each, group)]
        assert len(branches) == (0 if each is InternalError else 1), each
    for each in LEAVES:
        if issubclass(each, RequestError):
            assert 400 <= each.default_status < 500
        if issubclass(each, Unavailable):
            assert each.default_status == 503


def test_everything_that_may_be_raised_is_public() -> None:
    """An embedder can catch each by its name."""
    assert {each.__name__ for each in ALL} <= set(errors.__all__)


@pytest.mark.parametrize("error", ALL, ids=lambda each: each.__name__)
def test_an_error_reads_well(error: type[WakecallError]) -> None:
    """A code for programs, a sentence for people, OpenAI's kind of `type`."""
    raised = error()
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", raised.code)
    assert re.fullmatch(r"[A-Z`].*\.", raised.message)
    assert str(raised) == raised.message
    assert raised.type in {
        "invalid_request_error",
        "authentication_error",
        "permission_error",
        "not_found_error",
        "request_too_large",
        "rate_limit_error",
        "api_error",
    }
    assert (raised.param, raised.phase) == (None, None)


def test_what_is_said_at_the_raise_goes_before_the_class() -> None:
    """A publisher's own status and message, a computed delay, a phase, a member."""
    error = PublisherError("CUDA is out of memory", status=507)
    assert (error.status, error.message, str(error)) == (507, "CUDA is out of memory", "CUDA is out of memory")
    assert QueueFull(retry_after_s=0.0).retry_after_s == 0.0
    assert errors.DeadlineExceeded(phase="first_byte").phase == "first_byte"
    assert errors.InvalidRequest("A name is missing.", param="llms[0].name").param == "llms[0].name"
    assert PublisherError().status == 502, "the class is as it was"


def test_an_error_can_be_copied_with_all_it_says() -> None:
    """Fifty who wait for one wake each raise one of their own; a test runner sends them between processes."""
    error = errors.DeadlineExceeded("Too late.", phase="queue", status=504, retry_after_s=3.0, param="x")
    for other in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(other) is type(error)
        assert vars(other) == vars(error)
        assert str(other) == "Too late."


@pytest.mark.parametrize("each", ALL, ids=lambda each: each.__name__)
def test_every_error_says_what_it_was_told(each: type[WakecallError]) -> None:
    """Whatever else its class takes beside."""
    error = each("Said.", param="x", phase="queue", status=418, retry_after_s=2.5)
    assert (error.message, error.param, error.phase, error.status, error.retry_after_s) == (
        "Said.",
        "x",
        "queue",
        418,
        2.5,
    )
