"""`wakecall keys`, and what every other verb does with a key: real processes, a broker of its own or one of this process."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import trio
from click.testing import CliRunner, Result

from tests.cli.processes import PATIENCE_S, Running, call, environment, run_wakecall
from tests.cli.stage import open_engine, open_stage, post_chat, serve_answer, serve_broker
from tests.docs.cli_options import COMMANDS
from wakecall import Broker, BrokerConfig
from wakecall.cli import main

SECRET = re.compile(r"wakecall_(client|publisher|admin)_[a-z2-7]{52}")


def invoke(*args: str, state: Path, **variables: str) -> Result:
    """`wakecall ARGS` in this process, for what calls nobody."""
    ours = {name: None for name in os.environ if name.startswith("WAKECALL_")}
    return CliRunner().invoke(main, list(args), env={**ours, "XDG_STATE_HOME": str(state), **variables})


async def ask(*args: str, state: Path, **variables: str) -> Result:
    """The same in a thread, while a broker of this process goes on."""
    with trio.fail_after(PATIENCE_S):
        return await trio.to_thread.run_sync(partial(invoke, *args, state=state, **variables))


async def run(*args: str, state: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`wakecall ARGS` as a process, run to its end."""
    with trio.fail_after(PATIENCE_S):
        return await trio.to_thread.run_sync(partial(call, *args, state=state, **variables))


def secret_of(done: subprocess.CompletedProcess[str] | Result) -> str:
    """The key that was made: it stands alone on stdout, and nowhere else."""
    secret = done.stdout.removesuffix("\n")
    assert SECRET.fullmatch(secret), done
    assert not SECRET.search(done.stderr)
    return secret


def id_of(done: subprocess.CompletedProcess[str] | Result) -> str:
    found = re.search(r"Its id is (key_\w+)", done.stderr)
    assert found is not None, done.stderr
    return found[1]


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


# The whole of it ----------------------------------------------------------------------------------------------------


async def test_a_whole_round(tmp_path: Path) -> None:
    """From an empty machine: a first key, a broker that others may reach, a publisher and a client with keys, a call, and
    the end of both. No key is ever in a log."""
    first = await run("keys", "create", "admin", "--db", state=tmp_path)
    admin = secret_of(first)
    assert first.returncode == 0
    assert "serve --host 0.0.0.0`" in first.stderr
    async with (
        run_wakecall("serve", "--host", "0.0.0.0", "--port", "0", state=tmp_path) as serve,
        open_engine() as engine,
    ):
        url = await serve.url()
        operator = {"WAKECALL_BROKER": url, "WAKECALL_KEY": admin}
        made = await run("keys", "create", "publisher", "--name", "box", state=tmp_path, **operator)
        publisher, publisher_id = secret_of(made), id_of(made)
        made = await ask("keys", "create", "client", "--name", "friend", state=tmp_path, **operator)
        client, client_id = secret_of(made), id_of(made)

        args = ("publish", "--broker", url, "--engine", engine)
        async with run_wakecall(*args, state=tmp_path, WAKECALL_KEY=publisher) as publish:
            await publish.err.wait("channel open")
            assert (await post_chat(url, "wakecall-demo", key=client)).status_code == 200
            assert (await post_chat(url, "wakecall-demo")).status_code == 401
            assert "wakecall-demo" in (await ask("ls", state=tmp_path, **operator)).stdout

            revoked = await ask("keys", "revoke", client_id, state=tmp_path, **operator)
            assert revoked.stderr == f"Revoked {client_id} (friend) of role client.\n"
            assert (await post_chat(url, "wakecall-demo", key=client)).status_code == 401

            revoked = await run("keys", "revoke", publisher_id, state=tmp_path, **operator)
            assert revoked.stderr.endswith("of role publisher: its sessions and channels have ended.\n")
            assert await publish.wait() == 1
            assert "Error: The broker ended this publisher's session: its API key has been revoked" in publish.err.text
        async with run_wakecall(*args, state=tmp_path, WAKECALL_KEY=publisher) as again:
            assert await again.wait() == 78
            assert "This API key is not known here, or has been revoked. Have one of role publisher" in again.err.text
        serve.send(signal.SIGTERM)
        assert await serve.wait() == 0
        for said in (f"key_created key_id={client_id} role=client", f"key_revoked key_id={publisher_id}"):
            assert said in serve.err.text
        for text in (serve.err.text, publish.err.text, again.err.text):
            assert not SECRET.search(text)


async def test_serve_says_the_command_that_makes_a_key_and_then_starts(tmp_path: Path) -> None:
    """Copied into a shell as it stands, whatever the path looks like; 78 before, and an address after."""
    args = ("serve", "--host", "0.0.0.0", "--port", "0", "--db", str(tmp_path / "my broker's.db"))
    refused = await run(*args, state=tmp_path)
    assert refused.returncode == 78
    command = refused.stderr.split("`")[1]
    assert " keys create admin --db " in command
    done = await trio.run_process(
        ["sh", "-c", command], capture_stdout=True, capture_stderr=True, env=environment(tmp_path)
    )
    assert SECRET.fullmatch(done.stdout.decode().rstrip("\n"))
    async with run_wakecall(*args, state=tmp_path) as serve:
        await serve.url()


async def test_an_open_broker_that_others_reach_warns_at_each_start(tmp_path: Path) -> None:
    args = ("serve", "--host", "0.0.0.0", "--port", "0", "--open")
    for _ in range(2):
        async with run_wakecall(*args, state=tmp_path) as serve:
            url = await serve.url()
            assert "WARNING the broker is open: there are no API keys" in await serve.err.wait("WARNING")
            async with httpx2.AsyncClient(base_url=url) as http:
                assert (await http.get("/v1/models")).status_code == 200


# Where the keys are -------------------------------------------------------------------------------------------------


async def test_a_file_that_a_broker_holds_is_left_to_it(tmp_path: Path) -> None:
    """78, and --broker is named as the way; through that it works."""
    async with run_wakecall("serve", "--port", "0", state=tmp_path) as serve:
        url = await serve.url()
        for args in (("create", "admin"), ("ls",), ("revoke", "key_x")):
            refused = await ask("keys", *args, "--db", state=tmp_path)
            assert (refused.exit_code, refused.stdout) == (78, "")
            assert "wakecall.db open, so its keys are made and revoked there: name it with --broker" in refused.stderr
        made = await ask("keys", "create", "admin", "--broker", url, state=tmp_path)
        secret_of(made)
        assert "The broker is open no more" in made.stderr


def test_a_file_that_is_not_there_is_made_with_its_folder(tmp_path: Path) -> None:
    """For its owner alone. To list or revoke in it, it has to be there: it may be a slip of the pen."""
    path = tmp_path / "new" / "folder" / "w.db"
    for args in (("ls",), ("revoke", "key_x")):
        missing = invoke("keys", *args, "--db", str(path), state=tmp_path)
        assert (missing.exit_code, missing.stdout) == (78, "")
        assert "w.db is not there" in missing.stderr
    assert not path.parent.exists()
    secret_of(invoke("keys", "create", "admin", "--db", str(path), state=tmp_path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_without_a_path_it_is_the_file_that_serve_takes(tmp_path: Path) -> None:
    """`WAKECALL_DB`, else the one in the state directory; and `~` is the home directory."""
    named = tmp_path / "named.db"
    invoke("keys", "create", "admin", "--db", state=tmp_path)
    assert (tmp_path / "wakecall" / "wakecall.db").is_file()
    invoke("keys", "create", "admin", "--db", state=tmp_path, WAKECALL_DB=str(named))
    assert named.is_file()
    invoke("keys", "create", "admin", "--db", "~/home.db", state=tmp_path, HOME=str(tmp_path))
    assert (tmp_path / "home.db").is_file()


NOBODY = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    ("args", "variables", "code", "said"),
    [
        (["--broker", NOBODY, "--db", "x.db"], {}, 2, "two places"),
        (["--broker", NOBODY, "--db"], {}, 2, "two places"),
        (["--broker", NOBODY], {"WAKECALL_DB": "x.db"}, 1, f"No broker answers at {NOBODY}"),
        (["--db", "x.db"], {"WAKECALL_BROKER": NOBODY}, 78, "x.db is not there"),
        ([], {"WAKECALL_DB": "x.db"}, 78, "x.db is not there"),
        ([], {"WAKECALL_BROKER": NOBODY, "WAKECALL_DB": "x.db"}, 1, f"No broker answers at {NOBODY}"),
        ([], {"WAKECALL_BROKER": NOBODY, "WAKECALL_DB": ":memory:"}, 1, f"No broker answers at {NOBODY}"),
        (["--db", ":memory:"], {}, 78, ":memory: keeps no keys"),
        (["--db"], {"WAKECALL_DB": ":memory:"}, 78, ":memory: keeps no keys"),
        (["--db", "letter.txt"], {}, 78, "is no SQLite database"),
    ],
)
def test_which_of_the_two_places_is_meant(
    args: list[str], variables: dict[str, str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both on the command line cannot be; one there beats the other's variable; of two variables the broker's counts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letter.txt").write_text("Dear Sir or Madam, this is no database")
    done = invoke("keys", "ls", *args, state=tmp_path, **variables)
    assert done.exit_code == code
    assert said in done.stderr


# Making -------------------------------------------------------------------------------------------------------------


def listed(state: Path) -> list[dict[str, Any]]:
    done = invoke("keys", "ls", "--db", "--json", state=state)
    data: list[dict[str, Any]] = json.loads(done.stdout)
    return data


def test_every_option_reaches_the_key(tmp_path: Path) -> None:
    """By option and by variable; what is left out is no bound."""
    options = ("--name", "my friend", "--owner", "alice", "--llms", "qwen*", "--llms", "a, b")
    options += ("--rpm", "20", "--max-in-flight", "2", "--expires", "0.5")
    made = invoke("keys", "create", "client", "--db", *options, state=tmp_path)
    secret_of(made)
    for said in ("role client, its owner alice", "(my friend)", "only qwen*, a, b", "at most 20 a minute, 2 at a time"):
        assert said in made.stderr
    variables = {"NAME": "v", "OWNER": "bob", "LLMS": "x,y z", "RPM": "3", "MAX_IN_FLIGHT": "4", "EXPIRES": "1"}
    named = {f"WAKECALL_KEY_{name}": value for name, value in variables.items()}
    secret_of(invoke("keys", "create", "client", "--db", state=tmp_path, **named))
    secret_of(invoke("keys", "create", "publisher", "--db", state=tmp_path))
    one, two, three = listed(tmp_path)
    members = ("role", "owner", "name", "llms", "rpm", "max_in_flight")
    assert [one[each] for each in members] == ["client", "alice", "my friend", ["qwen*", "a", "b"], 20, 2]
    assert [two[each] for each in members] == ["client", "bob", "v", ["x", "y", "z"], 3, 4]
    assert [three[each] for each in members] == ["publisher", three["id"], "", None, None, None]
    assert three["expires_at"] is None
    assert one["expires_at"] > one["created_at"]


@pytest.mark.parametrize(
    ("role", "said"),
    [
        ("client", "OPENAI_API_KEY"),
        ("publisher", "export WAKECALL_KEY=…"),
        ("admin", "export WAKECALL_KEY=…"),
        ("monitor", "Prometheus"),
    ],
)
def test_who_makes_a_key_is_told_what_to_do_with_it(role: str, said: str, tmp_path: Path) -> None:
    made = invoke("keys", "create", role, "--db", state=tmp_path)
    assert "shown once" in made.stderr
    assert id_of(made) == listed(tmp_path)[0]["id"]
    assert said in made.stderr
    # The first of a file: whoever may operate comes next, or serving.
    assert ("keys create admin --db " in made.stderr, "serve --host" in made.stderr) == (
        role != "admin",
        role == "admin",
    )
    assert "keys create admin" not in invoke("keys", "create", role, "--db", state=tmp_path).stderr


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["create"], 2, "Missing argument 'ROLE'"),
        (["create", "king"], 2, "'king' is not one of"),
        (["create", "client", "--llms", "a?"], 2, "a? is no model's name"),
        (["create", "client", "--llms", "a\x1b[31m"], 2, "a\\x1b[31m is no model's name"),
        (["create", "client", "--owner", "two words"], 2, "an owner is"),
        (["create", "client", "--rpm", "0"], 2, "--rpm"),
        (["create", "client", "--max-in-flight", "-1"], 2, "--max-in-flight"),
        (["create", "client", "--expires", "0"], 2, "a number of days"),
        (["create", "client", "--expires", "nan"], 2, "a number of days"),
        (["create", "client", "--expires", "inf"], 2, "a number of days"),
        (["create", "client", "--expires", "40000"], 78, "a hundred years"),
        (["create", "admin", "--llms", "a"], 78, "is bound to models"),
        (["create", "monitor", "--llms", "a"], 78, "is bound to models"),
        (["create", "publisher", "--rpm", "3"], 78, "Only a client's key"),
        (["create", "client", "--name", "x" * 129], 78, "128 characters"),
        (["revoke"], 2, "Missing argument 'ID'"),
        (["revoke", "key_nobodys"], 1, "There is no key of this id."),
    ],
)
def test_what_cannot_be_is_refused(args: list[str], code: int, said: str, tmp_path: Path) -> None:
    """2 for how it was said, 78 for what was asked; and no key was made."""
    invoke("keys", "create", "admin", "--db", state=tmp_path)
    done = invoke("keys", *args, "--db", state=tmp_path)
    assert (done.exit_code, done.stdout) == (code, "")
    assert said in done.stderr
    assert "\x1b" not in done.stderr
    assert len(listed(tmp_path)) == 1


async def test_a_broker_refuses_the_same_with_the_same_code(tmp_path: Path) -> None:
    async with serve_broker() as (broker, url):
        admin = (await broker.create_key("admin")).secret
        asked = ("keys", "create", "publisher", "--rpm", "3", "--broker", url)
        done = await ask(*asked, state=tmp_path, WAKECALL_KEY=admin)
        gone = await ask("keys", "revoke", "key_nobodys/../x", "--broker", url, state=tmp_path, WAKECALL_KEY=admin)
        assert len(broker.key_views()) == 1
    assert (done.exit_code, done.stdout) == (78, "")
    assert "Only a client's key has such a limit. (HTTP 400)" in done.stderr
    assert gone.exit_code == 1


# Listing and revoking -----------------------------------------------------------------------------------------------


def key(**members: Any) -> dict[str, Any]:
    """One, as the API shows it."""
    shown = {"id": "key_1", "role": "client", "owner": "key_1", "name": "", "llms": None, "rpm": None}
    instants = {"max_in_flight": None, "created_at": "2026-01-01T00:00:00.000Z", "expires_at": None, "expired": False}
    return {**shown, **instants, **members}


async def test_it_lists_every_key_and_nothing_that_a_name_could_do(tmp_path: Path) -> None:
    """Who, what, how much, until when; an expired one is told from the others, and an escape is text."""
    data = [
        key(name="a\x1b[31mred", llms=["qwen*", "b"], rpm=20, max_in_flight=2),
        key(id="key_2", role="admin", expires_at="2026-01-01T00:00:00Z", expired=True),
        key(id="key_3", role="publisher", owner="alice", expires_at="9999-01-01T00:00:00Z", rpm=1),
    ]
    async with serve_answer(200, json.dumps({"data": data}).encode()) as (url, heard):
        done = await ask("keys", "ls", "--broker", url, state=tmp_path, WAKECALL_KEY="k3y", COLUMNS="20")
        as_json = await ask("keys", "ls", "--json", "--broker", url, state=tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    head, *rows = [cells(line) for line in done.stdout.splitlines()]
    assert head == ["ID", "ROLE", "OWNER", "NAME", "MODELS", "LIMITS", "CREATED", "EXPIRES"]
    assert [row[:6] for row in rows] == [
        ["key_1", "client", "key_1", "a\\x1b[31mred", "qwen*, b", "20 a minute, 2 at a time"],
        ["key_2", "admin", "key_1", "-", "-", "-"],
        ["key_3", "publisher", "alice", "-", "all", "1 a minute"],
    ]
    assert rows[0][7] == "never"
    assert re.fullmatch(r"expired \d+ d ago", rows[1][7])
    assert re.fullmatch(r"in \d+ d", rows[2][7])
    assert json.loads(as_json.stdout) == data
    assert b"authorization: Bearer k3y\r\n" in heard[0].replace(b"Authorization", b"authorization")


def test_no_key_is_no_error(tmp_path: Path) -> None:
    """A file whose only key is gone: an empty list, a sentence, and what that means for its broker."""
    made = invoke("keys", "create", "admin", "--db", state=tmp_path)
    revoked = invoke("keys", "revoke", id_of(made), "--db", state=tmp_path)
    assert (revoked.exit_code, revoked.stdout) == (0, "")
    assert "a broker without keys listens on loopback alone" in revoked.stderr
    empty = invoke("keys", "ls", "--db", state=tmp_path)
    assert (empty.exit_code, empty.stdout) == (0, "")
    assert empty.stderr == "There are no keys: see `wakecall keys create --help`.\n"
    assert listed(tmp_path) == []


def test_a_file_without_an_operator_is_said_to_be_one(tmp_path: Path) -> None:
    made = invoke("keys", "create", "admin", "--db", state=tmp_path)
    invoke("keys", "create", "client", "--db", state=tmp_path)
    revoked = invoke("keys", "revoke", id_of(made), "--db", state=tmp_path)
    assert revoked.stderr.splitlines()[-1] == "There is no key of role admin any more."


def test_nothing_of_a_key_is_listed(tmp_path: Path) -> None:
    """Neither in the table nor as JSON: not its end, nor its digest."""
    secret = secret_of(invoke("keys", "create", "admin", "--db", state=tmp_path))
    for args in ((), ("--json",)):
        shown = invoke("keys", "ls", "--db", *args, state=tmp_path).stdout
        assert "key_" in shown
        assert not any(secret[at : at + 8] in shown for at in range(len("wakecall_admin_"), len(secret) - 8))
        assert not re.search(r"[0-9a-f]{32}", shown)


# Presenting a key ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [("ls",), ("keys", "ls"), ("keys", "create", "client"), ("keys", "revoke", "key_x")])
async def test_whoever_may_not_is_told_why(args: tuple[str, ...], tmp_path: Path) -> None:
    """No key, one that is none, and another role's: 78, a sentence each, and never the key itself."""
    async with serve_broker() as (broker, url):
        await broker.create_key("admin")
        client = (await broker.create_key("client")).secret
        at = (*args, "--broker", url)
        none = await ask(*at, state=tmp_path)
        wrong = await ask(*at, state=tmp_path, WAKECALL_KEY="sk-s3cret")
        other = await ask(*at, "--key", client, state=tmp_path)
    for done, said in (
        (none, f"Error: The broker at {url} wants an API key. Put one of role admin into WAKECALL_KEY.\n"),
        (wrong, "Error: This API key is not known here, or has been revoked. (HTTP 401). That is about what"),
        (
            other,
            f"Error: The broker at {url} takes a key of role admin for this, and it was given one of role client.\n",
        ),
    ):
        assert (done.exit_code, done.stdout) == (78, "")
        assert said in done.stderr
        assert "s3cret" not in done.stderr
        assert client not in done.stderr


async def test_an_open_broker_needs_no_key_and_minds_none(tmp_path: Path) -> None:
    """And its first key has to be an operator's, or nobody could make another."""
    async with serve_broker() as (broker, url):
        for variables in ({}, {"WAKECALL_KEY": "whatever"}):
            assert (await ask("ls", "--broker", url, state=tmp_path, **variables)).exit_code == 0
        client = await ask("keys", "create", "client", "--broker", url, state=tmp_path)
        assert (client.exit_code, client.stdout) == (78, "")
        assert "Make one of role admin first" in client.stderr
        first = await ask("keys", "create", "admin", "--broker", url, state=tmp_path)
        last = await ask("keys", "revoke", id_of(first), "--broker", url, state=tmp_path, WAKECALL_KEY=secret_of(first))
        assert last.exit_code == 78
        assert "This is the last key of role admin that lasts." in last.stderr
        assert len(broker.key_views()) == 1


NOT_FOUND = b'{"error": {"message": "Nothing is here.", "code": "not_found"}}'


@pytest.mark.parametrize("args", [("ls",), ("create", "admin"), ("revoke", "key_x")])
@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, NOT_FOUND, "This broker is of a version that has no keys."),
        (404, b"<html>", "is no Wakecall broker"),
        (200, b"<html>", "is no Wakecall broker"),
        (200, b'{"data": [{"id": 1}]}', "is no Wakecall broker"),
        (200, b'{"data": 7}', "is no Wakecall broker"),
        (503, b'{"error": {"message": "a \\u001b[31mb", "code": "store_unavailable"}}', "a \\x1b[31mb (HTTP 503)"),
    ],
)
async def test_what_is_no_broker_or_an_old_one_is_told(
    args: tuple[str, ...], status: int, body: bytes, said: str, tmp_path: Path
) -> None:
    async with serve_answer(status, body) as (url, _):
        done = await ask("keys", *args, "--broker", url, state=tmp_path)
    assert (done.exit_code, done.stdout) == (1, "")
    assert said in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("args", [("ls",), ("keys", "ls"), ("publish", "--engine", "http://127.0.0.1:1")])
@pytest.mark.parametrize("text", ["s3cret\nhost: evil", "two s3crets", "s3crét"])
def test_what_can_be_no_key_is_refused_unsaid(args: tuple[str, ...], text: str, tmp_path: Path) -> None:
    """A line break in it would be another header; and whatever it is, it may be a key with something beside it."""
    for variables, options in (({"WAKECALL_KEY": text}, ()), ({}, ("--key", text))):
        done = invoke(*args, *options, state=tmp_path, **variables)
        assert done.exit_code == 2
        assert "this is no API key" in done.stderr
        assert "s3cr" not in done.stderr


def test_an_address_with_a_password_is_shown_without_it(tmp_path: Path) -> None:
    done = invoke("ls", "--broker", "http://me:s3cret@127.0.0.1:1", state=tmp_path)
    assert done.exit_code == 1
    assert "No broker answers at http://127.0.0.1:1 (" in done.stderr


async def test_beside_a_password_in_the_address_the_key_arrives_too(tmp_path: Path) -> None:
    """`Authorization` is the proxy's then, so the key comes as `x-api-key`."""
    async with serve_answer(200, b'{"data": []}') as (url, heard):
        address = url.replace("://", "://me:pass@")
        await ask("keys", "ls", "--broker", address, state=tmp_path, WAKECALL_KEY="k3y")
    head = heard[0].lower()
    assert b"\r\nx-api-key: k3y\r\n" in head
    assert b"\r\nauthorization: basic " in head


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_never_shows_the_key(verb: str, tmp_path: Path) -> None:
    done = invoke(*verb.split(), "--help", state=tmp_path, WAKECALL_KEY="s3cret")
    assert done.exit_code == 0
    assert "s3cret" not in done.output


# Publishing with one ------------------------------------------------------------------------------------------------


async def ended(publish: Running) -> tuple[int, str]:
    """Its exit code, and its last words."""
    code = await publish.wait()
    return code, publish.err.text.splitlines()[-1]


WHO_MAKES_ONE = (
    "Have one of role publisher in WAKECALL_KEY. Whoever operates the broker makes it with"
    " `wakecall keys create publisher`."
)


async def secrets_for(broker: Broker) -> dict[str, str]:
    await broker.create_key("admin")
    bound = await broker.create_key("publisher", llms=["mine/*"])
    return {"client": (await broker.create_key("client")).secret, "bound": bound.secret}


@pytest.mark.parametrize(
    ("which", "said"),
    [
        (None, f"The broker wants an API key, and this publisher has none. {WHO_MAKES_ONE}"),
        (
            "unknown",
            f"refuses this publisher's API key: This API key is not known here, or has been revoked. {WHO_MAKES_ONE}",
        ),
        ("client", f"refuses this publisher's API key: This path takes a key of role publisher. {WHO_MAKES_ONE}"),
        (
            "bound",
            "refuses to register 'wakecall-demo': This key does not publish under this name."
            " Publish it under another --name",
        ),
    ],
)
async def test_a_publisher_that_may_not_says_what_to_do(which: str | None, said: str, tmp_path: Path) -> None:
    """78: another start would change nothing."""
    async with open_stage() as stage:
        secrets = {"unknown": "sk-s3cret", **await secrets_for(stage.broker)}
        variables = {} if which is None else {"WAKECALL_KEY": secrets[which]}
        async with run_wakecall(*stage.args, state=tmp_path, **variables) as publish:
            code, last = await ended(publish)
        assert code == 78
        assert said in last
        assert not any(secret in publish.err.text for secret in secrets.values())


async def test_a_publisher_without_a_key_ends_when_its_broker_gets_one(tmp_path: Path) -> None:
    """Its channel is still open; with the next heartbeat it is told. With a key of `local` it is the same session again."""
    config = BrokerConfig(heartbeat_interval_s=0.2)
    async with open_stage(config=config) as stage, run_wakecall(*stage.args, state=tmp_path) as publish:
        await publish.err.wait("channel open")
        (before,) = stage.broker.session_views()
        await stage.broker.create_key("admin")
        code, last = await ended(publish)
        assert code == 78
        assert last == f"Error: The broker wants an API key, and this publisher has none. {WHO_MAKES_ONE}"
        secret = (await stage.broker.create_key("publisher", owner="local")).secret
        async with run_wakecall(*stage.args, "--key", secret, state=tmp_path) as again:
            await again.err.wait("channel open")
            (after,) = stage.broker.session_views()
            assert after.record.session_id == before.record.session_id
            assert list(after.llms) == ["wakecall-demo"]


async def test_changing_a_publishers_key_keeps_its_session(tmp_path: Path) -> None:
    """A second key of the same owner, a restart with it, and then the first may go: nothing happens to the second's."""
    async with open_stage() as stage:
        await stage.broker.create_key("admin")
        old = await stage.broker.create_key("publisher")
        new = await stage.broker.create_key("publisher", owner=old.key.owner)
        async with run_wakecall(*stage.args, state=tmp_path, WAKECALL_KEY=old.secret) as publish:
            await publish.err.wait("channel open")
            (before,) = stage.broker.session_views()
            publish.send(signal.SIGTERM)
            assert await publish.wait() == 0
        async with run_wakecall(*stage.args, state=tmp_path, WAKECALL_KEY=new.secret) as publish:
            await publish.err.wait("channel open")
            await stage.broker.revoke_key(old.key.key_id)
            (after,) = stage.broker.session_views()
            assert after.record.session_id == before.record.session_id
            assert after.connected
            assert stage.statuses() == {"wakecall-demo": "active"}
