"""What a register says, and what its refusal means."""

from __future__ import annotations

from collections.abc import Iterable

from .config import AnnouncedStatus, PublishedModel, PublisherConfig
from .errors import KeyRefused, NameTaken, PublisherError, RegistrationRefused
from .wire import BrokerRefused, Row


def rows_to_register(config: PublisherConfig, models: Iterable[PublishedModel], status: AnnouncedStatus) -> list[Row]:
    """The rows of a register; all of them have the status of their one engine."""
    return [
        Row(
            name=model.name,
            type=config.type,
            model=model.engine_id if model.engine_id != model.name else None,
            status=status,
            max_concurrency=config.max_concurrency,
            wake_s=config.wake_s,
            cancel=config.cancel,
        )
        for model in models
    ]


def fatal_error(error: BrokerRefused) -> PublisherError | None:
    """What a refused register means for the publisher; None if trying again may help."""
    if error.status in (401, 403):
        return KeyRefused(f"the broker refuses the key: {error.message}")
    if error.status == 409:
        return NameTaken(f"the broker refuses the registration: {error.message}")
    if 400 <= error.status < 500 and error.status not in (408, 429):
        return RegistrationRefused(f"the broker refuses the registration: {error}")
    return None
