"""What the documentation says of settings, errors, metrics and the lifecycle is what the code has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.docs import generate
from tests.docs.pages import DOCS, name_of
from wakecall import errors
from wakecall.config import BrokerConfig


@pytest.mark.parametrize("page", generate.pages(), ids=name_of)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    """If this fails: `python -m tests.docs.generate`, and read what it changed."""
    text = page.read_text()
    assert generate.generated(text) == text


def test_every_part_stands_in_exactly_one_page() -> None:
    found = [part for page in generate.pages() for part in generate.parts_of(page.read_text())]
    assert sorted(found) == sorted(generate.PARTS)


def test_every_setting_of_the_broker_is_documented() -> None:
    text = (DOCS / "reference/configuration.md").read_text()
    assert [each.name for each in dataclasses.fields(BrokerConfig) if f"| `{each.name}` |" not in text] == []


def test_every_error_code_is_documented() -> None:
    """Also those that stand alone in the tree, and what a base class says that is raised itself."""
    text = (DOCS / "reference/errors.md").read_text()
    codes = {getattr(errors, name).code for name in errors.__all__ if name != "Phase"}
    assert [code for code in sorted(codes) if f"`{code}`" not in text] == []


def test_every_error_has_a_place_in_the_tree() -> None:
    """An error directly below the root is in none of the tables."""
    roots = {child for child in errors.WakecallError.__subclasses__() if child.__module__ == errors.__name__}
    assert roots == {*generate.abstract_errors(), errors.InternalError}


def test_every_metric_is_documented() -> None:
    text = (DOCS / "reference/metrics.md").read_text()
    assert [family.name for family in generate.families() if f"`{family.name}" not in text] == []
