"""Keys over the wire: no way in without one, none with another's, and none where the check itself fails."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.testing

from tests.http.served import JSON, Frame, Reading, Served, WirePublisher, as_bytes, head, open_served, wait_until
from tests.http.wire import Answer
from wakecall.broker import Broker
from wakecall.config import BrokerConfig
from wakecall.keyring import Keyring
from wakecall.keys import ROLES

#: Everything that answers without a key, and why it may.
PUBLIC = {
    "/": "says what this is",
    "/healthz": "whether the process answers",
    "/openapi.json": "what is written in the documentation, too",
    "/readyz": "whether it takes work",
}

FOREIGN_HOST = "llm.example.org"


@dataclass
class Keyed:
    """A served broker that has keys: one of each role, and a second publisher's."""

    served: Served
    secrets: dict[str, str]

    def header(self, whose: str) -> str:
        return f"authorization: Bearer {self.secrets[whose]}"

    async def ask(self, whose: str, method: str, target: str, body: Any = None, *headers: str) -> Answer:
        data = b"" if body is None else as_bytes(body)
        return await self.served.ask(method, target, self.header(whose), JSON, *headers, body=data, host=FOREIGN_HOST)

    async def register(self, session_id: str, *llms: dict[str, Any], whose: str = "publisher") -> Answer:
        return await self.ask(
            whose, "PUT", f"/publisher/v1/sessions/{session_id}", {"llms": llms or [{"name": "qwen"}]}
        )


@pytest.fixture
async def keyed(served: Served) -> Keyed:
    broker = served.broker
    secrets = {role: (await broker.create_key(role)).secret for role in ROLES}
    secrets["stranger"] = (await broker.create_key("publisher")).secret
    return Keyed(served, secrets)


class KeyedPublisher(WirePublisher):
    """`WirePublisher`, with a key."""

    def __init__(self, keyed: Keyed, session_id: str, reading: Reading, whose: str) -> None:
        super().__init__(keyed.served, session_id, reading)
        self._keyed = keyed
        self._whose = whose

    async def answer(self, frame: Frame, body: Any = b"", *headers: str) -> Answer:
        target = f"/publisher/v1/tasks/{frame.task_id}/result"
        return await self._keyed.ask(self._whose, "POST", target, body, *headers)


class Publishing:
    """A session of a key's, its channel open while the block lasts."""

    def __init__(
        self, keyed: Keyed, *llms: dict[str, Any], whose: str = "publisher", session_id: str = "laptop"
    ) -> None:
        self._keyed, self._llms, self._whose, self._session_id = keyed, llms, whose, session_id

    async def __aenter__(self) -> KeyedPublisher:
        keyed = self._keyed
        assert (await keyed.register(self._session_id, *self._llms, whose=self._whose)).status == 200
        self._connection = keyed.served.server.connect()
        wire = await self._connection.__aenter__()
        await wire.send(head("GET", f"/publisher/v1/sessions/{self._session_id}/frames", keyed.header(self._whose)))
        reading = await Reading(wire, "GET").read_head()
        assert reading.status == 200
        publisher = KeyedPublisher(keyed, self._session_id, reading, self._whose)
        await publisher.next("hello")
        return publisher

    async def __aexit__(self, *error: Any) -> None:
        await self._connection.__aexit__(*error)


# Every route ----------------------------------------------------------------------------------------------------------


def routes(app: Any) -> Iterator[tuple[str, str]]:
    """Each method of each rule in the app's own map, its parts filled in."""
    for rule in app.url_map.iter_rules():
        target = re.sub(r"<(?:path:)?(\w+)>", lambda found: f"a-{found[1].replace('_', '-')}", rule.rule)
        for method in sorted(rule.methods - {"OPTIONS"}):
            yield method, target


async def everything(broker: Broker) -> Any:
    counted = broker.statistics()
    return broker.llm_views(), broker.session_views(), broker.task_views(), broker.key_views(), counted


@pytest.mark.parametrize(
    "presented",
    [
        (),
        ("authorization: Bearer",),
        ("authorization: Bearer wakecall_admin_aaaa",),
        ("authorization: Basic YWRtaW46YWRtaW4=",),
        ("authorization: ",),
        ("x-api-key: ",),
        ("x-api-key: none",),
        ("cookie: key=x",),
    ],
)
async def test_every_route_is_401_without_a_key_but_for_a_short_list(keyed: Keyed, presented: tuple[str, ...]) -> None:
    """Walked through the app's own map, so that a route which somebody adds is one that this test tries. (OPTIONS says which
    methods a path takes, to everybody, and no more.)"""
    walked = set()
    before = await everything(keyed.served.broker)
    for method, target in routes(keyed.served.app):
        answer = await keyed.served.ask(method, target, *presented, JSON, host=FOREIGN_HOST)
        walked.add(target)
        options = await keyed.served.ask("OPTIONS", target, *presented, host=FOREIGN_HOST)
        assert (options.status, options.body) == (200, b"")
        assert method in options.headers["allow"]
        if target in PUBLIC:
            assert answer.status == 200, (method, target)
            continue
        assert answer.status == 401, (method, target)
        assert answer.headers["www-authenticate"] == "Bearer"
        if method != "HEAD":
            assert answer.code == "invalid_api_key"
            assert answer.json["error"]["type"] == "authentication_error"
    assert set(PUBLIC) < walked
    assert len(walked) > 25
    assert await everything(keyed.served.broker) == before


def role_of(target: str) -> str | None:
    if target in PUBLIC:
        return None
    if target == "/metrics":
        return "monitor"
    return next(
        (role for prefix, role in (("/v1/", "client"), ("/publisher/v1/", "publisher")) if target.startswith(prefix)),
        "admin",
    )


@pytest.mark.parametrize("role", ROLES)
async def test_every_route_is_403_with_another_roles_key(keyed: Keyed, role: str) -> None:
    """No role holds another: an operator's key generates nothing and publishes nothing. Nothing changes. He may read the
    metrics, and whoever may do that can do nothing else."""
    before = await everything(keyed.served.broker)
    for method, target in routes(keyed.served.app):
        if role_of(target) in (None, role):
            continue
        answer = await keyed.ask(role, method, target, {})
        if (role, target) == ("admin", "/metrics"):
            assert answer.status == 200
            continue
        assert answer.status == 403, (method, target, answer)
        if method != "HEAD":
            assert answer.code == "forbidden"
    assert await everything(keyed.served.broker) == before


async def test_a_monitor_reads_the_metrics(keyed: Keyed) -> None:
    """As its operator does; nobody else, and nobody without a key."""
    for whose, status in (("monitor", 200), ("admin", 200), ("client", 403), ("publisher", 403)):
        answer = await keyed.ask(whose, "GET", "/metrics")
        assert answer.status == status, whose
        assert (b"wakecall_infers_accepted_total" in answer.body) is (status == 200)
    assert (await keyed.served.ask("GET", "/metrics", host=FOREIGN_HOST)).status == 401


async def test_with_another_publishers_key_nothing_of_this_ones_is_there(keyed: Keyed) -> None:
    """Session, tasks, names: 404 or 409 on every path, and nothing changes."""
    async with Publishing(keyed) as publisher, trio.open_nursery() as nursery:
        answers: list[Answer] = []

        async def call() -> None:
            answers.append(await keyed.ask("client", "POST", "/v1/chat/completions", {"model": "qwen"}))

        nursery.start_soon(call)
        frame = await publisher.next("infer")
        before = (
            keyed.served.broker.session_views(),
            keyed.served.broker.llms(),
            keyed.served.broker.task_views()[0].state,
        )
        session, task = "/publisher/v1/sessions/laptop", f"/publisher/v1/tasks/{frame.task_id}"
        tried = {
            ("PUT", session): (409, "session_taken"),
            ("DELETE", session): (404, "session_not_found"),
            ("POST", f"{session}/heartbeat"): (404, "session_not_found"),
            ("GET", f"{session}/frames"): (404, "session_not_found"),
            ("GET", f"{task}/body"): (404, "task_not_found"),
            ("POST", f"{task}/result"): (404, "task_not_found"),
            ("POST", f"{task}/chunks"): (404, "task_not_found"),
            ("POST", f"{task}/failure"): (404, "task_not_found"),
            ("POST", f"{task}/cancelled"): (404, "task_not_found"),
            ("POST", f"{session}/results"): (404, "session_not_found"),
            ("POST", f"{session}/pause"): (404, "session_not_found"),
            ("POST", f"{session}/resume"): (404, "session_not_found"),
            ("PUT", "/publisher/v1/sessions/mine"): (409, "llm_name_taken"),
        }
        paths = {
            (method, target)
            for method, target in routes(keyed.served.app)
            if target.startswith("/publisher/") and method != "HEAD"
        }
        names = {("a-session-id", "laptop"), ("a-task-id", frame.task_id)}
        for method, target in paths:
            for dummy, real in names:
                target = target.replace(dummy, real)
            assert (method, target) in tried, "a route that this test does not know"
        for (method, target), expected in tried.items():
            body = {"llms": [{"name": "qwen"}]} if method == "PUT" else {"message": "x"}
            answer = await keyed.ask("stranger", method, target, body, "wakecall-offset: 0")
            assert (answer.status, answer.code) == expected, (method, target)
        after = (
            keyed.served.broker.session_views(),
            keyed.served.broker.llms(),
            keyed.served.broker.task_views()[0].state,
        )
        assert after == before
        assert (await publisher.answer(frame, {"ok": True})).status == 200
    assert answers[0].json == {"ok": True}


async def test_a_heartbeat_tells_nothing_of_anothers_tasks(keyed: Keyed) -> None:
    async with (
        Publishing(keyed) as publisher,
        Publishing(keyed, {"name": "phi"}, whose="stranger", session_id="theirs"),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keyed.ask, "client", "POST", "/v1/completions", {"model": "qwen"})
            frame = await publisher.next("infer")
            answer = await keyed.ask(
                "stranger", "POST", "/publisher/v1/sessions/theirs/heartbeat", {"tasks": [frame.task_id, "never"]}
            )
            assert answer.json["drop"] == [frame.task_id, "never"]
            assert (await publisher.answer(frame, {})).status == 200


# The key itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form", ["authorization: Bearer {}", "Authorization: bearer {}", "x-api-key: {}", "X-API-Key:   {}  "]
)
async def test_a_key_comes_in_either_way(keyed: Keyed, form: str) -> None:
    answer = await keyed.served.ask("GET", "/v1/models", form.format(keyed.secrets["client"]), host=FOREIGN_HOST)
    assert answer.status == 200


async def test_a_key_may_come_in_both_ways_but_not_two_keys(keyed: Keyed) -> None:
    """Which of the two counts must not depend on who reads first. A proxy's own password is no key."""
    key, other = keyed.secrets["client"], keyed.secrets["admin"]
    tried = [
        ((f"authorization: Bearer {key}", f"x-api-key: {key}"), 200),
        ((f"authorization: Bearer {key}", f"x-api-key: {other}"), 401),
        ((f"authorization: Bearer {key}", f"authorization: Bearer {other}"), 401),
        ((f"x-api-key: {key}", f"x-api-key: {other}"), 401),
        (("authorization: Basic bmdpbng6cGFzcw==", f"x-api-key: {key}"), 200),
        (("authorization: Basic bmdpbng6cGFzcw==",), 401),
        ((f"authorization: {key}",), 401),
        ((f"authorization: Bearer {key} {key}",), 401),
        ((f"authorization: Bearer {key}, Bearer {key}",), 401),
    ]
    for headers, status in tried:
        answer = await keyed.served.ask("GET", "/v1/models", *headers, host=FOREIGN_HOST)
        assert answer.status == status, headers


@pytest.mark.parametrize("wrong", ["\xff\xfe", "é" * 1000, "a" * 60_000, "%00", "' OR 1=1 --", "{{7*7}}", "\t\t"])
async def test_whatever_is_no_key_is_401(keyed: Keyed, wrong: str) -> None:
    for header in ("authorization: Bearer ", "x-api-key: "):
        answer = await keyed.served.ask("GET", "/v1/models", header + wrong, host=FOREIGN_HOST)
        assert (answer.status, answer.code) == (401, "invalid_api_key")


async def test_a_refusal_on_messages_has_anthropics_shape(keyed: Keyed) -> None:
    answer = await keyed.served.ask("POST", "/v1/messages", JSON, body=b"{}", host=FOREIGN_HOST)
    assert (answer.status, answer.json["type"]) == (401, "error")


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("x"), UnicodeError(), RecursionError(), ValueError("wakecall_client_x")]
)
async def test_whatever_goes_wrong_in_the_check_lets_nobody_in(
    keyed: Keyed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    """503, for a good key and for none, on every route; and the log has no part of what was presented."""

    def broken(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(Keyring, "find", broken)
    caplog.set_level(logging.DEBUG)
    for method, target in routes(keyed.served.app):
        if target in PUBLIC:
            continue
        for headers in ((), (keyed.header(role_of(target) or ""),)):
            answer = await keyed.served.ask(method, target, *headers, JSON, host=FOREIGN_HOST)
            assert answer.status == 503, (method, target)
    assert "a key could not be checked" in caplog.text
    assert "wakecall_" not in caplog.text


async def test_on_the_next_request_a_revoked_key_opens_nothing(keyed: Keyed) -> None:
    """Also on the connection that it came on before."""
    async with keyed.served.server.connect() as wire:
        request = head("GET", "/v1/models", keyed.header("client"))
        await wire.send(request)
        assert (await wire.read_answer()).status == 200
        client = next(view for view in keyed.served.broker.key_views() if view.key.role == "client")
        assert (await keyed.ask("admin", "DELETE", f"/admin/v1/keys/{client.key.key_id}")).status == 204
        await wire.send(request)
        assert (await wire.read_answer()).status == 401


@pytest.mark.parametrize(
    ("whose", "method", "target", "body"),
    [
        ("admin", "POST", "/admin/v1/keys", {"role": "admin"}),
        ("admin", "PUT", "/admin/v1/llms/gpt", {"type": "openai", "model": "x", "url": "https://api.example"}),
        ("publisher", "PUT", "/publisher/v1/sessions/late", {"llms": [{"name": "late"}]}),
        ("client", "POST", "/v1/chat/completions", {"model": "qwen"}),
        ("nobody", "POST", "/admin/v1/keys", {"role": "admin"}),
    ],
)
async def test_who_loses_his_key_while_his_body_arrives_is_refused(
    served: Served, whose: str, method: str, target: str, body: Any
) -> None:
    """Else a stolen key could make another one while it is revoked; and who began on an open broker has no key at all."""
    broker = served.broker
    if whose != "nobody":
        keyed = Keyed(served, {role: (await broker.create_key(role)).secret for role in ROLES})
    header = () if whose == "nobody" else (keyed.header(whose),)
    data = as_bytes(body)
    async with served.server.connect() as wire:
        await wire.send(head(method, target, *header, JSON, f"content-length: {len(data)}") + data[:5])
        await trio.testing.wait_all_tasks_blocked(0.01)
        if whose == "nobody":
            await broker.create_key("admin")
        else:
            key = next(view.key for view in broker.key_views() if view.key.role == whose)
            await broker.revoke_key(key.key_id)
        before = await everything(broker)
        await wire.send(data[5:])
        answer = await wire.read_answer(method)
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert await everything(broker) == before


async def test_a_publisher_whose_key_is_revoked_is_told_to_stop(keyed: Keyed) -> None:
    async with Publishing(keyed) as publisher:
        own = next(view.key for view in keyed.served.broker.key_views() if view.key.role == "publisher")
        assert (await keyed.ask("admin", "DELETE", f"/admin/v1/keys/{own.key_id}")).status == 204
        assert (await publisher.next("bye")).data == {"reason": "evicted"}
        assert await publisher.reading.rest() == (b"", False)
        assert (await keyed.register("laptop")).status == 401


# What a client's key is bound to ----------------------------------------------------------------------------------------


async def test_a_key_bound_to_models_lists_and_calls_those_alone(keyed: Keyed) -> None:
    made = await keyed.served.broker.create_key("client", llms=["qwen*"])
    keyed.secrets["friend"] = made.secret
    async with Publishing(keyed, {"name": "qwen"}, {"name": "phi"}):
        listed = (await keyed.ask("friend", "GET", "/v1/models")).json["data"]
        assert [each["id"] for each in listed] == ["qwen"]
        assert (await keyed.ask("friend", "GET", "/v1/models/qwen")).status == 200
        hidden = await keyed.ask("friend", "GET", "/v1/models/phi", None, "x-request-id: x")
        absent = await keyed.ask("friend", "GET", "/v1/models/none", None, "x-request-id: x")
        assert (hidden.status, hidden.code) == (404, "model_not_found")
        hidden_call = await keyed.ask("friend", "POST", "/v1/chat/completions", {"model": "phi"}, "x-request-id: x")
        absent_call = await keyed.ask("friend", "POST", "/v1/chat/completions", {"model": "none"}, "x-request-id: x")
        assert (hidden_call.status, hidden_call.code) == (404, "model_not_found")
        # To the last byte as if it were not there.
        for one, other in ((hidden, absent), (hidden_call, absent_call)):
            one.headers.pop("date"), other.headers.pop("date")
            assert (one.status, one.headers, one.body) == (other.status, other.headers, other.body)


async def test_a_publishers_key_bound_to_names_registers_those_alone(keyed: Keyed) -> None:
    keyed.secrets["friend"] = (await keyed.served.broker.create_key("publisher", llms=["friend/*"])).secret
    assert (await keyed.register("theirs", {"name": "friend/qwen"}, whose="friend")).status == 200
    refused = await keyed.register("theirs", {"name": "friend/phi"}, {"name": "gpt"}, whose="friend")
    assert (refused.status, refused.code) == (403, "forbidden")
    assert refused.json["error"]["param"] == "llms[1].name"
    assert [llm.name for llm in keyed.served.broker.llms()] == ["friend/qwen"]


async def test_requests_a_minute_are_bounded_and_the_answers_say_how_it_stands(keyed: Keyed) -> None:
    keyed.secrets["friend"] = (await keyed.served.broker.create_key("client", rpm=2)).secret
    left = []
    for _ in range(2):
        answer = await keyed.ask("friend", "POST", "/v1/chat/completions", {"model": "none"})
        assert answer.status == 404
        assert answer.headers["x-ratelimit-limit-requests"] == "2"
        left.append(answer.headers["x-ratelimit-remaining-requests"])
    assert left == ["1", "0"]
    refused = await keyed.ask("friend", "POST", "/v1/chat/completions", {"model": "none"})
    assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
    assert refused.json["error"]["type"] == "rate_limit_error"
    assert 25 <= int(refused.headers["retry-after"]) <= 30
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert re.fullmatch(r"(\d+m)?[\d.]+s", refused.headers["x-ratelimit-reset-requests"])
    # Nobody else pays.
    other = await keyed.ask("client", "POST", "/v1/chat/completions", {"model": "none"})
    assert other.status == 404
    assert "x-ratelimit-limit-requests" not in other.headers


async def test_a_request_that_is_refused_for_its_encoding_is_one_too(keyed: Keyed) -> None:
    keyed.secrets["friend"] = (await keyed.served.broker.create_key("client", rpm=1)).secret
    for status in (415, 429):
        answer = await keyed.ask("friend", "POST", "/v1/completions", {"model": "none"}, "content-encoding: gzip")
        assert (answer.status, answer.headers["x-ratelimit-remaining-requests"]) == (status, "0")


async def test_a_streamed_answer_says_too_how_the_rate_stands(keyed: Keyed) -> None:
    keyed.secrets["friend"] = (await keyed.served.broker.create_key("client", rpm=9)).secret
    async with Publishing(keyed) as publisher, trio.open_nursery() as nursery:
        answers: list[Answer] = []

        async def call() -> None:
            answers.append(await keyed.ask("friend", "POST", "/v1/completions", {"model": "qwen", "stream": True}))

        nursery.start_soon(call)
        target = f"/publisher/v1/tasks/{(await publisher.next('infer')).task_id}/result"
        headers = (keyed.header("publisher"), "content-type: text/event-stream")
        assert (await keyed.served.ask("POST", target, *headers, body=b"data: [DONE]\n\n")).status == 200
    assert answers[0].headers["content-type"] == "text/event-stream"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "8"


async def test_requests_at_a_time_are_bounded_and_counted_from_the_head(keyed: Keyed) -> None:
    """A body that is still on its way counts: else a key's bodies would be bounded by nothing. Leaving frees the place."""
    keyed.secrets["friend"] = (await keyed.served.broker.create_key("client", max_in_flight=1)).secret
    body = as_bytes({"model": "qwen"})
    broker = keyed.served.broker

    def under_way() -> int:
        return sum(view.in_flight for view in broker.key_views())

    async with Publishing(keyed) as publisher:
        for sent in (b"", body):
            async with keyed.served.server.connect() as wire:
                length = f"content-length: {len(body)}"
                await wire.send(head("POST", "/v1/chat/completions", keyed.header("friend"), length) + sent)
                await wait_until(lambda: under_way() == 1)
                if sent:
                    await publisher.next("infer")
                refused = await keyed.ask("friend", "POST", "/v1/chat/completions", {"model": "qwen"})
                assert (refused.status, refused.code) == (429, "rate_limit_exceeded")
                assert refused.headers["retry-after"] == "1"
            await wait_until(lambda: under_way() == 0)


# Operators ----------------------------------------------------------------------------------------------------------


async def test_an_operator_makes_lists_and_revokes_keys(keyed: Keyed) -> None:
    asked = {
        "role": "client",
        "name": "Ännas Laptop",
        "owner": "anna",
        "llms": ["qwen*"],
        "rpm": 60,
        "max_in_flight": 4,
    }
    made = await keyed.ask("admin", "POST", "/admin/v1/keys", {**asked, "expires_in_s": 86_400})
    assert made.status == 201
    assert made.headers["cache-control"] == "no-store"
    shown = made.json
    secret = shown.pop("key")
    assert re.fullmatch(r"wakecall_client_[a-z2-7]{52}", secret)
    assert {name: shown[name] for name in asked} == asked
    assert shown["expired"] is False
    listed = await keyed.ask("admin", "GET", "/admin/v1/keys")
    assert shown in listed.json["data"]
    assert b"wakecall_" not in listed.body
    keyed.secrets["friend"] = secret
    assert (await keyed.ask("friend", "GET", "/v1/models")).status == 200
    assert (await keyed.ask("admin", "DELETE", f"/admin/v1/keys/{shown['id']}")).status == 204
    assert (await keyed.ask("friend", "GET", "/v1/models")).status == 401
    gone = await keyed.ask("admin", "DELETE", f"/admin/v1/keys/{shown['id']}")
    assert (gone.status, gone.code) == (404, "not_found")


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({}, "role"),
        ({"role": "root"}, "role"),
        ({"role": 1}, "role"),
        ({"role": "client", "llms": "qwen"}, "llms"),
        ({"role": "client", "llms": ["a b"]}, "llms[0]"),
        ({"role": "client", "rpm": 0}, "rpm"),
        ({"role": "client", "rpm": True}, "rpm"),
        ({"role": "client", "expires_in_s": -1}, "expires_in_s"),
        ({"role": "publisher", "max_in_flight": 1}, "max_in_flight"),
        ({"role": "client", "owner": "a/b"}, "owner"),
    ],
)
async def test_what_is_no_key_is_400_and_says_which_member(keyed: Keyed, asked: dict[str, Any], param: str) -> None:
    before = keyed.served.broker.key_views()
    answer = await keyed.ask("admin", "POST", "/admin/v1/keys", asked)
    assert (answer.status, answer.code) == (400, "invalid_request")
    assert answer.json["error"]["param"] == param
    assert keyed.served.broker.key_views() == before


async def test_nobody_locks_himself_out(served: Served) -> None:
    """The first key that is made over the wire is an operator's and lasts, and the last one of those stays."""
    for asked in ({"role": "client"}, {"role": "publisher"}, {"role": "admin", "expires_in_s": 60}):
        refused = await served.ask("POST", "/admin/v1/keys", JSON, body=as_bytes(asked))
        assert (refused.status, refused.code) == (403, "forbidden")
    assert served.broker.is_open
    first = (await served.ask("POST", "/admin/v1/keys", JSON, body=as_bytes({"role": "admin"}))).json
    keyed = Keyed(served, {"admin": first["key"]})
    await served.broker.create_key("admin", expires_in_s=60)
    refused = await keyed.ask("admin", "DELETE", f"/admin/v1/keys/{first['id']}")
    assert (refused.status, refused.code) == (403, "forbidden")
    second = (await keyed.ask("admin", "POST", "/admin/v1/keys", {"role": "admin"})).json
    assert (await keyed.ask("admin", "DELETE", f"/admin/v1/keys/{first['id']}")).status == 204
    keyed.secrets["admin"] = second["key"]
    assert (await keyed.ask("admin", "GET", "/admin/v1/keys")).status == 200


async def test_what_local_had_can_be_handed_over(keyed: Keyed) -> None:
    """From the time before there were keys."""
    broker = keyed.served.broker
    await broker.register("old", [])
    owner = next(view.key.owner for view in broker.key_views() if view.key.role == "publisher")
    assert (await keyed.register("old")).code == "session_taken"
    changed = await keyed.ask("admin", "PATCH", "/admin/v1/sessions/old", {"owner": owner})
    assert (changed.status, changed.json["owner"]) == (200, owner)
    assert (await keyed.register("old")).status == 200
    changed = await keyed.ask("admin", "PATCH", "/admin/v1/llms/qwen", {"owner": "anna"})
    assert (changed.status, changed.json["owner"], changed.json["status"]) == (200, "anna", "inactive")
    for target in ("/admin/v1/sessions/none", "/admin/v1/llms/none"):
        assert (await keyed.ask("admin", "PATCH", target, {"owner": "anna"})).status == 404
    for wrong in ({}, {"owner": 1}, {"owner": "a b"}):
        answer = await keyed.ask("admin", "PATCH", "/admin/v1/llms/qwen", wrong)
        assert (answer.status, answer.json["error"]["param"]) == (400, "owner")


async def test_with_keys_neither_host_nor_origin_matters(keyed: Keyed) -> None:
    """No page has a key that its user did not give it."""
    answer = await keyed.ask("client", "GET", "/v1/models", None, "origin: https://evil.example")
    assert answer.status == 200
    assert not any(name.startswith("access-control") for name in answer.headers)


async def test_the_first_key_closes_an_open_broker_for_whoever_is_there(served: Served) -> None:
    async with served.publishing() as publisher, served.calling({"model": "qwen"}) as reading:
        frame = await publisher.next("infer")
        await served.broker.create_key("admin")
        assert (await publisher.next("bye")).data == {"reason": "stale"}
        assert (await reading.read_head()).status == 503
        assert (await publisher.answer(frame, {})).status == 401
        assert (await served.ask("POST", "/publisher/v1/sessions/laptop/heartbeat", body=b"{}")).status == 401


# What they hold ------------------------------------------------------------------------------------------------------


async def test_one_keys_bodies_leave_room_for_anothers() -> None:
    """Half of what is held at all is the most for one: he hears 429 beyond, while another's body is taken."""
    kib = 1024
    async with open_served(BrokerConfig(max_held_bytes=64 * kib)) as served:
        one, other = [f"x-api-key: {(await served.broker.create_key('client')).secret}" for _ in range(2)]
        begun = head("POST", "/v1/chat/completions", one, f"content-length: {30 * kib}") + bytes(20 * kib)
        body = as_bytes({"model": "nobody", "pad": "x" * 20 * kib})
        async with served.server.connect() as wire:
            await wire.send(begun)
            await wait_until(lambda: served.app.asgi_app.budget.held_bytes == 20 * kib)
            refused = await served.ask("POST", "/v1/chat/completions", one, body=body)
            assert (refused.status, refused.code) == (429, "queue_full")
            assert (await served.ask("POST", "/v1/chat/completions", other, body=body)).code == "model_not_found"
            await wire.send(bytes(10 * kib))
            assert (await wire.read_answer("POST")).status == 400
        assert (await served.ask("POST", "/v1/chat/completions", one, body=body)).code == "model_not_found"
