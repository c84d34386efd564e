"""Strips: the algebra and the closed forms, each against counting pairs one by one."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.kernels.masks import measure
from ringspan.kernels.masks.span import END, Span, gaps
from ringspan.kernels.masks.strips import EVERYTHING, Strip, intersect, join, meet, subtract, tidy, unite

SIZE = 16
ROW, KEY = torch.arange(SIZE)[:, None], torch.arange(SIZE)[None, :]

edges = st.one_of(st.integers(-2, SIZE + 2), st.sampled_from([-END, END]))
distances = st.one_of(st.integers(-SIZE, SIZE), st.sampled_from([-END, END]))


@st.composite
def strips(draw: st.DrawFn) -> Strip:
    """Draw a strip that may be empty, plain or stepped; bounds on none, some or all sides."""
    step = draw(st.sampled_from([1, 1, 2, 3, 4, 6]))
    first, last = draw(edges.filter(lambda e: e < END)), draw(edges.filter(lambda e: e > -END))
    low, high = draw(distances.filter(lambda d: d < END)), draw(distances.filter(lambda d: d > -END))
    return Strip(first, last, low, high, step, draw(st.integers(0, step - 1)))


live = strips().map(tidy).filter(lambda strip: strip is not None)


@st.composite
def ranges(draw: st.DrawFn) -> Span:
    start = draw(st.integers(0, SIZE - 1))
    return Span(start, draw(st.integers(start + 1, SIZE)))


def table(*many: Strip) -> torch.Tensor:
    """Count how many of the strips hold each pair, from the strip's definition."""
    count = torch.zeros(SIZE, SIZE, dtype=torch.long)
    for first, last, low, high, step, offset in many:
        in_range = (first <= KEY) & (last > KEY) & (ROW + low <= KEY) & (ROW + high > KEY)
        count += in_range & ((ROW - KEY) % step == offset)
    return count


def held(spans: list[Span] | tuple[Span, ...]) -> list[int]:
    return [k for span in spans for k in range(span.start, min(span.stop, SIZE))]


@given(strips())
@settings(deadline=None)
def test_tidy_keeps_the_pairs(strip: Strip) -> None:
    found = tidy(strip)
    assert torch.equal(table(strip), table(*([found] if found else [])))


@given(live, live)
@settings(deadline=None, max_examples=100)
def test_intersection_and_difference(a: Strip, b: Strip) -> None:
    both = intersect(a, b)
    assert torch.equal(table(*([both] if both else [])), table(a) * table(b))
    assert torch.equal(table(*subtract(a, b)), table(a) * (1 - table(b)))


@given(st.lists(live, max_size=4), st.lists(live, max_size=3))
@settings(deadline=None, max_examples=100)
def test_union_is_disjoint_and_complete(left: list[Strip], right: list[Strip]) -> None:
    one, two = unite(left), unite(right)
    assert torch.equal(table(*one), table(*left).clamp(max=1))
    assert torch.equal(table(*join(left)).clamp(max=1), table(*left).clamp(max=1))
    assert torch.equal(table(*meet(one, two)), table(*one) * table(*two))


def test_joins_what_is_one_strip() -> None:
    assert join([Strip(0, 4), Strip(4, 9)]) == (Strip(0, 9),)
    assert join([Strip(0, 4), Strip(5, 9)]) == (Strip(0, 4), Strip(5, 9))
    assert join([Strip(0, 9, -4, 0), Strip(0, 9, 0, 3)]) == (Strip(0, 9, -4, 3),)
    assert join([Strip(0, 9, -4, 0), Strip(0, 9, 1, 3)]) == (Strip(0, 9, -4, 0), Strip(0, 9, 1, 3))
    apart = (Strip(0, 9, -8, -5, 2, 0), Strip(0, 9, -2, 1, 2, 0))
    assert join(apart) == apart
    assert join([Strip(0, 9, -4, -3, 2, 0), Strip(0, 9, -2, 1, 2, 0)]) == (Strip(0, 9, -4, 1, 2, 0),)
    assert join([Strip(0, 9, -8, 1, 2, 0), Strip(0, 9, -8, 1, 4, 2)]) == (Strip(0, 9, -8, 1, 2, 0),)
    assert join([Strip(0, 4), EVERYTHING, Strip(6, 9)]) == (EVERYTHING,)


@given(live, ranges(), ranges())
@settings(deadline=None, max_examples=200)
def test_closed_forms_match_counting(strip: Strip, q: Span, k: Span) -> None:
    bounded = strip._replace(first=max(strip.first, 0), last=min(strip.last, SIZE))
    pairs = table(bounded)[q.start : q.stop]
    keys, seers = torch.nonzero(pairs.any(0)).flatten().tolist(), torch.nonzero(pairs.any(1)).flatten() + q.start
    assert measure.exists(bounded, q) == bool(pairs.any())
    if pairs.any():  # an empty strip has been left out before anyone asks
        assert held(measure.reach(bounded, q)) == keys
        assert held(measure.rows(bounded, q)) == seers.tolist()
    assert measure.area(strip, q, k) == int(pairs[:, k.start : k.stop].sum())


@given(st.lists(live, max_size=4), ranges())
@settings(deadline=None, max_examples=100)
def test_full_is_the_complement_of_what_some_row_misses(many: list[Strip], q: Span) -> None:
    disjoint = unite(many)
    truth = torch.nonzero(table(*disjoint)[q.start : q.stop].all(0)).flatten().tolist()
    bounded = [s._replace(first=max(s.first, 0), last=min(s.last, SIZE)) for s in disjoint]
    found = held(measure.full_of(bounded, q))
    assert set(found) <= set(truth)
    if q.size == 1 or all(strip.step == 1 for strip in disjoint):
        assert found == truth


def test_gaps() -> None:
    inside = Span(2, 10)
    assert gaps([], inside) == (inside,)
    assert gaps([Span(0, 3), Span(5, 6)], inside) == (Span(3, 5), Span(6, 10))
    assert gaps([Span(2, 9)], inside) == (Span(9, 10),)
    assert gaps([Span(0, 1), Span(2, 12)], inside) == ()
    assert gaps([Span(11, 12)], inside) == (inside,)
