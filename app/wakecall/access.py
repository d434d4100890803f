"""Keys come, go and expire, and what is one owner's becomes another's: what that does to sessions and rows.

Each operation decides in one synchronous step, as in `registry`, through whose ways of ending a session and a channel it
goes. What a key may do in a single call is `keyring`'s.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Final

import trio

from .deadlines import Deadline
from .directory import Directory
from .dispatch import Dispatcher
from .errors import InvalidRequest, ModelNotFound, NotFound, SessionNotFound, StoreUnavailable, TooMany
from .keyring import is_expired
from .keys import ENTROPY_BYTES, MAX_PATTERNS, ROLES, digest_of, format_key, is_owner, is_pattern
from .lifecycle import RowEvent
from .models import Key, KeyEvent, KeyView, Kind, NewKey, Role
from .registry import Registry

__all__ = ["LONGEST_KEY_S", "MAX_KEY_NAME_CHARS", "MOST_OF_A_LIMIT", "Access"]

MAX_KEY_NAME_CHARS: Final = 128
MOST_OF_A_LIMIT: Final = 1_000_000
LONGEST_KEY_S: Final = 100 * 366 * 86_400.0


class Access:
    """Works on a `Directory`; made by the broker."""

    def __init__(self, directory: Directory, dispatcher: Dispatcher, registry: Registry) -> None:
        self._directory = directory
        self._dispatcher = dispatcher
        self._registry = registry
        self._config = directory.config
        self._expiries: dict[str, Deadline] = {}  # of publishers' keys, by their ids

    # Keys -----------------------------------------------------------------------------------------------------------

    def load(self) -> None:
        """Once the directory is loaded: watch the keys that will expire, and end what those that are gone have left."""
        directory, now = self._directory, self._directory.clock.now()
        valid = set()
        for caller in directory.keyring.callers.values():
            assert caller.key is not None
            if not is_expired(caller.key, now):
                valid.add(caller.key.key_id)
                self._watch(caller.key)
        for session in list(directory.sessions.values()):
            if session.record.key_id is not None and session.record.key_id not in valid:
                self._registry.remove_session_nowait(session, "evicted")

    def close(self) -> None:
        """The broker closes: an expiry during its last commit would decide after everything has ended."""
        for expiry in self._expiries.values():
            self._directory.waiting_deadlines.disarm(expiry)
        self._expiries.clear()

    def create_nowait(
        self,
        role: Role,
        name: str,
        owner: str | None,
        llms: Sequence[str] | None,
        rpm: int | None,
        max_in_flight: int | None,
        expires_in_s: float | None,
    ) -> NewKey:
        """See `Broker.create_key`."""
        directory, now = self._directory, self._directory.clock.now()
        if directory.journal.is_overfull:
            raise StoreUnavailable
        _check(role, name, owner, llms, rpm, max_in_flight, expires_in_s)
        if len(directory.keyring.callers) >= self._config.max_keys:
            raise TooMany(f"A broker has at most {self._config.max_keys} keys. Revoke some.")
        secret = format_key(role, secrets.token_bytes(ENTROPY_BYTES))
        key_id = f"key_{secrets.token_hex(8)}"
        key = Key(
            key_id,
            role,
            owner or key_id,
            digest_of(secret),
            created_at=now,
            name=name,
            expires_at=None if expires_in_s is None else now + expires_in_s,
            llms=None if llms is None else tuple(llms),
            rpm=rpm,
            max_in_flight=max_in_flight,
        )
        directory.add_key(key)
        self._watch(key)
        directory.notify(KeyEvent("created", key_id, role, key.owner))
        return NewKey(key, secret)

    def revoke_nowait(self, key_id: str) -> None:
        """See `Broker.revoke_key`."""
        if key_id not in self._directory.keyring.callers:
            raise NotFound("There is no key of this id.")
        key = self._directory.remove_key(key_id).key
        assert key is not None
        if (expiry := self._expiries.pop(key_id, None)) is not None:
            self._directory.waiting_deadlines.disarm(expiry)
        self._end_sessions_of(key)
        self._directory.notify(KeyEvent("revoked", key_id, key.role, key.owner))

    def require_keys_nowait(self) -> None:
        """From now on a key is needed. A channel opened without one ends: its publisher comes back, and hears why."""
        if not self._directory.keyring.is_open:
            return
        self._directory.keyring.close()
        for session in list(self._directory.sessions.values()):
            for channel in (session.pending, session.channel):
                if channel is None:
                    continue
                if channel.needs_open:
                    self._registry.end_channel(channel, "stale")
                elif channel.results is not None and channel.results.needs_open:
                    channel.results.end()

    def view(self) -> list[KeyView]:
        """All keys, oldest first."""
        now = self._directory.clock.now()
        views = []
        for caller in self._directory.keyring.callers.values():
            assert caller.key is not None
            views.append(KeyView(caller.key, caller.in_flight, is_expired(caller.key, now)))
        return sorted(views, key=lambda view: (view.key.created_at, view.key.key_id))

    def _watch(self, key: Key) -> None:
        """A publisher's key that expires takes its sessions with it, at that moment. Others just open nothing any more."""
        if key.role != "publisher" or key.expires_at is None:
            return
        expiry = self._expiries[key.key_id] = Deadline(partial(self._expire, key))
        left_s = key.expires_at - self._directory.clock.now()
        self._directory.waiting_deadlines.arm(expiry, trio.current_time() + left_s)

    def _expire(self, key: Key) -> None:
        del self._expiries[key.key_id]
        self._end_sessions_of(key)
        self._directory.notify(KeyEvent("expired", key.key_id, key.role, key.owner))

    def _end_sessions_of(self, key: Key) -> None:
        """End the sessions that this key registered last, and every channel that it opened on another's."""
        if key.role != "publisher":
            return
        for session in list(self._directory.sessions.values()):
            if session.record.key_id == key.key_id:
                self._registry.remove_session_nowait(session, "evicted")
                continue
            for channel in (session.pending, session.channel):
                if channel is None:
                    continue
                if channel.key_id == key.key_id:
                    self._registry.end_channel(channel, "evicted")
                elif channel.results is not None and channel.results.key_id == key.key_id:
                    channel.results.end()

    # Owners ---------------------------------------------------------------------------------------------------------

    def hand_over_session_nowait(self, session_id: str, owner: str) -> None:
        """See `Broker.hand_over_session`."""
        directory = self._directory
        session = directory.sessions.get(session_id)
        if session is None:
            raise SessionNotFound
        _check_owner(owner)
        if session.record.owner == owner:
            return
        if directory.owned.get(owner, 0) >= self._config.max_sessions_per_owner:
            raise TooMany(f"An owner has at most {self._config.max_sessions_per_owner} sessions.", param="owner")
        directory.check_room_for(len(session.rows), owner, "owner")
        # Whoever holds the channel holds it for the old owner.
        for channel in (session.pending, session.channel):
            if channel is not None:
                self._registry.end_channel(channel, "evicted")
        pools = {id(row.pool): row.pool for row in session.rows.values()}
        directory.hand_over_session(session, owner)
        for pool in pools.values():
            self._dispatcher.row_is_gone(pool)

    def hand_over_llm_nowait(self, name: str, owner: str) -> None:
        """See `Broker.hand_over_llm`."""
        directory = self._directory
        row = directory.rows.get(name)
        if row is None:
            raise ModelNotFound
        _check_owner(owner)
        if row.llm.owner == owner:
            return
        if row.llm.kind is Kind.VIRTUAL:
            directory.check_room_for(1, owner, "owner")
            # Also what was sent: else the old owner's answers would hold the new one's slots.
            pool = row.pool
            self._dispatcher.fail_row(row, "The model was handed over while it worked on this request.")
            self._dispatcher.step(row, RowEvent.WITHDRAWN)
            directory.detach_row(row)
            directory.hand_over_row(row, owner)
            self._dispatcher.row_is_gone(pool)
            return
        directory.hand_over_row(row, owner)


def _check_owner(owner: str) -> None:
    if not is_owner(owner):
        raise InvalidRequest(
            "An owner is 1 to 128 of A-Z a-z 0-9 . _ : @ -, and begins with a letter or a digit.", param="owner"
        )


def _check(
    role: Role,
    name: str,
    owner: str | None,
    llms: Sequence[str] | None,
    rpm: int | None,
    max_in_flight: int | None,
    expires_in_s: float | None,
) -> None:
    """What is asked of a new key. Raises InvalidRequest, TooMany."""
    if role not in ROLES:
        raise InvalidRequest(f"A role is one of {', '.join(ROLES)}.", param="role")
    if len(name) > MAX_KEY_NAME_CHARS:
        raise InvalidRequest(f"A key's name is at most {MAX_KEY_NAME_CHARS} characters long.", param="name")
    if owner is not None:
        _check_owner(owner)
    if llms is not None:
        if role not in ("client", "publisher"):
            raise InvalidRequest("Only a client's or a publisher's key is bound to models.", param="llms")
        if not llms:
            raise InvalidRequest("Without any model a key opens nothing: leave `llms` out for all.", param="llms")
        if len(llms) > MAX_PATTERNS:
            raise TooMany(f"A key has at most {MAX_PATTERNS} patterns.", param="llms")
        for index, pattern in enumerate(llms):
            if not is_pattern(pattern):
                raise InvalidRequest("This is no name and no pattern of names.", param=f"llms[{index}]")
    for param, bound in (("rpm", rpm), ("max_in_flight", max_in_flight)):
        if bound is None:
            continue
        if role != "client":
            raise InvalidRequest("Only a client's key has such a limit.", param=param)
        if not 1 <= bound <= MOST_OF_A_LIMIT:
            raise InvalidRequest(f"A limit is 1 to {MOST_OF_A_LIMIT}; leave it out for none.", param=param)
    if expires_in_s is not None and not (0 < expires_in_s <= LONGEST_KEY_S and math.isfinite(expires_in_s)):
        raise InvalidRequest("A key lives for some time, and at most a hundred years.", param="expires_in_s")
