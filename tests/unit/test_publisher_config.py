"""What a publisher can be told, and what it makes of its engine's ids."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wakecall.models import is_llm_name
from wakecall.publisher import InvalidConfig, PublishedModel, PublisherConfig, name_for
from wakecall.publisher.backoff import Backoff
from wakecall.publisher.state import state_path


def config(**settings: Any) -> PublisherConfig:
    return PublisherConfig(**{"broker_url": "http://broker", "engine_url": "http://engine", **settings})


@pytest.mark.parametrize(
    ("engine_id", "name"),
    [
        ("qwen2.5:7b", "qwen2.5:7b"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/models/Qwen 2.5/tiny.Q4_K_M.gguf", "tiny.Q4_K_M"),
        ("C:\\models\\tiny.GGUF", "tiny"),
        ("./tiny.gguf", "tiny"),
        ("my model (v2)", "my-model-v2-"),
        ("/models/_tiny/", "tiny"),
    ],
)
def test_an_engine_id_becomes_a_name(engine_id: str, name: str) -> None:
    assert name_for(engine_id) == name


@given(st.text(max_size=200))
def test_every_id_gives_a_valid_name_or_a_clear_error(engine_id: str) -> None:
    with contextlib.suppress(InvalidConfig):
        assert is_llm_name(name_for(engine_id))


@pytest.mark.parametrize("url", ["http://e:1", "http://e:1/", "http://e:1/v1", "http://e:1/v1/"])
def test_the_engine_may_be_given_with_or_without_v1(url: str) -> None:
    assert config(engine_url=url).engine_base == "http://e:1"


@pytest.mark.parametrize(
    "settings",
    [
        {"broker_url": "broker:8080"},
        {"engine_url": "ftp://engine"},
        {"engine_url": "http://engine/?key=x"},
        {"models": (PublishedModel("a b"),)},
        {"models": (PublishedModel("a"), PublishedModel("a", "b"))},
        {"session_id": "a b"},
        {"max_concurrency": 0},
        {"hibernating": True},
        {"hibernate_command": "true"},
        {"hibernate_after_s": 0.0, "models": (PublishedModel("a"),)},
        {"upload": "pieces"},
        {"cancel": "stop"},
        {"wake_s": 0},
        {"health_path": "health"},
        {"pool": "a b"},
        {"pool": "a", "models": (PublishedModel("a"),)},
        {"queue_s": 0.0},
        {"first_byte_s": -1.0},
        {"idle_s": float("nan")},
        {"total_s": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig) as refused:
        config(**settings)
    assert refused.value.exit_code == 78


def test_the_key_is_not_in_the_repr() -> None:
    assert "s3cret" not in repr(config(broker_key="s3cret"))


def test_an_engine_key_that_is_not_set_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(InvalidConfig, match="NO_SUCH_KEY"):
        config(engine_key_env="NO_SUCH_KEY").engine_key()


def test_there_is_a_state_file_for_each_broker_and_engine_and_for_each_session_given(tmp_path: Path) -> None:
    base = state_path(config(state_dir=tmp_path))
    assert base.is_relative_to(tmp_path)
    assert state_path(config(state_dir=tmp_path, engine_url="http://engine/v1/")) == base
    others = [{"broker_url": "http://b2"}, {"engine_url": "http://e2"}, {"session_id": "a"}, {"session_id": "b"}]
    assert len({base, *(state_path(config(state_dir=tmp_path, **other)) for other in others)}) == 5


def test_a_pause_grows_slowly_to_its_cap_and_starts_again() -> None:
    backoff = Backoff(0.2, 5.0)
    pauses = [backoff.next_pause() for _ in range(20)]
    assert 0.1 <= pauses[0] <= 0.2
    assert all(2.5 <= pause <= 5.0 for pause in pauses[-5:])
    backoff.reset()
    assert backoff.next_pause() <= 0.2
