"""What the tests of faults share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.machine import Machine, compile_shim


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes a machine go wrong. It takes a C compiler, which `.ci/run` installs."""
    return compile_shim(tmp_path_factory.mktemp("shim"))


@pytest.fixture
def machine(shim: Path, tmp_path: Path) -> Machine:
    """A machine on which all is well yet; its disk is what holds `w.db`."""
    return Machine(shim, tmp_path / "control", "/w.db")
