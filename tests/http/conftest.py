"""What the tests of the app share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.http.served import Served, open_served


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    """The app over a broker of its own, on a free port; invariant 1 is checked at its end."""
    async with open_served() as each:
        yield each
