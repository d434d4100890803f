"""The documentation as the tests read it: pages, headings and their anchors, links, code blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

_FENCE = re.compile(r"^( *)(```+)(\S*)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$")
_LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^()\s>]+)>?(?: \"[^\"]*\")?\)")
_CODE_SPAN = re.compile(r"(`+)(?:(?!\1).)+\1")


class Block(NamedTuple):
    """A fenced code block: where it begins, what it says that it is, and its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def read(page: Path) -> tuple[list[tuple[int, str]], list[Block]]:
    """A page's prose, as numbered lines, and its code blocks."""
    prose: list[tuple[int, str]] = []
    blocks: list[Block] = []
    inside: tuple[int, str, str, int] | None = None
    text: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if inside is None and fence is not None:
            inside, text = (number, fence[2], fence[3], len(fence[1])), []
        elif inside is not None and fence is not None and fence[2] == inside[1] and not fence[3]:
            blocks.append(Block(page, inside[0], inside[2], "\n".join(text) + "\n"))
            inside = None
        elif inside is not None:
            text.append(line[inside[3] :])
        else:
            prose.append((number, line))
    assert inside is None, f"{name_of(page)}:{inside[0]}: this code block is never closed" if inside else ""
    return prose, blocks


def blocks(*languages: str) -> list[Block]:
    """All code blocks of all pages that say they are in one of these languages."""
    return [block for page in PAGES for block in read(page)[1] if block.language in languages]


def anchors(page: Path) -> set[str]:
    """What `#…` may name in a page, as GitHub makes it of its headings."""
    found: Counter[str] = Counter()
    names = set()
    for _, line in read(page)[0]:
        heading = _HEADING.match(line)
        if heading is None:
            continue
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        names.add(slug if not found[slug] else f"{slug}-{found[slug]}")
        found[slug] += 1
    return names


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Line and target of each link in a page's prose."""
    for number, line in read(page)[0]:
        for match in _LINK.finditer(_CODE_SPAN.sub(lambda span: "x" * len(span[0]), line)):
            yield number, match[1]
