"""From strips to tiles, in integers: every live pair once, no row without a key, little visited in vain."""

import random

import pytest
import torch

from ringspan.kernels import cpu, tiles
from ringspan.kernels.mask import Causal, Documents, Full, Groups, Mask, Sinks, Window
from ringspan.kernels.masks.span import END, Span
from ringspan.kernels.masks.strips import Strip
from ringspan.kernels.tiles import Tiles, canonical, join, tiles_of
from ringspan.kernels.work import Work


def seen(rows: Span, strip: Strip, height: int, width: int) -> torch.Tensor:
    row, column = torch.arange(height)[:, None], torch.arange(width)
    table = (column >= strip.first) & (column < strip.last)
    low, high = max(strip.low, -height - width), min(strip.high, height + width)
    table = table & (column >= row + low) & (column < row + high)
    return table & (row >= rows.start) & (row < rows.stop)


def painted(found: tuple[Tiles, ...], height: int, width: int) -> torch.Tensor:
    """How often each pair is computed and kept."""
    table = torch.zeros(height, width, dtype=torch.int64)
    for each in found:
        shape = each.shape
        i, c = torch.arange(shape.rows)[:, None], torch.arange(shape.width)
        kept = (c - i >= shape.low) & (c - i < shape.high) & ((c < shape.hole.start) | (c >= shape.hole.stop))
        assert kept.any(1).all(), "a row of a tile without a key: the operator would report lse 0"
        assert shape.full == (kept.all().item() and not shape.hole.size)
        assert all(a + shape.rows <= b for a, b in zip(each.rows, each.rows[1:], strict=False))
        for row, column in zip(each.rows, each.columns, strict=True):
            table[row : row + shape.rows, column : column + shape.width] += kept
    return table


def random_strip(rng: random.Random, rows: Span, width: int) -> Strip | None:
    """A strip that shows each of the rows at least one column."""
    first, last = sorted(rng.sample(range(width + 1), 2))
    low = rng.choice([-END, rng.randint(-rows.stop - 50, width - rows.start)])
    high = rng.choice([END, rng.randint(-rows.stop, width - rows.start + 50)])
    strip = Strip(first, last, low, high)
    starts = [max(first, row + low) < min(last, row + high) for row in rows_of(rows)]
    return strip if all(starts) else None


def rows_of(rows: Span) -> range:
    return range(rows.start, rows.stop)


def test_tiles_hold_every_live_pair_of_a_strip_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(0)
    for name, value in (("BLOCK", 32), ("STEP", 8), ("TRIANGLE", 150)):
        monkeypatch.setattr(tiles, name, value)
    tried = edges = 0
    while tried < 400:
        start = rng.randint(0, 40)
        rows = Span(start, start + rng.choice([1, 2, 7, 33, 64, 65, 120, 200]))
        width = rng.choice([1, 5, 64, 131, 260])
        strip = random_strip(rng, rows, width)
        if strip is None:
            continue
        tried += 1
        edges += strip.low > -END and strip.high < END
        found = painted(tiles_of([(rows, strip)]), rows.stop, width)
        assert torch.equal(found, seen(rows, strip, rows.stop, width).long()), (rows, strip)
    assert edges > 20


MASKS = [
    Causal(),
    Full(),
    Causal() & Window(1024),
    Causal() & (Window(700) | Sinks(4)),
    Window(300, 200),
    Causal() & Groups(512),
    Causal() & Documents([0, 1, 2, 64, 65, 700, 1500]),
    Causal() & (Window(64) | Sinks(2)) & Documents([0, 333, 1500]),
]
ZIGZAG = (Span(0, 375), Span(1125, 1500))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"), [((Span(0, 1500),), (Span(0, 1500),)), (ZIGZAG, ZIGZAG), (ZIGZAG, (Span(375, 1125),))]
)
def test_tiles_of_a_call_hold_its_pairs_and_few_others(
    mask: Mask, queries: tuple[Span, ...], keys: tuple[Span, ...]
) -> None:
    each = Work(mask, queries, keys)
    rows, columns = (torch.cat([torch.arange(*span) for span in spans]) for spans in (queries, keys))
    total = torch.zeros(each.rows, each.columns, dtype=torch.int64)
    visited = 0
    for sweep in each.sweeps:
        total += painted(cpu.plan(sweep), sweep.height, sweep.width)
        visited += sum(found.visited for found in cpu.plan(sweep))
    assert torch.equal(total, mask.allowed(rows[:, None], columns).expand(total.shape).long())
    assert each.area == total.sum()
    # A step of 64 rows visits at most 64 columns in vain per row and edge.
    assert visited <= 1.07 * each.area + 64 * each.rows


@pytest.mark.parametrize(("window", "ratio"), [(1024, 1.07), (256, 1.3), (4096, 1.02)])
def test_a_window_visits_little_more_than_it_holds(window: int, ratio: float) -> None:
    each = Work(Causal() & (Window(window) | Sinks(4)), (Span(0, 32768),), (Span(0, 32768),))
    found = [part for sweep in each.sweeps for part in cpu.plan(sweep)]
    assert each.area <= sum(part.visited for part in found) <= ratio * each.area
    assert len(found) < 80  # shapes, not blocks


def test_a_zigzag_rank_meets_its_own_chunks_in_one_causal_item() -> None:
    for size in (10, 5000):
        spans = (Span(0, size), Span(3 * size, 4 * size))
        (sweep,) = Work(Causal(), spans, spans).sweeps
        assert join(sweep.items) == [(Span(0, 2 * size), Strip(0, 2 * size, high=1))]
    found = cpu.plan(sweep)
    assert [(each.shape.rows, each.shape.causal) for each in found] == [(10000, True)]


def test_join_keeps_apart_what_one_strip_cannot_say() -> None:
    apart = [
        (Span(0, 10), Strip(0, 10, high=1)),
        (Span(10, 20), Strip(10, 20, high=1)),  # the next document
        (Span(30, 40), Strip(10, 20)),  # not the row after
        (Span(40, 50), Strip(11, 20)),
        (Span(40, 50), Strip(22, 25)),  # a gap between them
    ]
    joined = join(apart)
    assert [rows for rows, _ in joined] == [rows for rows, _ in apart]
    for (rows, strip), (_, kept) in zip(apart, joined, strict=True):
        assert torch.equal(seen(rows, strip, 50, 50), seen(rows, kept, 50, 50))


def test_join_is_linear_in_documents() -> None:
    edges = list(range(0, 20001))
    (sweep,) = Work(Causal() & Documents(edges), (Span(0, 20000),), (Span(0, 20000),)).sweeps
    found = tiles_of(sweep.items)
    assert [(each.shape.rows, each.shape.keys, len(each.rows)) for each in found] == [(1, 1, 20000)]


def test_canonical_says_nothing_it_need_not() -> None:
    assert canonical(Span(5, 9), Strip(0, 3, low=-100, high=50)) == Strip(0, 3)
    assert canonical(Span(5, 9), Strip(-END, END, low=-2, high=3)) == Strip(3, 11, -2, 3)
    assert canonical(Span(5, 6), Strip(0, 30, low=-2, high=3)) == Strip(3, 8)
