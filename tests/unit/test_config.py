"""Every time and bound: its default, and what is refused."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from wakecall.config import BrokerConfig

KIB, MIB, GIB = 2**10, 2**20, 2**30

DEFAULTS: dict[str, float] = {
    "heartbeat_timeout_s": 90,
    "inactive_retention_s": 14_400,
    "sweep_interval_s": 15,
    "heartbeat_interval_s": 30,
    "keepalive_s": 15,
    "wake_s": 120,
    "queue_s": 60,
    "first_byte_s": 300,
    "idle_s": 120,
    "total_s": 3600,
    "peer_stall_s": 60,
    "grace_s": 2,
    "cancel_lease_s": 10,
    "residence_s": 30,
    "waiting_s": 10,
    "settled_memory_s": 300,
    "usage_flush_s": 5,
    "usage_retention_s": 400 * 86_400,
    "max_body_bytes": 32 * MIB,
    "max_held_bytes": 1 * GIB,
    "max_inline_body_bytes": 64 * KIB,
    "max_plain_bytes": 1 * MIB,
    "max_event_tail_bytes": 64 * KIB,
    "max_message_bytes": 4 * KIB,
    "max_text_bytes": 512,
    "max_untaken_frame_bytes": 4 * MIB,
    "reply_buffer_bytes": 256 * KIB,
    "max_llms_per_session": 256,
    "max_llms_per_owner": 20_000,
    "max_sessions_per_owner": 1000,
    "max_heartbeat_tasks": 10_000,
    "max_waiting_per_llm": 2000,
    "max_waiting_per_key": 2000,
    "max_waiting": 10_000,
    "max_llms_per_pool": 256,
    "max_aliases": 1000,
    "max_settled_per_session": 1000,
    "max_keys": 10_000,
    "max_readers_per_reply": 64,
    "max_usage_cells": 50_000,
}
NAMES = [each.name for each in fields(BrokerConfig)]
BOUNDS = [name for name in NAMES if not name.endswith("_s")]


def test_the_defaults_are_the_protocols() -> None:
    """Each of them, and there is no other."""
    config = BrokerConfig()
    assert {name: getattr(config, name) for name in NAMES} == DEFAULTS


def test_every_setting_says_what_it_is_for() -> None:
    """`serve --help` and the reference are made from it."""
    for each in fields(BrokerConfig):
        assert each.metadata["doc"]
        assert each.metadata["unit"]
        assert each.name.endswith("_s") is (each.metadata["unit"] == "s")


def test_no_grace_is_a_grace() -> None:
    """`serve --grace 0` stops at once; no other time or bound means anything at 0."""
    assert BrokerConfig(grace_s=0).grace_s == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "grace_s"])
@pytest.mark.parametrize("value", [0, 0.0, -0.0, -1, -0.5, float("nan"), float("inf"), float("-inf"), True, "90", None])
def test_what_is_no_positive_number_is_refused(name: str, value: Any) -> None:
    """By name and value: it may have come from the environment."""
    with pytest.raises(ValueError, match=f"{name} must be a positive") as caught:
        BrokerConfig(**{name: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", BOUNDS)
def test_a_bound_is_whole(name: str) -> None:
    """Half an infer is no infer."""
    with pytest.raises(ValueError, match="whole"):
        BrokerConfig(**{name: 1.5})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_every_setting_can_be_changed(name: str) -> None:
    """Alone, and the others stay."""
    value = 10 * MIB if name == "max_untaken_frame_bytes" else 29
    value = 40 if name == "heartbeat_timeout_s" else value
    changed = BrokerConfig(**{name: value})  # type: ignore[arg-type]
    assert {each: getattr(changed, each) for each in NAMES} == DEFAULTS | {name: value}


@pytest.mark.parametrize(
    "together",
    [
        {"heartbeat_timeout_s": 30},
        {"heartbeat_interval_s": 90},
        {"max_inline_body_bytes": 64 * KIB + 1},
        {"max_untaken_frame_bytes": 128 * KIB},
    ],
)
def test_settings_that_do_not_go_together_are_refused(together: dict[str, Any]) -> None:
    """Each alone looks good, and would end live publishers."""
    (name,) = together
    with pytest.raises(ValueError, match=name):
        BrokerConfig(**together)


def test_a_time_may_be_a_fraction() -> None:
    assert BrokerConfig(grace_s=0.001).grace_s == 0.001


def test_it_cannot_be_changed_while_a_broker_runs_on_it() -> None:
    with pytest.raises(FrozenInstanceError):
        BrokerConfig().grace_s = 3.0  # type: ignore[misc]
