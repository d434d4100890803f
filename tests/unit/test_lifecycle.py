"""The lifecycle, against the table of the design as it is written there."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.lifecycle import (
    ABSENT,
    RAISES,
    TRANSITIONS,
    IllegalTransition,
    RowEvent,
    RowState,
    state_of,
    step,
)
from wakecall.models import LLM, Status

DESIGN = """
| state | register(s) | report(s) | revive | woken | wake failed | lost | withdrawn | expired |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
| (none) | s | raises | raises | raises | raises | raises | raises | raises |
| active | s | s | active | active | active | inactive, remembers active | inactive, remembers nothing | raises |
| hibernating | s | s | hibernating | active | hibernating | inactive, remembers hibernating | inactive, remembers nothing | raises |
| inactive | s | s, if it remembers anything | what it remembers, else inactive | inactive | inactive | inactive | inactive, forgets | (none) |
"""  # noqa: E501

EVENTS = {
    "register(s)": {Status.ACTIVE: RowEvent.REGISTER_ACTIVE, Status.HIBERNATING: RowEvent.REGISTER_HIBERNATING},
    "report(s)": {Status.ACTIVE: RowEvent.REPORT_ACTIVE, Status.HIBERNATING: RowEvent.REPORT_HIBERNATING},
    "revive": {None: RowEvent.REVIVE},
    "woken": {None: RowEvent.WOKEN},
    "wake failed": {None: RowEvent.WAKE_FAILED},
    "lost": {None: RowEvent.LOST},
    "withdrawn": {None: RowEvent.WITHDRAWN},
    "expired": {None: RowEvent.EXPIRED},
}


def after(cell: str, state: RowState, named: Status | None) -> RowState | str:
    """What a cell of the design's table says, for a row in `state` and an event that names a status or none."""
    nothing = RowState(Status.INACTIVE, None)
    match cell:
        case "raises":
            return "raises"
        case "(none)":
            return RowState(None, None)
        case "s":
            return RowState(named, None)
        case "s, if it remembers anything":
            return RowState(named, None) if state.remembers else state
        case "what it remembers, else inactive":
            return RowState(state.remembers, None) if state.remembers else state
        case "inactive, remembers nothing" | "inactive, forgets":
            return nothing
        case "inactive":
            return state
        case "active" | "hibernating":
            return RowState(Status(cell), None)
        case "inactive, remembers active" | "inactive, remembers hibernating":
            return RowState(Status.INACTIVE, Status(cell.removeprefix("inactive, remembers ")))
    raise AssertionError(f"the table has a cell that this test cannot read: {cell}")


def read_design() -> dict[RowState, dict[RowEvent, RowState | str]]:
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in DESIGN.strip().splitlines()]
    table: dict[RowState, dict[RowEvent, RowState | str]] = {}
    for name, *cells in lines:
        if name == "inactive":
            states = [RowState(Status.INACTIVE, each) for each in (None, Status.ACTIVE, Status.HIBERNATING)]
        else:
            states = [RowState(None if name == "(none)" else Status(name), None)]
        for state in states:
            table[state] = {
                event: after(cell, state, named)
                for column, cell in zip(head[1:], cells, strict=True)
                for named, event in EVENTS[column].items()
            }
    return table


def test_the_table_is_the_designs() -> None:
    """All sixty pairs, none beside them, and none left out."""
    written = {
        state: {event: "raises" if to is RAISES else to for event, to in row.items()}
        for state, row in TRANSITIONS.items()
    }
    assert written == read_design()
    assert len(TRANSITIONS) == 6
    assert all(set(row) == set(RowEvent) for row in TRANSITIONS.values())


ALL = [(state, event) for state in TRANSITIONS for event in RowEvent]


@pytest.mark.parametrize(("state", "event"), ALL, ids=lambda x: str(x.value if isinstance(x, RowEvent) else x))
def test_a_step_is_the_tables_or_raises(state: RowState, event: RowEvent) -> None:
    """One door: what the table says, or an error that names both; neither changes the table."""
    before = copy.deepcopy(TRANSITIONS)
    to = TRANSITIONS[state][event]
    if to is RAISES:
        with pytest.raises(IllegalTransition, match="cannot happen") as caught:
            step(state, event)
        assert event.value in str(caught.value)
        assert isinstance(caught.value, AssertionError)
    else:
        assert step(state, event) == to
    assert before == TRANSITIONS


@given(st.lists(st.sampled_from(RowEvent), max_size=60))
def test_however_a_row_walks_it_stays_within_the_table(events: list[RowEvent]) -> None:
    """From nothing, through any events: a state that the table lists, an illegal one leaving it where it was; it
    remembers only while inactive, and only what it last was; withdrawn, it comes back by a register alone."""
    state = ABSENT
    last_live: Status | None = None
    withdrawn = False
    for event in events:
        try:
            state = step(state, event)
        except IllegalTransition:
            assert TRANSITIONS[state][event] is RAISES
            continue
        assert state in TRANSITIONS
        if event in (RowEvent.REGISTER_ACTIVE, RowEvent.REGISTER_HIBERNATING):
            withdrawn = False
        elif event is RowEvent.WITHDRAWN:
            withdrawn = True
        elif event is RowEvent.EXPIRED:
            withdrawn, last_live = False, None
        if withdrawn:
            assert state == RowState(Status.INACTIVE, None)
        if state.status in (Status.ACTIVE, Status.HIBERNATING):
            assert state.remembers is None
            last_live = state.status
        elif state.remembers is not None:
            assert state.remembers is last_live


def test_the_state_of_a_record() -> None:
    """What a stored row's two members say; no record, no row."""
    row = LLM("qwen", "local", Status.INACTIVE, 0.0, 0.0, remembers=Status.HIBERNATING)
    assert state_of(None) == ABSENT == RowState(None)
    assert state_of(row) == RowState(Status.INACTIVE, Status.HIBERNATING)
    assert state_of(replace(row, status=Status.ACTIVE, remembers=None)) == RowState(Status.ACTIVE)
