"""Ulysses attention against dense attention in float64: out, lse, every gradient, and the bytes of the plan."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from sharded_cases import (
    LAYOUTS,
    Case,
    Strategy,
    check,
    error_over_one_rank,
    run_processes,
    run_threads,
    whole,
)
from virtual_ranks import apart, threads

from ringspan.dist_attn import gather, gather_plan, local, ring, ring_plan, ulysses, ulysses_plan
from ringspan.dist_attn.executor import Wiring
from ringspan.dist_attn.heads import deal
from ringspan.dist_attn.ulysses_plan import Merged, rows_of
from ringspan.kernels.attention import attend
from ringspan.kernels.select import select

PLAIN = Strategy(ulysses_plan.moves, ulysses.executor)
F32, BF16 = torch.float32, torch.bfloat16


def across(moves: Callable[..., Any], executor: Callable[..., Any]) -> Strategy:
    return Strategy(
        partial(ulysses_plan.moves, inner_moves=moves),
        partial(ulysses.executor, inner_executor=executor),
    )


HYBRIDS = {
    "local": across(local.moves, local.executor),
    "gather": across(gather_plan.moves, gather.executor),
    "ring": across(ring_plan.moves, ring.executor),
}

CASES = [
    (PLAIN, Case("causal", (2,), (8, 2), 37)),
    (PLAIN, Case("window", (3,), (6, 2), 41, "contiguous")),
    (PLAIN, Case("heads documents", (4,), (6, 3), 37, "zigzag")),
    (PLAIN, Case("heads", (4,), (6, 2), 37, "zigzag")),  # places with one and with two query heads
    (PLAIN, Case("heads", (3,), (4, 4), 29, "blocks", sinks=False)),
    (PLAIN, Case("full documents", (4,), (4, 1), 33, "contiguous", dlse=False)),  # every place uses the one KV head
    (PLAIN, Case("groups documents", (2,), (4, 2), 30, "zigzag", dtype=F32)),
    (PLAIN, Case("dilated", (3,), (8, 4), 50, "blocks", dtype=F32)),
    (PLAIN, Case("both sides", (4,), (4, 2), 40, "contiguous", sinks=False, dlse=False)),
    (PLAIN, Case("causal", (4,), (4, 2), 3, "zigzag")),  # a rank without tokens
    (PLAIN, Case("window documents", (3,), (4, 2), 38, "zigzag", kv_weights=(5, 0, 1), keep=True)),
    (PLAIN, Case("causal", (2,), (4, 2), 90, "blocks", kv_weights=(1, 3), dtype=F32)),
    (PLAIN, Case("few", (4,), (4, 2), 31, "contiguous", dtype=F32)),
    (PLAIN, Case("heads", (2,), (4, 2), 31, first_kv_head=1, total_kv_heads=4)),
    (PLAIN, Case("causal", (1,), (4, 2), 31, "contiguous")),
    (PLAIN, Case("window", (8,), (8, 2), 67, "zigzag")),
    (PLAIN, Case("heads", (2,), (9, 3), 35, "zigzag")),  # a place with 3 and 1 query heads of two KV heads
    (PLAIN, Case("causal", (2, 2), (4, 2), 35, "zigzag")),
]
MESHES = [
    ("local", Case("window documents", (1, 2), (4, 2), 35, "zigzag")),
    ("gather", Case("window documents", (2, 2), (6, 2), 39, "zigzag")),
    ("gather", Case("causal", (2, 3), (4, 4), 50, "blocks", keep=True, dtype=F32)),
    ("ring", Case("heads documents", (2, 2), (4, 2), 39, "zigzag")),
    ("ring", Case("causal", (4, 2), (4, 1), 50, "contiguous", keep=True, dtype=F32)),
    ("ring", Case("window", (2, 1), (4, 1), 50, "contiguous")),
    ("ring", Case("window", (2, 2), (4, 2), 50, "zigzag", kv_weights=(2, 1, 0, 3))),
    ("ring", Case("causal", (2, 2), (4, 2), 3, "zigzag")),
]


def name_of(value: object) -> str:
    return value.name if isinstance(value, Case) else value if isinstance(value, str) else ""


@pytest.mark.parametrize(("strategy", "case"), CASES, ids=name_of)
def test_ranks_compute_what_dense_attention_does(strategy: Strategy, case: Case) -> None:
    check(case, strategy, run_threads(case, strategy))


@pytest.mark.parametrize(("name", "case"), MESHES, ids=name_of)
def test_between_nodes_another_strategy_attends(name: str, case: Case) -> None:
    check(case, HYBRIDS[name], run_threads(case, HYBRIDS[name]))


@pytest.mark.parametrize(
    ("strategy", "case"), [CASES[3], CASES[10], (HYBRIDS["ring"], MESHES[3][1])], ids=["four", "three", "two by two"]
)
def test_gloo_processes_do_too(strategy: Strategy, case: Case) -> None:
    check(case, strategy, run_processes(case, strategy))


@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("mesh", [(4,), (2, 2)], ids=str)
def test_bf16_is_as_exact_as_on_one_rank(mesh: tuple[int, ...], sinks: bool) -> None:
    case = Case("window documents", mesh, (4, 2), 257, dtype=BF16, dim=32, sinks=sinks)
    strategy = HYBRIDS["ring"] if len(mesh) == 2 else PLAIN
    assert max(error_over_one_rank(case, strategy)) <= 1.1


def test_the_kernel_may_round_as_on_one_rank() -> None:
    """Each row meets all its keys in one call, so the bf16 operator serves, bit for bit as with all tokens here."""
    case = Case("causal", (4,), (8, 2), 129, dtype=BF16, dim=32, sinks=False)
    given = case.inputs
    out, lse = attend(given["q"], given["k"], given["v"], mask=case.built, out_dtype=BF16)
    found = whole(case, run_threads(case, PLAIN))
    assert torch.equal(found[0], out)
    assert torch.equal(found[1], lse)


def test_results_that_sinks_join_come_home_exact() -> None:
    case = Case("window", (2,), (4, 2), 257, dtype=BF16, dim=32)
    assert error_over_one_rank(case, PLAIN)[0] <= 1.1
    problems = case._replace(sinks=False).problem, case.problem
    bare, exact = (PLAIN.moves(problem).transfers(backward=False).received(0) for problem in problems)
    assert exact - bare == 2 * 129 * 2 * 32 * 2  # batch, rows, heads from the other rank, dim, bytes


def test_keys_that_nobody_sees_change_nothing() -> None:
    case = Case("few", (3,), (4, 2), 31, "contiguous")
    given = case.inputs
    other = {name: x.clone() for name, x in given.items()}
    for name in ("k", "v"):
        other[name][:, 3:] += 100
    found, changed = (whole(case, run_threads(case, PLAIN, each)) for each in (given, other))
    assert all(torch.equal(a, b) for a, b in zip(found, changed, strict=True))
    assert not found[3][:, 3:].any()
    assert found[4][:, :3].any()


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (6, 2), (6, 3), (8, 8), (9, 3), (24, 4), (32, 8)], ids=str)
def test_each_query_head_is_dealt_once_and_meets_its_kv_head(heads: tuple[int, int]) -> None:
    total, groups = heads
    for ranks in range(1, total + 1):
        dealt = deal(total, groups, ranks)
        assert [head for each in dealt for head in each.queries] == list(range(total))
        sizes = {len(each.queries) for each in dealt}
        assert max(sizes) - min(sizes) <= (total % ranks > 0)
        for each in dealt:
            ratio, rest = divmod(len(each.queries), len(each.local))
            assert rest == 0
            met = [each.local[at // ratio] for at in range(len(each.queries))]
            assert met == [head // (total // groups) for head in each.queries]
            assert sorted(set(met)) == list(each.keys) == sorted([*each.sole, *each.shared])
            assert each.shared == tuple(h for h in each.keys if sum(h in other.keys for other in dealt) > 1)


def test_bytes_are_those_of_heads_and_rows_alone() -> None:
    """By hand: 8 query heads of 2 KV heads on 4 ranks, 40 tokens, bf16, D 16. Two ranks share each KV head."""
    case = Case("causal", (4,), (8, 2), 40, "contiguous", dtype=BF16, dim=16, batch=1, sinks=False)
    plan = PLAIN.moves(case.problem)
    rows = 3 * 10
    forward = rows * (2 + 1 + 1) * 16 * 2 + 10 * 6 * (16 * 2 + 4)  # q, k, v of 30 rows; out, lse of 6 heads
    slopes = rows * 2 * (16 * 2 + 4 + 4)  # dout, lse, delta
    home = 10 * 6 * 16 * 2 + 10 * 3 * 2 * 16 * 4  # dq; dk and dv of three other ranks' halves, in fp32
    assert [plan.transfers(backward=way).received(1) for way in (False, True)] == [forward, slopes + home]
    again = PLAIN.moves(replace(case.problem, keep=True)).transfers(backward=True).received(1)
    assert again == slopes + home + rows * 4 * 16 * 2
    narrow = PLAIN.moves(replace(case.problem, wire=BF16)).transfers(backward=True).received(1)
    assert slopes + home - narrow == 10 * 3 * 2 * 16 * 2


@pytest.mark.parametrize("name", ["plain", "gather", "ring"])
def test_the_plan_counts_every_live_pair_once_in_rounds_that_fit(name: str) -> None:
    case = Case("heads documents", (2, 2), (6, 3), 37)
    plan = (PLAIN if name == "plain" else HYBRIDS[name]).moves(case.problem)
    for backward in (False, True):
        areas, found = plan.areas(backward=backward), plan.transfers(backward=backward)
        assert areas.sum() == sum(int(case.table(head).sum()) for head in range(3)) * 2
        assert not areas[[0, -2, -1]].any()
        assert (found.depart < found.arrive).all()
        assert found.arrive.max() == len(areas) - 1
        assert (found.source != found.target).all()


def test_nothing_is_kept_for_a_backward_that_may_not_have_it() -> None:
    case = Case("causal", (2,), (8, 2), 37)

    def rest(case: Case) -> list[list[int]]:
        kernel, problem = select(torch.device("cpu"), case.dtype, case.dim), case.problem

        def rank(wiring: Wiring, _: Any) -> Any:
            q, k, v = (case.inputs[name][:, :18] for name in "qkv")
            rows = problem.layout.share(wiring.rank, 2, 37)
            q, k, v = (torch.zeros(2, rows, x.shape[2], 8, dtype=x.dtype) for x in (q, k, v))
            return ulysses.executor(problem, wiring, kernel, 1.0).forward(q, k, v).rest

        return [list(x.shape) for x in threads(case.mesh, rank)[0]]

    assert apart(rest, case) == [[2, 37, 4, 8], [2, 37, 1, 8], [2, 37, 1, 8]]
    assert apart(rest, case._replace(keep=True)) == []


def test_what_cannot_be_dealt_is_refused_with_the_numbers() -> None:
    few = Case("causal", (8,), (4, 2)).problem
    assert "4 query heads to 8 ranks" in (ulysses_plan.refuses(few) or "")
    with pytest.raises(ValueError, match="ulysses: cannot deal 4 query heads to 8 ranks"):
        ulysses_plan.moves(few)
    assert ulysses_plan.refuses(replace(few, mesh=(4,))) is None
    assert "2-D mesh" in (ulysses_plan.refuses(replace(few, mesh=(4,)), lambda _: None) or "")
    assert ulysses_plan.refuses(replace(few, mesh=(2, 4)), lambda _: None) is None
    assert "4 query heads to 8 ranks" in (ulysses_plan.refuses(replace(few, mesh=(2, 8)), lambda _: None) or "")
    assert ulysses_plan.refuses(replace(few, mesh=(2, 4)), lambda inner: f"no {inner.mesh}") == "no (2,)"


def test_what_a_rank_holds_is_the_keys_of_its_heads_twice() -> None:
    problem = Case("causal", (2, 2), (4, 2), 40, batch=1).problem
    assert ulysses_plan.holds(problem) == 2 * 2 * 40 * 1 * 8 * 8  # copies, K and V, rows, KV heads, dim, bytes
    assert ulysses_plan.holds(problem, lambda inner: inner.world) == 2 * 2 * 20 * 1 * 8 * 8 + 2


@pytest.mark.parametrize("layout", ["zigzag", "contiguous", "blocks"])
def test_a_node_holds_its_ranks_rows_in_ascending_order(layout: str) -> None:
    for length in (2, 37, 96):
        for node in range(2):
            held = Merged(LAYOUTS[layout], 3).spans(node, 2, length)
            assert all(a.stop < b.start for a, b in pairwise(held))
            positions = [p for a, b in held for p in range(a, b)]
            found = {}
            for rank in range(node * 3, node * 3 + 3):
                mine = [p for a, b in LAYOUTS[layout].spans(rank, 6, length) for p in range(a, b)]
                places = [p for a, b in rows_of(LAYOUTS[layout], 6, length, rank, 3) for p in range(a, b)]
                found |= dict(zip(places, mine, strict=True))
            assert [found[place] for place in range(len(positions))] == positions
