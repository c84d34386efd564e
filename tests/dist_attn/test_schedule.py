"""The plan, on integers alone: every live pair once, no byte too many, the same on every rank and in every process."""

import os
import subprocess
import sys
import time
from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.dist_attn import (
    Causal,
    Contiguous,
    Dilated,
    Documents,
    Full,
    Groups,
    PerHead,
    Plan,
    Sinks,
    Span,
    Window,
    ZigZag,
    plan,
    s2_attention,
)
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.pairs import Pair, pairs_of, without
from ringspan.dist_attn.schedule import Schedule, routed
from ringspan.kernels.mask import Mask

LAYOUTS = [Contiguous(), ZigZag()]


@st.composite
def masks(draw: st.DrawFn, length: int) -> tuple[Mask, torch.Tensor]:
    """A mask, and its table made from words and numbers."""
    q, k = torch.arange(length)[:, None], torch.arange(length)[None, :]
    inner = sorted(draw(st.sets(st.integers(1, length), max_size=5)) - {length})
    start = torch.zeros(length, dtype=torch.long)
    if draw(st.booleans()):
        for edge in inner:
            start[edge:] = edge
    same, first = start[:, None] == start[None, :], k - start[None, :]
    size, window = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    parts: list[tuple[Mask, torch.Tensor]] = [
        (Full(), torch.ones(length, length, dtype=torch.bool)),
        (Window(window), (q - k <= window) & (k <= q)),
        (Window(window) | Sinks(2), ((q - k <= window) & (k <= q)) | (first < 2)),
        (Groups(size, size // 2), (q - size // 2) // size == (k - size // 2) // size),
        (Dilated(3, size), ((q - k) % size == 0) & (q >= k) & (q - k < 3 * size)),
    ]
    mask, table = draw(st.sampled_from(parts))
    if draw(st.booleans()):
        mask, table = Causal() & mask, table & (q >= k)
    if bool(start.any()):
        mask = mask & Documents([0, *inner, length])
    return mask, table & same


@st.composite
def cases(draw: st.DrawFn) -> tuple[Schedule, torch.Tensor]:
    """A schedule of a ring, paced or not, or a double ring, keys perhaps shared out otherwise, with the mask's table.

    Lengths beyond ``SMALL_ROWS`` a piece, so that pieces go round the ring, and below, so that they go by trees.
    """
    world = draw(st.sampled_from([1, 2, 3, 5, 6, 8, (2, 2), (2, 3), (3, 2), (4, 2), (1, 3), (3, 1)]))
    length = draw(st.one_of(st.integers(1, 40), st.integers(300, 700)))
    mask, table = draw(masks(length))
    layout, kv_layout = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from([None, *LAYOUTS]))
    mesh = world if isinstance(world, tuple) else (world,)
    return draw(st.sampled_from(routed(mask, layout, mesh, length, kv_layout or layout))), table


def held(spans: tuple[Span, ...]) -> list[int]:
    return [p for span in spans for p in range(span.start, span.stop)]


def check_pairs(pairs: Iterable[Pair], table: torch.Tensor, mask: Mask) -> torch.Tensor:
    """Return how often each live (query, key) is in a pair, having looked at each pair's kind."""
    seen = torch.zeros(table.shape, dtype=torch.long)
    for pair in pairs:
        block = table[pair.q.start : pair.q.stop, pair.k.start : pair.k.stop]
        assert block.any(0).all(), "a key that no query of the pair sees"
        assert bool(block.all()) == pair.full
        assert mask.area(pair.q, pair.k) == int(block.sum())
        seen[pair.q.start : pair.q.stop, pair.k.start : pair.k.stop] += block.long()
    return seen


@given(cases())
@settings(deadline=None, max_examples=150)
def test_every_live_pair_is_computed_once(case: tuple[Schedule, torch.Tensor]) -> None:
    plan_, table = case
    seen = torch.zeros(table.shape, dtype=torch.long)
    for rank in range(plan_.world):
        mine = check_pairs((pair for step in plan_.steps(rank) for pair in step.pairs), table, plan_.mask)
        assert int(mine.sum()) == plan_.area(rank)
        seen += mine
    assert torch.equal(seen, table.long())


@given(cases())
@settings(deadline=None, max_examples=100)
def test_keys_of_a_call_ascend_and_are_the_keys_that_came(case: tuple[Schedule, torch.Tensor]) -> None:
    plan_, _ = case
    for rank in range(plan_.world):
        for step in plan_.steps(rank):
            for arrival in step.computed:
                keys = arrival.work.keys
                assert all(a.stop <= b.start for a, b in zip(keys, keys[1:], strict=False))
                assert arrival.work.queries == plan_.spans(rank)
                if arrival is not step.own:
                    assert keys == tuple(hop.span for hop in arrival.hops)
                    assert arrival.rows == sum(hop.span.size for hop in arrival.hops)
                    assert step.number == arrival.step > arrival.depart


@given(st.data())
@settings(deadline=None)
def test_pairs_of_any_two_spans_are_exact(data: st.DataObject) -> None:
    """Also where keys lie strictly inside the queries' span."""
    mask, table = data.draw(masks(20))
    spans = [Span(start, data.draw(st.integers(start + 1, 20))) for start in (data.draw(st.integers(0, 19)), 0, 7)]
    for q, k in ((spans[0], spans[1]), (spans[1], spans[0]), (spans[1], spans[2])):
        wanted = torch.zeros(20, 20, dtype=torch.long)
        wanted[q.start : q.stop, k.start : k.stop] = table[q.start : q.stop, k.start : k.stop].long()
        assert torch.equal(check_pairs(pairs_of(mask, [q], [k]), table, mask), wanted)


def test_without_cuts_holes_out_of_spans() -> None:
    spans = (Span(0, 10), Span(12, 20))
    assert without(spans, (Span(2, 4), Span(8, 14))) == (Span(0, 2), Span(4, 8), Span(14, 20))
    assert without(spans, ()) == spans
    assert without(spans, (Span(0, 30),)) == ()


@given(cases())
@settings(deadline=None, max_examples=150)
def test_keys_received_are_exactly_the_keys_needed(case: tuple[Schedule, torch.Tensor]) -> None:
    plan_, table = case
    for rank in range(plan_.world):
        mine = held(plan_.spans(rank))
        needed = set(torch.nonzero(table[mine].any(0)).flatten().tolist()) - set(held(plan_.kv_spans(rank)))
        received = [p for hop in plan_.hops if hop.target == rank for p in range(hop.span.start, hop.span.stop)]
        assert sorted(received) == sorted(needed)  # each once
        assert plan_.needed_rows(rank) == plan_.received_rows(rank) == len(needed)
    # Gradients move as often as the keys did.
    ranks = range(plan_.world)
    assert sum(plan_.returned_rows(r) for r in ranks) == sum(plan_.received_rows(r) for r in ranks)


@given(cases())
@settings(deadline=None, max_examples=100)
def test_a_rank_only_sends_what_it_has(case: tuple[Schedule, torch.Tensor]) -> None:
    """Also gradients: a rank that sends a sum on has added what came for it before."""
    plan_, _ = case
    by_target = {(hop.target, hop.piece): hop for hop in plan_.hops}
    assert len(by_target) == len(plan_.hops)
    for hop in plan_.hops:
        assert 0 <= hop.depart < hop.step <= hop.back < hop.add
        if hop.source != hop.owner:
            assert by_target[hop.source, hop.piece].step <= hop.depart
        if hop.home != hop.owner:
            onward = by_target[hop.home, hop.piece]
            assert onward.back >= hop.add
            assert onward.step <= hop.back + 1


@given(cases())
@settings(deadline=None, max_examples=60)
def test_areas_by_step_are_what_the_steps_compute(case: tuple[Schedule, torch.Tensor]) -> None:
    plan_, _ = case
    for rank in range(plan_.world):
        counted = torch.zeros(len(plan_.areas), dtype=torch.long)
        for step in plan_.steps(rank):
            for arrival in step.computed:
                counted[step.number] += arrival.work.area
        assert counted.tolist() == plan_.areas[:, rank].tolist()


def whole(mask: Mask, layout: Layout, world: int, length: int, dtype: torch.dtype = torch.bfloat16) -> Plan:
    return plan(mask, layout, world=world, length=length, heads=8, kv_heads=2, head_dim=64, dtype=dtype)


def test_s2_groups_move_half_a_group_for_half_of_the_heads() -> None:
    made = whole(s2_attention(100), Contiguous(), 4, 400)
    row = 2 * 1 * 64 * 2  # K and V of the one KV head whose groups are shifted
    assert [made.received_bytes(rank) for rank in range(4)] == [0, 50 * row, 50 * row, 50 * row]
    assert made.lower_bound_bytes(1) == 50 * row
    assert made.area(0) == (100 * 101 // 2 + 50 * 51) / 2  # mean over the two KV heads


def test_per_head_masks_are_planned_head_by_head() -> None:
    made = whole(PerHead({(0, 1): Causal(), (1, 2): Causal() & Window(10)}), Contiguous(), 2, 100)
    row = 2 * 64 * 2
    assert made.received_bytes(1) == (50 + 10) * row == made.lower_bound_bytes(1)


def test_bytes_of_a_plan() -> None:
    made = whole(Causal(), ZigZag(), 2, 1000)
    row = 2 * 2 * 64 * 2  # K and V, KV heads, head dim, bytes
    assert made.lower_bound_bytes(0) == 500 * row
    assert made.lower_bound_bytes(1) == 250 * row
    forward = sum(made.received_bytes(r) for r in range(2))
    assert sum(made.received_bytes(r, backward=True) for r in range(2)) == 3 * forward  # dK, dV in fp32
    wide = whole(Causal(), ZigZag(), 2, 1000, torch.float64)
    assert sum(wide.received_bytes(r, backward=True) for r in range(2)) == 2 * sum(
        wide.received_bytes(r) for r in range(2)
    )
    rows = whole(Causal() & Documents([[0, 1000], [0, 250, 1000]]), ZigZag(), 2, 1000)
    one = whole(Causal() & Documents([0, 250, 1000]), ZigZag(), 2, 1000)
    assert rows.received_bytes(0) == made.received_bytes(0) + one.received_bytes(0)


def test_hash_is_stable_across_processes_and_tells_plans_apart() -> None:
    code = (
        "import torch; from ringspan.dist_attn import *;"
        "print(plan(Causal() & Documents([0, 3, 8]), ZigZag(), world=2, length=8, heads=4, kv_heads=2, head_dim=8,"
        "dtype=torch.float32).hash)"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert len(runs) == 1
    hashes = {whole(m, x, w, 64).hash for m in (Causal(), Full()) for x in LAYOUTS for w in (1, 2)}
    assert len(hashes) == 8


def test_a_world_that_does_not_exist_can_be_planned() -> None:
    began = time.monotonic()
    made = whole(Causal() & Documents([0, 300_000, 300_001, 1 << 20]), Contiguous(), 1024, 1 << 20)
    assert made.received_bytes(1023) == made.lower_bound_bytes(1023)
    assert time.monotonic() - began < 60  # a bound on hanging, not on speed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "teleport"}, "strategy: 'teleport' is not one of auto, ring"),
        ({"heads": 3}, "heads: 3 query heads cannot share 2 KV heads"),
        ({"world": 0}, "world: 0 must be at least 1, or"),
        ({"length": 7}, "ends at 8 but the sequence has 7 tokens"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, int | str], message: str) -> None:
    good = {
        "world": 2,
        "length": 8,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "dtype": torch.float32,
    }
    with pytest.raises(ValueError, match=message):
        plan(Causal() & Documents([0, 8]), ZigZag(), **{**good, **change})  # pyright: ignore[reportArgumentType]
