"""What a publisher may register: names from one stock for rows and pools, each one owner's; bounds that a row can have."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from .errors import InvalidRequest, LLMIsPublic, LLMNameTaken, TooMany
from .models import Kind, LLMSpec, Status, is_llm_name

if TYPE_CHECKING:
    from .directory import Directory
    from .row import Row

__all__ = ["check_spec", "check_specs"]

#: The largest that a row may name (protocol.md, Register).
_MAX_CONCURRENCY: Final = 100_000


def check_specs(directory: Directory, session_id: str, specs: Sequence[LLMSpec], owner: str) -> None:
    """Whether a session may have these rows, all of them.

    Args:
        directory: what there is already.
        session_id: the session's, which may be new.
        specs: what it asks for.
        owner: the session's.

    Raises:
        InvalidRequest: a name or a number is none that a row can have, or a name stands twice.
        LLMIsPublic, LLMNameTaken: a name is somebody else's.
        TooMany: they are.
    """
    limit = directory.config.max_llms_per_session
    if len(specs) > limit:
        raise TooMany(f"A session has at most {limit} models.", param="llms")
    seen: set[str] = set()
    for index, spec in enumerate(specs):
        where = f"llms[{index}].name"
        if not is_llm_name(spec.name):
            raise InvalidRequest("This is no valid name for a model.", param=where)
        if spec.name in seen:
            raise InvalidRequest("The same name stands twice.", param=where)
        check_spec(spec, f"llms[{index}]")
        seen.add(spec.name)
        _check_pool(directory, spec, f"llms[{index}]", owner)
        row = directory.rows.get(spec.name)
        if row is None:
            continue
        llm = row.llm
        if llm.kind is Kind.PUBLIC:
            raise LLMIsPublic(param=where)
        if llm.owner != owner:
            raise LLMNameTaken(param=where)
        if llm.session_id != session_id and llm.status is not Status.INACTIVE:
            raise LLMNameTaken(param=where)
    for index, spec in enumerate(specs):
        if spec.pool in seen:
            raise LLMNameTaken("A pool cannot have the name of a model.", param=f"llms[{index}].pool")
    _check_pool_sizes(directory, specs)
    fresh = sum(1 for name in seen if name not in directory.rows)
    # Rows outlive a goodbye: else sessions that come and go could fill the memory.
    directory.check_room_for(fresh, owner, "llms")


def check_spec(spec: LLMSpec, where: str) -> None:
    """Whether a row can be like this, whoever else there is. Raises InvalidRequest, whose param begins with `where`."""
    if spec.status is Status.INACTIVE:
        raise InvalidRequest("A status is active or hibernating.", param=f"{where}.status")
    if spec.max_concurrency is not None and not 1 <= spec.max_concurrency <= _MAX_CONCURRENCY:
        message = f"A concurrency is 1 to {_MAX_CONCURRENCY}; leave it out for no bound."
        raise InvalidRequest(message, param=f"{where}.max_concurrency")
    if spec.wake_s is not None and not 0 < spec.wake_s < math.inf:
        raise InvalidRequest("A wake takes some seconds.", param=f"{where}.wake_s")
    for name in ("queue_s", "first_byte_s", "idle_s", "total_s"):
        value = getattr(spec, name)
        if value is not None and not 0 < value < math.inf:
            raise InvalidRequest("A budget is some seconds.", param=f"{where}.{name}")


def _check_pool(directory: Directory, spec: LLMSpec, where: str, owner: str) -> None:
    """Rows and pools have their names from one stock, and a pool is one owner's: else whoever likes could join it, and
    be sent what its callers say."""
    if spec.name in directory.pools:
        raise LLMNameTaken("This is the name of a pool.", param=f"{where}.name")
    if spec.group is not None and not is_llm_name(spec.group):
        raise InvalidRequest("This is no valid name for a group.", param=f"{where}.group")
    if spec.pool is None:
        return
    if not is_llm_name(spec.pool):
        raise InvalidRequest("This is no valid name for a pool.", param=f"{where}.pool")
    if spec.pool in directory.rows:
        raise LLMNameTaken("A pool cannot have the name of a model.", param=f"{where}.pool")
    pool = directory.pools.get(spec.pool)
    if pool is not None and pool.owner != owner:
        raise LLMNameTaken("This pool is another owner's.", param=f"{where}.pool")


def _check_pool_sizes(directory: Directory, specs: Sequence[LLMSpec]) -> None:
    sizes: dict[str, int] = {}
    for index, spec in enumerate(specs):
        if spec.pool is None:
            continue
        pool = directory.pools.get(spec.pool)
        rows: Mapping[str, Row] = {} if pool is None else pool.rows
        size = sizes.get(spec.pool, len(rows)) + (spec.name not in rows)
        if size > directory.config.max_llms_per_pool:
            most = directory.config.max_llms_per_pool
            raise TooMany(f"A pool has at most {most} models.", param=f"llms[{index}].pool")
        sizes[spec.pool] = size
