"""`python -m tests.fuzz SECONDS [TARGET…]`: fuzz for so long, the seconds shared out between the targets.

With atheris where it is installed (coverage leads it), each target in a process of its own; elsewhere with Hypothesis. What
is found is printed with the input, and is to become a plain test. The corpus is kept in `.fuzz/`, for the next time.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
CORPUS = Path(".fuzz")
#: Instrumented, so that their branches lead the fuzzer; the rest of the world is not.
OURS = ["wakecall.http", "wakecall.publisher.sse", "wakecall.addresses", "wakecall.models"]


def _escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)


def run_atheris(name: str, seconds: int) -> None:
    """Does not come back: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=OURS):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    corpus = CORPUS / name
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(target.seeds):
        (corpus / f"seed-{index}").write_bytes(seed)
    tokens = CORPUS / f"{name}.dict"
    tokens.write_text("".join(f'"{_escaped(each)}"\n' for each in target.tokens if each))
    options = [f"-max_total_time={seconds}", f"-dict={tokens}", "-timeout=30", "-rss_limit_mb=2048", "-max_len=4096"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={CORPUS}/{name}-", str(corpus)], target.check)
    atheris.Fuzz()


def run_hypothesis(name: str, seconds: int) -> None:
    """Again and again from another seed, until the time is over."""
    from hypothesis import HealthCheck, given, seed, settings

    from tests.fuzz.mutations import bytes_for
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    until, round_ = time.monotonic() + seconds, 0
    while time.monotonic() < until:
        round_ += 1

        def check(data: bytes) -> None:
            target.check(data)

        quiet = settings(max_examples=2000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        seed(round_)(quiet(given(bytes_for(target))(check)))()


def run_alone(name: str, seconds: int) -> None:
    """In this process, which atheris may end."""
    (run_atheris if HAS_ATHERIS else run_hypothesis)(name, seconds)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("seconds", type=int)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    said: Any = parser.parse_args()
    if said.alone:
        run_alone(said.targets[0], said.seconds)
        return 0
    from tests.fuzz.targets import TARGETS

    unknown = set(said.targets) - set(TARGETS)
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}, only {', '.join(TARGETS)}")
    names = said.targets or list(TARGETS)
    failed = []
    for name in names:
        each = max(1, said.seconds // len(names))
        print(f"=== {name}, {each} s, with {'atheris' if HAS_ATHERIS else 'Hypothesis'}", flush=True)
        if subprocess.run([sys.executable, "-m", "tests.fuzz", "--alone", str(each), name]).returncode:
            failed.append(name)
    print(f"found something: {', '.join(failed)}" if failed else "found nothing")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
