"""`wakecall` itself: its help, its version, and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cli.processes import call
from tests.docs.cli_options import COMMANDS, command_of, options_of
from wakecall.cli import VERBS, main


def test_help_names_every_verb(tmp_path: Path) -> None:
    """The help goes to stdout, and each verb has its line."""
    run = call("--help", state=tmp_path)
    assert run.returncode == 0
    assert run.stderr == ""
    for verb, said in VERBS.items():
        assert f"  {verb} " in run.stdout
        assert said in run.stdout


def test_help_loads_no_verb() -> None:
    """Help is quick because no verb's module is loaded for it, nor what they stand on."""
    heavy = {
        "trio",
        "rich",
        "httpx2",
        "quart",
        "hypercorn",
        "sqlite_utils",
        "msgspec",
        "platformdirs",
        "prometheus_client",
    }
    script = (
        "import sys\n"
        "from wakecall.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        f"print(sorted(name for name in sys.modules if name in {heavy!r} or name.startswith('wakecall.cli.')))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_has_help(verb: str) -> None:
    """`wakecall VERB --help` describes it and each of its options, and what the group says of it is its own."""
    run = CliRunner().invoke(main, [*verb.split(), "--help"])
    assert run.exit_code == 0
    command = command_of(verb)
    assert command.name == verb.split()[-1]
    if verb in VERBS:
        assert command.get_short_help_str() == VERBS[verb]
    else:
        assert command.short_help
    for option in options_of(verb):
        assert option.help, option.name
        assert option.opts[0] in run.output


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_option_is_also_a_variable(verb: str) -> None:
    """Each names its variable, `WAKECALL_…`, in the help; no two options of a verb share one."""
    options = options_of(verb)
    variables = [option.envvar for option in options]
    assert len(set(variables)) == len(variables)
    for option in options:
        assert isinstance(option.envvar, str)
        assert option.envvar.startswith("WAKECALL_")
        assert option.show_envvar


def test_version(tmp_path: Path) -> None:
    run = call("--version", state=tmp_path)
    assert (run.returncode, run.stdout) == (0, "wakecall 0.1.0\n")


@pytest.mark.parametrize(
    "args", [["nonsense"], ["ls", "--nonsense"], ["ls", "surplus"], ["keys"], ["keys", "nonsense"], []]
)
def test_what_is_no_command_is_a_usage_error(args: list[str], tmp_path: Path) -> None:
    """Exit code 2, nothing on stdout, and how it is meant on stderr."""
    run = call(*args, state=tmp_path)
    assert run.returncode == 2
    assert run.stdout == ""
    assert "Usage: wakecall" in run.stderr


def test_an_interrupt_anywhere_ends_as_a_shell_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ctrl-C before a verb has taken over its signals is no traceback, but 128 + SIGINT."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wakecall.cli.import_module", interrupted)
    run = CliRunner().invoke(main, ["ls"])
    assert run.exit_code == 130
    assert isinstance(run.exception, SystemExit)
