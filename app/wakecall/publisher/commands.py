"""What starts and stops an engine, or a model in it: the user's commands, and the engine's health as the judge."""

from __future__ import annotations

from pathlib import Path

import trio

from .config import PublishedModel, PublisherConfig
from .engine import Engine
from .process import CommandFailed, cut_log, last_line, open_command


class Commands:
    """The commands of a configuration.

    Args:
        config: the commands and their times.
        engine: asked for its health.
        log: their error output.
    """

    def __init__(self, config: PublisherConfig, engine: Engine, log: Path) -> None:
        self._config = config
        self._engine = engine
        self._log = log

    @property
    def can_wake(self) -> bool:
        return self._config.wake_command is not None

    async def is_healthy(self) -> bool:
        """Whether the engine answers."""
        return await self._engine.is_healthy()

    async def bring_up(self, model: PublishedModel | None, *, always: bool = False) -> bool:
        """Return when the engine answers, and whether that took the wake command.

        Args:
            model: the one that is meant, for the command to know; None: the whole engine.
            always: run the command even if the engine answers, for it may do so with another model.

        Raises:
            CommandFailed: it failed, or there is none and the engine does not answer.
        """
        command = self._config.wake_command
        if not (always and command is not None) and await self.is_healthy():
            return False
        if command is None:
            raise CommandFailed("the engine does not answer, and its publisher has no command to wake it")
        grace_s = self._config.terminate_grace_s
        async with open_command(command, self._log, grace_s=grace_s, variables=_variables(model)) as group:
            # A server that is starting tells nobody when it is done: it has to be asked.
            while not await self.is_healthy():
                group.is_alive()
                await trio.sleep(self._config.health_interval_s)
        return True

    async def put_down(self, model: PublishedModel | None) -> str | None:
        """Run the hibernate command, if there is one, and return why it failed; `model` as in `bring_up`."""
        command = self._config.hibernate_command
        if command is None:
            return None
        grace_s = self._config.terminate_grace_s
        try:
            with trio.move_on_after(self._config.hibernate_s) as limit:
                async with open_command(command, self._log, grace_s=grace_s, variables=_variables(model)):
                    return None
        except CommandFailed as error:
            return str(error)
        assert limit.cancelled_caught
        return f"the hibernate command did not end within {self._config.hibernate_s:.0f} s"

    def overdue(self, seconds: float) -> str:
        """What to say of a wake that was given `seconds`."""
        said = last_line(self._log) if self.can_wake else None
        message = f"the engine did not answer within {seconds:.0f} s"
        return f"{message}: {said}" if said else message

    def trim_log(self) -> None:
        """Keep the commands' error output small: a daemon may write to it for months."""
        cut_log(self._log)


def _variables(model: PublishedModel | None) -> dict[str, str]:
    return {} if model is None else {"WAKECALL_LLM": model.name, "WAKECALL_MODEL": model.engine_id}
