"""Where keys are: at a broker that runs, or in a file that none has open. Both say the same of them."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from urllib.parse import quote

import click
import msgspec
import trio

from ..errors import NotFound, StoreUnavailable, WakecallError
from ..store import StoreError, StoreInUse
from .brokerclient import BrokerRefused, ask, no_broker
from .common import ConfigurationError, printable

if TYPE_CHECKING:
    from ..broker import Broker
    from ..models import Role

__all__ = ["BrokerKeys", "FileKeys", "Key", "Made", "NewKey", "parsed"]

T = TypeVar("T")

_PATH: Final = "/admin/v1/keys"


class Key(msgspec.Struct, kw_only=True):
    """What is shown of a key."""

    id: str
    role: str
    owner: str
    name: str = ""
    llms: list[str] | None = None
    rpm: int | None = None
    max_in_flight: int | None = None
    created_at: str | None = None
    expires_at: str | None = None
    expired: bool = False


class NewKey(Key, kw_only=True):
    """One that has just been made: `key` is the key itself."""

    key: str


class Made(NamedTuple):
    """A new key, and whether the broker was open before it."""

    key: NewKey
    is_first: bool


def parsed(data: list[dict[str, Any]]) -> list[Key]:
    """A listing's keys. Raises msgspec.MsgspecError: these are none."""
    return msgspec.convert(data, list[Key])


class BrokerKeys:
    """Those of a running broker. Each method raises `click.ClickException`.

    Args:
        url: its address.
        key: of role admin; None: it is open.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self._url = url
        self._key = key

    def listing(self) -> tuple[list[dict[str, Any]], datetime]:
        """All keys as the API has them, and the time by which they expire."""
        answer = self._ask()
        try:
            data = json.loads(answer.body)["data"]
            parsed(data)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise click.ClickException(no_broker(self._url)) from error
        return data, answer.now

    def create(self, role: Role, settings: dict[str, Any]) -> Made:
        """Make one, with the members that the API takes."""
        answer = self._ask(method="POST", said={"role": role, **settings})
        try:
            made = msgspec.json.decode(answer.body, type=NewKey)
        except msgspec.MsgspecError as error:
            raise click.ClickException(no_broker(self._url)) from error
        # Whoever has no key of role admin can do this at an open broker alone.
        return Made(made, is_first=self._key is None)

    def revoke(self, key_id: str) -> list[Key]:
        """Revoke one. Returns all that there were."""
        data, _ = self.listing()
        # Not looked for in the list: whether it is there is the broker's to say.
        ask(self._url, f"{_PATH}/{quote(key_id, safe='')}", key=self._key, method="DELETE")
        return parsed(data)

    def _ask(self, **request: Any) -> Any:
        try:
            return ask(self._url, _PATH, key=self._key, **request)
        except BrokerRefused as error:
            if error.status == 404 and error.code:
                raise click.ClickException("This broker is of a version that has no keys.") from error
            raise


class FileKeys:
    """Those in a database that no broker has open. Each method raises `click.ClickException`.

    Args:
        path: its file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def listing(self) -> tuple[list[dict[str, Any]], datetime]:
        async def look(broker: Broker) -> tuple[list[dict[str, Any]], datetime]:
            return _described(broker), datetime.fromtimestamp(broker.now(), UTC)

        return self._do(look)

    def create(self, role: Role, settings: dict[str, Any]) -> Made:
        from ..http.shown import describe_key
        from ..models import KeyView

        async def make(broker: Broker) -> Made:
            was_open = broker.is_open
            made = await broker.create_key(role, **settings)
            described: dict[str, Any] = msgspec.to_builtins(describe_key(KeyView(made.key, 0, expired=False)))
            return Made(msgspec.convert({**described, "key": made.secret}, NewKey), was_open)

        return self._do(make, create=True)

    def revoke(self, key_id: str) -> list[Key]:
        async def end(broker: Broker) -> list[Key]:
            were = parsed(_described(broker))
            await broker.revoke_key(key_id)
            return were

        return self._do(end)

    def _do(self, work: Callable[[Broker], Awaitable[T]], *, create: bool = False) -> T:
        if not create and not os.path.exists(self.path):
            raise ConfigurationError(f"{printable(self.path)} is not there: `wakecall keys create` makes it.")

        async def run() -> T:
            async with self._open() as broker:
                return await work(broker)

        try:
            return trio.run(run)
        except (NotFound, StoreUnavailable) as error:
            raise click.ClickException(printable(str(error))) from error
        except WakecallError as error:
            raise ConfigurationError(printable(str(error))) from error

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[Broker]:
        """A broker on the file, which nobody calls."""
        from ..broker import open_broker
        from ..store.sqlite import open_sqlite_store

        try:
            async with open_sqlite_store(self.path) as store, open_broker(store) as broker:
                yield broker
        except StoreInUse as error:
            raise ConfigurationError(
                f"A broker has {printable(self.path)} open, so its keys are made and revoked there: name it with"
                " --broker, and have a key of role admin in WAKECALL_KEY."
            ) from error
        except StoreError as error:
            raise ConfigurationError(printable(str(error))) from error


def _described(broker: Broker) -> list[dict[str, Any]]:
    from ..http.shown import describe_key

    # As JSON would have them: patterns are a list there.
    described: list[dict[str, Any]] = msgspec.to_builtins([describe_key(view) for view in broker.key_views()])
    return described
