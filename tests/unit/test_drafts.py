"""Records by way of a draft are those that `dataclasses.replace` makes: equal, and as frozen."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from wakecall.drafts import LLMDraft, changed_llm, changed_session
from wakecall.models import LLM, SessionRecord, Status

ROW = LLM("qwen", "anna", Status.ACTIVE, 1.0, 2.0, pool="big", total_s=3.0)
SESSION = SessionRecord("laptop", "anna", 1.0, 2.0, epoch=7)


@pytest.mark.parametrize(("record", "changed"), [(ROW, changed_llm), (SESSION, changed_session)])
def test_each_field_can_be_changed_and_the_others_stay(record: Any, changed: Any) -> None:
    assert changed(record) == record
    assert changed(record) is not record
    for field in fields(record):
        made = changed(record, **{field.name: "other"})
        assert type(made) is type(record)
        assert made == replace(record, **{field.name: "other"})
        assert hash(made) == hash(replace(record, **{field.name: "other"}))
        with pytest.raises(FrozenInstanceError):
            setattr(made, field.name, "once more")
    assert pickle.loads(pickle.dumps(changed(record))) == record


def test_what_is_no_field_is_refused() -> None:
    with pytest.raises(AttributeError):
        changed_llm(ROW, nonsense=1)


def test_a_draft_takes_the_fields_in_their_order() -> None:
    draft = LLMDraft(*(getattr(ROW, field.name) for field in fields(LLM)))
    draft.__class__ = LLM
    assert draft == ROW
