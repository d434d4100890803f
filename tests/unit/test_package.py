"""What `import wakecall` gives: every public name, and none before it is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

import wakecall


@pytest.mark.parametrize("name", wakecall.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(wakecall, name) is getattr(wakecall, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = wakecall.nonsense


def test_no_public_name_is_a_modules_too() -> None:
    """The import of a module puts it into the package under its name, over whatever stood there."""
    modules = {path.stem for path in Path(wakecall.__file__).parent.iterdir()}
    assert modules.isdisjoint(wakecall.__all__)
