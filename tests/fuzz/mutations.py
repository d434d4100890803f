"""Bytes for a target, as Hypothesis draws them: a seed, changed here and there."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzz.targets import Target

__all__ = ["bytes_for"]


@st.composite
def bytes_for(draw: st.DrawFn, target: Target) -> bytes:
    """A seed of the target's, with tokens put in, pieces left out, doubled or moved, bytes changed."""
    data = draw(st.sampled_from(target.seeds))
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 24)))
        put = draw(
            st.one_of(
                st.sampled_from(target.tokens or (b"",)),
                st.binary(max_size=4),
                st.just(data[start:end] * 2),
                st.sampled_from(target.seeds),
            )
        )
        data = data[:start] + put + data[end:]
    return data
