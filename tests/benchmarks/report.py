"""What was found: figures, the bars that they are held against, and how both are written down."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

__all__ = ["Bar", "Figure", "Row", "as_json", "as_markdown", "machine", "summarise"]

_PACKAGES = (
    "trio",
    "hypercorn",
    "h11",
    "quart",
    "quart-trio",
    "sqlite-utils",
    "msgspec",
    "prometheus-client",
    "httpx2",
)


@dataclass(frozen=True, slots=True)
class Bar:
    """What a value has to reach, or to stay below."""

    sign: Literal["≥", "≤"]
    bound: float

    def is_met_by(self, value: float) -> bool:
        return value >= self.bound if self.sign == "≥" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement of one round.

    Args:
        name: short and stable: what the rounds are matched by.
        unit: of ours and of the floor: `requests/s`, `ms`, `KiB`.
        ours: as measured.
        floor: taken in the same round; None: the bar is absolute.
        value: what the bar is held against: a ratio or an absolute figure.
        bar: None: it is only told.
    """

    name: str
    unit: str
    ours: float
    floor: float | None
    value: float
    bar: Bar | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A figure over all rounds. `ours` and `floor` are medians; whether the bar is met goes by the median too."""

    name: str
    unit: str
    ours: float
    floor: float | None
    median: float
    least: float
    most: float
    bar: Bar | None
    is_met: bool | None


def summarise(rounds: Sequence[Sequence[Figure]]) -> list[Row]:
    """One row for each figure, in the order in which they first came. A round may lack some."""
    by_name: dict[str, list[Figure]] = {}
    for figures in rounds:
        for figure in figures:
            by_name.setdefault(figure.name, []).append(figure)
    rows = []
    for name, figures in by_name.items():
        floors = [figure.floor for figure in figures if figure.floor is not None]
        values = [figure.value for figure in figures]
        median, bar = statistics.median(values), figures[0].bar
        rows.append(
            Row(
                name,
                figures[0].unit,
                statistics.median(figure.ours for figure in figures),
                statistics.median(floors) if floors else None,
                median,
                min(values),
                max(values),
                bar,
                bar.is_met_by(median) if bar is not None else None,
            )
        )
    return rows


def as_markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    """A table, and the machine in a line."""
    lines = [
        "| what | unit | floor | Wakecall | value: median (least–most) | bar | met |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        value = f"{_number(row.median)} ({_number(row.least)}–{_number(row.most)})"
        met = {True: "yes", False: "**no**", None: ""}[row.is_met]
        floor = "" if row.floor is None else _number(row.floor)
        cells = [row.name, row.unit, floor, _number(row.ours), value, str(row.bar or ""), met]
        lines.append(f"| {' | '.join(cells)} |")
    packages = ", ".join(f"{name} {found}" for name, found in facts["packages"].items())
    lines += ["", f"{facts['cpu']}, {facts['cores']} cores; {facts['kernel']}; Python {facts['python']}; {packages}."]
    return "\n".join(lines) + "\n"


def as_json(rows: Sequence[Row], facts: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """The same for programs."""
    figures = [{**asdict(row), "bar": str(row.bar) if row.bar is not None else None} for row in rows]
    return {"machine": dict(facts), "run": dict(run), "figures": figures}


def machine() -> dict[str, Any]:
    """What it was measured on."""
    cpu = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "cpu": cpu or "unknown processor",
        "cores": os.cpu_count(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
    }


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"
