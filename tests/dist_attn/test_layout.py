"""Layouts: every token held once, in order, for any length on any world."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.dist_attn import Contiguous, Span, ZigZag
from ringspan.dist_attn.layout import Layout

LAYOUTS = [Contiguous(), ZigZag()]


@given(st.sampled_from(LAYOUTS), st.integers(1, 9), st.integers(0, 100))
def test_spans_partition_the_sequence(layout: Layout, world: int, length: int) -> None:
    held = [span for rank in range(world) for span in layout.spans(rank, world, length)]
    assert sorted(p for span in held for p in range(span.start, span.stop)) == list(range(length))
    assert all(span.start < span.stop for span in held)
    shares = [layout.share(rank, world, length) for rank in range(world)]
    assert max(shares) - min(shares) <= 2
    if length % world == 0:
        assert set(shares) == {length // world}


def test_zigzag_deals_chunks_from_both_ends() -> None:
    assert ZigZag().spans(0, 2, 16) == (Span(0, 4), Span(12, 16))
    assert ZigZag().spans(1, 2, 16) == (Span(4, 12),)  # neighbours join
    assert ZigZag().spans(1, 4, 16) == (Span(2, 4), Span(12, 14))


def test_fewer_tokens_than_ranks_leave_some_empty() -> None:
    assert sum(Contiguous().share(rank, 4, 3) == 0 for rank in range(4)) == 1


@pytest.mark.parametrize(("rank", "world", "length"), [(2, 2, 4), (-1, 2, 4), (0, 1, -1)])
def test_bad_arguments_are_named(rank: int, world: int, length: int) -> None:
    with pytest.raises(ValueError, match=r"rank:|length:"):
        ZigZag().spans(rank, world, length)
