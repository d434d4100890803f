"""What `import wakecall` gives: every public name, and none before it is asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import wakecall


@pytest.mark.parametrize("name", wakecall.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(wakecall, name) is getattr(wakecall, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wakecall.nonsense


def test_serve_is_the_function() -> None:
    """Though there is a module of that name, which its import puts into the package."""
    script = (
        "from wakecall import serve; from wakecall import serve as again; assert callable(serve) and serve is again"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
