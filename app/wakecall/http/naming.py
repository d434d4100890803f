"""`/admin/v1`: what operators say of names (aliases, pools), and what they hold back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, Final

import msgspec

from ..broker import Broker
from ..errors import ModelNotFound, NotFound, StoreUnavailable
from ..models import AliasView, LLMView, PoolView
from ..naming import MAX_FALLBACKS
from .admin import LLMList, describe_llm
from .answers import Answer, json_answer, no_content
from .calls import Call
from .routes import Routes
from .shown import Name

__all__ = ["add_naming_routes"]

_ALIAS: Final = "/admin/v1/aliases/<path:name>"

_Handler = Callable[..., Awaitable[Answer]]


class Held(msgspec.Struct, frozen=True):
    """A row's name, or a pool's for all its rows."""

    llm: Annotated[str, Name]


class NewAlias(msgspec.Struct, frozen=True):
    """What an alias leads to: rows and pools, there already or not, each once; never another alias."""

    target: Annotated[str, Name]
    fallbacks: (
        Annotated[
            list[Annotated[str, Name]],
            msgspec.Meta(
                description="Tried in this order when the target is offline, full, or has refused the infer itself.",
                extra_json_schema={"maxItems": MAX_FALLBACKS, "uniqueItems": True},
            ),
        ]
        | None
    ) = None


class Alias(msgspec.Struct, frozen=True):
    """An alias. `routable`: one of the rows that it leads to could take an infer."""

    name: Annotated[str, Name]
    target: Annotated[str, Name]
    fallbacks: tuple[Annotated[str, Name], ...]
    routable: bool


class AliasList(msgspec.Struct, frozen=True):
    """Aliases by name."""

    data: list[Alias]


class Pool(msgspec.Struct, frozen=True):
    """A pool, its rows, and how many infers wait for any of them."""

    name: Annotated[str, Name]
    owner: str
    llms: tuple[Annotated[str, Name], ...]
    waiting: int


class PoolList(msgspec.Struct, frozen=True):
    """Pools by name."""

    data: list[Pool]


def add_naming_routes(routes: Routes, broker: Broker) -> None:
    """Put these routes of operators there."""

    def add_hold(path: str) -> Callable[[_Handler], _Handler]:
        return routes.add(
            "POST", path, role="admin", body=Held, answer=LLMList, errors=(ModelNotFound, StoreUnavailable)
        )

    @add_hold("/admin/v1/drain")
    async def drain(call: Call, said: Held) -> Answer:
        """Keep new infers from a row or a pool; those that wait for it by name are still served."""
        return _llms(await broker.hold(said.llm, "drain"))

    @add_hold("/admin/v1/pause")
    async def pause(call: Call, said: Held) -> Answer:
        """Send nothing more to a row or a pool: new infers are refused, those that wait stay."""
        return _llms(await broker.hold(said.llm, "pause"))

    @add_hold("/admin/v1/resume")
    async def resume(call: Call, said: Held) -> Answer:
        """Take a drain or a pause from a row or a pool."""
        return _llms(await broker.resume(said.llm))

    @routes.add("GET", "/admin/v1/aliases", role="admin", answer=AliasList)
    async def list_aliases(call: Call) -> Answer:
        """List all aliases."""
        return json_answer(AliasList([_alias(view) for view in broker.alias_views()]))

    @routes.add("PUT", _ALIAS, role="admin", body=NewAlias, answer=Alias, errors=(StoreUnavailable,))
    async def put_alias(call: Call, name: str, said: NewAlias) -> Answer:
        """Make or change an alias."""
        return json_answer(_alias(await broker.put_alias(name, [said.target, *(said.fallbacks or ())])))

    @routes.add("DELETE", _ALIAS, role="admin", answer=None, errors=(NotFound, StoreUnavailable))
    async def delete_alias(call: Call, name: str) -> Answer:
        """Delete an alias."""
        await broker.delete_alias(name)
        return no_content()

    @routes.add("GET", "/admin/v1/pools", role="admin", answer=PoolList)
    async def list_pools(call: Call) -> Answer:
        """List all pools."""
        return json_answer(PoolList([_pool(view) for view in broker.pool_views()]))


def _llms(views: list[LLMView]) -> Answer:
    return json_answer(LLMList([describe_llm(view) for view in views]))


def _alias(view: AliasView) -> Alias:
    target, *fallbacks = view.alias.targets
    return Alias(view.alias.name, target, tuple(fallbacks), view.routable)


def _pool(view: PoolView) -> Pool:
    return Pool(view.name, view.owner, view.llms, view.waiting)
