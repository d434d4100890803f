"""Ids of tasks."""

from __future__ import annotations

import os
from copy import copy

import pytest

from wakecall.models import is_id
from wakecall.taskids import TaskIds


def test_each_is_an_id_of_its_own_with_bits_enough() -> None:
    """Beyond what is drawn at a time, too: 24 characters of six bits."""
    ids = TaskIds()
    made = [ids.new() for _ in range(1_000)]
    assert len(set(made)) == len(made)
    assert all(is_id(each) and len(each) * 6 >= 128 for each in made)


def test_a_forked_process_has_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was drawn before the fork is its parent's."""
    ids = TaskIds()
    ids.new()
    forked = copy(ids)
    assert forked.new() == ids.new()  # or this shows nothing
    parents = {ids.new() for _ in range(1_000)}
    forked = copy(ids)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert parents.isdisjoint(forked.new() for _ in range(1_000))
    assert forked.new() != ids.new()
