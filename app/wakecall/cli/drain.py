"""`wakecall drain`."""

from __future__ import annotations

import click

from . import VERBS
from .common import SectionedCommand, broker_option, key_option, printable
from .holding import change_hold, json_option, listed

__all__ = ["command"]


@click.command("drain", cls=SectionedCommand, short_help=VERBS["drain"])
@click.argument("llm", metavar="LLM")
@broker_option
@key_option("admin")
@json_option
def command(llm: str, broker: str, key: str | None, as_json: bool) -> None:
    """Drain LLM, any model or pool of a broker: no new requests, while what it has is still served.

    It lasts until `wakecall resume LLM`, across restarts. To stop also what waits for it: `wakecall pause LLM`.
    """
    rows = change_hold("drain", llm, broker, key, as_json)
    in_flight = sum(row.in_flight for row in rows)
    click.echo(
        printable(
            f"Draining {listed([row.name for row in rows] or [llm])}: no new requests; {in_flight} in flight, and what waits"
            f" for it by name is still served. `wakecall resume {llm}` takes it back."
        ),
        err=True,
    )
