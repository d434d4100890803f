"""Records made quickly: by way of a draft, which becomes the record once it is whole.

A frozen dataclass sets each field of a new instance through `object.__setattr__`, which for a row's two dozen is most of
what a heartbeat, a sweep or the start of a broker costs. A draft has the same slots and is not frozen, so Python lets its
instance become one of the record's class. Nobody else may hold a draft: from then on it is as frozen as any record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, make_dataclass
from operator import attrgetter
from typing import Any, Final, TypeVar

from .models import LLM, SessionRecord

__all__ = ["LLMDraft", "changed_llm", "changed_session"]

R = TypeVar("R")


def _draft_of(record: type[Any]) -> type[Any]:
    return make_dataclass(f"{record.__name__}Draft", [(each.name, each.type) for each in fields(record)], slots=True)


#: A row to be: all its fields, in their order. It is one once its `__class__` is `LLM`.
LLMDraft: Final[Any] = _draft_of(LLM)


def _changer_of(record: type[R], draft_class: Any) -> Callable[..., R]:
    values_of = attrgetter(*(each.name for each in fields(record)))  # type: ignore[arg-type]

    def changed(before: R, /, **changes: Any) -> R:
        draft: Any = draft_class(*values_of(before))
        for name, value in changes.items():
            setattr(draft, name, value)
        draft.__class__ = record
        return draft  # type: ignore[no-any-return]

    return changed


#: As `dataclasses.replace`. Raises AttributeError: there is no such field.
changed_llm: Final[Callable[..., LLM]] = _changer_of(LLM, LLMDraft)
changed_session: Final[Callable[..., SessionRecord]] = _changer_of(SessionRecord, _draft_of(SessionRecord))
