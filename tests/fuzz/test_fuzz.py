"""A short run of every target, the same at each time. A long one, led by coverage: `just fuzz SECONDS`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.mutations import bytes_for
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", TARGETS)
def test_an_edge_holds_against_mutated_seeds(name: str) -> None:
    """What is found here, or by a long run, becomes a plain test of its module beside the mend."""
    target = TARGETS[name]
    for seed in target.seeds:
        target.check(seed)

    @settings(max_examples=250, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(bytes_for(target))
    def run(data: bytes) -> None:
        target.check(data)

    run()


def test_a_long_run_runs_and_fails_where_something_is_found(tmp_path: Path) -> None:
    """With atheris where there is one, with Hypothesis elsewhere."""
    script = """
import sys
from tests.fuzz import targets
from tests.fuzz.__main__ import run_alone
def check(data: bytes) -> None:
    assert b"NaN" not in data
targets.TARGETS["request_id"] = targets.Target(check, (b"seed", b"NaN"), (b"NaN",))
run_alone("request_id", 2)
"""
    command = [sys.executable, "-c", script]
    env_path = f"{ROOT}:{ROOT / 'app'}"
    found = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": env_path}, timeout=60
    )
    assert found.returncode != 0
    assert "AssertionError" in found.stdout + found.stderr
    good = subprocess.run(
        [sys.executable, "-c", "from tests.fuzz.__main__ import run_alone; run_alone('request_id', 1)"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": env_path},
        timeout=60,
    )
    assert good.returncode == 0, good.stderr
