"""What a measurement is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Bar", "Figure"]


@dataclass(frozen=True, slots=True)
class Bar:
    sign: Literal["≥", "≤"]
    bound: float


@dataclass(frozen=True, slots=True)
class Figure:
    """One measurement of one round."""

    name: str
    unit: str
    ours: float
    floor: float | None
    value: float
    bar: Bar | None = None
