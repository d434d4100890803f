"""A line plot as SVG, small enough to be read as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

__all__ = ["line_plot", "powers_over", "ticks_to"]

_WIDTH, _HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 70, 50
# Told apart by those who see no colours, too: each has its own dashes.
_LINES = (("#6b7280", "6 4"), ("#2563eb", ""), ("#d97706", "2 3"), ("#059669", "8 3 2 3"))


def ticks_to(most: float) -> list[float]:
    """About five round numbers from 0 to at least `most`."""
    raw = max(most, 1e-9) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [step * number for number in range(max(1, math.ceil(most / step * 0.999)) + 1)]


def powers_over(least: float, most: float) -> list[float]:
    """The powers of ten around two positive values."""
    low = math.floor(math.log10(least))
    return [10.0**power for power in range(low, max(low + 1, math.ceil(math.log10(most))) + 1)]


def line_plot(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    is_log_x: bool = False,
    is_log_y: bool = False,
) -> str:
    """The SVG of some lines over one axis each way; y begins at 0, or at a power of ten.

    Args:
        lines: by name, points in the order of x.
        is_log_x: equal factors of x take equal room.
        is_log_y: equal factors of y; none of them is 0.
    """
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    ticks = powers_over(min(ys), max(ys)) if is_log_y else ticks_to(max(ys))

    def across(x: float) -> float:
        place, low, high = (math.log(v) if is_log_x else v for v in (x, xs[0] if is_log_x else 0.0, xs[-1]))
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (place - low) / ((high - low) or 1)

    def up(y: float) -> float:
        place, low, high = (math.log(v) if is_log_y else v for v in (y, ticks[0], ticks[-1]))
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (place - low) / (high - low)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        f'font-size="13" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        _text(_LEFT, 22, title, 'font-size="16"'),
    ]
    for y in ticks:
        out.append(f'<path d="M{_LEFT} {up(y):.1f}H{_WIDTH - _RIGHT}" stroke="#e5e7eb"/>')
        out.append(_text(_LEFT - 8, up(y) + 4, f"{y:,.10g}", 'text-anchor="end"'))
    out += [_text(across(x), _HEIGHT - _BOTTOM + 18, f"{x:g}", 'text-anchor="middle"') for x in xs]
    out.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 10, x_label, 'text-anchor="middle"'))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    out.append(_text(16, middle, y_label, f'text-anchor="middle" transform="rotate(-90 16 {middle:.0f})"'))
    at = _LEFT
    for number, (name, points) in enumerate(lines.items()):
        colour, dashes = _LINES[number % len(_LINES)]
        stroke = f'stroke="{colour}" stroke-width="2"' + (f' stroke-dasharray="{dashes}"' if dashes else "")
        path = "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in points)
        out.append(f'<path d="M{path}" fill="none" {stroke}/>')
        out += [f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="3" fill="{colour}"/>' for x, y in points]
        out.append(f'<path d="M{at} 44h28" {stroke}/>')
        out.append(_text(at + 34, 48, name))
        at += 60 + 7 * len(name)
    return "\n".join([*out, "</svg>"]) + "\n"


def _text(x: float, y: float, what: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="#111827" {more}>{escape(what)}</text>'
