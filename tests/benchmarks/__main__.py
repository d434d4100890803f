"""`python -m tests.benchmarks`: every figure beside its floor, over some rounds, as a table. See `--help`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from . import growth, tool
from .report import Figure, as_json, as_markdown, machine, summarise

#: Modules with `GROUP` and `measure(seconds)`; each round goes through all of them.
MODULES = ("traffic", "pace", "heartbeats", "memory", "death", "wakes", "sweeps", "start", "core")
#: Those that `--peers` adds.
PEER_MODULES = ("peers",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of load for each figure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="groups, by name")
    parser.add_argument("--peers", action="store_true", help="install what people use today, and measure it too")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--plots", type=Path, metavar="FOLDER", help="measure how cost grows, and draw it")
    options = parser.parse_args()
    names = MODULES + (PEER_MODULES if options.peers else ())
    groups = {module.GROUP: module for module in (importlib.import_module(f"{__package__}.{name}") for name in names)}
    if unknown := set(options.only or ()) - groups.keys():
        parser.error(f"no such group: {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
    try:
        tool.build()
    except RuntimeError as error:
        raise SystemExit(str(error)) from error
    rounds: list[list[Figure]] = []
    is_whole = True
    for number in range(options.rounds):
        figures: list[Figure] = []
        for name, group in groups.items():
            if options.only is None or name in options.only:
                print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr)
                try:
                    figures += group.measure(options.seconds)
                except RuntimeError as error:
                    print(f"{name} could not be measured: {error}", file=sys.stderr)
                    is_whole = False
        rounds.append(figures)
    rows, facts = summarise(rounds), machine()
    table = as_markdown(rows, facts)
    print(table, end="")
    if options.markdown is not None:
        options.markdown.write_text(table)
    if options.json is not None:
        run = {"seconds": options.seconds, "rounds": options.rounds}
        options.json.write_text(json.dumps(as_json(rows, facts, run), indent=2, ensure_ascii=False) + "\n")
    if options.plots is not None:
        growth.draw(options.plots, options.seconds)
    if not is_whole:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
