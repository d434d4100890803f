"""`/v1`: what inference clients call."""

from __future__ import annotations

from typing import Any, Final

from quart import Quart

from ..broker import Broker
from ..errors import InvalidRequest, RateLimitExceeded
from ..keyring import Claim
from ..models import LLM, InferRequest
from .answers import Answer, StreamBody, json_answer
from .calls import Call, begin, look_into, refuse_encoded
from .errors import rate_headers
from .relay import pass_on
from .sniff import sniff

__all__ = ["RELAYED", "add_client_routes"]

_MAX_HEADER_CHARS: Final = 1024

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


def add_client_routes(app: Quart, broker: Broker) -> None:
    """Put the routes of inference clients into `app`."""
    config = broker.config

    async def relay() -> Answer:
        call = begin(broker, "client")
        refuse_encoded(call)
        path = call.request.path
        with _claim(broker, call) as claim:
            body = await call.exchange.read_body(config.max_body_bytes)
            headers = call.request.headers
            content_type = _short(headers.get("content-type"), "Content-Type") or "application/json"
            asked = await look_into(body, lambda body: sniff(body, content_type))
            infer = broker.infer_nowait(
                asked.model,
                InferRequest(
                    path=path,
                    body=body,
                    content_type=content_type,
                    accept=_short(headers.get("accept"), "Accept"),
                    stream=asked.stream,
                    request_id=call.exchange.request_id,
                ),
                claim=claim,
            )
        # From here on this infer has to be cancelled by whoever holds it: first us, then the answer's body.
        call.exchange.on_disconnect(infer.cancel)
        answer = None
        try:
            answer = await pass_on(infer, call.exchange, path, config, wants_stream=asked.stream)
        finally:
            if answer is None or not isinstance(answer.response, StreamBody):
                infer.cancel()
        return answer

    async def list_models() -> Answer:
        caller = begin(broker, "client").caller
        return json_answer({"object": "list", "data": [_describe(llm) for llm in broker.llms(caller)]})

    async def get_model(name: str) -> Answer:
        caller = begin(broker, "client").caller
        return json_answer(_describe(broker.llm(name, caller)))

    for path in RELAYED:
        app.add_url_rule(path, "relay", relay, methods=["POST"])
    app.add_url_rule("/v1/models", "list_models", list_models)
    app.add_url_rule("/v1/models/<path:name>", "get_model", get_model)


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


def _describe(llm: LLM) -> dict[str, Any]:
    return {
        "id": llm.name,
        "object": "model",
        "created": int(llm.created_at),
        "owned_by": llm.owner,
        "wakecall": {"status": llm.status, "kind": llm.kind, "type": llm.type},
    }
