"""What operators call."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from . import views
from .core import Core
from .errors import NotFound, SessionNotFound
from .ledger import Usage, UsageBy
from .models import (
    AliasView,
    Hold,
    KeyView,
    LLMSpec,
    LLMView,
    NewKey,
    PoolView,
    Role,
    SessionView,
    SweepReport,
    TaskView,
)

__all__ = ["Operating"]


class Operating(Core):
    """Keys, usage, rows, names, sessions and owners, as operators see and change them."""

    # Keys -----------------------------------------------------------------------------------------------------------

    def key_views(self) -> list[KeyView]:
        """All keys, oldest first, expired ones too. The keys themselves nobody has but their holders."""
        return self._access.view()

    async def create_key(
        self,
        role: Role,
        *,
        name: str = "",
        owner: str | None = None,
        llms: Sequence[str] | None = None,
        rpm: int | None = None,
        max_in_flight: int | None = None,
        expires_in_s: float | None = None,
    ) -> NewKey:
        """Make a key. With the first one the broker is no longer open.

        Args:
            role: `client`, `publisher`, `admin` or `monitor`.
            name: for people.
            owner: whose sessions, names and tasks its holder's are; None: the key's own id.
            llms: patterns of the names that a client may use or a publisher may register (`*`: any characters); None: all.
            rpm: a client's requests a minute; None: no bound.
            max_in_flight: a client's requests at a time; None: no bound.
            expires_in_s: seconds that it lives; None: until it is revoked.

        Raises:
            InvalidRequest, TooMany: what is asked cannot be.
            StoreUnavailable: there is no such key, for it could not be kept.
            NotFound: somebody revoked it before it was made.
        """
        made = self._access.create_nowait(role, name, owner, llms, rpm, max_in_flight, expires_in_s)
        kept = False
        try:
            await self._journal.commit().wait()
            kept = True
        finally:
            if not kept:
                # Whoever asked does not get it, be it for the store or because he left, so nobody shall have it.
                with suppress(NotFound):
                    self._access.revoke_nowait(made.key.key_id)
        if made.key.key_id not in self._directory.keyring.callers:
            raise NotFound("The key was revoked before it was made.")
        self._access.require_keys_nowait()
        return made

    async def revoke_key(self, key_id: str) -> None:
        """Delete a key: the next request with it is refused, and a publisher's sessions and channels end now.

        Infers that a client's key has under way go on.

        Raises:
            NotFound: there is none.
            StoreUnavailable: it is revoked, but that is not committed yet.
        """
        self._access.revoke_nowait(key_id)
        await self._journal.commit().wait()

    # Usage ----------------------------------------------------------------------------------------------------------

    async def usage(self, by: UsageBy, since: float) -> dict[str, Usage]:
        """What was used from the hour on in which an instant is, up to now.

        Args:
            by: what it is summed by.
            since: seconds since the epoch.

        Returns:
            The sums by the keys' ids (empty: no key was needed), those of revoked ones too, or by the LLMs' names.
            `ledger.OTHERS` stands for what was one too many for `max_usage_cells`.

        Raises:
            StoreUnavailable: it cannot be written or read.
        """
        return await self._accounting.read(by, since)

    # Rows and sessions ----------------------------------------------------------------------------------------------

    def llm_views(self) -> list[LLMView]:
        """All rows by name, at work."""
        rows = self._directory.rows
        return [views.view_llm(rows[name]) for name in sorted(rows)]

    def llm_view(self, name: str) -> LLMView:
        """One row, at work. Raises ModelNotFound."""
        return views.view_llm(self._find_row(name))

    def pool_views(self) -> list[PoolView]:
        """All pools by name."""
        pools = self._directory.pools
        return [views.view_pool(pools[name]) for name in sorted(pools)]

    def session_views(self) -> list[SessionView]:
        """All sessions by id."""
        sessions = self._directory.sessions
        return [views.view_session(sessions[session_id]) for session_id in sorted(sessions)]

    def task_views(self) -> list[TaskView]:
        """All infers and wakes under way: those sent, then those that wait, oldest first."""
        return views.view_tasks(self._directory, self._dispatcher.placer.places())

    async def put_public_llm(
        self,
        name: str,
        *,
        type: str,
        model: str,
        url: str,
        key_env: str | None = None,
        max_concurrency: int | None = None,
        queue_s: float | None = None,
        first_byte_s: float | None = None,
        idle_s: float | None = None,
        total_s: float | None = None,
    ) -> LLMView:
        """Make or change an operator's own row, which publishers cannot touch and no sweep does.

        What is under way goes on as it began. Without an `Upstream` (see `open_broker`) it is offline.

        Args:
            name: what clients ask for.
            type: the upstream's kind; `anthropic` is told its key as Anthropic's API wants it, all others as OpenAI's does.
            model: the upstream's own id.
            url: where the upstream is, with or without `/v1`.
            key_env: the environment variable that holds its key, `WAKECALL_UPSTREAM_…`; None: it wants none.
            max_concurrency: infers at a time; None: no bound.
            queue_s, first_byte_s, idle_s, total_s: its own budgets; None: the broker's.

        Raises:
            InvalidRequest: that is no name, or no bound.
            LLMIsVirtual, LLMNameTaken: it is a publisher's, or a pool's.
            StoreUnavailable: it is there, but not committed yet.
        """
        spec = LLMSpec(
            name,
            type=type,
            model=model,
            max_concurrency=max_concurrency,
            queue_s=queue_s,
            first_byte_s=first_byte_s,
            idle_s=idle_s,
            total_s=total_s,
        )
        self._registry.put_public_nowait(spec, url, key_env)
        await self._journal.commit().wait()
        return self.llm_view(name)

    async def delete_llm(self, name: str) -> None:
        """Delete a row of any kind; its infers fail. Raises ModelNotFound, StoreUnavailable."""
        self._registry.delete_llm_nowait(name)
        await self._journal.commit().wait()

    async def hold(self, name: str, hold: Hold) -> list[LLMView]:
        """Keep new infers from a row, or from all rows of a pool, until `resume`. What is in flight finishes.

        It stands beside the status, and no register, heartbeat or restart takes it away.

        Args:
            name: the row's or the pool's; aliases are not followed.
            hold: `drain`: what waits for the row by name is still served. `pause`: nothing more is sent.

        Returns:
            The rows, by name.

        Raises:
            ModelNotFound: there is neither.
            StoreUnavailable: it is held, but that is not committed yet.
        """
        return await self._set_hold(name, hold)

    async def resume(self, name: str) -> list[LLMView]:
        """Take the operator's hold from a row or a pool's rows; a publisher's own pause stays. As `hold`."""
        return await self._set_hold(name, None)

    async def _set_hold(self, name: str, hold: Hold | None) -> list[LLMView]:
        names = self._naming.hold_nowait(name, hold)
        await self._journal.commit().wait()
        rows = self._directory.rows
        return [views.view_llm(rows[each]) for each in names if each in rows]

    # Names ----------------------------------------------------------------------------------------------------------

    def alias_views(self) -> list[AliasView]:
        """All aliases by name."""
        return self._naming.alias_views()

    async def put_alias(self, name: str, targets: Sequence[str]) -> AliasView:
        """Make or change an alias. It comes before a row or pool of its name.

        Args:
            name: what clients ask for.
            targets: names of rows and pools, each once: what it leads to, then at most eight fallbacks in their order. One
                that is not there yet may come. An alias's own name means the row or pool of that name.

        Raises:
            InvalidRequest, TooMany: what is asked cannot be.
            StoreUnavailable: it is there, but not committed yet; or it is new, and the store is too far behind.
        """
        alias = self._naming.put_alias_nowait(name, targets)
        await self._journal.commit().wait()
        return self._naming.alias_view(alias)

    async def delete_alias(self, name: str) -> None:
        """Delete an alias; what waits goes on. Raises NotFound, StoreUnavailable."""
        self._naming.delete_alias_nowait(name)
        await self._journal.commit().wait()

    # Owners and ends ------------------------------------------------------------------------------------------------

    async def hand_over_session(self, session_id: str, owner: str) -> SessionView:
        """Make a session, with its rows, another owner's. Its channel ends: whoever holds it is not the new owner.

        Raises:
            SessionNotFound: there is none.
            InvalidRequest, TooMany: that is no owner, or one who has as much as he may.
            StoreUnavailable: it is done, but not committed yet.
        """
        self._access.hand_over_session_nowait(session_id, owner)
        await self._journal.commit().wait()
        session = self._directory.sessions.get(session_id)
        if session is None:
            raise SessionNotFound  # it went while this was committed
        return views.view_session(session)

    async def hand_over_llm(self, name: str, owner: str) -> LLMView:
        """Make a row another owner's. A virtual one is withdrawn from its session; its new owner's next register adopts it.

        Raises:
            ModelNotFound: there is none.
            InvalidRequest, TooMany: that is no owner, or one who has as much as he may.
            StoreUnavailable: it is done, but not committed yet.
        """
        self._access.hand_over_llm_nowait(name, owner)
        await self._journal.commit().wait()
        return self.llm_view(name)

    async def evict(self, session_id: str) -> None:
        """End a session as goodbye does, but its publisher is told not to come back. Raises SessionNotFound."""
        session = self._directory.sessions.get(session_id)
        if session is None:
            raise SessionNotFound
        self._registry.remove_session_nowait(session, "evicted")
        await self._journal.commit().wait()

    async def sweep(self) -> SweepReport:
        """One pass: rows without a heartbeat go inactive, those inactive for long are deleted. Idempotent.

        Raises:
            StoreUnavailable: it is done, but not committed yet.
        """
        report = await self._registry.sweep()
        if report.inactivated or report.deleted:
            await self._journal.commit().wait()
        return report
