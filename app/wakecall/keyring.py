"""Who may call: the keys there are, in memory, and what each of their holders has under way.

A broker without keys is *open*: whoever calls is `anybody`. With the first key it is closed, and stays so, whatever is
revoked: a broker must not open by itself. Nothing here awaits anything, so no request waits for the disk to know its caller.
"""

from __future__ import annotations

import hmac
from types import TracebackType
from typing import Final

from .errors import InvalidApiKey, RateLimitExceeded
from .keys import ROLES, digest_of, matcher_of, roles_held_by
from .limits import RateState, RequestRate
from .models import LOCAL_OWNER, MAX_NAME_LENGTH, Key, Role

__all__ = ["Caller", "Claim", "Keyring"]


class Caller:
    """Somebody who calls, known by his key, or by there being none. Made by `Broker.authenticate`.

    Attributes:
        key: his; None while the broker is open.
        owner: whose sessions, names and tasks are his.
        roles: which paths he may use.
        in_flight: calls of his that are under way.
        waiting: infers of his that wait for a slot or a wake.
    """

    __slots__ = ("_matches", "_rate", "in_flight", "key", "owner", "roles", "waiting")

    def __init__(self, key: Key | None) -> None:
        self.key: Final = key
        self.owner: Final = LOCAL_OWNER if key is None else key.owner
        self.roles: Final[frozenset[Role]] = frozenset(ROLES) if key is None else roles_held_by(key.role)
        self.in_flight = 0
        self.waiting = 0
        self._matches = None if key is None or key.llms is None else matcher_of(key.llms)
        self._rate = None if key is None or key.rpm is None else RequestRate(key.rpm)

    @property
    def key_id(self) -> str | None:
        return None if self.key is None else self.key.key_id

    def may_use(self, name: str) -> bool:
        """Whether a model of this name is one for him."""
        # What is longer than any name matches nothing: to look through it for a pattern could take seconds.
        return self._matches is None or (len(name) <= MAX_NAME_LENGTH and self._matches(name))

    def claim(self, now: float) -> Claim:
        """Begin a call of his, as far as his key's limits go.

        Args:
            now: seconds, by any clock that only grows.

        Raises:
            RateLimitExceeded: he has as many calls under way as he may, or has made as many in the last minute.
        """
        most = None if self.key is None else self.key.max_in_flight
        if most is not None and self.in_flight >= most:
            # First, for it costs nothing of the rate.
            raise RateLimitExceeded(
                f"This key may have {most} requests under way at a time.",
                retry_after_s=1.0,
                rate=None if self._rate is None else self._rate.look(now),
            )
        rate = None if self._rate is None else self._rate.take(now)
        if rate is not None and not rate.allowed:
            raise RateLimitExceeded(
                f"This key may make {rate.limit} requests a minute.", retry_after_s=rate.retry_after_s, rate=rate
            )
        return Claim(self, rate)


class Claim:
    """A call that counts against its caller's limits, from its beginning until it is released.

    Hold it in a `with` block; an infer that is accepted with it takes it over, and releases it with its outcome.

    Attributes:
        caller: whose.
        rate: how his rate stands; None: there is no bound to it.
    """

    __slots__ = ("_held", "_taken_over", "caller", "rate")

    def __init__(self, caller: Caller, rate: RateState | None) -> None:
        self.caller: Final = caller
        self.rate: Final = rate
        self._taken_over = False
        self._held = True
        caller.in_flight += 1

    def take_over(self) -> None:
        """An infer holds it from now on. Raises RuntimeError: one does already, or the call is over."""
        if self._taken_over or not self._held:
            raise RuntimeError("a claim is for one call, and not for one after its end")
        self._taken_over = True

    def release(self) -> None:
        """The call is over. Idempotent."""
        if self._held:
            self._held = False
            self.caller.in_flight -= 1

    def __enter__(self) -> Claim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._taken_over:
            self.release()


class Keyring:
    """The entire state of who may call: the callers by their keys' ids and digests, and whether a key is needed."""

    def __init__(self) -> None:
        self.callers: dict[str, Caller] = {}
        self._by_digest: dict[str, Caller] = {}
        self.anybody: Final = Caller(None)
        self.is_open = True

    def add(self, key: Key) -> Caller:
        """A key that was not there."""
        caller = self.callers[key.key_id] = self._by_digest[key.digest] = Caller(key)
        return caller

    def close(self) -> None:
        """From now on a key is needed."""
        self.is_open = False

    def remove(self, key_id: str) -> Caller:
        """A key that is there is no more. Raises KeyError: it is not there."""
        caller = self.callers.pop(key_id)
        assert caller.key is not None
        del self._by_digest[caller.key.digest]
        return caller

    def find(self, secret: str | None, now: float) -> Caller:
        """Who presents this key.

        Looked up by the digest of the whole key, which tells nothing of how much of a wrong one is right, and compared
        once more in a time that does not depend on where they differ.

        Args:
            secret: the key; None: none was presented.
            now: seconds since the epoch.

        Raises:
            InvalidApiKey: there is none, it is unknown, or its time is over.
        """
        if self.is_open:
            return self.anybody
        if secret is None:
            raise InvalidApiKey(
                "This broker wants an API key: send it as `Authorization: Bearer KEY` or `x-api-key: KEY`."
            )
        digest = digest_of(secret)
        caller = self._by_digest.get(digest)
        if caller is None or caller.key is None or not hmac.compare_digest(caller.key.digest, digest):
            raise InvalidApiKey("This API key is not known here, or has been revoked.")
        if is_expired(caller.key, now):
            raise InvalidApiKey("This API key has expired.")
        return caller

    def check(self, caller: Caller, now: float) -> None:
        """Whether somebody who was found a while ago would be found now.

        Raises:
            InvalidApiKey: his key has been revoked or has expired since, or he had none and needs one now.
        """
        if caller.key is None:
            if not self.is_open:
                raise InvalidApiKey("This broker wants an API key now.")
        elif self.callers.get(caller.key.key_id) is not caller:
            raise InvalidApiKey("This API key has been revoked.")
        elif is_expired(caller.key, now):
            raise InvalidApiKey("This API key has expired.")


def is_expired(key: Key, now: float) -> bool:
    """Whether a key's time is over at `now` (seconds since the epoch)."""
    return key.expires_at is not None and key.expires_at <= now
