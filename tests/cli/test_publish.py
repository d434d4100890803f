"""`wakecall publish`: against a broker of this process and a small engine of ours."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import trio

from tests.cli.processes import call, run_wakecall
from tests.cli.stage import open_stage
from wakecall import BrokerConfig, LLMSpec
from wakecall.cli.publish import sentence
from wakecall.publisher import PublisherEvent, RegisteredModel, events


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_it_publishes_what_the_engine_has_until_it_is_stopped(number: signal.Signals, tmp_path: Path) -> None:
    """Its models are callable while it runs; a signal withdraws them, says goodbye, and ends it with 0."""
    async with open_stage() as stage, run_wakecall(*stage.args, state=tmp_path) as publish:
        await publish.err.wait("channel open")
        assert stage.statuses() == {"wakecall-demo": "active"}
        answer = await stage.chat("wakecall-demo", "the secret prompt")
        assert "the secret prompt" in answer.json()["choices"][0]["message"]["content"]
        await publish.err.wait("completed in")
        publish.send(number)
        assert await publish.wait() == 0
        assert stage.statuses() == {"wakecall-demo": "inactive"}
        assert stage.broker.session_views() == []
        assert "secret" not in publish.err.text
        assert publish.out.text == ""
        for said in (
            "registered as session",
            "channel open (epoch 1)",
            "stopping: 0 requests",
            "stopped",
        ):
            assert said in publish.err.text


async def test_every_option_reaches_the_row(tmp_path: Path) -> None:
    """Name, id, type, session, concurrency and the rest stand at the broker as they were given."""
    options = ("--name", "mine", "--model", "wakecall-demo", "--type", "toy", "--session", "my-session")
    options += ("--max-concurrency", "3", "--cancel", "drain", "--wake-s", "7", "--hibernating", "--upload", "chunks")
    options += ("--pool", "gpus", "--queue-s", "11", "--first-byte-s", "12", "--idle-s", "13", "--total-s", "14")
    async with open_stage() as stage, run_wakecall(*stage.args, *options, state=tmp_path) as publish:
        await publish.err.wait("channel open")
        row = stage.broker.llm("mine")
        assert (row.model, row.type, row.session_id) == ("wakecall-demo", "toy", "my-session")
        assert (row.pool, row.queue_s, row.first_byte_s, row.idle_s, row.total_s) == ("gpus", 11, 12, 13, 14)
        assert (row.max_concurrency, row.cancel, row.wake_s, row.status) == (3, "drain", 7.0, "hibernating")
        # The engine is awake already: a wake asks its health, and needs no command.
        assert (await stage.chat("mine")).status_code == 200
        assert "the command was not needed" in await publish.err.wait("the engine is awake")


async def test_variables_do_as_well_as_options(tmp_path: Path) -> None:
    async with open_stage() as stage:
        variables = {"WAKECALL_BROKER": stage.url, "WAKECALL_ENGINE": stage.engine_url, "WAKECALL_NAME": "mine"}
        variables |= {"WAKECALL_MODEL": "wakecall-demo", "WAKECALL_LOG_FORMAT": "json"}
        async with run_wakecall("publish", state=tmp_path, **variables) as publish:
            await publish.err.wait('"channel_open"')
            await stage.chat("mine")
            await publish.err.wait('"infer_finished"')
            publish.send(signal.SIGTERM)
            assert await publish.wait() == 0
        lines = [json.loads(line) for line in publish.err.text.splitlines()]
        by_event = {line["event"]: line for line in lines if "event" in line}
        assert by_event["registered"]["models"][0]["name"] == "mine"
        assert by_event["channel_open"]["epoch"] == 1
        assert by_event["infer_finished"]["outcome"] == "completed"
        assert "drained" in by_event


async def test_models_take_turns_on_one_engine(tmp_path: Path) -> None:
    """Three of a group, each with its own id at the engine: calls swap them, and the commands know which is meant."""
    done = tmp_path / "done"
    options = ["--group", "gpu", "--wake-command", f'echo "wake $WAKECALL_LLM $WAKECALL_MODEL" >> {done}']
    options += ["--hibernate-command", f'echo "sleep $WAKECALL_LLM" >> {done}']
    variables = {"WAKECALL_NAME": "a b c", "WAKECALL_MODEL": "\nwakecall-demo\n my model \nwakecall-demo\n"}
    config = BrokerConfig(residence_s=0.01)
    async with open_stage(config=config) as stage:
        async with run_wakecall(*stage.args, *options, state=tmp_path, **variables) as publish:
            await publish.err.wait("channel open")
            assert stage.statuses() == {"a": "active", "b": "hibernating", "c": "hibernating"}
            for name in ("c", "a", "b"):
                assert (await stage.chat(name)).status_code in (200, 404)
                await publish.err.wait(f"{name} is awake")
            assert stage.broker.llm("b").model == "my model"
            assert stage.statuses() == {"a": "hibernating", "b": "active", "c": "hibernating"}
    assert done.read_text().splitlines() == [
        "sleep a",
        "wake c wakecall-demo",
        "sleep c",
        "wake a wakecall-demo",
        "sleep a",
        "wake b my model",
    ]


@pytest.mark.parametrize("cancel", ["abort", "drain"])
async def test_the_slot_of_a_client_that_left_is_free_when_its_engine_has_stopped(cancel: str, tmp_path: Path) -> None:
    """Long before the broker would take it back: at once, or with `drain` when the engine is done."""
    config = BrokerConfig(cancel_lease_s=3600, total_s=3600)
    delay_s = 3600 if cancel == "abort" else 0.01
    async with open_stage(delay_s, config) as stage:
        args = (*stage.args, "--max-concurrency", "1", "--cancel", cancel)
        async with run_wakecall(*args, state=tmp_path) as publish, trio.open_nursery() as nursery:
            await publish.err.wait("channel open")
            async with trio.open_nursery() as client:
                client.start_soon(stage.chat, "wakecall-demo")
                await publish.err.wait("request ")
                client.cancel_scope.cancel()
            nursery.start_soon(stage.chat, "wakecall-demo")
            while publish.err.text.count(" for wakecall-demo\n") < 2:
                await publish.err.news.wait()
            assert "cancelled in" in publish.err.text
            nursery.cancel_scope.cancel()


async def test_a_second_signal_drops_everything(tmp_path: Path) -> None:
    """The first one waits for what is under way; whoever does not want that says so again."""
    async with open_stage(delay_s=3600) as stage, run_wakecall(*stage.args, state=tmp_path) as publish:
        await publish.err.wait("channel open")
        answers = []

        async def ask() -> None:
            answers.append(await stage.chat("wakecall-demo"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await publish.err.wait("request ")
            publish.send(signal.SIGTERM)
            await publish.err.wait("stopping: 1 requests under way")
            publish.send(signal.SIGTERM)
            assert await publish.wait() == 0
        assert answers[0].status_code == 503
        assert "Traceback" not in publish.err.text


async def test_an_evicted_publisher_stops_and_says_so(tmp_path: Path) -> None:
    async with open_stage() as stage, run_wakecall(*stage.args, "--session", "s", state=tmp_path) as publish:
        await publish.err.wait("channel open")
        await stage.broker.evict("s")
        assert await publish.wait() == 1
        assert "Error: An operator of the broker evicted this publisher." in publish.err.text


async def test_a_superseded_publisher_stops_and_says_so(tmp_path: Path) -> None:
    async with open_stage() as stage, run_wakecall(*stage.args, "--session", "s", state=tmp_path) as publish:
        await publish.err.wait("channel open")
        async with stage.broker.open_channel("s"):
            assert await publish.wait() == 1
        assert "Error: Another process publishes with this session id" in publish.err.text


async def test_a_second_agent_for_one_engine_is_refused(tmp_path: Path) -> None:
    """78: the state file of this broker and engine is held."""
    async with open_stage() as stage, run_wakecall(*stage.args, state=tmp_path) as publish:
        await publish.err.wait("channel open")
        async with run_wakecall(*stage.args, state=tmp_path) as second:
            assert await second.wait() == 78
            assert "Error: Another publisher is running for this broker and engine" in second.err.text
            assert "to run two on purpose, give each of them a --session of its own." in second.err.text


async def test_two_agents_for_one_engine_need_two_sessions(tmp_path: Path) -> None:
    """Another name does not make it another engine: the second says how it is done, and as it says, it works."""
    first, second = (("--name", name, "--model", "wakecall-demo") for name in ("one", "two"))
    async with open_stage() as stage, run_wakecall(*stage.args, *first, state=tmp_path) as publish:
        await publish.err.wait("channel open")
        async with run_wakecall(*stage.args, *second, state=tmp_path) as refused:
            assert await refused.wait() == 78
            assert "--session" in refused.err.text
        async with run_wakecall(*stage.args, *second, "--session", "other", state=tmp_path) as other:
            await other.err.wait("channel open")
            assert stage.statuses() == {"one": "active", "two": "active"}
            assert [(await stage.chat(name)).status_code for name in ("one", "two")] == [200, 200]
            async with run_wakecall(*stage.args, *second, "--session", "other", state=tmp_path) as third:
                assert await third.wait() == 78
                assert "Another publisher is running with this session id" in third.err.text
            other.send(signal.SIGTERM)
            assert await other.wait() == 0
        assert stage.statuses() == {"one": "active", "two": "inactive"}


async def test_a_name_that_is_taken_ends_it(tmp_path: Path) -> None:
    async with open_stage() as stage:
        await stage.broker.put_public_llm("wakecall-demo", type="x", model="m", url="http://127.0.0.1:1")
        async with run_wakecall(*stage.args, state=tmp_path) as publish:
            assert await publish.wait() == 1
            assert "refuses to register 'wakecall-demo': This name is a public model's" in publish.err.text
            assert "Publish yours under another --name" in publish.err.text
            assert "Traceback" not in publish.err.text


async def test_a_pool_that_cannot_be_had_ends_it(tmp_path: Path) -> None:
    async with open_stage() as stage:
        await stage.broker.register("other", [LLMSpec("gpt")])
        async with run_wakecall(*stage.args, "--pool", "gpt", state=tmp_path) as publish:
            assert await publish.wait() == 1
            assert "'wakecall-demo' in the pool 'gpt': A pool cannot have the name of a model." in publish.err.text
            assert "Choose another --pool" in publish.err.text


async def test_a_name_that_another_session_took_meanwhile_ends_it(tmp_path: Path) -> None:
    """Its session is gone from the broker, and when it registers again the name is somebody else's."""
    async with open_stage() as stage, run_wakecall(*stage.args, "--session", "s", state=tmp_path) as publish:
        await publish.err.wait("channel open")
        await stage.broker.goodbye("s")
        await stage.broker.register("thief", [LLMSpec("wakecall-demo")])
        assert await publish.wait() == 1
        said = "The broker refuses to register 'wakecall-demo' again: Another session holds this name."
        assert f"Error: {said} Publish yours under another --name" in publish.err.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_is_heard_while_an_engine_does_not_answer(number: signal.Signals, tmp_path: Path) -> None:
    """It is asked for its models first, and may take as long as it likes."""
    asked = trio.Event()

    async def say_nothing(stream: trio.SocketStream) -> None:
        asked.set()
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, say_nothing, 0, host="127.0.0.1"))
        engine = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        async with run_wakecall("publish", "--engine", engine, state=tmp_path) as publish:
            await asked.wait()
            publish.send(number)
            assert await publish.wait() == 0
            assert "Traceback" not in publish.err.text
        nursery.cancel_scope.cancel()


def test_an_engine_that_is_not_there_is_said(tmp_path: Path) -> None:
    """Without names it has to be asked, so it has to be up."""
    run = call("publish", "--engine", "http://127.0.0.1:1", state=tmp_path)
    assert run.returncode == 1
    assert "Error: The engine at http://127.0.0.1:1 does not answer" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 2, "--engine"),
        (["--engine", "http://e", "--hibernating"], 2, "--hibernating needs --name"),
        (["--engine", "http://e", "--name", "a", "--name", "b", "--model", "x"], 2, "as often as --name"),
        (["--engine", "http://e", "--name", "a", "--group", "one two"], 78, "group"),
        (["--engine", "http://e", "--name", "a", "--name", "a"], 78, "given twice"),
        (["--engine", "http://e", "--upload", "pigeon"], 2, "--upload"),
        (["--engine", "http://e", "--wake-s", "long"], 2, "--wake-s"),
        (["--engine", "localhost:11434"], 78, "engine's address"),
        (["--engine", "http://e", "--broker", "ftp://b"], 78, "broker's address"),
        (["--engine", "http://e", "--name", "no good name"], 78, "no valid name"),
        (["--engine", "http://e", "--max-concurrency", "0"], 78, "ax_concurrency"),
        (["--engine", "http://e", "--wake-s", "nan"], 78, "ake_s"),
        (["--engine", "http://e", "--hibernate-command", "x"], 78, "hibernate_after"),
        (["--engine", "http://127.0.0.1:1", "--engine-key-env", "NO_SUCH_VARIABLE"], 78, "NO_SUCH_VARIABLE"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_happens(
    args: list[str], code: int, said: str, tmp_path: Path
) -> None:
    """2 for how it was said, 78 for what was asked."""
    run = call("publish", *args, state=tmp_path)
    assert run.returncode == code
    assert run.stdout == ""
    assert said in run.stderr
    assert "Traceback" not in run.stderr


_VALUES: dict[str, Any] = {
    "models": (RegisteredModel("m", "active", "created"),),
    "outcome": "completed",
    "message": "why",
}


@pytest.mark.parametrize("kind", get_args(PublisherEvent))
def test_every_event_has_a_sentence(kind: type[PublisherEvent]) -> None:
    """Whatever a publisher tells, its command line has words for it."""
    fields: dict[str, Any] = {}
    for name, annotation in kind.__annotations__.items():
        by_type = {"int": 1, "float": 0.5, "bool": True, "str": name, "int | None": 200, "str | None": "n"}
        fields[name] = _VALUES[name] if name in _VALUES else by_type[annotation]
    said = sentence(kind(**fields))
    assert said
    assert said.isprintable()
    if "message" in fields:
        assert "why" in said


def test_a_session_registered_again_is_said_to_be() -> None:
    said = sentence(events.Registered(session_id="s", models=(), again=True))
    assert said == "registered again as session s: no model"
