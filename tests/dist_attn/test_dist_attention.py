"""DistAttention, where queries travel, against dense attention in float64: out, lse, every gradient; and its plan."""

import random
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from compositions import Case as Composition
from compositions import cases as compositions
from hypothesis import given, settings
from hypothesis import strategies as st
from sharded_cases import (
    Case,
    Result,
    Strategy,
    Uneven,
    check,
    error_over_one_rank,
    run_processes,
    run_threads,
)
from torch import Tensor
from typing_extensions import override
from virtual_ranks import Mail

from ringspan.dist_attn import dist_attention, dist_attention_plan
from ringspan.dist_attn.dist_attention_plan import QueryMoves, moves
from ringspan.dist_attn.layout import Contiguous, Layout, ZigZag
from ringspan.dist_attn.meetings import meetings
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.mask import Causal, Documents, Mask, Sinks, Span, Window, union
from ringspan.kernels.parts import parts_of

HERE = Strategy(dist_attention_plan.moves, dist_attention.executor)
F32, BF16 = torch.float32, torch.bfloat16

CASES = [
    Case("causal", (1,), (4, 4), 63),
    Case("causal", (2,), (8, 2), 130, dtype=F32, dim=64, dlse=False),
    Case("causal", (2,), (4, 1), 130, "contiguous", (1, 3), F32, sinks=False, dim=33),
    Case("full documents", (2,), (4, 1), 37, "contiguous"),
    Case("full", (2,), (2, 2), 64, sinks=False, dim=32),
    Case("dilated", (2,), (4, 2), 130, dtype=F32),
    Case("heads", (2,), (4, 2), 97, "contiguous", (3, 1)),
    Case("causal", (3,), (4, 2), 101, kv_weights=(1, 0, 0)),
    Case("window", (3,), (4, 2), 101, "queries on rank 2", dtype=F32),
    Case("causal documents", (3,), (4, 4), 70, "queries on rank 2", (1, 0, 0), sinks=False),
    Case("window documents", (3,), (4, 1), 101, "mostly rank 1", (5, 0, 1), keep=True),
    Case("both sides", (3,), (4, 2), 61, sinks=False),
    Case("groups documents", (3,), (2, 1), 101, "blocks", dtype=F32),
    Case("few", (4,), (4, 2), 61, "contiguous"),
    Case("dilated documents", (4,), (4, 4), 101, "blocks", dlse=False),
    Case("causal", (4,), (2, 1), 3, dtype=F32),  # a rank without tokens
    Case("heads", (4,), (6, 3), 150, kv_weights=(1, 2, 3, 4)),
    Case("heads documents", (4,), (4, 2), 150, "contiguous", dtype=F32),
    Case("window documents", (4,), (4, 4), 257, "contiguous", dtype=F32, dim=33, sinks=False),
    Case("heads", (2,), (4, 2), 31, first_kv_head=1, total_kv_heads=4),
    Case("causal", (2, 2), (4, 2), 35),
    Case("causal documents", (8,), (4, 1), 301),
    Case("causal", (8,), (4, 2), 500, dtype=F32, dim=32),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ranks_compute_what_dense_attention_does(case: Case) -> None:
    check(case, HERE, run_threads(case, HERE))


@pytest.mark.parametrize("case", [CASES[2], CASES[10], CASES[17]], ids=lambda case: case.name)
def test_gloo_processes_give_the_bits_that_threads_give(case: Case) -> None:
    ranks = run_processes(case, HERE)
    check(case, HERE, ranks)
    assert bits(ranks) == bits(run_threads(case, HERE))


def bits(results: list[Result]) -> list[Any]:
    return [[x.double().tolist() for x in each.tensors] for each in results]


def test_results_do_not_depend_on_the_order_of_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    case, chance, post = Case("window documents", (4,), (4, 2), 203, "blocks", dtype=F32), random.Random(0), Mail.post

    def slow(self: Mail, *given: Any) -> Any:
        time.sleep(0.02 * chance.random())
        return post(self, *given)

    quick = bits(run_threads(case, HERE))
    monkeypatch.setattr(Mail, "post", slow)
    assert all(bits(run_threads(case, HERE)) == quick for _ in range(2))


@pytest.mark.parametrize(
    ("mask", "world", "layout"),
    [
        ("causal", 2, "zigzag"),
        ("causal", 8, "zigzag"),
        ("causal documents", 8, "zigzag"),
        ("full", 4, "contiguous"),
        ("window", 4, "contiguous"),
    ],
)
def test_bf16_is_as_exact_as_on_one_rank(mask: str, world: int, layout: str) -> None:
    case = Case(mask, (world,), (8, 2), 510, layout, dtype=BF16, dim=64, dlse=False)
    # The last is the sinks' gradient: eight draws of rounding noise, too few to compare closely.
    assert max(error_over_one_rank(case, HERE)[:5]) <= 1.1


def test_gradients_of_keys_never_travel() -> None:
    case = Case("full", (2,), (4, 2), 40, "contiguous", (0, 1), dim=8)
    moved = moves(case.problem).transfers(backward=True)
    assert moved.received(0) == 20 * 2 * 4 * 8 * 8  # dq of its 20 rows, in two batch rows and four heads
    assert [each.tensors[3].shape[1] for each in run_threads(case, HERE)] == [0, 40]


@dataclass(frozen=True)
class Dealt(Layout):
    """Blocks dealt to the ranks one by one."""

    block: int

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        starts = range(rank * self.block, length, world * self.block)
        return union(Span(start, min(start + self.block, length)) for start in starts)


@settings(deadline=None, max_examples=150)
@given(compositions(longest=40), st.integers(1, 5), st.data())
def test_the_plan_knows_who_sees_whose_keys(case: Composition, world: int, data: st.DataObject) -> None:
    weights = st.tuples(*[st.integers(0, 3)] * world).filter(any)
    even = st.sampled_from([ZigZag(), Contiguous()])
    layouts = st.one_of(even, st.builds(Dealt, st.integers(1, 6)), st.builds(Uneven, weights))
    layout, kv_layout = data.draw(layouts), data.draw(layouts)
    made = meetings(case.mask, layout, kv_layout, world, case.length)
    bound, table = planned(case.mask, layout, kv_layout, world, case.length), case.table
    for source in range(world):
        queries, held = positions(layout, source, world, case), positions(kv_layout, source, world, case)
        for target in range(world):
            live = table[queries][:, positions(kv_layout, target, world, case)]
            rows = made.rows(source, target)
            assert [p for a, b in rows for p in range(a, b)] == queries[live.any(1)].tolist()
            assert all(a < b for a, b in rows)
            assert all(left.stop < right.start for left, right in pairwise(rows))
            assert made.areas[source, target] == live.sum()
        table_of_rank = table[queries].any(0)
        table_of_rank[held] = False
        assert bound.problem.lower_bound(source) == table_of_rank.sum() * 2 * 8 * 2


def positions(layout: Layout, rank: int, world: int, case: Composition) -> Tensor:
    found = [p for a, b in layout.spans(rank, world, case.length) for p in range(a, b)]
    return torch.tensor(found, dtype=torch.int64)


def planned(mask: Mask, layout: Layout, kv_layout: Layout, world: int, length: int) -> QueryMoves:
    """Plan for one batch row in bf16: 4 query heads, 1 KV head of 8."""
    return moves(Problem(parts_of(mask, 1, 1), 1, length, layout, kv_layout, (world,), 4, 1, 8, BF16))


def test_bytes_per_row_are_those_of_the_design() -> None:
    made = planned(Causal(), Contiguous(), Contiguous(), 2, 20)
    forward, backward = made.transfers(backward=False), made.transfers(backward=True)
    # Ten rows visit rank 0 and come home: (6 D + 4) H and (8 D + 8) H bytes for each, there and back.
    assert forward.bytes.sum() == 10 * (6 * 8 + 4) * 4
    assert backward.bytes.sum() == 10 * (8 * 8 + 8) * 4
    assert forward.received(0) == 10 * 8 * 2 * 4
    assert backward.received(1) == 10 * 8 * 4 * 4
    assert dist_attention_plan.holds(made.problem) == 2 * 10 * (8 * 8 + 8) * 4
    columns = (forward.depart, forward.arrive, forward.source, forward.target)
    assert np.stack(columns).T.tolist() == [[0, 1, 1, 0], [2, 3, 0, 1]]


def test_only_distances_that_somebody_needs_are_walked() -> None:
    window = planned(Causal() & Window(9), Contiguous(), Contiguous(), 8, 160)
    assert window.areas().shape == (4, 8)  # own, the right neighbour's rows, and two rounds in which results land
    moved = window.transfers(backward=False)
    assert set((moved.source - moved.target).tolist()) == {1, -1}
    assert set(moved.bytes[moved.source > moved.target].tolist()) == {9 * 4 * 8 * 2}  # nine rows look across
    apart = planned(Causal() & Documents(range(0, 161, 20)), Contiguous(), Contiguous(), 8, 160)
    assert apart.areas().tolist() == [[4 * 20 * 21 // 2] * 8]
    assert not apart.transfers(backward=True).bytes.size


@pytest.mark.parametrize("name", ["causal", "window documents", "heads", "heads documents"])
def test_areas_and_transfers_tell_of_the_same_rounds(name: str) -> None:
    case = Case(name, (4,), (4, 2), 150, kv_weights=(1, 2, 3, 4))
    made = moves(case.problem)
    areas, moved = made.areas(), made.transfers(backward=False)
    assert areas.sum() == sum(int(case.table(head).sum()) for head in range(2)) * 2
    assert moved.arrive.max() == len(areas) - 1
    assert (moved.depart + 1 == moved.arrive).all()
    if name == "causal":  # one part: its round 0 is own work, all others are for those whose queries came
        visited = {(int(t), int(r)) for t, r in np.argwhere(areas) if t}
        half = len(moved.bytes) // 2  # the way out, then the way home
        assert set(zip(moved.arrive[:half].tolist(), moved.target[:half].tolist(), strict=True)) == visited
        assert set(zip((moved.depart[half:] - 1).tolist(), moved.source[half:].tolist(), strict=True)) == visited


def test_a_million_tokens_on_64_ranks_are_planned_in_a_moment() -> None:
    chance = random.Random(5)
    packed = Documents([0, *sorted(chance.sample(range(1, 1 << 20), 299)), 1 << 20])
    began = time.perf_counter()
    for mask in (Causal() & (Window(4095) | Sinks(4)) & packed, Causal() & packed, Causal()):
        for layout in (ZigZag(), Dealt(256)):
            made = planned(mask, layout, layout, 64, 1 << 20)
            assert made.transfers(backward=True).bytes.sum() > 0
            assert made.areas().sum() > 0
    assert time.perf_counter() - began < 4  # a tenth where nothing else runs


def test_everything_can_be_done() -> None:
    assert all(dist_attention_plan.refuses(case.problem) is None for case in CASES)
