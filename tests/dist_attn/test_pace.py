"""Packed documents: ranks in step by time, not by piece; windows of rows hold; results and bytes are the ring's."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sharded_cases import Case, Strategy, check, run_threads

from ringspan.dist_attn import Balanced, Causal, Contiguous, Documents, Mask, Sinks, Window, ZigZag
from ringspan.dist_attn import pace as pace_module
from ringspan.dist_attn import schedule as schedule_module
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.schedule import Schedule, coupled_area, routed, schedule
from ringspan.dist_attn.strategies import TABLE

WORLD, LENGTH = 16, 33_500
EDGES = [0, 2600, 6100, 8100, 9100, 10800, 11800, 14500, 24500, 26000, 27500, 31700, 33500]
PACKED = Causal() & Documents(EDGES)
RING = Strategy(TABLE["ring"].moves, TABLE["ring"].executor)


def both(mask: Mask, layout: Layout) -> tuple[Schedule, Schedule]:
    ring, paced = routed(mask, layout, (WORLD,), LENGTH, layout)
    return ring, paced


@pytest.mark.parametrize("layout", [ZigZag(), Balanced(PACKED)], ids=["zigzag", "balanced"])
def test_ranks_wait_for_each_other_less(layout: Layout) -> None:
    ring, paced = both(PACKED, layout)
    assert schedule(PACKED, layout, WORLD, LENGTH).columns.table.tolist() == paced.columns.table.tolist()
    busiest = paced.areas.sum(0).max()
    assert busiest == ring.areas.sum(0).max()
    lost, lost_on_the_ring = (coupled_area(each) / busiest - 1 for each in (paced, ring))
    assert lost <= 0.2
    assert lost_on_the_ring > max(0.05, 2 * lost)


def test_pieces_on_their_way_take_time() -> None:
    """Step by step nobody would wait for ranks here, but for pieces that are sent one short step ahead."""
    mask = Causal() & Documents([0, 2474, 3688, 5042, 5220, 16384])
    ring, paced = routed(mask, Balanced(mask), (4,), 16384, Balanced(mask))
    chosen = schedule(mask, Balanced(mask), 4, 16384)
    assert chosen.columns.table.tolist() == paced.columns.table.tolist() != ring.columns.table.tolist()


def test_even_work_goes_round_the_ring() -> None:
    """Neighbours spare the links between nodes, so pieces go straight only where ranks would wait."""
    for mask, layout in ((Causal() & Documents([0, LENGTH]), ZigZag()), (PACKED, Contiguous())):
        ring, paced = both(mask, layout)
        assert ring.columns.table.tolist() != paced.columns.table.tolist()
        assert schedule(mask, layout, WORLD, LENGTH).columns.table.tolist() == ring.columns.table.tolist()


@pytest.mark.parametrize("shares", [1, 2, 4])
def test_keys_and_gradients_stay_within_their_windows(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace_module, "KEY_SHARES", shares)
    monkeypatch.setattr(pace_module, "GRADIENT_SHARES", 2 * shares)
    _, paced = both(PACKED, Balanced(PACKED))
    hops, share = paced.columns, -(-LENGTH // WORLD)
    ahead = lent = 0
    for rank in range(WORLD):
        for slot in range(paced.rounds):
            here = (hops.target == rank) & (hops.depart <= slot) & (hops.step >= slot)
            needed = here & ((hops.step == slot) | (hops.depart == hops.step - 1))  # now, or in the next slot
            assert hops.rows[here].sum() <= max(shares * share, hops.rows[needed].sum())
            ahead = max(ahead, int(hops.rows[here].sum()))
            lent_now = (hops.home == rank) & (hops.back <= slot) & (hops.add > slot)
            together = lent_now & (hops.add == hops.back + 1)  # no room for them: added at once
            assert hops.rows[lent_now].sum() <= max(2 * shares * share, hops.rows[together].sum())
            lent = max(lent, int(hops.rows[lent_now].sum()))
    assert ahead > shares * share // 2  # the windows are used
    assert lent > share


def test_slots_follow_the_work_before_a_piece() -> None:
    """By hand: four ranks, each with one document of its own but rank 3, whose queries see all of rank 2's keys too."""
    mask = Causal() & Documents([0, 1000, 2000, 4000])
    _, paced = routed(mask, Contiguous(), (4,), 4000, Contiguous())
    (hop,) = paced.hops
    own = 1000 * 1001 // 2
    assert (hop.owner, hop.target, hop.span) == (2, 3, (2000, 3000))
    assert hop.step == hop.back == int(own / ((own + 1000 * 1000) / 64)) == 21
    assert hop.depart == 0  # one share fits the window from the beginning
    assert hop.add == 22  # at the end


@pytest.fixture
def always_paced(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Take the paced way wherever there is one; ranks are threads of a fork, which inherits it."""
    monkeypatch.setattr(schedule_module, "NEIGHBOURS", 0.0)
    schedule.cache_clear()
    yield monkeypatch
    schedule.cache_clear()


CASES = [
    Case(mask="causal documents", mesh=(8,), heads=(8, 2), length=300),
    Case(mask="causal documents", mesh=(4,), heads=(6, 3), length=300, layout="contiguous", dtype=torch.float32),
    Case(mask="window documents", mesh=(8,), heads=(4, 1), length=777, layout="contiguous"),
    Case(mask="full documents", mesh=(8,), heads=(4, 4), length=555, keep=True),
    Case(mask="causal documents", mesh=(5,), heads=(4, 2), length=1200, kv_weights=(1, 4, 2, 0, 3)),
    Case(mask="heads documents", mesh=(4,), heads=(8, 4), length=300, layout="blocks", dlse=False),
]


@pytest.mark.parametrize("shares", [(1, 1), (4, 8)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_paced_ranks_compute_what_dense_attention_does(
    case: Case, shares: tuple[int, int], always_paced: pytest.MonkeyPatch
) -> None:
    always_paced.setattr(pace_module, "KEY_SHARES", shares[0])
    always_paced.setattr(pace_module, "GRADIENT_SHARES", shares[1])
    problem = case.problem
    made = schedule(problem.parts[0].mask, problem.layout, problem.world, case.length, problem.kv_layout)
    late = np.flatnonzero(made.columns.add > made.columns.back + 1)
    early = np.flatnonzero(made.columns.depart < made.columns.step - 1)
    assert len(early)
    assert len(late)
    check(case, RING, run_threads(case, RING))


def test_a_window_and_sinks_of_documents_are_paced_too() -> None:
    mask = Causal() & (Window(300) | Sinks(4)) & Documents(EDGES)
    for made in both(mask, Balanced(mask)):
        for rank in range(WORLD):
            assert made.received_rows(rank) == made.needed_rows(rank)
