"""Masks: interval answers against the definition, by brute force over random compositions, spans and documents."""

import pytest
import torch
from compositions import Case, Words, built, cases, leaves, names, spans
from hypothesis import given, settings
from hypothesis import strategies as st

from dense import pattern_table
from ringspan.kernels.mask import Causal, Dilated, Documents, Full, Groups, Mask, Sinks, Span, Window, overlap, union

MILLION = 1 << 20


def members(found: tuple[Span, ...], length: int) -> set[int]:
    assert union(found) == found, "sorted, disjoint, joined"
    return {k for span in found for k in range(span.start, min(span.stop, length))}


def seen(rows: torch.Tensor) -> set[int]:
    return set(torch.nonzero(rows).flatten().tolist())


@given(cases())
@settings(deadline=None, max_examples=200)
def test_allowed_is_the_definition(case: Case) -> None:
    position = torch.arange(case.length)
    found = case.mask.allowed(position[:, None], position[None, :])
    assert found.shape == (case.length, case.length)
    assert torch.equal(found, case.table)


@given(cases(), st.data())
@settings(deadline=None, max_examples=250)
def test_pieces_hold_every_pair_once(case: Case, data: st.DataObject) -> None:
    q = Span(*data.draw(spans(case.length)))
    position = torch.arange(case.length)
    count = torch.zeros(case.length, case.length, dtype=torch.long)
    at = q.start
    for rows, strips in case.mask.pieces(q):
        assert rows.start == at < rows.stop, "in order, without gaps"
        at = rows.stop
        for first, last, low, high, step, offset in strips:
            assert first >= 0
            r, k = position[rows.start : rows.stop, None], position[None, :]
            inside = (k >= first) & (k < last) & (k >= r + low) & (k < r + high) & ((r - k) % step == offset)
            count[rows.start : rows.stop] += inside
            beyond = last > case.length and rows.stop + high > case.length  # keys after the last of this table
            assert inside.any() or beyond, "each strip serves a row"
    assert at == q.stop
    assert torch.equal(count[q.start : q.stop], case.table[q.start : q.stop].long())


@given(cases(), st.data())
@settings(deadline=None, max_examples=250)
def test_reach_full_and_area_match_the_table(case: Case, data: st.DataObject) -> None:
    q, k = Span(*data.draw(spans(case.length))), Span(*data.draw(spans(case.length)))
    rows = case.table[q.start : q.stop]
    assert members(case.mask.reach(q), case.length) == seen(rows.any(0))
    full = members(case.mask.full(q), case.length)
    assert full <= seen(rows.all(0))
    if not {"or", "dilated"} <= names(case.words):
        assert full == seen(rows.all(0))
    assert case.mask.area(q, k) == int(rows[:, k.start : k.stop].sum())


@given(cases(), st.data())
@settings(deadline=None, max_examples=200)
def test_a_single_row_is_exact_whatever_the_mask(case: Case, data: st.DataObject) -> None:
    row = data.draw(st.integers(0, case.length - 1))
    truth = seen(case.table[row])
    assert members(case.mask.reach(Span(row, row + 1)), case.length) == truth
    assert members(case.mask.full(Span(row, row + 1)), case.length) == truth


@given(cases(), st.data())
@settings(deadline=None)
def test_cuts_lie_at_document_and_group_edges(case: Case, data: st.DataObject) -> None:
    q = Span(*data.draw(spans(case.length)))
    edges = {start for start in case.boundaries or [] if q.start < start < q.stop}
    for size, shift, per_document in (leaf[1:] for leaf in leaves_of(case.words) if leaf[0] == "groups"):
        table = pattern_table(case.length, ("groups", size, shift, per_document), case.boundaries)
        edges |= {r for r in range(q.start + 1, q.stop) if not table[r - 1, r]}
    inner = sorted(edges)
    assert case.mask.cuts(q) == tuple(map(Span, [q.start, *inner], [*inner, q.stop]))
    assert case.mask.cuts(q) == tuple(rows for rows, _ in case.mask.pieces(q))


def leaves_of(words: Words) -> list[Words]:
    return [leaf for each in words[1:] for leaf in leaves_of(each)] if words[0] in ("and", "or") else [words]


@given(cases())
@settings(deadline=None, max_examples=200)
def test_causal_says_exactly_whether_a_later_key_is_seen(case: Case) -> None:
    # Without Documents the question is about any length; five groups repeat no pattern over more than 32 positions.
    length = case.length if case.boundaries else 80
    assert case.mask.causal == (not pattern_table(length, case.words, case.boundaries).triu(1).any())


def test_causal_by_name() -> None:
    assert (Causal() & (Window(1024) | Sinks(4)) & Documents([0, 5, 90])).causal
    assert not (Causal() | Sinks(4)).causal
    assert (Causal() | Sinks(1)).causal  # the first key is no later than any query
    assert (Groups(2) & Groups(2, 1)).causal
    assert not (Groups(2) & Groups(3, 1)).causal
    assert (Window(3, 3) & Documents([0, 1, 2])).causal
    assert not (Window(3, 3) & Documents([0, 1, 3])).causal
    assert not (Causal() & Documents([[0, 2], [0, 1, 2]]) & Full()).heads
    assert not (Full() & Documents([[0, 1, 2], [0, 2]])).causal


@given(leaves, st.integers(1, 24))
@settings(deadline=None)
def test_allowed_broadcasts_and_keeps_the_shape(words: Words, length: int) -> None:
    position = torch.arange(length)
    assert built(words).allowed(position, position).shape == (length,)
    assert built(words).allowed(position[None, :, None], position[None, None, :]).shape == (1, length, length)
    diagonal = pattern_table(length, words).diagonal()
    assert torch.equal(built(words).allowed(position, position), diagonal)


@pytest.mark.parametrize(
    ("mask", "live"),
    [
        (Full(), MILLION**2),
        (Causal(), MILLION * (MILLION + 1) // 2),
        (Causal() & Window(4095), 4096 * MILLION - 4096 * 4095 // 2),
        # Rows from 4100 on see four sinks beside the window; those before see all before them.
        (Causal() & (Window(4095) | Sinks(4)), 4100 * MILLION - 4100 * 4099 // 2),
        (Dilated(512, 8), 512 * MILLION - 8 * 512 * 511 // 2),
        (Causal() & Groups(1024), 1024 * (1024 * 1025 // 2)),
        (Window(MILLION, MILLION), MILLION**2),
    ],
)
def test_areas_over_a_million_tokens(mask: Mask, live: int) -> None:
    whole = Span(0, MILLION)
    assert mask.area(whole, whole) == live
    halves = [Span(0, MILLION // 2 + 3), Span(MILLION // 2 + 3, MILLION)]
    assert sum(mask.area(q, k) for q in halves for k in halves) == live


def test_one_template_serves_many_documents() -> None:
    mask = Causal() & (Window(4) | Sinks(2)) & Documents(range(0, 1001, 10))
    pieces = mask.pieces(Span(0, 1000))
    assert len(pieces) == 100
    first = [strip for _, strips in pieces[:1] for strip in strips]
    for rows, strips in pieces:
        moved = [strip._replace(first=strip.first + rows.start, last=strip.last + rows.start) for strip in first]
        assert list(strips) == moved


def test_simple_masks_are_one_strip() -> None:
    """What can be one strip is one: kernels then meet each tile once."""
    q = Span(512, 1024)
    for mask in (
        Causal() & Full() & Window(9),
        Window(3) | Window(9) | Window(5, 0),
        (Causal() & Window(4, 4)) | Window(9),
        Groups(256) & Causal() & Groups(256),
        Dilated(4, 2) | Dilated(9, 2),
        Dilated(9, 1) | Window(3),
        Sinks(3) | Sinks(5),
    ):
        assert {len(strips) for _, strips in mask.pieces(q)} == {1}, mask


def test_union_and_overlap() -> None:
    assert union([Span(4, 6), Span(0, 2), Span(2, 3), Span(5, 9), Span(7, 7)]) == (Span(0, 3), Span(4, 9))
    assert overlap([Span(0, 3), Span(5, 9)], [Span(2, 6), Span(8, 12)]) == (Span(2, 3), Span(5, 6), Span(8, 9))
