"""`wakecall pause`, `resume` and `drain`: this machine's publisher, and any model as an operator."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import trio
from click.testing import Result

from tests.cli.processes import run_wakecall
from tests.cli.stage import Stage, open_engine, open_stage, serve_answer
from tests.cli.test_keys import ask, invoke, run
from wakecall import BrokerConfig, LLMSpec
from wakecall.publisher import PublishedModel, PublisherConfig
from wakecall.publisher.state import known_publishers, open_state
from wakecall.testing import FakePublisher

FOREVER_S = 3600.0


def holds(stage: Stage) -> dict[str, tuple[str | None, bool]]:
    """The operator's hold and the publisher's pause of each row."""
    return {row.name: (row.hold, row.paused) for row in stage.broker.llms()}


# This machine's publisher -------------------------------------------------------------------------------------------


async def test_my_gpu_now(tmp_path: Path) -> None:
    """While the agent runs, as a process: no argument is needed. What is in flight finishes, what comes is refused."""
    async with open_stage() as stage, run_wakecall(*stage.args, state=tmp_path) as publish:
        await publish.err.wait("channel open")
        paused = await run("pause", state=tmp_path)
        assert (paused.returncode, paused.stdout) == (0, "")
        assert paused.stderr == (
            "Paused wakecall-demo: no new requests; what is in flight finishes. `wakecall resume` takes it back.\n"
        )
        assert holds(stage) == {"wakecall-demo": (None, True)}
        assert (await stage.chat("wakecall-demo")).status_code == 503
        again = await ask("pause", "--json", state=tmp_path)
        assert json.loads(again.stdout) == {"llms": {"wakecall-demo": {"status": "active", "paused": True}}}
        resumed = await ask("resume", state=tmp_path)
        assert (resumed.exit_code, resumed.output) == (0, "Resumed wakecall-demo.\n")
        assert (await stage.chat("wakecall-demo")).status_code == 200


async def test_one_model_of_several(tmp_path: Path) -> None:
    names = ("--name", "a", "--name", "b", "--name", "c")
    async with open_stage() as stage, run_wakecall(*stage.args, *names, state=tmp_path) as publish:
        await publish.err.wait("channel open")
        done = await ask("pause", "--llm", "a", "--llm", "c", state=tmp_path)
        assert "Paused a and c: " in done.output
        assert holds(stage) == {"a": (None, True), "b": (None, False), "c": (None, True)}
        done = await ask("resume", state=tmp_path, WAKECALL_LLMS="c b")
        assert done.output == "Resumed b and c.\n"
        assert holds(stage) == {"a": (None, True), "b": (None, False), "c": (None, False)}
        unknown = await ask("pause", "--llm", "z", state=tmp_path)
        assert unknown.exit_code == 1
        assert "(HTTP 404)" in unknown.output


async def test_of_several_that_run_one_has_to_be_named(tmp_path: Path) -> None:
    async with open_stage() as stage, open_engine() as other:
        second = ("publish", "--broker", stage.url, "--engine", f"{other}/v1/", "--name", "other")
        async with (
            run_wakecall(*stage.args, state=tmp_path) as one,
            run_wakecall(*second, state=tmp_path) as two,
        ):
            await one.err.wait("channel open")
            await two.err.wait("channel open")
            unclear = await ask("pause", state=tmp_path)
            assert unclear.exit_code == 78
            assert unclear.output.startswith(
                "Error: There are several publishers on this machine; say which one is meant:"
            )
            for each in known_publishers(tmp_path / "wakecall"):
                assert each.is_running
                assert f"--broker {stage.url} --engine {each.engine} --session {each.session_id}" in unclear.output
            assert not any(paused for _, paused in holds(stage).values())
            assert (await ask("pause", "--engine", other, state=tmp_path)).exit_code == 0
            assert holds(stage) == {"other": (None, True), "wakecall-demo": (None, False)}
            # What `publish` reads from its variables is enough here, too.
            done = await ask("pause", state=tmp_path, WAKECALL_ENGINE=stage.engine_url, WAKECALL_BROKER=f"{stage.url}/")
            assert "Paused wakecall-demo: " in done.output
            two.send(signal.SIGTERM)
            await two.wait()
            # One that is over is not in the way of the one that runs.
            assert (await ask("resume", state=tmp_path)).output == "Resumed wakecall-demo.\n"


def know(state: Path, broker: str, engine: str = "http://127.0.0.1:11434", session: str | None = None) -> None:
    """What a publisher that has ended leaves behind."""
    config = PublisherConfig(
        broker_url=broker,
        engine_url=engine,
        session_id=session,
        models=(PublishedModel("m"),),
        state_dir=state / "wakecall",
    )
    with open_state(config):
        pass


def test_without_a_publisher_it_says_so(tmp_path: Path) -> None:
    done = invoke("pause", state=tmp_path)
    assert done.exit_code == 1
    assert "No publisher is known on this machine" in done.output
    know(tmp_path, "http://127.0.0.1:1")
    done = invoke("resume", "--engine", "http://127.0.0.1:2", state=tmp_path)
    assert done.exit_code == 1
    assert "No publisher like that is known on this machine" in done.output


def test_a_broker_that_is_away_is_said(tmp_path: Path) -> None:
    know(tmp_path, "http://127.0.0.1:1")
    done = invoke("pause", state=tmp_path)
    assert done.exit_code == 1
    assert "No broker answers at http://127.0.0.1:1" in done.output


async def test_a_session_that_the_broker_does_not_know_is_said(tmp_path: Path) -> None:
    async with open_stage() as stage:
        know(tmp_path, stage.url)
        done = await ask("pause", state=tmp_path)
    assert done.exit_code == 1
    assert "does not know this machine's publisher of http://127.0.0.1:11434: does it run" in done.output


@pytest.mark.parametrize(
    ("status", "code", "key", "exit_code", "said"),
    [
        (401, "invalid_api_key", None, 78, "wants an API key. Put one of role publisher into WAKECALL_KEY."),
        (401, "invalid_api_key", "k", 78, "That is about what WAKECALL_KEY or --key says."),
        (
            403,
            "forbidden",
            f"wakecall_admin_{'a' * 52}",
            78,
            "role publisher for this, and it was given one of role admin",
        ),
        (503, "store_unavailable", None, 1, "nope"),
        (404, "not_found", None, 1, "nope"),
    ],
)
async def test_a_refusal_is_a_sentence(
    status: int, code: str, key: str | None, exit_code: int, said: str, tmp_path: Path
) -> None:
    body = json.dumps({"error": {"message": "nope", "code": code}}).encode()
    async with serve_answer(status, body) as (url, heard):
        know(tmp_path, url, session="s")
        variables = {} if key is None else {"WAKECALL_KEY": key}
        done = await ask("pause", state=tmp_path, **variables)
    assert done.exit_code == exit_code
    assert said in done.output
    assert "Traceback" not in done.output
    request = heard[0].decode()
    assert request.startswith("POST /publisher/v1/sessions/s/pause HTTP/1.1\r\n")
    assert key is None or f"authorization: bearer {key}" in request.lower()


async def test_what_is_no_broker_is_told_from_one(tmp_path: Path) -> None:
    async with serve_answer(200, b"<html>") as (url, _):
        know(tmp_path, url)
        done = await ask("pause", state=tmp_path)
    assert done.exit_code == 1
    assert "no Wakecall broker" in done.output


@pytest.mark.parametrize("args", [["--broker", "http://[::1"], ["--engine", "http://[::1"]])
def test_what_is_no_url_is_a_usage_error(args: list[str], tmp_path: Path) -> None:
    know(tmp_path, "http://127.0.0.1:1")
    done = invoke("pause", *args, state=tmp_path)
    assert done.exit_code == 2
    assert args[0] in done.output


# An operator's ------------------------------------------------------------------------------------------------------


async def operate(stage: Stage, *args: str, state: Path) -> Result:
    return await ask(*args, "--broker", stage.url, state=state)


async def test_an_operator_holds_a_model_by_its_name(tmp_path: Path) -> None:
    """Nothing has to run on this machine. Neither side's resume ends what the other has begun, and that is said."""
    async with open_stage(config=BrokerConfig(total_s=FOREVER_S)) as stage:
        async with FakePublisher(stage.broker, "laptop", [LLMSpec("a", pool="p"), LLMSpec("b", pool="p")]):
            done = await operate(stage, "drain", "a", state=tmp_path)
            assert (done.exit_code, holds(stage)["a"]) == (0, ("drain", False))
            assert "Draining a: no new requests; 0 in flight" in done.output
            assert "`wakecall resume a` takes it back" in done.output
            done = await operate(stage, "pause", "p", state=tmp_path)
            assert "Paused a and b: " in done.output
            assert "`wakecall resume p` takes it back" in done.output
            assert holds(stage) == {"a": ("pause", False), "b": ("pause", False)}
            await stage.broker.pause_session("laptop", ["b"])
            done = await operate(stage, "resume", "p", state=tmp_path)
            assert done.output == (
                "Resumed a and b. That their publisher has paused b stays, until it says `wakecall resume`.\n"
            )
            assert holds(stage) == {"a": (None, False), "b": (None, True)}
            rows = json.loads((await operate(stage, "drain", "p", "--json", state=tmp_path)).stdout)
            assert [(row["name"], row["hold"]) for row in rows] == [("a", "drain"), ("b", "drain")]


async def test_a_model_that_is_not_there_is_said(tmp_path: Path) -> None:
    async with open_stage() as stage:
        for verb in ("drain", "pause", "resume"):
            done = await operate(stage, verb, "nothing", state=tmp_path)
            assert done.exit_code == 1
            assert "(HTTP 404)" in done.output


async def test_a_publishers_key_is_told_how_its_own_is_paused(tmp_path: Path) -> None:
    body = json.dumps({"error": {"message": "nope", "code": "forbidden"}}).encode()
    async with serve_answer(403, body) as (url, _):
        key = f"wakecall_publisher_{'a' * 52}"
        done = await ask("pause", "qwen", "--broker", url, "--key", key, state=tmp_path)
    assert done.exit_code == 78
    assert "takes a key of role admin for this, and it was given one of role publisher." in done.output
    assert "For a model of this machine's publisher: `wakecall pause --llm qwen`." in done.output


@pytest.mark.parametrize("extra", [("--llm", "b"), ("--engine", "http://e"), ("--session", "s")])
def test_both_sides_at_once_is_a_usage_error(extra: tuple[str, str], tmp_path: Path) -> None:
    done = invoke("pause", "a", *extra, state=tmp_path)
    assert done.exit_code == 2
    assert f"{extra[0]} is about this machine's publisher, and a about any model of a broker" in done.output


async def test_ls_shows_what_is_held(tmp_path: Path) -> None:
    async with open_stage() as stage:
        async with FakePublisher(stage.broker, "laptop", [LLMSpec("a"), LLMSpec("b"), LLMSpec("c")]):
            await stage.broker.hold("a", "drain")
            await stage.broker.hold("b", "pause")
            await stage.broker.pause_session("laptop", ["c"])
            done = await operate(stage, "ls", state=tmp_path)
    for name, said in (("a", "active, draining"), ("b", "active, paused"), ("c", "active, paused")):
        assert next(line for line in done.output.splitlines() if line.startswith(f"{name} ")).count(said) == 1


def test_asking_who_runs_stops_nobody_from_starting(tmp_path: Path) -> None:
    """It holds the file's lock for an instant; whoever starts in it waits that long."""
    config = PublisherConfig(
        broker_url="http://b", engine_url="http://e", models=(PublishedModel("m"),), state_dir=tmp_path
    )
    with open_state(config) as state:
        assert [each.is_running for each in known_publishers(tmp_path)] == [True]
        state.path.with_name("broken.json").write_text('{"session_id": 3}')
        state.path.with_name("odd.json").write_text("[")
    assert [(each.session_id, each.is_running) for each in known_publishers(tmp_path)] == [(state.session_id, False)]


async def test_a_publisher_starts_while_somebody_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from wakecall.publisher import state as module

    config = PublisherConfig(
        broker_url="http://b", engine_url="http://e", models=(PublishedModel("m"),), state_dir=tmp_path
    )
    with open_state(config) as state:
        pass
    asking = state.path.open("rb")
    fcntl.flock(asking, fcntl.LOCK_SH)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: asking.close())
    with open_state(config) as again:
        assert again.session_id == state.session_id
    await trio.lowlevel.checkpoint()
