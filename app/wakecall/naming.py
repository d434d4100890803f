"""What a name stands for, and what keeps rows from new infers.

There is one namespace: an operator's alias comes first, then a row, then a pool. What an alias leads to are rows and pools,
never another alias, so that nothing leads in a circle and a name is looked up once. An alias may have the name of a row: the
operator's word rules, and the row is still what a target of that name means.

A *hold* is the operator's and a *pause* the publisher's. Both stand beside a row's status, whatever that is, until they are
taken away. Each operation decides in one synchronous step, as in `registry`; what that means for those who wait is the
dispatcher's to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from . import views
from .directory import Directory
from .dispatch import Dispatcher
from .errors import InvalidRequest, ModelNotFound, NotFound, StoreUnavailable, TooMany
from .models import (
    LLM,
    LOCAL_OWNER,
    Alias,
    AliasView,
    Hold,
    ModelView,
    Status,
    is_llm_name,
)
from .registry import Registry
from .row import Row

__all__ = ["MAX_FALLBACKS", "Naming"]

MAX_FALLBACKS: Final = 8

#: How near a row of this status is to an answer.
_NEARNESS: Final = {Status.ACTIVE: 2, Status.HIBERNATING: 1, Status.INACTIVE: 0}


class Naming:
    """Works on a `Directory`; made by the broker."""

    def __init__(self, directory: Directory, dispatcher: Dispatcher, registry: Registry) -> None:
        self._directory = directory
        self._dispatcher = dispatcher
        self._registry = registry

    # What a name stands for ------------------------------------------------------------------------------------------

    def rows_of(self, name: str) -> list[Row]:
        """The row of this name, or the rows of the pool of this name; empty: there is neither."""
        target = self._directory.find_target(name)
        return [] if target is None else list(target.rows)

    def models(self, may_use: Callable[[str], bool]) -> list[ModelView]:
        """All that a client can name, in the order of the names, as far as `may_use` says that he may."""
        return [self.model(name) for name in filter(may_use, self.names())]

    def names(self) -> list[str]:
        """All that a client can name, in order."""
        directory = self._directory
        return sorted({*directory.rows, *directory.pools, *directory.aliases})

    def model(self, name: str) -> ModelView:
        """What a client can name so. Raises ModelNotFound."""
        alias = self._directory.aliases.get(name)
        if alias is not None:
            led_to = (row.llm for target in alias.targets for row in self.rows_of(target))
            return ModelView(name, "alias", _nearest(led_to), "", LOCAL_OWNER, alias.created_at)
        target = self._directory.find_target(name)
        if target is None:
            raise ModelNotFound
        llms = [row.llm for row in target.rows]
        if target.only is not None:
            return _view(llms[0])
        created_at = min(llm.created_at for llm in llms)
        return ModelView(name, "pool", _nearest(llms), "", target.pool.owner, created_at)

    # Aliases --------------------------------------------------------------------------------------------------------

    def alias_views(self) -> list[AliasView]:
        """All aliases by name."""
        aliases = self._directory.aliases
        return [self.alias_view(aliases[name]) for name in sorted(aliases)]

    def alias_view(self, alias: Alias) -> AliasView:
        """An alias, and whether it leads to anybody now."""
        rows = (row for target in alias.targets for row in self.rows_of(target))
        return AliasView(alias, any(views.view_llm(row).routable for row in rows))

    def put_alias_nowait(self, name: str, targets: Sequence[str]) -> Alias:
        """See `Broker.put_alias`."""
        directory = self._directory
        before = directory.aliases.get(name)
        self._check_alias(name, targets)
        if before is None:
            if directory.journal.is_overfull:
                raise StoreUnavailable
            if len(directory.aliases) >= directory.config.max_aliases:
                raise TooMany(f"A broker has at most {directory.config.max_aliases} aliases.", param="name")
        alias = Alias(name, tuple(targets), directory.clock.now() if before is None else before.created_at)
        directory.put_alias(name, alias)
        return alias

    def delete_alias_nowait(self, name: str) -> None:
        """See `Broker.delete_alias`."""
        if name not in self._directory.aliases:
            raise NotFound("There is no alias of this name.")
        self._directory.put_alias(name, None)

    def _check_alias(self, name: str, targets: Sequence[str]) -> None:
        aliases = self._directory.aliases
        if not is_llm_name(name):
            raise InvalidRequest("This is no valid name for a model.", param="name")
        if any(name in other.targets for other in aliases.values() if other.name != name):
            raise InvalidRequest(
                "Another alias leads to this name: an alias leads to rows and pools alone.", param="name"
            )
        if not targets:
            raise InvalidRequest("An alias leads to something.", param="target")
        if len(targets) > 1 + MAX_FALLBACKS:
            raise TooMany(f"An alias has at most {MAX_FALLBACKS} fallbacks.", param="fallbacks")
        for index, target in enumerate(targets):
            param = f"fallbacks[{index - 1}]" if index else "target"
            if not is_llm_name(target):
                raise InvalidRequest("This is no valid name for a model.", param=param)
            if target in targets[:index]:
                raise InvalidRequest("The same name stands twice.", param=param)
            if target != name and target in aliases:
                raise InvalidRequest("This is an alias itself: an alias leads to rows and pools alone.", param=param)

    # Holds and pauses -----------------------------------------------------------------------------------------------

    def hold_nowait(self, name: str, hold: Hold | None) -> list[str]:
        """See `Broker.hold` and `Broker.resume`. Returns the rows' names, in order."""
        rows = self.rows_of(name)
        if not rows:
            raise ModelNotFound(param="llm")
        self._change((row for row in rows if row.llm.hold != hold), hold=hold)
        return sorted(row.llm.name for row in rows)

    def pause_nowait(self, session_id: str, names: Sequence[str] | None, owner: str, *, paused: bool) -> dict[str, LLM]:
        """See `Broker.pause_session` and `Broker.resume_session`."""
        session = self._registry.find_session(session_id, owner)
        limit = self._directory.config.max_llms_per_session
        if names is not None and len(names) > limit:
            raise TooMany(f"A session has at most {limit} models.", param="llms")
        for index, name in enumerate(names or ()):
            if not is_llm_name(name):
                raise InvalidRequest("This is no valid name for a model.", param=f"llms[{index}]")
            if name not in session.rows:
                raise ModelNotFound("The session has no model of this name.", param=f"llms[{index}]")
        named = session.rows if names is None else names
        rows = [session.rows[name] for name in dict.fromkeys(named)]
        self._change((row for row in rows if row.llm.paused is not paused), paused=paused)
        return {name: session.rows[name].llm for name in sorted(session.rows)}

    def _change(self, rows: Iterable[Row], **changes: Hold | bool | None) -> None:
        changed = list(rows)
        for row in changed:
            self._directory.change_row(row, **changes)
        # Only when all are as they shall be: what one lets go must not be sent to the next.
        for row in changed:
            self._dispatcher.review(row)


def _view(llm: LLM) -> ModelView:
    return ModelView(llm.name, llm.kind.value, llm.status, llm.type, llm.owner, llm.created_at)


def _nearest(llms: Iterable[LLM]) -> Status:
    """The status that is nearest to an answer; inactive, if there is none."""
    return max((llm.status for llm in llms), key=_NEARNESS.__getitem__, default=Status.INACTIVE)
