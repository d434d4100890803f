"""What `wakecall demo` looks like: two columns that live on a terminal, or plain lines where there is none.

A screen is told things and shows them; it knows no broker, and whoever tells it things knows no terminal.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Literal, Protocol, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .common import printable

__all__ = ["Flow", "LiveScreen", "Mood", "PlainScreen", "Screen", "open_screen"]

#: What moves along the lines between client, broker, publisher and engine.
Flow = Literal["none", "call", "wake", "request", "answer"]
Mood = Literal["off", "asleep", "waking", "awake"]
Tone = Literal["plain", "quiet", "sleep", "good", "bad"]

_STYLES: Final[dict[Tone, str]] = {"plain": "", "quiet": "dim", "sleep": "yellow", "good": "green", "bad": "bold red"}
_MOOD_STYLES: Final[dict[Mood, str]] = {
    "off": "dim",
    "asleep": "yellow",
    "waking": "bold yellow",
    "awake": "bold green",
}
_WIDE: Final = 72
_NOTES_WIDTH: Final = 42
_FRAME_WIDTH: Final = 4
_PICTURE_ROWS: Final = 5
_ROWS: Final = 12
"""Lines of what lives, at the most: few enough to be wiped and drawn twelve times a second."""


@dataclass(frozen=True)
class _Glyphs:
    line: str
    dot: str
    right: str
    left: str
    cursor: str
    marks: dict[Tone, str]
    moods: dict[Mood, str]


_UNICODE: Final = _Glyphs(
    *("─", "●", "▶", "◀", "▌"),
    marks={"plain": "·", "quiet": "·", "sleep": "☾", "good": "✓", "bad": "✗"},
    moods={"off": "", "asleep": "☾ asleep", "waking": "◐ waking", "awake": "● awake"},
)
_ASCII: Final = _Glyphs(
    *("-", "o", ">", "<", "_"),
    marks={"plain": "-", "quiet": "-", "sleep": "z", "good": "+", "bad": "!"},
    moods={"off": "", "asleep": "asleep", "waking": "waking", "awake": "awake"},
)


class Screen(Protocol):
    """What the demo tells."""

    def note(self, text: str, tone: Tone = "plain") -> None:
        """Something happened, now."""

    def ask(self, prompt: str) -> None:
        """This is what the client asks."""

    def write(self, text: str) -> None:
        """A piece of the answer."""

    def flow(self, flow: Flow) -> None:
        """What moves along the lines from now on."""

    def engine(self, mood: Mood) -> None:
        """How the engine is."""

    def tick(self) -> None:
        """A twelfth of a second has passed."""

    def finish(self) -> None:
        """That was all; what is to stay is put where it stays."""


@contextmanager
def open_screen(clock: Callable[[], float], stream: TextIO | None = None) -> Iterator[Screen]:
    """The screen that fits where stdout goes.

    Args:
        clock: seconds since the demo began.
        stream: instead of stdout.
    """
    stream = stream or sys.stdout
    if hasattr(stream, "reconfigure"):
        # An engine may answer with what this terminal cannot show: that is no reason to end.
        stream.reconfigure(errors="replace")
    console = Console(file=stream, highlight=False)
    unicode = "utf" in (stream.encoding or "").lower()
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainScreen(clock, stream, _UNICODE if unicode else _ASCII)
        return
    screen = LiveScreen(clock, console, _UNICODE if unicode else _ASCII)
    with Live(
        console=console,
        get_renderable=screen.render,
        auto_refresh=False,
        transient=True,
        redirect_stdout=False,
        vertical_overflow="crop",
    ) as live:
        screen.live = live
        yield screen


class PlainScreen:
    """Lines in the order in which things happen: what happens with its time, the answer behind `>`, word by word."""

    def __init__(self, clock: Callable[[], float], stream: TextIO, glyphs: _Glyphs) -> None:
        self._clock = clock
        self._stream = stream
        self._glyphs = glyphs
        self._width = max(20, shutil.get_terminal_size().columns - 1)
        self._column = 0

    def note(self, text: str, tone: Tone = "plain") -> None:
        self._break()
        head = f"{self._clock():6.2f} s  {self._glyphs.marks[tone]} "
        self._put(textwrap.fill(printable(text), self._width, initial_indent=head, subsequent_indent=" " * len(head)))
        self._put("\n")

    def ask(self, prompt: str) -> None:
        self.note(f"you ask: {prompt}")

    def write(self, text: str) -> None:
        for word in _words(text):
            if word == "\n" or self._column + len(word) > self._width:
                self._break()
                word = word.strip()
            if not word:
                continue
            if not self._column:
                self._put("> ")
                self._column = 2
                word = word.lstrip()
            self._put(word)
            self._column += len(word)

    def flow(self, flow: Flow) -> None:
        """Lines do not move."""

    def engine(self, mood: Mood) -> None:
        """The notes say it."""

    def tick(self) -> None:
        """Nothing moves."""

    def finish(self) -> None:
        self._break()

    def _break(self) -> None:
        if self._column:
            self._put("\n")
            self._column = 0

    def _put(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class LiveScreen:
    """A picture of who talks to whom, the answer, and what happens beside it."""

    def __init__(self, clock: Callable[[], float], console: Console, glyphs: _Glyphs) -> None:
        self.live: Live | None = None
        self._clock = clock
        self._console = console
        self._glyphs = glyphs
        self._notes: list[tuple[float, str, Tone]] = []
        self._prompt = ""
        self._answer = ""
        self._flow: Flow = "none"
        self._mood: Mood = "off"
        self._ticks = 0
        self._finished = False

    def note(self, text: str, tone: Tone = "plain") -> None:
        self._notes.append((self._clock(), printable(text), tone))
        self._refresh()

    def ask(self, prompt: str) -> None:
        self._prompt = printable(prompt)
        self._refresh()

    def write(self, text: str) -> None:
        self._answer += "\n".join(printable(line) for line in text.split("\n"))
        self._refresh()

    def flow(self, flow: Flow) -> None:
        self._flow = flow
        self._refresh()

    def engine(self, mood: Mood) -> None:
        self._mood = mood
        self._refresh()

    def tick(self) -> None:
        self._ticks += 1
        self._refresh()

    def finish(self) -> None:
        self._flow = "none"
        self._finished = True
        if self.live is not None:
            # What lived is wiped (it may have been cut to fit), what stays is printed whole.
            self.live.stop()
            self._console.print(self.render())

    def _refresh(self) -> None:
        if self.live is not None and not self._finished:
            self.live.refresh()

    # Drawing --------------------------------------------------------------------------------------------------------

    def render(self) -> RenderableType:
        """All of it, as it is now: the last lines of what does not fit while it lives, everything at the end."""
        width, height = self._console.size
        wide = width >= _WIDE
        beside = width - _NOTES_WIDTH if wide else width
        answer = self._answer_lines(beside - _FRAME_WIDTH)
        notes = self._note_lines((_NOTES_WIDTH if wide else width) - _FRAME_WIDTH)
        if wide:
            rows = max(len(answer), len(notes)) if self._finished else max(3, min(_ROWS, height - _PICTURE_ROWS - 2))
            columns = Table.grid(padding=0)
            columns.add_column(width=beside)
            columns.add_column(width=_NOTES_WIDTH)
            columns.add_row(_panel("the answer", answer, rows), _panel("what happens", notes, rows))
            return Group(Padding(self._picture(width - 4), (1, 2, 1, 2)), columns)
        if not self._finished:
            # One below the other; the answer gets what the notes leave.
            notes = notes[-max(1, height // 2 - 2) :]
            answer_rows = max(1, min(_ROWS, height - len(notes) - 5))
        else:
            answer_rows = len(answer)
        return Group(_panel("the answer", answer, answer_rows), _panel("what happens", notes, len(notes)))

    def _picture(self, width: int) -> Text:
        names = ["you", "broker", "publisher", "engine"]
        span = (width - sum(len(name) + 2 for name in names)) // 3
        top = Text(overflow="crop", no_wrap=True)
        starts = []
        for index, name in enumerate(names):
            starts.append(len(top) + 1)
            style = _MOOD_STYLES[self._mood] if name == "engine" else "bold"
            top.append(f" {name} ", style)
            if index < 3:
                top.append_text(self._link(index, span))
        below = ["", "on this machine", "dialled out", self._glyphs.moods[self._mood]]
        under = Text(overflow="crop", no_wrap=True)
        for start, name, text in zip(starts, names, below, strict=True):
            left = min(max(0, start + (len(name) - len(text)) // 2), width - len(text))
            under.append(" " * (left - len(under)))
            under.append(text, _MOOD_STYLES[self._mood] if name == "engine" else "dim")
        return Text("\n").join([top, under])

    def _link(self, index: int, span: int) -> Text:
        """One of the three lines. The second has its head on the other side: it was the publisher that dialled."""
        glyphs = self._glyphs
        cells = [glyphs.line] * span
        if index == 1:
            cells[0] = glyphs.left
        else:
            cells[-1] = glyphs.right
        link = Text("".join(cells), "dim")
        busy: dict[Flow, tuple[int, ...]] = {
            "none": (),
            "call": (0,),
            "wake": (1, 2),
            "request": (1, 2),
            "answer": (0, 1, 2),
        }
        if index not in busy[self._flow]:
            return link
        style = "bold yellow" if self._flow == "wake" else "bold green" if self._flow == "answer" else "bold cyan"
        step = -self._ticks if self._flow == "answer" else self._ticks
        line = Text(style="dim")
        for at, cell in enumerate(cells):
            moving = (at - step) % 7 == 0
            line.append(glyphs.dot if moving else cell, style if moving else "")
        return line

    def _answer_lines(self, width: int) -> list[Text]:
        lines: list[Text] = []
        if self._prompt:
            lines += Text(f"{self._glyphs.right} {self._prompt}", "bold").wrap(self._console, width)
            lines.append(Text())
        body = Text(self._answer)
        if not self._finished:
            body.append(self._glyphs.cursor, "" if self._answer else "dim")
        return [*lines, *body.wrap(self._console, width)]

    def _note_lines(self, width: int) -> list[Text]:
        lines = []
        for at, text, tone in self._notes:
            head = Text.assemble((f"{at:5.2f} s ", "dim"), (self._glyphs.marks[tone], _STYLES[tone]), " ")
            for number, line in enumerate(Text(text, _STYLES[tone]).wrap(self._console, max(8, width - len(head)))):
                lines.append(head + line if not number else Text(" " * len(head)) + line)
        return lines


def _panel(title: str, lines: list[Text], rows: int) -> Panel:
    """A frame of `rows` lines; of more, the last are shown."""
    shown = Text("\n", no_wrap=True, overflow="crop").join(lines[-rows:] if rows else [])
    return Panel(shown, title=title, title_align="left", border_style="dim", height=rows + 2, padding=(0, 1))


def _words(text: str) -> Iterator[str]:
    """Pieces of a text that can stand on one line, line breaks as pieces of their own."""
    for number, line in enumerate(text.split("\n")):
        if number:
            yield "\n"
        word = ""
        for letter in printable(line):
            if letter == " " and word.strip():
                yield word
                word = ""
            word += letter
        if word:
            yield word
