"""Every way in which a call can end badly, as data.

The tree is cut by whose doing it was, for that decides what a caller may do about it:

* `RequestError`: the caller's own. Sending the same again gives the same answer.
* `TaskOver`: nobody's. The task that a publisher speaks of has ended, or never was.
* `InferFailed`: the publisher's, its machine's or its network's. The request itself was sound.
* `Unavailable`: the broker's own, and passing.

Each class carries its `code` (stable, for programs), HTTP `status` and what the two retry headers say; `message` is for
people. No class here knows HTTP beyond those numbers: `wakecall.http` turns them into answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from .limits import RateState

__all__ = [
    "AmbiguousModel",
    "DeadlineExceeded",
    "Forbidden",
    "InferCancelled",
    "InferFailed",
    "InternalError",
    "InvalidApiKey",
    "InvalidJson",
    "InvalidRequest",
    "LLMIsPublic",
    "LLMIsVirtual",
    "LLMNameTaken",
    "MethodNotAllowed",
    "ModelNotFound",
    "ModelOffline",
    "ModelRequired",
    "NotFound",
    "OffsetGap",
    "Phase",
    "PublisherDisconnected",
    "PublisherError",
    "PublisherLostWhileWaking",
    "QueueFull",
    "RateLimitExceeded",
    "RequestError",
    "RequestTimeout",
    "RequestTooLarge",
    "ResultInProgress",
    "SessionNotFound",
    "SessionTaken",
    "ShutDownAtWork",
    "ShuttingDown",
    "StoreUnavailable",
    "TaskAlreadySettled",
    "TaskCancelled",
    "TaskNotFound",
    "TaskOver",
    "TooMany",
    "Unavailable",
    "UnsupportedEncoding",
    "WakeFailed",
    "WakeTimeout",
    "WakecallError",
]

Phase = Literal["queue", "wake", "first_byte", "idle", "total"]


class WakecallError(Exception):
    """The root of everything that Wakecall raises on purpose.

    Args:
        message: one sentence for people; the class's own when left out.
        param: the request's member at fault, as in `llms[0].name`.
        phase: for a deadline, which phase ran out.
        status: the HTTP status, where it is not the class's own (a publisher's failure may name one).
        retry_after_s: seconds after which trying again is worth it, where that was computed.
    """

    code: ClassVar[str] = "internal_error"
    default_status: ClassVar[int] = 500
    type: ClassVar[str] = "api_error"
    default_message: ClassVar[str] = "Something went wrong inside the broker."
    #: What `x-should-retry` says; None leaves the header out and the decision to the SDK.
    should_retry: ClassVar[bool | None] = None
    default_retry_after_s: ClassVar[float | None] = None

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        phase: Phase | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message or self.default_message)
        self.message = message or self.default_message
        self.param = param
        self.phase = phase
        self.status = status or self.default_status
        self.retry_after_s = self.default_retry_after_s if retry_after_s is None else retry_after_s


# The caller's own doing ---------------------------------------------------------------------------------------------


class RequestError(WakecallError):
    """The caller asked for something that cannot be had as asked."""

    code = "invalid_request"
    default_status = 400
    type = "invalid_request_error"
    default_message = "The request is not valid."


class InvalidRequest(RequestError):
    """A member of the wrong type, out of range, or missing."""


class InvalidJson(RequestError):
    """The body is not well-formed JSON (RFC 8259), or not within our bounds of it."""

    code = "invalid_json"
    default_message = "The body is not well-formed JSON."


class TooMany(RequestError):
    """More of something than a bound allows."""

    code = "too_many"
    default_message = "That is more than this broker allows."


class ModelRequired(RequestError):
    """A client's request names no model."""

    code = "model_required"
    default_message = "The request must name a model."


class AmbiguousModel(RequestError):
    """`model` or `stream` stands in the body more than once, or in another spelling beside it."""

    code = "ambiguous_model"
    default_message = "The request names `model` or `stream` more than once."


class UnsupportedEncoding(RequestError):
    """A client's body came with a Content-Encoding."""

    code = "unsupported_encoding"
    default_status = 415
    default_message = "Send the body without a Content-Encoding."


class InvalidApiKey(RequestError):
    code = "invalid_api_key"
    default_status = 401
    type = "authentication_error"
    default_message = "The API key is missing or not valid."


class Forbidden(RequestError):
    code = "forbidden"
    default_status = 403
    type = "permission_error"
    default_message = "This is not allowed here."


class NotFound(RequestError):
    code = "not_found"
    default_status = 404
    type = "not_found_error"
    default_message = "There is nothing at this path."


class ModelNotFound(NotFound):
    code = "model_not_found"
    default_message = "There is no model of this name."


class SessionNotFound(NotFound):
    code = "session_not_found"
    default_message = "There is no such session: register it first."


class MethodNotAllowed(RequestError):
    code = "method_not_allowed"
    default_status = 405
    default_message = "This path does not take this method."


class RequestTimeout(RequestError):
    code = "request_timeout"
    default_status = 408
    default_message = "The request did not arrive in time."


class RequestTooLarge(RequestError):
    code = "request_too_large"
    default_status = 413
    type = "request_too_large"
    default_message = "The body is larger than this broker takes."


class LLMNameTaken(RequestError):
    """The name belongs to another session that is alive, or to another owner."""

    code = "llm_name_taken"
    default_status = 409
    default_message = "Another session holds this name."


class LLMIsPublic(RequestError):
    code = "llm_is_public"
    default_status = 409
    default_message = "This name is a public model's, which only an operator changes."


class LLMIsVirtual(RequestError):
    code = "llm_is_virtual"
    default_status = 409
    default_message = "This name is a publisher's model, which only its publisher changes."


class SessionTaken(RequestError):
    code = "session_taken"
    default_status = 409
    default_message = "This session id is in use."


class ResultInProgress(RequestError):
    """Two uploads for one task at the same time."""

    code = "result_in_progress"
    default_status = 409
    default_message = "Another upload for this task is under way."


class OffsetGap(RequestError):
    """A piece of a result starts beyond what has arrived."""

    code = "offset_gap"
    default_status = 409
    default_message = "This piece starts beyond what has arrived."


class RateLimitExceeded(RequestError):
    """A key's own limit: its requests a minute, or at a time. `retry_after_s` is computed.

    Args:
        message, param, phase, status, retry_after_s: as of every error.
        rate: how the key's rate stands, where that was it.
    """

    code = "rate_limit_exceeded"
    default_status = 429
    type = "rate_limit_error"
    default_message = "Too many requests."

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        phase: Phase | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
        rate: RateState | None = None,
    ) -> None:
        super().__init__(message, param=param, phase=phase, status=status, retry_after_s=retry_after_s)
        self.rate = rate


class QueueFull(RequestError):
    """As many wait as may wait. `retry_after_s` is computed from what is waiting."""

    code = "queue_full"
    default_status = 429
    type = "rate_limit_error"
    default_message = "Too many requests are waiting for this model."
    default_retry_after_s = 1.0


# Nobody's doing: the task is over -----------------------------------------------------------------------------------


class TaskOver(WakecallError):
    """What a publisher gets for a task that takes nothing any more: it stops its engine and forgets the task."""

    default_status = 409
    type = "invalid_request_error"


class TaskNotFound(TaskOver):
    code = "task_not_found"
    default_status = 404
    type = "not_found_error"
    default_message = "There is no such task."


class TaskAlreadySettled(TaskOver):
    """The publisher ended it before."""

    code = "task_already_settled"
    default_message = "This task has ended."


class TaskCancelled(TaskOver):
    """Its client, a deadline, its channel or a shutdown ended it."""

    code = "task_cancelled"
    default_status = 410
    default_message = "This task was cancelled."


# The publisher's doing, or its machine's ----------------------------------------------------------------------------


class InferFailed(WakecallError):
    """An infer that was sound did not come to a good end."""

    default_status = 503


class ModelOffline(InferFailed):
    code = "model_offline"
    default_message = "The model's publisher is not connected."
    default_retry_after_s = 2.0


class PublisherDisconnected(InferFailed):
    """The publisher was lost with the infer's frame sent: it may have generated, so nobody repeats it."""

    code = "publisher_disconnected"
    default_message = "The model's publisher was lost while it worked on this request."
    should_retry: ClassVar[bool | None] = False


class PublisherLostWhileWaking(PublisherDisconnected):
    """The publisher was lost while the infer waited for its wake: nothing was generated, trying again is harmless."""

    default_message = "The model's publisher was lost while the model was being woken."
    should_retry = None
    default_retry_after_s = 2.0


class WakeFailed(InferFailed):
    """The publisher could not wake the model; the message is its own."""

    code = "wake_failed"
    default_message = "The model could not be woken."
    should_retry = False


class WakeTimeout(InferFailed):
    code = "wake_timeout"
    default_status = 504
    default_message = "The model was not awake in time."
    should_retry = False


class DeadlineExceeded(InferFailed):
    """This infer's own time is up; `phase` says in which."""

    code = "deadline_exceeded"
    default_status = 504
    default_message = "The request's time is up."
    should_retry = False


class PublisherError(InferFailed):
    """The publisher reported a failure, its upload broke off, or its answer cannot be passed on."""

    code = "publisher_error"
    default_status = 502
    default_message = "The model's publisher failed."
    should_retry = False


class InferCancelled(InferFailed):
    """The infer's own caller left. Nobody is there to be answered; it is an outcome, not an answer."""

    code = "client_disconnected"
    default_status = 499
    default_message = "The caller left."
    should_retry = False


# The broker's own ---------------------------------------------------------------------------------------------------


class Unavailable(WakecallError):
    """The broker cannot do this now."""

    default_status = 503


class ShuttingDown(Unavailable):
    code = "shutting_down"
    default_message = "The broker is stopping."
    default_retry_after_s = 5.0


class ShutDownAtWork(ShuttingDown):
    """The broker stopped with the infer's frame sent: it may have generated, so nobody repeats it."""

    default_message = "The broker stopped while the model worked on this request."
    should_retry = False


class StoreUnavailable(Unavailable):
    """The decision stands in memory and is written again; it cannot be acknowledged yet."""

    code = "store_unavailable"
    default_message = "The broker cannot write to its store."
    default_retry_after_s = 5.0


class InternalError(WakecallError):
    """A bug of ours. The caller learns no more than that."""
