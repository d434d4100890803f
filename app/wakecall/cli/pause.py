"""`wakecall pause`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from . import VERBS
from .common import SectionedCommand, printable
from .holding import change_hold, change_pause, listed, which_options

__all__ = ["command"]


@click.command("pause", cls=SectionedCommand, short_help=VERBS["pause"])
@which_options
def command(
    llm: str | None,
    broker: str | None,
    key: str | None,
    llms: Sequence[str],
    engine: str | None,
    session: str | None,
    as_json: bool,
) -> None:
    """Pause this machine's publisher: my GPU now. Or, as an operator, pause LLM, any model or pool of a broker.

    What is paused takes no new requests and is sent nothing more; what is in flight finishes, and what waits goes on
    waiting. Each pause lasts until whoever made it says `wakecall resume`, across restarts.
    """
    if llm is not None:
        names = [row.name for row in change_hold("pause", llm, broker, key, as_json)]
        back = f"wakecall resume {llm}"
    else:
        names = change_pause(
            "pause", broker=broker, key=key, llms=llms, engine=engine, session=session, as_json=as_json
        )
        back = "wakecall resume"
    if not names:
        said = "This publisher has no model now, so nothing is paused."
    else:
        said = f"Paused {listed(names)}: no new requests; what is in flight finishes. `{back}` takes it back."
    click.echo(printable(said), err=True)
