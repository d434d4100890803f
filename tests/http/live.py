"""`wakecall serve` as a process of its own, and beside it what a stateless load of requests needs to get anywhere.

It has a key for each role, all of one owner. A publisher in a thread holds the channel of `laptop` and comes back whatever
is done to it; `ready` puts back what the request before may have taken away, `task` is the id of an infer that is under way,
and `spare_key` that of a key which nobody needs. All of it blocks: what drives it, does too.
"""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from tests.cli.processes import PATIENCE_S, environment

__all__ = ["LAPTOP", "ROWS", "SPARE", "Live", "open_live"]

LAPTOP = "laptop"
#: A session that is registered and has no channel.
SPARE = "spare"
#: `answers` does at once, `holds` never, `sleeps` is woken first.
ROWS = ("answers", "holds", "sleeps")

_CALL = b'{"model": "holds", "prompt": "hello"}'


class Live:
    """A broker that listens on `port`, and its publisher."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._asking = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        #: By role. The first one closes the broker, so it is an operator's.
        self.keys: dict[str, str] = {}
        for role in ("admin", "publisher", "client"):
            status, made = self.ask("POST", "/admin/v1/keys", {"role": role, "owner": "tester"})
            assert status == 201, made
            self.keys[role] = made["key"]
        self._held: tuple[socket.socket, str] | None = None
        self._arrived: list[str] = []
        self._news = threading.Condition()
        self._stopping = False
        self._channel: http.client.HTTPConnection | None = None
        self._thread = threading.Thread(target=self._publish, name="publisher")
        self._thread.start()

    def ask(self, method: str, target: str, said: Any = None) -> tuple[int, Any]:
        """One request with the key that its path takes: the status, and the JSON if there is any."""
        return self._ask(self._asking, method, target, said)

    def ready(self) -> None:
        """Return once the sessions are registered, the channel is open and the rows can be called."""
        while True:
            with self._news:
                channel = self._channel
            for alias in self.ask("GET", "/admin/v1/aliases")[1]["data"]:
                self.ask("DELETE", f"/admin/v1/aliases/{alias['name']}")
            status, found = self.ask("GET", "/admin/v1/llms")
            assert status == 200, found
            routable = {row["name"] for row in found["data"] if row["routable"]}
            statuses = {row["name"]: row["status"] for row in found["data"]}
            if routable.issuperset(ROWS) and statuses["sleeps"] == "hibernating":
                self.ask("PUT", f"/publisher/v1/sessions/{SPARE}", {"llms": []})
                return
            for row in found["data"]:
                if row["hold"] is not None:
                    self.ask("POST", "/admin/v1/resume", {"llm": row["name"]})
            for name in ROWS:
                # A public row of that name, or another session's: whoever made it, it goes.
                self.ask("DELETE", f"/admin/v1/llms/{name}")
            if self._register(self._asking) != 200:
                self.ask("DELETE", f"/admin/v1/sessions/{LAPTOP}")  # it is somebody else's by now
                self._register(self._asking)
            self.ask("POST", f"/publisher/v1/sessions/{LAPTOP}/resume", {})
            _, sessions = self.ask("GET", "/admin/v1/sessions")
            if not any(each["connected"] for each in sessions["data"] if each["session_id"] == LAPTOP):
                self._wait_for_another(channel)

    def _wait_for_another(self, channel: http.client.HTTPConnection | None) -> None:
        with self._news:
            assert self._news.wait_for(lambda: self._channel is not channel, PATIENCE_S), "no channel"

    def task(self) -> str:
        """The id of an infer that its publisher has, and nobody has answered."""
        if self._held is not None:
            status, _ = self.ask("GET", f"/publisher/v1/tasks/{self._held[1]}/body")
            if status == 200:
                return self._held[1]
            self._held[0].close()
        self.ready()
        with self._news:
            self._arrived.clear()
        client = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nx-api-key: {self.keys['client']}\r\n"
            f"content-length: {len(_CALL)}\r\n\r\n"
        )
        client.sendall(head.encode() + _CALL)
        with self._news:
            assert self._news.wait_for(lambda: self._arrived, PATIENCE_S), "no frame"
            self._held = (client, self._arrived.pop())
        return self._held[1]

    def spare_key(self) -> str:
        """The id of a key that may be revoked."""
        return str(self.ask("POST", "/admin/v1/keys", {"role": "client"})[1]["id"])

    def close(self) -> None:
        if self._held is not None:
            self._held[0].close()
        self._asking.close()
        with self._news:
            self._stopping = True
            if self._channel is not None and self._channel.sock is not None:
                self._channel.sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()

    # The publisher's thread ----------------------------------------------------------------------------------------

    def _publish(self) -> None:
        posting = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        while not self._stopping:
            channel = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
            try:
                self._register(posting)
                channel.request(
                    "GET", f"/publisher/v1/sessions/{LAPTOP}/frames", headers={"x-api-key": self.keys["publisher"]}
                )
                answer = channel.getresponse()
                if answer.status == 200:
                    self._follow(channel, answer, posting)
            except (OSError, http.client.HTTPException):
                posting.close()  # opens itself again
            finally:
                channel.close()
        posting.close()

    def _follow(
        self, channel: http.client.HTTPConnection, answer: http.client.HTTPResponse, posting: http.client.HTTPConnection
    ) -> None:
        event = b""
        while line := answer.readline():
            name, _, value = line.rstrip(b"\n").partition(b": ")
            if name == b"event":
                event = value
            elif name == b"data":
                self._take(event, msgspec.json.decode(value), channel, posting)

    def _take(
        self,
        event: bytes,
        data: dict[str, Any],
        channel: http.client.HTTPConnection,
        posting: http.client.HTTPConnection,
    ) -> None:
        with self._news:
            if event == b"hello":
                self._channel = channel
            elif event == b"infer" and data["llm"] == "holds":
                self._arrived.append(data["task_id"])
            self._news.notify_all()
        if event in (b"infer", b"wake") and data["llm"] != "holds":
            self._ask(posting, "POST", f"/publisher/v1/tasks/{data['task_id']}/result", {"from": "the engine"})

    def _register(self, connection: http.client.HTTPConnection) -> int:
        rows = [{"name": name, "status": "hibernating" if name == "sleeps" else "active"} for name in ROWS]
        return self._ask(connection, "PUT", f"/publisher/v1/sessions/{LAPTOP}", {"llms": rows})[0]

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, target: str, said: Any = None
    ) -> tuple[int, Any]:
        body = b"" if said is None else msgspec.json.encode(said)
        headers = {"content-type": "application/json"}
        role = {"v1": "client", "publisher": "publisher"}.get(target.split("/")[1], "admin")
        if role in self.keys:
            headers["x-api-key"] = self.keys[role]
        connection.request(method, target, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        is_json = answer.getheader("content-type", "").startswith("application/json")
        return answer.status, msgspec.json.decode(data) if data and is_json else None


@contextmanager
def open_live(state: Path, *options: str) -> Iterator[Live]:
    """A broker and its publisher for the block. Its log is empty of errors of ours, or this fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "wakecall", "serve", "--port", "0", "--db", ":memory:", *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(state),
    )
    log: list[str] = []
    assert process.stderr is not None
    following = threading.Thread(target=log.extend, args=(process.stderr,), name="log")
    following.start()
    try:
        assert process.stdout is not None
        listening = process.stdout.readline()
        assert "listens on" in listening, log
        live = Live(int(listening.rpartition(":")[2]))
        try:
            yield live
            assert live.ask("GET", "/healthz")[0] == 200
        finally:
            live.close()
    finally:
        process.terminate()
        process.wait(PATIENCE_S)
        following.join(PATIENCE_S)
        process.stdout.close()
        process.stderr.close()
    errors = [line for line in log if " ERROR " in line or "Traceback" in line]
    assert errors == [], errors
