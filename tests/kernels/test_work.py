"""A kernel call's integers against brute force: every live pair once, and no tile visited that holds none."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.kernels.mask import Causal, Dilated, Documents, Full, Groups, Mask, Sinks, Span, Window
from ringspan.kernels.work import Sweep, Work, work

LENGTH = 48


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    plain = st.one_of(
        st.builds(Window, st.integers(0, 12), st.integers(0, 3)),
        st.builds(Sinks, st.integers(1, 6)),
        st.builds(Groups, st.integers(1, 20), st.integers(0, 10)),
        st.builds(Dilated, st.integers(1, 6), st.integers(1, 5)),
        st.sampled_from([Causal(), Full()]),
    )
    mask = draw(plain)
    for _ in range(draw(st.integers(0, 2))):
        mask = mask & draw(plain) if draw(st.booleans()) else mask | draw(plain)
    if draw(st.booleans()):
        mask = Causal() & mask
    inner = draw(st.sets(st.integers(1, LENGTH - 1), max_size=6))
    return mask & Documents([0, *sorted(inner), LENGTH]) if draw(st.booleans()) else mask


@st.composite
def spans(draw: st.DrawFn) -> tuple[Span, ...]:
    edges = sorted(draw(st.sets(st.integers(0, LENGTH), min_size=2, max_size=8)))
    kept = [Span(a, b) for a, b in zip(edges, edges[1:], strict=False)]
    return tuple(kept[:: draw(st.integers(1, 2))])


def table_of(each: Work) -> torch.Tensor:
    """The definition: which local row sees which local column."""
    rows, columns = (torch.cat([torch.arange(*span) for span in side]) for side in (each.queries, each.keys))
    return each.mask.allowed(rows[:, None], columns[None, :])


def in_order(table: torch.Tensor, sweep: Sweep) -> torch.Tensor:
    if sweep.rows is None or sweep.keys is None:
        return table
    return table[sweep.rows][:, sweep.keys]


def of_bounds(sweep: Sweep) -> torch.Tensor:
    column = torch.arange(sweep.width)
    low, high = sweep.bounds.unbind(0)
    return ((low[..., None] <= column) & (column < high[..., None])).sum(0)


def of_items(sweep: Sweep) -> torch.Tensor:
    count = torch.zeros(sweep.height, sweep.width, dtype=torch.int64)
    row, column = torch.arange(sweep.height)[:, None], torch.arange(sweep.width)[None, :]
    for rows, strip in sweep.items:
        live = (row >= rows.start) & (row < rows.stop) & (column >= strip.first) & (column < strip.last)
        live &= (column >= row + strip.low) & (column < row + strip.high)
        assert live[rows.start : rows.stop].any(1).all(), "a row of an item sees nothing"
        count += live
    return count


@given(masks(), spans(), spans())
@settings(deadline=None, max_examples=200)
def test_sweeps_hold_every_live_pair_once(mask: Mask, queries: tuple[Span, ...], keys: tuple[Span, ...]) -> None:
    each = Work(mask, queries, keys)
    table = table_of(each)
    for count in (of_items, of_bounds):
        total = torch.zeros_like(table, dtype=torch.int64)
        for sweep in each.sweeps:
            rows = torch.arange(each.rows) if sweep.rows is None else sweep.rows
            columns = torch.arange(each.columns) if sweep.keys is None else sweep.keys
            total[rows[:, None], columns[None, :]] += count(sweep)
        assert torch.equal(total, table.long())
    assert each.area == int(table.sum())


@given(masks(), spans(), spans(), st.sampled_from([(1, 1), (4, 8), (8, 4), (16, 16), (7, 5)]))
@settings(deadline=None, max_examples=200)
def test_runs_visit_exactly_the_tiles_that_hold_a_pair(
    mask: Mask, queries: tuple[Span, ...], keys: tuple[Span, ...], tile: tuple[int, int]
) -> None:
    for sweep in Work(mask, queries, keys).sweeps:
        live = of_bounds(sweep) > 0
        for turned in (False, True):
            runs = sweep.column_runs(*tile) if turned else sweep.row_runs(*tile)
            seen = live.t() if turned else live
            own, other = (tile[1], tile[0]) if turned else tile
            for block in range(-(-seen.shape[0] // own)):
                rows = seen[block * own : (block + 1) * own]
                kinds = []
                for kind in (0, 1):
                    a, b = runs.pointers[2 * block + kind : 2 * block + kind + 2].tolist()
                    listed = [tile for start, stop in runs.runs[a:b].tolist() for tile in range(start, stop)]
                    assert listed == sorted(set(listed))
                    kinds.append(listed)
                exact = [c for c in range(-(-seen.shape[1] // other)) if rows[:, c * other : (c + 1) * other].any()]
                assert sorted(kinds[0] + kinds[1]) == exact
                for c in kinds[0]:
                    assert (c + 1) * other <= seen.shape[1]
                    assert rows[:, c * other : (c + 1) * other].all()
                assert runs.tiles()[block].tolist() == [len(kinds[0]), len(kinds[1])]


@pytest.mark.parametrize("turned", [False, True])
def test_most_of_a_causal_square_is_full(turned: bool) -> None:
    sweep = Work(Causal(), (Span(0, 1024),), (Span(0, 1024),)).sweeps[0]
    runs = sweep.column_runs(64, 64) if turned else sweep.row_runs(64, 64)
    assert runs.tiles().sum(0).tolist() == [16 * 15 // 2, 16]


def test_metadata_of_a_million_packed_tokens_is_of_the_order_of_the_blocks() -> None:
    length = 1 << 20
    edges = sorted({0, length, *torch.randint(1, length, (300,), generator=torch.Generator().manual_seed(0)).tolist()})
    mask = Causal() & (Window(4096) | Sinks(4)) & Documents(edges)
    began = time.perf_counter()
    sweep = Work(mask, (Span(0, length),), (Span(0, length),)).sweeps[0]
    runs = sweep.row_runs(128, 64)
    turned = sweep.column_runs(128, 64)
    print(f"1M tokens, 300 documents: {1e3 * (time.perf_counter() - began):.0f} ms")
    assert len(runs.runs) <= 6 * (runs.blocks + len(edges))
    assert len(turned.runs) <= 6 * (turned.blocks + len(edges))


def test_work_is_planned_once() -> None:
    spans = (Span(0, 8),)
    assert work(Causal() & Window(3), spans, spans) is work(Causal() & Window(3), spans, spans)
