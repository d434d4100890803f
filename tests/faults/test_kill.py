"""SIGKILL in the middle of registrations and heartbeats, again and again on one file: whatever was acknowledged is there."""

from __future__ import annotations

import math
import random
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import httpx2
import trio

from tests.e2e.stack import BrokerProcess, open_broker_process, within

ROUNDS = 4
PUBLISHERS = 8
#: Each round is cut off after at most so many acknowledgements, and at least half of them.
ENOUGH = 120


class Writer:
    """A publisher with one request under way at a time, who notes what he was promised.

    Attributes:
        promised: what each row's status is by the last answer that came.
        asked: the same if the request under way is counted as done.
    """

    def __init__(self, session_id: str, dice: random.Random) -> None:
        self.session_id = session_id
        self.promised: dict[str, str] = {}
        self.asked: dict[str, str] = {}
        self._dice = dice

    async def write_on(self, http: httpx2.AsyncClient, on_acknowledged: trio.MemorySendChannel[None]) -> None:
        """Register one row more, or say how the rows are, until the broker is gone."""
        path = f"/publisher/v1/sessions/{self.session_id}"
        try:
            while True:
                if len(self.promised) < 3 or self._dice.random() < 0.3:
                    name = f"{self.session_id}-{len(self.asked)}"
                    self.asked = self.promised | {name: self._draw()}
                    llms = [{"name": name, "status": status} for name, status in self.asked.items()]
                    answer = await http.put(path, json={"llms": llms})
                else:
                    self.asked = {name: self._draw() for name in self.promised}
                    answer = await http.post(f"{path}/heartbeat", json={"llms": self.asked})
                assert answer.status_code == 200, answer.text
                self.promised = self.asked
                on_acknowledged.send_nowait(None)
        except httpx2.TransportError:
            pass

    def _draw(self) -> str:
        return self._dice.choice(["active", "hibernating"])

    def check(self, stored: dict[str, str]) -> None:
        """The file says what was promised, or what was being asked when the broker died."""
        mine = {name: status for name, status in stored.items() if name.startswith(f"{self.session_id}-")}
        assert mine in (self.promised, self.asked), (self.session_id, mine, self.promised, self.asked)
        self.promised = self.asked = mine


def stored_statuses(db: Path) -> dict[str, str]:
    """What each row is, or remembers that it was, by the file alone."""
    with closing(sqlite3.connect(db)) as connection:
        return dict(connection.execute("SELECT name, coalesce(remembers, status) FROM llms"))


async def write_and_kill(broker: BrokerProcess, writers: list[Writer], acknowledgements: int) -> None:
    """Let all of them write; SIGKILL the broker once so many answers have come, whatever is under way then."""
    acknowledged, answers = trio.open_memory_channel[None](math.inf)
    async with httpx2.AsyncClient(base_url=broker.url, timeout=20, trust_env=False) as http:
        async with trio.open_nursery() as nursery:
            for writer in writers:
                nursery.start_soon(writer.write_on, http, acknowledged)
            for _ in range(acknowledgements):
                await answers.receive()
            broker.send(signal.SIGKILL)
    await broker.wait()


@within(90)
async def test_every_acknowledged_registration_and_status_survives_a_kill(tmp_path: Path) -> None:
    """Also those of the rounds before; the next broker starts at once, shows them all, and revives them as they were."""
    db, dice = tmp_path / "w.db", random.Random(20261124)
    writers = [Writer(f"s{number}", dice) for number in range(PUBLISHERS)]
    for _ in range(ROUNDS):
        async with open_broker_process(db) as broker:
            rows = await broker.list("llms")
            promised = {name for writer in writers for name in writer.promised}
            assert {row["name"] for row in rows} == promised
            assert {row["status"] for row in rows} <= {"inactive"}
            for writer in writers[:2]:
                if writer.promised:
                    answer = await broker.http.post(f"/publisher/v1/sessions/{writer.session_id}/heartbeat", json={})
                    assert answer.json()["llms"] == writer.promised
            before = len(promised)
            await write_and_kill(broker, writers, dice.randrange(ENOUGH // 2, ENOUGH))
        stored = stored_statuses(db)
        for writer in writers:
            writer.check(stored)
        assert len(stored) > before
