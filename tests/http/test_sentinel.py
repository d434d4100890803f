"""A key and a prompt, sent down every path, good and bad, show nowhere: no log, traceback, metric, error body or file.

Both are looked for in pieces and in every encoding (`tests.sentinel`). What may carry them is left out: an engine's own
answer, a publisher's own message, and a request id that the caller chose.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.http.served import JSON, SSE, as_bytes, head, open_served, wait_until
from tests.http.test_app_keys import Keyed, Publishing, role_of, routes
from tests.http.wire import Answer
from tests.sentinel import leaks_of, new_sentinel
from wakecall.broker import Broker
from wakecall.config import BrokerConfig
from wakecall.http import client, relay, sse
from wakecall.http.protocol import Http11
from wakecall.keyring import Keyring
from wakecall.keys import ROLES
from wakecall.store.sqlite import open_sqlite_store
from wakecall.upload import Upload

PROMPT = new_sentinel("prompt")
STRANGE_KEY = new_sentinel("key")


class Watched:
    """What an app said to anybody while it was served."""

    def __init__(self, keyed: Keyed, log: pytest.LogCaptureFixture, db: Path) -> None:
        self.keyed = keyed
        self.served = keyed.served
        self._log = log
        self._db = db
        self._errors: list[bytes] = []
        # Without what every key begins with.
        self.secrets = [PROMPT, STRANGE_KEY, *(key.rpartition("_")[2] for key in keyed.secrets.values())]

    def note_bytes(self, data: bytes) -> None:
        """Keep an answer as it came."""
        self._errors.append(data)

    def note(self, answer: Answer) -> Answer:
        """Keep an answer, if it is one of ours: an error."""
        if answer.status >= 400:
            self._errors.append(repr(answer.headers).encode() + answer.body)
        return answer

    async def check(self) -> None:
        metrics = (await self.keyed.ask("admin", "GET", "/metrics")).body
        assert b"wakecall_infers" in metrics
        handler = logging.Formatter("%(name)s %(levelname)s %(message)s %(args)s %(stack_info)s")
        places = {
            "the log": "\n".join(handler.format(record) for record in self._log.records).encode(),
            "the metrics": metrics,
            "an error": b"\n".join(self._errors),
        }
        for file in self._db.parent.iterdir():
            places[file.name] = file.read_bytes()
        assert any(name.startswith(self._db.name) and data for name, data in places.items())
        for name, data in places.items():
            for secret in self.secrets:
                assert leaks_of(data, secret) == [], name


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "w.db"


@asynccontextmanager
async def watched(caplog: pytest.LogCaptureFixture, db: Path, **settings: Any) -> AsyncIterator[Watched]:
    """An app with keys on a file, all that it logs kept, down to debug."""
    caplog.set_level(logging.DEBUG)
    async with open_sqlite_store(db) as store, open_served(BrokerConfig(**settings), store) as served:
        secrets = {role: (await served.broker.create_key(role)).secret for role in ROLES}
        each = Watched(Keyed(served, secrets), caplog, db)
        yield each
        await each.check()
    for file in db.parent.iterdir():
        for secret in each.secrets:
            assert leaks_of(file.read_bytes(), secret) == [], file.name


def bodies() -> list[tuple[bytes, str]]:
    """The prompt wherever a body can hold it, well-formed and not."""
    form = f'--B\r\ncontent-disposition: form-data; name="{PROMPT}"; filename="{PROMPT}"\r\n\r\n{PROMPT}\r\n--B--\r\n'
    return [
        (as_bytes({"model": "qwen", "messages": [{"role": "user", "content": PROMPT}]}), JSON),
        (
            as_bytes(
                {"model": PROMPT, "stream": PROMPT, PROMPT: PROMPT, "llms": PROMPT, "role": PROMPT, "owner": PROMPT}
            ),
            JSON,
        ),
        (
            as_bytes(
                {"model": [PROMPT], "llms": [{"name": f"{PROMPT} x", PROMPT: 1}], "message": [PROMPT], "role": [PROMPT]}
            ),
            JSON,
        ),
        (as_bytes({"llms": {f"{PROMPT}!": PROMPT}, "tasks": [f"{PROMPT}!"], "type": PROMPT, "url": PROMPT}), JSON),
        (as_bytes({"llm": f"{PROMPT} x", "target": f"{PROMPT} x", "fallbacks": [PROMPT], "pool": PROMPT}), JSON),
        (
            as_bytes(
                {
                    "model": "qwen",
                    "prompt_cache_key": PROMPT,
                    "user": [PROMPT],
                    "metadata": {"user_id": PROMPT},
                    "input": PROMPT,
                    "prompt": [PROMPT],
                }
            ),
            JSON,
        ),
        (as_bytes({"model": "qwen"})[:-1] + f',"model": "{PROMPT}"}}'.encode(), JSON),
        (f'{{"prompt": "{PROMPT}'.encode(), JSON),
        (f'"{PROMPT}"'.encode(), JSON),
        (f"{PROMPT}".encode("utf-16"), JSON),
        (b'{"model": "\xff' + PROMPT.encode() + b'"}', JSON),
        (form.encode(), "content-type: multipart/form-data; boundary=B"),
        (form.encode(), f"content-type: multipart/form-data; boundary={PROMPT}"),
        (as_bytes({"model": "qwen"}), f"content-encoding: {PROMPT}"),
    ]


@pytest.mark.parametrize("whose", [*ROLES, None])
async def test_down_every_route(whose: str | None, caplog: pytest.LogCaptureFixture, db: Path) -> None:
    """Each method of each route, with its own key, another role's, and none that is known; each body; and the rest of a
    request that can hold something: query, cookie, headers."""
    async with watched(caplog, db) as watch:
        served, secrets = watch.served, watch.keyed.secrets
        for method, target in routes(served.app):
            if role_of(target) != whose:
                continue
            if target.endswith("/frames"):
                continue  # it does not end; below
            own = secrets.get(role_of(target) or "", STRANGE_KEY)
            other = secrets["client" if role_of(target) == "admin" else "admin"]
            odd = (
                f"cookie: {own}={PROMPT}",
                f"x-request-id: {own} {PROMPT}",
                f"wakecall-offset: {PROMPT}",
                f"range: {own}",
            )
            # Where none is read, one is as good as another.
            tried = bodies() if method in ("PUT", "POST", "PATCH") else bodies()[:2]
            for number, (body, kind) in enumerate(tried):
                # A refused key's body is not read: two of those show as much as all.
                for key in (
                    (f"authorization: Bearer {own}",)
                    if number > 1
                    else (
                        f"authorization: Bearer {own}",
                        f"x-api-key: {other}",
                        f"authorization: Bearer {STRANGE_KEY}",
                    )
                ):
                    query = f"{target}?key={own}&prompt={PROMPT}"
                    watch.note(await served.ask(method, query, key, kind, *odd, body=body if method != "HEAD" else b""))
        for target in (
            f"/v1/models/{PROMPT}",
            f"/admin/v1/llms/{PROMPT}",
            f"/publisher/v1/tasks/{STRANGE_KEY}/body",
            f"/{PROMPT}",
        ):
            for role in ROLES:
                watch.note(await watch.keyed.ask(role, "GET", target))


async def test_whatever_no_route_ever_sees(caplog: pytest.LogCaptureFixture, db: Path) -> None:
    """What the parser refuses, the barrier turns away, and Quart cannot route."""
    async with watched(caplog, db) as watch:
        key = f"authorization: Bearer {watch.keyed.secrets['client']}\r\nx-prompt: {PROMPT}\r\n"
        rest = f"host: x\r\n{key}\r\n"
        for data in (
            f"{PROMPT}\r\n\r\n",
            f"GET /{PROMPT} HTTP/9.9\r\n{rest}",
            f"GET /{PROMPT} HTTP/1.0\r\n{rest}",
            f"GET /v1/models HTTP/1.1\r\n{PROMPT}\r\n{rest}",
            f"GET /v1/models HTTP/1.1\r\n{PROMPT} : x\r\n{rest}",
            f"{PROMPT} /v1/models HTTP/1.1\r\n{rest}",
            f"GET ?{PROMPT} HTTP/1.1\r\n{rest}",
            f"GET //{PROMPT} HTTP/1.1\r\n{rest}",
            f"GET /%ff{PROMPT} HTTP/1.1\r\n{rest}",
            f"GET http://[{PROMPT}/ HTTP/1.1\r\n{rest}",
            f"CONNECT {PROMPT}:443 HTTP/1.1\r\n{rest}",
            f"GET /{PROMPT} HTTP/1.1\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-key: {PROMPT}\r\n{rest}",
            f"GET / HTTP/1.1\r\nupgrade: h2c\r\nhttp2-settings: {PROMPT}\r\nconnection: upgrade, http2-settings\r\n{rest}",
            f"POST /v1/completions HTTP/1.1\r\ncontent-length: {PROMPT}\r\n{rest}",
            f"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\ntransfer-encoding: chunked\r\n{rest}{PROMPT}",
            f"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n{rest}{PROMPT}\r\n",
            f"POST /v1/completions HTTP/1.1\r\nhost: {PROMPT}\x01\r\n{key}\r\n",
            f"GET / HTTP/1.1\r\nx: {PROMPT * 3000}\r\n{rest}",
            "GET / HTTP/1.1\r\n" + f"{PROMPT}: {PROMPT}\r\n" * 101 + rest,
            f"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{PROMPT}",
        ):
            async with watch.served.server.connect() as wire:
                await wire.send(data.encode("latin-1"))
                await wire.half_close()
                watch.note_bytes(await wire.read_to_end())


async def test_on_the_way_of_an_infer_whatever_becomes_of_it(caplog: pytest.LogCaptureFixture, db: Path) -> None:
    """Completed, failed, broken off, out of time, its client gone, its wake failed, too large, too late."""
    async with watched(caplog, db, first_byte_s=0.2, queue_s=0.2, cancel_lease_s=0.01, max_body_bytes=100_000) as watch:
        keyed, served = watch.keyed, watch.served
        call = {"model": "qwen", "messages": [{"role": "user", "content": PROMPT}]}
        stream = {**call, "stream": True}
        publisher_key = keyed.header("publisher")

        async def ask(body: Any, *headers: str) -> None:
            watch.note(await keyed.ask("client", "POST", "/v1/chat/completions", body, *headers))

        async with AsyncExitStack() as stack:
            rows = {"name": "qwen", "max_concurrency": 1}, {"name": "sleeper", "status": "hibernating"}
            publisher = await stack.enter_async_context(Publishing(keyed, *rows))
            nursery = await stack.enter_async_context(trio.open_nursery())

            async def post(what: str, task_id: str, body: bytes, *headers: str) -> Answer:
                target = f"/publisher/v1/tasks/{task_id}/{what}"
                return watch.note(await served.ask("POST", target, publisher_key, *headers, body=body))

            for kind, answer in ((JSON, as_bytes({"said": PROMPT})), (SSE, f"data: {PROMPT}\n\n".encode())):
                nursery.start_soon(ask, call if kind is JSON else stream)
                frame = await publisher.next("infer")
                await post("result", frame.task_id, answer, kind)
                await post("result", frame.task_id, answer, kind)
                await post("failure", frame.task_id, answer)
            nursery.start_soon(ask, call)
            frame = await publisher.next("infer")
            await post("failure", frame.task_id, as_bytes({"message": "out of memory", "status": 507}))
            nursery.start_soon(ask, stream)
            await publisher.next("infer")
            frame = await publisher.next("cancel")  # no first byte in time
            await post("cancelled", frame.task_id, as_bytes({"message": PROMPT}))
            await post("cancelled", STRANGE_KEY, as_bytes({"message": PROMPT}))
            nursery.start_soon(ask, call)
            frame = await publisher.next("infer")
            await ask(stream)  # no slot in time
            async with served.server.connect() as wire:
                target = f"/publisher/v1/tasks/{frame.task_id}/result"
                await wire.send(head("POST", target, publisher_key, JSON, "content-length: 1000") + PROMPT.encode())
            async with served.server.connect() as wire:
                body = as_bytes(call)
                length = f"content-length: {len(body)}"
                await wire.send(head("POST", "/v1/completions", keyed.header("client"), length) + body)
                await publisher.next("infer")
            await post("cancelled", (await publisher.next("cancel")).task_id, b"")
            await ask(call, f"x-wakecall-priority: {PROMPT}")
            await ask(call, f"x-wakecall-timeout-s: {PROMPT}")
            nursery.start_soon(ask, {**call, "model": "sleeper"})
            frame = await publisher.next("wake")
            await post("result", frame.task_id, b"no such GPU", "wakecall-status: 500")
            await ask({**call, "padding": PROMPT * 10_000})
            await ask({**call, "model": f"{PROMPT}"})
            nursery.start_soon(ask, call)
            await publisher.next("infer")
            await publisher.reading.wire.stream.aclose()


class Broken(Exception):
    """A bug of ours, that quotes all it knows."""


def broken_by(secret: str) -> Any:
    """What breaks, with a cause that quotes as much."""

    def breaks(*_: Any, **__: Any) -> Any:
        try:
            raise KeyError(secret)
        except KeyError as error:
            raise Broken(secret, {secret: secret}) from error

    return breaks


def something_broke(caplog: pytest.LogCaptureFixture) -> bool:
    return any("Broken" in record.getMessage() for record in caplog.records)


def all_secrets(watch: Watched) -> str:
    return " ".join([PROMPT, *watch.keyed.secrets.values()])


CALL = {"model": "qwen", "messages": [{"role": "user", "content": PROMPT}]}

# Each: what breaks, and the request that comes to it. `/v1` ones come with the prompt in their body.
IN_A_REQUEST: list[tuple[Any, str, str, str, str, Any]] = [
    (Keyring, "find", "client", "POST", "/v1/chat/completions", CALL),
    (client, "sniff", "client", "POST", "/v1/messages", CALL),
    (client, "pass_on", "client", "POST", "/v1/chat/completions", CALL),
    (Broker, "claim", "client", "POST", "/v1/responses", CALL),
    (Broker, "infer_nowait", "client", "POST", "/v1/chat/completions", CALL),
    (Broker, "model_names", "client", "GET", "/v1/models", None),
    (Broker, "register", "publisher", "PUT", "/publisher/v1/sessions/other", {"llms": []}),
    (Broker, "heartbeat", "publisher", "POST", "/publisher/v1/sessions/laptop/heartbeat", {}),
    (Broker, "open_channel_nowait", "publisher", "GET", "/publisher/v1/sessions/laptop/frames", None),
    (sse.FramesBody, "__anext__", "publisher", "GET", "/publisher/v1/sessions/laptop/frames", None),
    (Broker, "create_key", "admin", "POST", "/admin/v1/keys", {"role": "client", "name": PROMPT}),
    (Broker, "task_views", "admin", "GET", "/admin/v1/tasks", None),
    (Http11, "handle", "client", "POST", "/v1/chat/completions", CALL),
]


@pytest.mark.parametrize(
    ("where", "name", "whose", "method", "target", "body"), IN_A_REQUEST, ids=[each[1] for each in IN_A_REQUEST]
)
async def test_where_something_of_ours_breaks_in_a_request(
    where: Any,
    name: str,
    whose: str,
    method: str,
    target: str,
    body: Any,
    caplog: pytest.LogCaptureFixture,
    db: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its type and place are logged, its message goes nowhere."""
    async with watched(caplog, db) as watch, Publishing(watch.keyed):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, broken_by(all_secrets(watch)))
            data = b"" if body is None else as_bytes(body)
            async with watch.served.server.connect() as wire:
                length = f"content-length: {len(data)}"
                await wire.send(head(method, target, watch.keyed.header(whose), JSON, length) + data)
                watch.note_bytes(await wire.read_some())
                await wait_until(lambda: something_broke(caplog))


@pytest.mark.parametrize(
    ("where", "name", "what"),
    [
        (Broker, "open_upload", "result"),
        (Upload, "send", "result"),
        (Upload, "finish", "chunks"),
        (Broker, "fail", "failure"),
        (relay, "safe_content_type", "result"),
    ],
)
async def test_where_something_of_ours_breaks_in_an_answer(
    where: Any, name: str, what: str, caplog: pytest.LogCaptureFixture, db: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its way in, and on its way out."""
    async with watched(caplog, db) as watch, Publishing(watch.keyed) as publisher, trio.open_nursery() as nursery:
        keyed = watch.keyed

        async def call() -> None:
            watch.note(await keyed.ask("client", "POST", "/v1/chat/completions", CALL))

        nursery.start_soon(call)
        frame = await publisher.next("infer")
        with monkeypatch.context() as patched:
            patched.setattr(where, name, broken_by(all_secrets(watch)))
            target = f"/publisher/v1/tasks/{frame.task_id}/{what}"
            watch.note(
                await keyed.ask("publisher", "POST", target, {"message": "x", "said": PROMPT}, "wakecall-offset: 0")
            )
            await wait_until(lambda: something_broke(caplog))
        nursery.cancel_scope.cancel()  # a client whose answer was lost by this would wait on
