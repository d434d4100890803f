"""Engines for the e2e tests: one process for each kind, started on first use and shared by the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.engine import Engine, run_engine, write_model


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
