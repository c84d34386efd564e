"""Masks: interval answers against the definition, by brute force over random spans and documents."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense import mask_table
from ringspan.kernels.mask import (
    Causal,
    Documents,
    Full,
    Mask,
    Span,
    batch_rows,
    of_row,
    overlap,
    union,
)

LENGTH = 24


@st.composite
def cases(draw: st.DrawFn) -> tuple[Mask, torch.Tensor, int]:
    length = draw(st.integers(1, LENGTH))
    inner = draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6)) if length > 1 else set()
    boundaries = [0, *sorted(inner), length]
    causal, packed = draw(st.booleans()), draw(st.booleans())
    mask: Mask = Causal() if causal else Full()
    if packed:
        mask = draw(st.sampled_from([mask & Documents(boundaries), Documents(boundaries) & mask]))
    return (
        mask,
        mask_table(length, causal=causal, boundaries=boundaries if packed else None),
        length,
    )


def members(spans: tuple[Span, ...], length: int) -> set[int]:
    return {k for span in spans for k in range(span.start, min(span.stop, length))}


@given(cases(), st.data())
@settings(deadline=None, max_examples=200)
def test_reach_full_and_allowed_match_the_definition(case: tuple[Mask, torch.Tensor, int], data: st.DataObject) -> None:
    mask, table, length = case
    position = torch.arange(length)
    assert torch.equal(mask.allowed(position[:, None], position[None, :]), table)
    start = data.draw(st.integers(0, length - 1))
    q = Span(start, data.draw(st.integers(start + 1, length)))
    rows = table[q.start : q.stop]
    assert members(mask.reach(q), length) == set(torch.nonzero(rows.any(0)).flatten().tolist())
    assert members(mask.full(q), length) == set(torch.nonzero(rows.all(0)).flatten().tolist())


@given(cases())
@settings(deadline=None)
def test_cuts_keep_every_query_within_one_document(case: tuple[Mask, torch.Tensor, int]) -> None:
    mask, table, length = case
    cuts = mask.cuts(Span(0, length))
    assert [q for cut in cuts for q in range(cut.start, cut.stop)] == list(range(length))
    for cut in cuts:
        # Within a cut the first key any query sees is the same for all: the document's start, or 0.
        assert len({int(torch.nonzero(table[q]).flatten()[0]) for q in range(cut.start, cut.stop)}) == 1


@pytest.mark.parametrize("bad", [[1, 4], [0], [0, 3, 3], [0, 4, 2], [], [0, 2.0, 4], [0, True, 4]])
def test_documents_refuse_bad_boundaries(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="Documents boundaries must be"):
        Documents(bad)


def test_a_mask_holds_at_most_one_documents() -> None:
    with pytest.raises(ValueError, match="at most one"):
        _ = Documents([0, 4]) & Causal() & Documents([0, 2, 4])


def test_masks_are_values() -> None:
    one, two = (Causal() & Documents([0, 2, 4]) for _ in range(2))
    assert one == two
    assert len({one, two, Causal()}) == 2
    assert str(one) == "Causal() & Documents(boundaries=(0, 2, 4))"


def test_documents_must_end_at_the_length() -> None:
    with pytest.raises(ValueError, match="ends at 4 but the sequence has 5"):
        (Causal() & Documents([0, 4])).check(5)


def test_one_boundary_list_per_row_is_taken_apart() -> None:
    mask = Causal() & Documents([[0, 2, 4], [0, 4]])
    assert of_row(mask, 1) == Causal() & Documents([0, 4])
    assert batch_rows(mask, 2) == [Causal() & Documents([0, 2, 4]), Causal() & Documents([0, 4])]
    with pytest.raises(ValueError, match="2 boundary lists for 3 batch rows"):
        batch_rows(mask, 3)
    with pytest.raises(ValueError, match="2 masks for 3 batch rows"):
        batch_rows([Causal(), Full()], 3)
    with pytest.raises(ValueError, match="answers no question about one row"):
        mask.reach(Span(0, 4))


def test_union_and_overlap() -> None:
    assert union([Span(4, 6), Span(0, 2), Span(2, 3), Span(5, 9), Span(7, 7)]) == (
        Span(0, 3),
        Span(4, 9),
    )
    assert overlap([Span(0, 3), Span(5, 9)], [Span(2, 6), Span(8, 12)]) == (
        Span(2, 3),
        Span(5, 6),
        Span(8, 9),
    )
