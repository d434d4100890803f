"""Every relative link leads somewhere, and every page can be reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, anchors, links, name_of


def problem_with(page: Path, target: str) -> str | None:
    """What is wrong with a link, or None. The network is never asked."""
    if target.startswith(("http://", "https://", "mailto:")):
        return None
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    if not file.exists():
        return f"{path} is not there"
    if not file.is_relative_to(ROOT):
        return f"{path} is outside of the project"
    if anchor and anchor not in anchors(file):
        return f"{name_of(file)} has no heading for #{anchor}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_and_anchor_resolves(page: Path) -> None:
    problems = [(line, target, problem_with(page, target)) for line, target in links(page)]
    assert [f"{name_of(page)}:{line}: {why}" for line, _, why in problems if why] == []


@pytest.mark.parametrize("target", ["nowhere.md", "#no-such-heading", "docs/glossary.md#no-such-word", "../outside.md"])
def test_a_link_that_leads_nowhere_is_found(target: str) -> None:
    """The check itself."""
    assert problem_with(ROOT / "README.md", target) is not None


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached: set[Path] = set()
    to_read = [ROOT / "README.md"]
    while to_read:
        page = to_read.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [(page.parent / target.partition("#")[0]).resolve() for _, target in links(page)]
        to_read += [target for target in targets if target.suffix == ".md" and target.is_relative_to(ROOT)]
    assert [name_of(page) for page in PAGES if page not in reached] == []


def test_the_documentation_has_its_four_parts() -> None:
    assert {"tutorial", "how-to", "reference", "explanation"} <= {path.name for path in DOCS.iterdir() if path.is_dir()}
