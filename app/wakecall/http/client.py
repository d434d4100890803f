"""`/v1`: what inference clients call."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Final, Literal, cast

import msgspec

from ..broker import Broker
from ..errors import (
    AmbiguousModel,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    ModelOffline,
    ModelRequired,
    PublisherDisconnected,
    PublisherError,
    RateLimitExceeded,
    ShuttingDown,
    WakeFailed,
    WakeTimeout,
)
from ..hosting import MOST_BROKERS, PSEUDONYM
from ..keyring import Claim
from ..models import InferRequest, ModelView, Priority, Status
from .answers import Answer, StreamBody, json_answer
from .auth import check_again
from .calls import Call, look_into, refuse_encoded
from .errors import rate_headers
from .listing import list_answer
from .relay import PASSED_TYPES, pass_on
from .routes import HELD_BODY, Header, Media, Routes
from .shown import Name
from .sniff import FLAG_PATTERN, MAX_FIELD_BYTES, sniff

__all__ = ["PRIORITY", "RELAYED", "TIMEOUT", "add_client_routes"]

_MAX_HEADER_CHARS: Final = 1024
_PSEUDONYM: Final = re.compile(r"\bwakecall-[0-9a-f]{16}\b")
_VERSION: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

PRIORITY: Final = Header(
    "x-wakecall-priority",
    "(interactive|batch)",
    "A priority is interactive or batch.",
    "`batch`: what is interactive comes first. `interactive` when left out.",
)
TIMEOUT: Final = Header(
    "x-wakecall-timeout-s",
    # More than 0, and at most 86400.
    r"(?=.*[1-9])(0|[1-9][0-9]{0,3}|[1-7][0-9]{4}|8[0-5][0-9]{3}|86[0-3][0-9]{2}|86400(?![.]0*[1-9]))([.][0-9]{1,18})?",
    "A timeout is a number of seconds, more than 0 and at most 86400.",
    "The most that the call may take in all, in seconds, where that is less than it would have.",
)

#: All that is ever relayed.
RELAYED: Final = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/rerank",
    "/v1/moderations",
    "/v1/audio/transcriptions",
    "/v1/audio/translations",
    "/v1/audio/speech",
    "/v1/images/generations",
    "/v1/images/edits",
)


class RelayedRequest(msgspec.Struct, frozen=True):
    """What the broker reads of a request. All else is the engine's business, and goes on as it came."""

    model: Annotated[str, msgspec.Meta(description="The name of a row, a pool or an alias.")]
    stream: bool | None = None


class RelayedForm(msgspec.Struct, frozen=True):
    """What the broker reads of a form. All other parts are the engine's business, and go on as they came."""

    model: Annotated[
        str,
        msgspec.Meta(
            description=f"The name of a row, a pool or an alias, in at most {MAX_FIELD_BYTES} bytes.",
            extra_json_schema={"maxLength": MAX_FIELD_BYTES},
        ),
    ]
    stream: Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^({FLAG_PATTERN})$"})] = "false"


class ModelState(msgspec.Struct, frozen=True):
    """How a model stands; a pool or an alias as the best of its rows does."""

    status: Status
    kind: Literal["virtual", "public", "pool", "alias"]
    type: str


class Model(msgspec.Struct, frozen=True):
    """A row, a pool or an alias, as OpenAI's API shows a model."""

    id: Annotated[str, Name]
    created: int
    owned_by: str
    wakecall: ModelState
    object: Literal["model"] = "model"


class ModelList(msgspec.Struct, frozen=True):
    """All rows, pools and aliases that the caller may use."""

    data: list[Model]
    object: Literal["list"] = "list"


_TOO_OFTEN: Final = RateLimitExceeded(retry_after_s=1.0)
_REQUEST: Final = Media(
    "JSON, whatever its Content-Type says, or a multipart form. `model` and `stream` stand once, at the top.",
    {"application/json": RelayedRequest, "multipart/form-data": RelayedForm},
)
_ANSWER: Final = Media("The engine's answer, untouched.", dict.fromkeys(PASSED_TYPES))
_ENGINES_ERROR: Final = Media("The engine's own error, untouched.", dict.fromkeys(PASSED_TYPES))


def add_client_routes(routes: Routes, broker: Broker) -> None:
    """Put the routes of inference clients there."""
    config = broker.config

    async def relay(call: Call) -> Answer:
        """Have an engine answer."""
        path = call.request.path
        with _claim(broker, call) as claim:
            refuse_encoded(call)
            via = _brokers_before(call)
            priority = cast("Priority", PRIORITY.read(call) or "interactive")
            timeout_s = TIMEOUT.read(call)
            body = await call.exchange.read_body(config.max_body_bytes)
            headers = call.request.headers
            content_type = _short(headers.get("content-type"), "Content-Type") or "application/json"
            whose = (call.caller.key_id or "").encode()
            asked = await look_into(call, body, lambda body: sniff(body, content_type, whose))
            check_again(broker, call.caller)
            infer = broker.infer_nowait(
                asked.model,
                InferRequest(
                    path=path,
                    body=body,
                    content_type=content_type,
                    accept=_short(headers.get("accept"), "Accept"),
                    stream=asked.stream,
                    request_id=call.exchange.request_id,
                    priority=priority,
                    timeout_s=None if timeout_s is None else float(timeout_s),
                    affinity=asked.affinity,
                    anthropic_version=_version(headers.get("anthropic-version")),
                    via=via,
                ),
                claim=claim,
            )
        # From here on this infer has to be cancelled by whoever holds it: first us, then the answer's body.
        call.exchange.on_disconnect(infer.cancel)
        answer = None
        try:
            answer = await pass_on(
                infer, call.exchange, path, config, wants_stream=asked.stream, place_of=broker.place_of
            )
        finally:
            if answer is None or not isinstance(answer.response, StreamBody):
                infer.cancel()
        return answer

    for path in RELAYED:
        routes.add(
            "POST",
            path,
            name=f"relay_{path.removeprefix('/v1/').replace('/', '_')}",
            role="client",
            is_hot=True,
            headers=(PRIORITY, TIMEOUT),
            body=_REQUEST,
            answer={"2XX": _ANSWER, "3XX": _ANSWER, "4XX": _ENGINES_ERROR, "5XX": _ENGINES_ERROR},
            errors=(
                *HELD_BODY,
                ModelRequired,
                AmbiguousModel,
                ModelNotFound,
                ModelOffline,
                PublisherDisconnected,
                PublisherError,
                RateLimitExceeded,
                WakeFailed,
                WakeTimeout,
                DeadlineExceeded,
                ShuttingDown,
            ),
        )(relay)

    @routes.add("GET", "/v1/models", role="client", answer=ModelList, errors=(_TOO_OFTEN,))
    async def list_models(call: Call) -> Answer:
        """List all models, sleeping and offline ones too."""

        def show(name: str) -> Model | None:
            try:
                return _describe(broker.model(name, call.caller))
            except ModelNotFound:
                return None  # not for him, or gone since the list was begun

        with _claim(broker, call) as claim:

            def hold() -> Callable[[], None]:
                claim.take_over()
                return claim.release

            # What is not for him is left out on the way: to hold all names against patterns may take a while.
            return list_answer(broker.model_names(), show, hold)

    @routes.add("GET", "/v1/models/<path:name>", role="client", answer=Model, errors=(ModelNotFound, _TOO_OFTEN))
    async def get_model(call: Call, name: str) -> Answer:
        """Show one model."""
        with _claim(broker, call):
            return json_answer(_describe(broker.model(name, call.caller)))


def _claim(broker: Broker, call: Call) -> Claim:
    """Begin a call on its caller's account, before its body is read: bodies cost too. The answer says how his rate stands.

    Raises:
        RateLimitExceeded: his key allows no more now.
    """
    try:
        claim = broker.claim(call.caller)
    except RateLimitExceeded as error:
        if error.rate is not None:
            call.exchange.add_headers(rate_headers(error.rate))
        raise
    if claim.rate is not None:
        call.exchange.add_headers(rate_headers(claim.rate))
    return claim


def _brokers_before(call: Call) -> tuple[str, ...]:
    """The brokers that a call has come through on its way to a public row of each. Raises InvalidRequest: it has been here
    before, or goes from one to the next for too long."""
    via = tuple(_PSEUDONYM.findall(",".join(call.request.headers.getlist("via"))))
    if PSEUDONYM in via or len(via) >= MOST_BROKERS:
        raise InvalidRequest(
            "This request goes round in a circle: a public model leads back to its broker.", param="Via"
        )
    return via


def _short(value: str | None, header: str) -> str | None:
    """A header that goes on. Raises InvalidRequest: too long for a frame, or it would not arrive as it is."""
    if value is None:
        return None
    if len(value) > _MAX_HEADER_CHARS:
        raise InvalidRequest(f"This header is longer than {_MAX_HEADER_CHARS} characters.", param=header)
    # Whatever else a byte is, Quart would send it as another when the body is fetched.
    if not (value.isascii() and value.replace("\t", " ").isprintable()):
        raise InvalidRequest("This header is printable ASCII.", param=header)
    return value


def _version(value: str | None) -> str | None:
    """A version of Anthropic's API; what is none is nobody's business."""
    return value if value is not None and _VERSION.fullmatch(value) else None


def _describe(model: ModelView) -> Model:
    return Model(
        id=model.name,
        created=int(model.created_at),
        owned_by=model.owner,
        wakecall=ModelState(model.status, model.kind, model.type),
    )
