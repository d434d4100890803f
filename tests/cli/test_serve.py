"""`wakecall serve`."""

from __future__ import annotations

import json
import re
import resource
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, fields
from pathlib import Path

import click
import httpx2
import pytest
import trio
from click.testing import CliRunner

from tests.cli.processes import Running, call, run_wakecall
from wakecall import BrokerConfig, ServeConfig
from wakecall.cli.serve import command

MEMORY = ("serve", "--port", "0", "--db", ":memory:")


class Channel:
    """A publisher's control channel on a bare socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.text = ""

    async def wait(self, wanted: str) -> None:
        """Until it has been sent; fails when the channel ends before."""
        while wanted not in self.text:
            data = await self.stream.receive_some()
            assert data, f"{wanted!r} never came, but:\n{self.text}"
            self.text += data.decode()

    async def wait_end(self) -> None:
        while data := await self.stream.receive_some():
            self.text += data.decode()


@asynccontextmanager
async def open_publisher(url: str, session_id: str, name: str) -> AsyncIterator[Channel]:
    """Registered, with its channel open."""
    async with httpx2.AsyncClient(base_url=url) as http:
        answer = await http.put(f"/publisher/v1/sessions/{session_id}", json={"llms": [{"name": name}]})
        assert answer.status_code == 200, answer.text
    host, _, port = url.removeprefix("http://").partition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        request = f"GET /publisher/v1/sessions/{session_id}/frames HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n"
        await stream.send_all(request.encode())
        channel = Channel(stream)
        await channel.wait("event: hello")
        yield channel


async def post_chat(url: str, name: str, prompt: str = "hi") -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=url, timeout=None) as http:
        body = {"model": name, "messages": [{"role": "user", "content": prompt}]}
        return await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "request-1"})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_listens_and_stops(number: signal.Signals, tmp_path: Path) -> None:
    """One line on stdout, with the real port, once it can be called; a signal ends it with 0."""
    async with run_wakecall(*MEMORY, state=tmp_path) as serve:
        url = await serve.url()
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9][0-9]*", url)
        async with httpx2.AsyncClient() as http:
            assert (await http.get(f"{url}/healthz")).status_code == 200
        serve.send(number)
        assert await serve.wait() == 0
        assert serve.out.text == f"Wakecall listens on {url}\n"
        assert "Traceback" not in serve.err.text


async def test_sighup_without_a_certificate_is_a_line_of_the_log(tmp_path: Path) -> None:
    """It goes on as before, however often."""
    async with run_wakecall(*MEMORY, state=tmp_path) as serve:
        url = await serve.url()
        for _ in range(2):
            serve.send(signal.SIGHUP)
            await serve.err.wait("there is no certificate that could be read again")
            async with httpx2.AsyncClient() as http:
                assert (await http.get(f"{url}/healthz")).status_code == 200
        serve.send(signal.SIGTERM)
        assert await serve.wait() == 0


async def test_with_idle_channels_open_it_stops_at_once(tmp_path: Path) -> None:
    """Publishers that just listen cost no grace: they get their `bye`, and it is over long before it."""
    async with run_wakecall(*MEMORY, "--grace", "30", state=tmp_path) as serve:
        url = await serve.url()
        async with open_publisher(url, "one", "a") as one, open_publisher(url, "two", "b") as two:
            began = trio.current_time()
            serve.send(signal.SIGTERM)
            assert await serve.wait() == 0, serve.err.text
            took = trio.current_time() - began
            for channel in (one, two):
                await channel.wait_end()
                assert "event: bye" in channel.text
                assert "shutdown" in channel.text
    assert took < 10


async def test_a_second_signal_skips_the_grace(tmp_path: Path) -> None:
    """What is under way has the grace; whoever does not want to wait for it says so again, and its client is told."""
    async with run_wakecall(*MEMORY, "--grace", "300", state=tmp_path) as serve:
        url = await serve.url()
        answers = []

        async def ask() -> None:
            answers.append(await post_chat(url, "slow"))

        async with open_publisher(url, "one", "slow") as channel, trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await channel.wait("event: infer")
            serve.send(signal.SIGTERM)
            await serve.err.wait("stopping: what is under way has 300 s")
            async with httpx2.AsyncClient() as http:
                # The listeners are still open: the grace is real.
                assert (await http.get(f"{url}/readyz")).status_code == 503
            began = trio.current_time()
            serve.send(signal.SIGTERM)
            assert await serve.wait() == 0, serve.err.text
            assert trio.current_time() - began < 2.5
        assert answers[0].status_code == 503


async def test_what_happens_is_told_in_lines(tmp_path: Path) -> None:
    """One line for each coming and going and each outcome, with what it takes to find a request; never its body."""
    async with run_wakecall(*MEMORY, state=tmp_path) as serve:
        url = await serve.url()
        async with open_publisher(url, "one", "m"):
            pass
        ended = await serve.err.wait("channel_ended")
        assert (await post_chat(url, "m", "the secret prompt")).status_code == 503
        settled = await serve.err.wait("infer ")
        serve.send(signal.SIGTERM)
        await serve.wait()
        assert "session_registered session_id=one llms=1" in serve.err.text
        assert "channel_open session_id=one epoch=1" in serve.err.text
        assert "reason=disconnected" in ended
        for said in ("request_id=request-1", "llm=m", "outcome=failed", "code=model_offline", "phase=", "seconds="):
            assert said in settled
        assert serve.err.text.count("request-1") == 1
        assert "secret" not in serve.err.text


async def test_as_json_every_line_is_an_object(tmp_path: Path) -> None:
    async with run_wakecall(*MEMORY, state=tmp_path, WAKECALL_LOG_FORMAT="json") as serve:
        url = await serve.url()
        async with open_publisher(url, "one", "m"):
            pass
        await serve.err.wait("channel_ended")
        await post_chat(url, "m")
        await serve.err.wait("request-1")
        serve.send(signal.SIGTERM)
        await serve.wait()
        lines = [json.loads(line) for line in serve.err.text.splitlines()]
        by_event = {line.get("event"): line for line in lines}
        assert {"session_registered", "channel_open", "channel_ended", "infer"} <= by_event.keys()
        assert by_event["infer"]["request_id"] == "request-1"
        assert by_event["infer"]["seconds"] >= 0
        assert all({"at", "level"} <= line.keys() for line in lines)


async def test_the_level_is_a_bound(tmp_path: Path) -> None:
    async with run_wakecall(*MEMORY, "--log-level", "error", state=tmp_path) as serve:
        async with open_publisher(await serve.url(), "one", "m"):
            pass
        serve.send(signal.SIGTERM)
        await serve.wait()
        assert serve.err.text == ""


async def test_rows_outlive_it_in_the_state_directory(tmp_path: Path) -> None:
    """Without `--db` they are in a file of the user's state directory; after a restart they are there, and inactive."""
    for start in (1, 2):
        async with run_wakecall("serve", "--port", "0", state=tmp_path) as serve:
            url = await serve.url()
            async with httpx2.AsyncClient(base_url=url) as http:
                if start == 1:
                    await http.put("/publisher/v1/sessions/one", json={"llms": [{"name": "m"}]})
                rows = (await http.get("/admin/v1/llms")).json()["data"]
            assert [(row["name"], row["session_id"]) for row in rows] == [("m", "one")]
            serve.send(signal.SIGTERM)
            assert await serve.wait() == 0, serve.err.text
    assert rows[0]["status"] == "inactive"
    assert (tmp_path / "wakecall" / "wakecall.db").is_file()


async def test_the_descriptor_limit_is_raised(tmp_path: Path) -> None:
    """Each client and publisher holds a descriptor, so it takes as many as it may."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))

    async with run_wakecall(*MEMORY, state=tmp_path, prepare=few) as serve:
        await serve.url()
        assert resource.prlimit(serve.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    """Exit code 1: it may be free in a moment."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = call("serve", "--port", str(port), "--db", ":memory:", state=tmp_path)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.splitlines() == [
        f"Error: cannot listen on 127.0.0.1:{port}: the port is in use. Give it another --port, or --port 0 for a free one."
    ]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_an_address_that_others_reach_is_refused(host: str, tmp_path: Path) -> None:
    """78, with the reason and with what makes it possible, as long as there is no key."""
    run = call("serve", "--host", host, "--port", "0", state=tmp_path)
    assert run.returncode == 78
    assert run.stdout == ""
    assert "there are no API keys, so anybody who reaches it could use, replace and delete every model" in run.stderr
    assert f" keys create admin --db {tmp_path}/wakecall/wakecall.db`, or listen on 127.0.0.1." in run.stderr
    assert "Traceback" not in run.stderr


def test_without_a_file_there_can_be_no_key(tmp_path: Path) -> None:
    """So no command is named that could not work, but what has to be done first."""
    run = call(*MEMORY, "--host", "0.0.0.0", state=tmp_path)
    assert run.returncode == 78
    assert "Keys are kept in the file that --db names, and :memory: is none: name one, or listen" in run.stderr


def test_a_file_that_is_no_store_is_refused(tmp_path: Path) -> None:
    """78, with what to do, and the file stays as it is."""
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear Sir or Madam, this is no database")
    run = call("serve", "--port", "0", "--db", str(letter), state=tmp_path)
    assert run.returncode == 78
    assert run.stdout == ""
    assert "is no SQLite database. Name another file" in run.stderr
    assert "Traceback" not in run.stderr
    assert letter.read_text().startswith("Dear")


async def test_one_broker_to_a_file(tmp_path: Path) -> None:
    async with run_wakecall("serve", "--port", "0", state=tmp_path) as first:
        await first.url()
        second = await trio.to_thread.run_sync(lambda: call("serve", "--port", "0", state=tmp_path))
        assert second.returncode == 78
        assert "in use by another broker" in second.stderr


@pytest.mark.parametrize(
    ("args", "variables", "said"),
    [
        (["--heartbeat-timeout-s", "0"], {}, "heartbeat_timeout_s"),
        (["--grace", "nan"], {}, "grace_s"),
        (["--max-waiting", "1.5"], {}, "--max-waiting"),
        (["--max-waiting", "-1"], {}, "max_waiting"),
        ([], {"WAKECALL_IDLE_S": "-3"}, "idle_s"),
        ([], {"WAKECALL_TOTAL_S": "soon"}, "WAKECALL_TOTAL_S"),
        (["--port", "65536"], {}, "--port"),
        ([], {"WAKECALL_PORT": "http"}, "WAKECALL_PORT"),
        (["--head-s", "0"], {}, "head_s"),
        ([], {"WAKECALL_MAX_CONNECTIONS": "0"}, "max_connections"),
        (["--log-level", "loud"], {}, "--log-level"),
        (["--cors", "https://a.example/"], {}, "'https://a.example/' is no origin: nothing stands behind"),
        ([], {"WAKECALL_CORS": "https://a.example b.example"}, "'b.example' is no origin: it has no scheme"),
    ],
)
def test_a_setting_that_cannot_be_is_named(
    args: list[str], variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    """Exit code 2, whether it came as an option or as a variable."""
    run = call("serve", "--db", ":memory:", *args, state=tmp_path, **{"WAKECALL_PORT": "0", **variables})
    assert run.returncode == 2
    assert said in run.stderr
    assert "Traceback" not in run.stderr


def test_every_setting_of_the_broker_is_an_option() -> None:
    """With its variable, its default and what its record says of it; the grace under the name that the issue gave it."""
    options = {param.name: param for param in command.params}
    for each in fields(BrokerConfig):
        option = options[each.name]
        assert isinstance(option, click.Option)
        assert option.opts == ["--grace" if each.name == "grace_s" else f"--{each.name.replace('_', '-')}"]
        assert option.envvar == f"WAKECALL_{each.name.upper()}"
        assert option.default == each.default
        assert option.help is not None
        assert each.metadata["doc"][1:] in option.help


@pytest.mark.parametrize("by", ["option", "variable", "neither"])
def test_what_a_connection_may_take_is_set(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by its option or its variable; else it is what a program gets by default."""
    given: dict[str, float] = {"keep_alive_s": 11.5, "head_s": 12.0, "body_s": 13.0, "max_connections": 14}
    found: list[ServeConfig] = []
    monkeypatch.setattr("wakecall.cli.serve.trio.run", lambda _, where, *__: found.append(where))
    monkeypatch.setattr("wakecall.cli.serve._raise_descriptor_limit", lambda: None)
    monkeypatch.setattr("wakecall.cli.serve.configure_logging", lambda *_: None)
    args = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()] if by == "option" else []
    variables = {f"WAKECALL_{name.upper()}": str(value) for name, value in given.items()} if by == "variable" else {}
    run = CliRunner().invoke(command, ["--db", ":memory:", *args], env=variables)
    assert run.exit_code == 0, run.output
    wanted = asdict(ServeConfig()) if by == "neither" else given
    assert {name: getattr(found[0], name) for name in given} == {name: wanted[name] for name in given}


async def test_pages_of_the_origins_that_are_given_may_call(tmp_path: Path) -> None:
    """More than one, by option or by variable; also when the answer is given before the app sees the request."""
    for args, variables in (
        (("--cors", "https://a.example", "--cors", "https://b.example"), {}),
        ((), {"WAKECALL_CORS": "https://a.example  https://b.example"}),
    ):
        async with run_wakecall(*MEMORY, *args, state=tmp_path, **variables) as serve:
            async with httpx2.AsyncClient(base_url=await serve.url()) as http:
                for page in ("https://a.example", "https://b.example"):
                    for headers in ({}, {"upgrade": "websocket"}):
                        answer = await http.get("/v1/models", headers={"origin": page, **headers})
                        assert answer.status_code == (400 if headers else 200)
                        assert answer.headers["access-control-allow-origin"] == page
                assert (await http.get("/v1/models", headers={"origin": "https://c.example"})).status_code == 403


async def test_a_setting_reaches_the_broker(tmp_path: Path) -> None:
    """By option and by variable: what publishers are told is what was set."""

    async def hello(serve: Running) -> str:
        async with open_publisher(await serve.url(), "one", "m") as channel:
            return channel.text

    args = ("--heartbeat-interval-s", "7")
    async with run_wakecall(*MEMORY, *args, state=tmp_path, WAKECALL_KEEPALIVE_S="4.5") as serve:
        text = await hello(serve)
    assert '"heartbeat_interval_s":7.0' in text
    assert '"keepalive_s":4.5' in text
