"""`wakecall resume`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from . import VERBS
from .common import SectionedCommand, printable
from .holding import change_hold, change_pause, listed, which_options

__all__ = ["command"]


@click.command("resume", cls=SectionedCommand, short_help=VERBS["resume"])
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
    """Resume this machine's publisher. Or, as an operator, LLM, any model or pool of a broker, paused or drained.

    A publisher's pause and an operator's hold are two things: each ends only what its own side has begun.
    """
    if llm is None:
        names = change_pause(
            "resume", broker=broker, key=key, llms=llms, engine=engine, session=session, as_json=as_json
        )
        said = f"Resumed {listed(names)}." if names else "This publisher has no model now, so nothing is resumed."
    else:
        rows = change_hold("resume", llm, broker, key, as_json)
        said = f"Resumed {listed([row.name for row in rows])}." if rows else "Nothing is resumed."
        if paused := [row.name for row in rows if row.paused]:
            said += f" That their publisher has paused {listed(paused)} stays, until it says `wakecall resume`."
    click.echo(printable(said), err=True)
