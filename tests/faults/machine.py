"""A machine that goes wrong: its wall clock leaps, its disk refuses writes."""

from __future__ import annotations

import mmap
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.programs import program


class Machine:
    """What is wrong with it just now; all is well at first. Processes that get its `variables` run on it.

    Args:
        library: the compiled `shim.c`.
        control: a file of this machine's own; it is made.
        disk: part of the names of the files that `disk_refuses` is about.
    """

    def __init__(self, library: Path, control: Path, disk: str) -> None:
        control.write_bytes(bytes(16))
        with control.open("r+b") as file:
            self._control = mmap.mmap(file.fileno(), 16)
        self.variables = {"LD_PRELOAD": str(library), "FAULTS_CONTROL": str(control), "FAULTS_DISK": disk}

    def leap(self, seconds: int) -> None:
        """Let the wall clock be so far from the truth from now on."""
        struct.pack_into("q", self._control, 0, seconds)

    @contextmanager
    def disk_refuses(self, errno: int) -> Iterator[None]:
        """Every write to the disk fails with `errno` while the block runs."""
        struct.pack_into("q", self._control, 8, errno)
        try:
            yield
        finally:
            struct.pack_into("q", self._control, 8, 0)


def compile_shim(folder: Path) -> Path:
    """The library of `shim.c`."""
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    compiler = program("cc", "gcc libc6-dev")
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library
