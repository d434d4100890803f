"""What can end or refuse a publisher, each with a message for a person and the exit code a command line should give."""

from __future__ import annotations

from typing import ClassVar


class PublisherError(Exception):
    """The publisher cannot start or cannot go on. `str(error)` is for a person; `exit_code` follows sysexits.h."""

    exit_code: ClassVar[int] = 1


class InvalidConfig(PublisherError):
    """A setting is wrong, or two settings do not go together."""

    exit_code = 78


class StateLocked(PublisherError):
    """Another publisher on this machine holds this session's state file."""

    exit_code = 78


class StateUnusable(PublisherError):
    """The state file or its directory cannot be read or written."""

    exit_code = 78


class EngineUnreachable(PublisherError):
    """The engine does not answer, and it is needed at once: to learn which models it has."""


class AmbiguousNames(PublisherError):
    """Two of the engine's models would be published under one name, or one under none."""

    exit_code = 78


class KeyRefused(PublisherError):
    """The broker refuses the publisher's key, or that it has none (401 or 403).

    Args:
        message: for a person.
        code: the protocol's; empty if the answer was not in its form.
        name: of the model that the key does not open; None if it is not about one.
        member: of its entry, such as `pool`; empty if it is about no single one.
    """

    exit_code = 78

    def __init__(self, message: str, *, code: str = "", name: str | None = None, member: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.name = name
        self.member = member


class RegistrationRefused(PublisherError):
    """The broker refuses to register the rows; trying again would not help.

    Args:
        message: for a person; it names the model, if it is about one.
        code: the protocol's, such as `too_many`; empty if the answer was not in its form.
        name: of the model that is at fault; None if it is not one.
        member: of its entry that is, such as `name` or `pool`; empty if it is about no single one.
    """

    def __init__(self, message: str, *, code: str = "", name: str | None = None, member: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.name = name
        self.member = member


class NameTaken(RegistrationRefused):
    """A name or the session id belongs to somebody else (409 on register)."""
