"""Layouts: every token held once, in order, for any length on any world."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.dist_attn.layout import Assigned, Contiguous, Layout, Striped, ZigZag
from ringspan.kernels.mask import Documents, Span

LAYOUTS = [Contiguous(), ZigZag()]
lengths, worlds = st.integers(0, 100), st.integers(1, 9)


@st.composite
def assignments(draw: st.DrawFn) -> tuple[Assigned, int, int]:
    """Draw an owner for each token."""
    world, length = draw(worlds), draw(lengths)
    owners = draw(st.lists(st.integers(0, world - 1), min_size=length, max_size=length))
    tokens = [[(at, at + 1) for at, owner in enumerate(owners) if owner == rank] for rank in range(world)]
    return Assigned(tokens), world, length


def check_partition(layout: Layout, world: int, length: int) -> None:
    held = [layout.spans(rank, world, length) for rank in range(world)]
    for spans in held:
        assert all(span.start < span.stop for span in spans)
        assert all(a.stop < b.start for a, b in zip(spans, spans[1:], strict=False))  # ascending, and joined
    assert sorted(p for spans in held for span in spans for p in range(*span)) == list(range(length))
    assert [layout.share(rank, world, length) for rank in range(world)] == [sum(s.size for s in h) for h in held]


@given(st.sampled_from(LAYOUTS), worlds, lengths)
def test_spans_partition_the_sequence(layout: Layout, world: int, length: int) -> None:
    check_partition(layout, world, length)
    shares = [layout.share(rank, world, length) for rank in range(world)]
    assert max(shares) - min(shares) <= 2
    if length % world == 0:
        assert set(shares) == {length // world}


@given(st.integers(1, 40), worlds, lengths)
def test_stripes_deal_blocks_in_turn(block: int, world: int, length: int) -> None:
    layout = Striped(block)
    check_partition(layout, world, length)
    for rank in range(world):
        assert all(p // block % world == rank for span in layout.spans(rank, world, length) for p in range(*span))


@given(assignments())
def test_assigned_spans_are_those_given(case: tuple[Assigned, int, int]) -> None:
    layout, world, length = case
    check_partition(layout, world, length)
    assert layout == Assigned(layout.by_rank)
    assert hash(layout) == hash(Assigned(layout.by_rank))


def test_zigzag_deals_chunks_from_both_ends() -> None:
    assert ZigZag().spans(0, 2, 16) == (Span(0, 4), Span(12, 16))
    assert ZigZag().spans(1, 2, 16) == (Span(4, 12),)  # neighbours join
    assert ZigZag().spans(1, 4, 16) == (Span(2, 4), Span(12, 14))


def test_stripes_end_in_a_short_block() -> None:
    assert Striped(4).spans(0, 2, 18) == (Span(0, 4), Span(8, 12), Span(16, 18))
    assert Striped(4).spans(1, 2, 18) == (Span(4, 8), Span(12, 16))
    assert Striped(16).spans(1, 2, 16) == ()


def test_assigned_shares_may_be_uneven() -> None:
    layout = Assigned([[(0, 5), (5, 6)], [], [(6, 7), (9, 10)], [(7, 9)]])
    assert layout.spans(0, 4, 10) == (Span(0, 6),)
    assert [layout.share(rank, 4, 10) for rank in range(4)] == [6, 0, 2, 2]


def test_fewer_tokens_than_ranks_leave_some_empty() -> None:
    assert sum(Contiguous().share(rank, 4, 3) == 0 for rank in range(4)) == 1


def test_layouts_that_look_at_no_mask_fit_any_documents() -> None:
    for layout in (*LAYOUTS, Striped(8), Assigned([[(0, 4)]])):
        assert layout.fitted(Documents([0, 3, 8])) is layout
        assert layout.fitted(None) is layout


def test_a_long_table_prints_short_and_tells_tables_apart() -> None:
    assert str(Assigned([[(0, 6)], [], [(6, 7), (9, 10)], [(7, 9)]])) == "Assigned(0:6; -; 6:7 9:10; 7:9)"
    even, odd = ([(at, at + 1) for at in range(first, 2000, 2)] for first in (0, 1))
    texts = {str(Assigned([even, odd])), str(Assigned([odd, even])), str(Assigned([even[:-1], [*odd, (2000, 2001)]]))}
    assert len(texts) == 3
    assert max(map(len, texts)) < 120


@pytest.mark.parametrize(("rank", "world", "length"), [(2, 2, 4), (-1, 2, 4), (0, 1, -1)])
@pytest.mark.parametrize("layout", [ZigZag(), Contiguous(), Striped(2), Assigned([[(0, 4)], []])])
def test_bad_arguments_are_named(layout: Layout, rank: int, world: int, length: int) -> None:
    with pytest.raises(ValueError, match=r"rank:|length:"):
        layout.spans(rank, world, length)


@pytest.mark.parametrize("block", [0, -1, True, 2.0, None])
def test_stripes_need_whole_blocks(block: Any) -> None:
    with pytest.raises(ValueError, match="Striped: block must be an int of at least 1, got"):
        Striped(block)


@pytest.mark.parametrize(
    ("spans", "words"),
    [
        ([[(0, 2), (4, 4)]], r"rank 0 has \(4, 4\); a span is two ints"),
        ([[], [(-1, 2)]], r"rank 1 has \(-1, 2\)"),
        ([[(0, 2, 4)]], r"rank 0 has \(0, 2, 4\)"),
        ([[(0, 2.5)]], r"rank 0 has \(0, 2.5\)"),
        ([[(0, 2), (1, 3)]], "rank 0 has 0:2 before 1:3; a rank's spans ascend"),
        ([[(4, 6), (0, 2)]], "rank 0 has 4:6 before 0:2"),
    ],
)
def test_assigned_refuses_what_is_no_list_of_spans(spans: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"Assigned: {words}"):
        Assigned(spans)


@pytest.mark.parametrize(
    ("spans", "world", "length", "words"),
    [
        ([[(0, 2)], [(2, 4)]], 3, 4, "world: 3 ranks, but Assigned lists spans for 2"),
        ([[(0, 2)], [(3, 4)]], 2, 4, "Assigned: gives tokens 2:3 to no rank"),
        ([[(0, 3)], [(2, 4)]], 2, 4, "Assigned: gives token 2 to two ranks"),
        ([[(0, 2)], [(2, 4)]], 2, 5, "length: 5 tokens, but Assigned lists 4"),
        ([[(0, 2)], [(2, 4)]], 2, 3, "length: 3 tokens, but Assigned lists 4"),
    ],
)
def test_assigned_serves_one_world_and_one_length(spans: Any, world: int, length: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Assigned(spans).spans(0, world, length)
