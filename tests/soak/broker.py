"""`wakecall serve`, which counts its own objects when told to: `python -m tests.soak.broker CENSUS serve …`.

On SIGUSR1 it collects garbage and writes what it holds to the file CENSUS. Only so can what is left over be told from what
Python has not got round to yet; and a growth by 3,000 of one type names its leak, which resident memory never does.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections import Counter

import httpcore2  # noqa: F401 - loaded with the first call of a public row, to which the warm-up may not come
from trio._core._run import GLOBAL_RUN_CONTEXT

from wakecall.cli import main


def take_census(path: str) -> None:
    """Write the count of Python's memory blocks, and of the objects of each type that the collector knows."""
    # Trio keeps up to 1,000 scopes whose deadline was dropped, and clears them out when they are more: they are its way of
    # saving work and nothing of ours, and would hide what is.
    GLOBAL_RUN_CONTEXT.runner.deadlines._prune()
    # What a finalizer of the first round lets go, the second one finds.
    for _ in range(2):
        gc.collect()
    blocks = sys.getallocatedblocks()
    kinds = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    with open(f"{path}.new", "w") as file:
        json.dump({"blocks": blocks, "kinds": kinds}, file)
    os.rename(f"{path}.new", path)


if __name__ == "__main__":
    census = sys.argv[1]
    signal.signal(signal.SIGUSR1, lambda *_: take_census(census))
    main(sys.argv[2:], prog_name="wakecall")
