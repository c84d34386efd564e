"""All-gather attention against dense attention in float64: out, lse, every gradient, and the bytes of the plan."""

import time
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from sharded_cases import Case, Strategy, check, error_over_one_rank, one_rank, run_processes, run_threads, truth, whole
from virtual_ranks import Mail, apart, threads

from dense import relative_rms
from ringspan.dist_attn import gather, gather_plan
from ringspan.dist_attn.executor import Wiring
from ringspan.dist_attn.layout import ZigZag
from ringspan.dist_attn.local import Alone
from ringspan.kernels.mask import Causal, Documents
from ringspan.kernels.parts import parts_of

WHOLE = Strategy(gather_plan.moves, gather.executor)
ONE = Strategy(partial(gather_plan.moves, head_group=1), partial(gather.executor, head_group=1))
THREE = Strategy(partial(gather_plan.moves, head_group=3), partial(gather.executor, head_group=3))
F32, BF16 = torch.float32, torch.bfloat16

CASES = [
    (WHOLE, Case("causal", (2,), (8, 2), 37)),
    (ONE, Case("window", (3,), (6, 2), 41, "contiguous")),
    (ONE, Case("heads documents", (4,), (6, 3), 37, "zigzag")),
    (WHOLE, Case("heads", (3,), (4, 4), 29, "blocks", sinks=False)),
    (WHOLE, Case("full documents", (4,), (4, 1), 32, "contiguous", dlse=False)),
    (ONE, Case("groups documents", (2,), (4, 2), 30, "zigzag", dtype=F32)),
    (THREE, Case("dilated", (3,), (8, 4), 50, "blocks", dtype=F32)),
    (WHOLE, Case("both sides", (4,), (4, 2), 40, "contiguous", sinks=False, dlse=False)),
    (ONE, Case("causal", (4,), (4, 2), 3, "zigzag")),  # a rank without tokens
    (WHOLE, Case("window documents", (3,), (4, 2), 38, "zigzag", kv_weights=(5, 0, 1), keep=True)),
    (ONE, Case("causal", (2,), (4, 2), 90, "blocks", kv_weights=(1, 3), dtype=F32)),
    (WHOLE, Case("few", (4,), (4, 2), 31, "contiguous", dtype=F32)),
    (ONE, Case("heads", (2,), (4, 2), 31, first_kv_head=1, total_kv_heads=4)),
    (WHOLE, Case("causal", (1,), (4, 2), 31, "contiguous")),
    (ONE, Case("window", (8,), (8, 2), 67, "zigzag")),
    (WHOLE, Case("causal", (2, 2), (4, 2), 35, "zigzag")),
]


@pytest.mark.parametrize(("strategy", "case"), CASES, ids=lambda x: x.name if isinstance(x, Case) else "")
def test_ranks_compute_what_dense_attention_does(strategy: Strategy, case: Case) -> None:
    check(case, strategy, run_threads(case, strategy))


@pytest.mark.parametrize(("strategy", "case"), [CASES[2], CASES[9]], ids=["four ranks", "three, uneven keys"])
def test_gloo_processes_do_too(strategy: Strategy, case: Case) -> None:
    check(case, strategy, run_processes(case, strategy))


@pytest.mark.parametrize("mask", ["causal", "window documents"])
def test_bf16_is_as_exact_as_on_one_rank(mask: str) -> None:
    case = Case(mask, (4,), (4, 2), 257, dtype=BF16, dim=32)
    assert max(error_over_one_rank(case, ONE)[:5]) <= 1.1


def test_gradients_on_a_narrow_wire_are_summed_in_fp32() -> None:
    case = Case("causal", (8,), (4, 2), 160, dtype=F32, wire=BF16)
    results = run_threads(case, ONE)
    exact, found = truth(case, case.inputs), whole(case, results)
    assert found[3].dtype == F32
    for index in (3, 4):  # one rounding of each rank's part; summed in bf16 it would be several times that
        assert 1e-4 < relative_rms(found[index], exact[index]) < 2.5e-3
    planned = ONE.moves(case.problem)
    wide = ONE.moves(case._replace(wire=None).problem)
    for rank, result in enumerate(results):
        both = [plan.transfers(backward=way).received(rank) for plan in (planned, wide) for way in (False, True)]
        assert result.received == (both[0], both[0] + both[1])
        assert both[3] - both[2] == 2 * (both[1] - both[0]) > 0


def test_keys_that_nobody_sees_change_nothing() -> None:
    case = Case("few", (3,), (4, 2), 31, "contiguous")
    given = case.inputs
    other = {name: x.clone() for name, x in given.items()}
    for name in ("k", "v"):
        other[name][:, 3:] += 100
    found, changed = (whole(case, run_threads(case, ONE, each)) for each in (given, other))
    assert all(torch.equal(a, b) for a, b in zip(found, changed, strict=True))
    assert not found[3][:, 3:].any()
    assert found[4][:, :3].any()


def test_one_group_is_computed_while_the_next_one_travels(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    gathers, computes = Mail.all_gather, Alone.forward

    def all_gather(self: Mail, local: torch.Tensor, step: str) -> Any:
        assert local.shape == (12, 2, 2, 1, 8)  # the largest share of 23 tokens; K and V; batch; one head of three
        if self.rank == 0:
            seen.append(step)
        return gathers(self, local, step)

    def forward(self: Alone, *tensors: torch.Tensor) -> None:
        if self.queries == case.problem.spans(0):
            seen.append("compute")
        computes(self, *tensors)

    case = Case("causal", (2,), (6, 3), 23, "contiguous")
    monkeypatch.setattr(Mail, "all_gather", all_gather)
    monkeypatch.setattr(Alone, "forward", forward)

    problem = case.problem

    def recorded() -> list[str]:
        threads(case.mesh, lambda wiring, traffic: one_rank(case, ONE, case.inputs, wiring, traffic, problem))
        return seen

    events = apart(recorded)
    steps = [f"forward gather of KV heads {i}:{i + 1}" for i in range(3)]
    assert events[:6] == [steps[0], steps[1], "compute", steps[2], "compute", "compute"]


def test_memory_bounds_the_heads_gathered_at_a_time() -> None:
    problem = Case("causal", (4,), (16, 8), 4096, dtype=BF16, dim=64, batch=1).problem
    whole_bytes = 2 * 4096 * 8 * 64 * 2
    assert whole_bytes < gather_plan.BUDGET
    assert gather_plan.head_groups(problem) == (range(8),)
    longer = Case("causal", (4,), (16, 8), 4096 * 24, dtype=BF16, dim=64, batch=1).problem
    groups = gather_plan.head_groups(longer)  # 24 MiB a head: two of them
    assert groups == (range(2), range(2, 4), range(4, 6), range(6, 8))
    assert gather_plan.head_groups(problem, 3) == (range(3), range(3, 6), range(6, 8))
    assert gather_plan.holds(problem) == 2 * whole_bytes
    assert gather_plan.holds(problem, 3) == 3 * whole_bytes * 3 // 8
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"head_group: {wrong} KV heads.*1 to the 8"):
            gather_plan.head_groups(problem, wrong)
    with pytest.raises(ValueError, match="head_group: 9"):
        gather.executor(problem, Wiring(0), None, 1.0, head_group=9)  # pyright: ignore[reportArgumentType]


def test_the_plan_counts_every_live_pair_once() -> None:
    case = Case("heads documents", (4,), (6, 3), 37)
    areas = ONE.moves(case.problem).areas(backward=True)
    live = sum(int(case.table(head).sum()) for head in range(3)) * 2
    assert areas.shape == (6, 4)
    assert areas.sum() == live
    assert not areas[[0, 4, 5]].any()
    for backward in (False, True):
        found = ONE.moves(case.problem).transfers(backward=backward)
        assert (found.depart < found.arrive).all()
        assert found.arrive.max() < len(areas)


def test_the_lower_bound_is_what_queries_see_elsewhere() -> None:
    case = Case("window documents", (3,), (4, 2), 38, kv_weights=(5, 0, 1))
    problem = case.problem
    for rank in range(3):
        rows = [p for a, b in problem.spans(rank) for p in range(a, b)]
        held = [p for a, b in problem.kv_spans(rank) for p in range(a, b)]
        seen = case.table(0)[:, rows].any(1)
        seen[:, held] = False
        assert case.problem.lower_bound(rank) == int(seen.sum()) * 2 * 2 * 8 * 8  # KV heads; K and V; dim; bytes


def test_a_million_tokens_are_planned_quickly() -> None:
    edges = np.sort(np.random.default_rng(0).choice(np.arange(1, 1 << 20), 299, replace=False)).tolist()
    mask = Causal() & Documents([0, *edges, 1 << 20])
    case = Case("causal", (64,), (32, 8), 1 << 20, dtype=BF16, dim=128, batch=1)
    problem = case.problem
    problem = type(problem)(**{**vars(problem), "parts": parts_of(mask, 1, 8), "layout": ZigZag()})
    start = time.perf_counter()
    plan = gather_plan.moves(problem)
    areas, moved = plan.areas(), plan.transfers(backward=True)
    took = time.perf_counter() - start
    assert areas.sum() == 32 * sum(
        (b - a) * (b - a + 1) // 2 for a, b in zip([0, *edges], [*edges, 1 << 20], strict=True)
    )
    assert moved.received(5) == 63 * (1 << 14) * 8 * 128 * 2 * (2 + 4)
    assert took < 2, f"{took:.2f} s"
