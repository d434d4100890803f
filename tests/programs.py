"""Programs that a few tests need and that no package of Python's brings."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["program"]


def program(name: str, package: str) -> str:
    """The path of a program.

    Where everything is tested it has to be there: `.ci/run` installs it. Elsewhere the tests that need it are left out, so
    that the README's command does with Python and git.

    Args:
        name: what it is called.
        package: Debian's that brings it.
    """
    # Where a user is not root a server may be off his path.
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None and os.environ.get("CI"):
        pytest.fail(f"{name} is not installed; .ci/run does it")
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install {package}")
    return found
