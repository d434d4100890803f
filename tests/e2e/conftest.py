"""Engines for the e2e tests: one process for each kind, started on first use and shared by the session.

And the option `--through-faults`: see way.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import Engine, run_engine, write_model
from tests.e2e.way import WAY


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--through-faults", action="store_true", help="put a bad network between every agent and its broker"
    )


def pytest_configure(config: pytest.Config) -> None:
    # In a run of everything this file is found after the options have been read.
    WAY.is_bad = config.getoption("--through-faults", default=False)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Through faults only what starts an agent is worth running once more."""
    if WAY.is_bad:
        agents = "open_publisher_process", "open_wire_publisher"
        with_agents = [item for item in items if any(hasattr(getattr(item, "module", None), name) for name in agents)]
        config.hook.pytest_deselected(items=[item for item in items if item not in with_agents])
        items[:] = with_agents


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    # A pass in which nothing went through would prove nothing.
    if WAY.is_bad and session.testscollected and not session.config.option.collectonly and not WAY.connections:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WAY.is_bad:
        terminalreporter.write_line(
            f"through faults: {WAY.connections} connections of agents, {WAY.passed / 1e6:.1f} MB"
        )


@pytest.fixture(scope="session")
def noise_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The GGUF that every engine here serves."""
    path = tmp_path_factory.mktemp("engine") / "noise.gguf"
    write_model(path)
    return path


@pytest.fixture(scope="session")
def engine(noise_model: Path) -> Iterator[Engine]:
    """A llama.cpp with 4 slots of 16,384 tokens. A test that stops or kills it opens its own with `open_engine`."""
    with run_engine(noise_model) as running:
        yield running


@pytest.fixture(scope="session")
def embedding_engine(noise_model: Path) -> Iterator[Engine]:
    """The same in embedding mode: the only one that serves `/v1/embeddings`."""
    with run_engine(noise_model, embedding=True) as running:
        yield running
