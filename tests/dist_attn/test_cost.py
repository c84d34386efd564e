"""The cost model against arithmetic done by hand, and its choices."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ringspan.dist_attn import Causal, Contiguous, Documents, Full, Sinks, Window, ZigZag, plan
from ringspan.dist_attn.cost import Costs, Link, predict, typical
from ringspan.dist_attn.moves import Transfers
from ringspan.dist_attn.strategies import TABLE, check_strategy, choose

LINK = Link(latency=0.5, bandwidth=10.0)
UNIT = 4 * 2  # FLOPs of a live pair and head of 2 features, forward


def costs(*links: Link, per_node: int = 100, call: float = 0.0, forward: float = UNIT) -> Costs:
    return Costs(links or (LINK,), per_node, forward=forward, backward=forward, call=call)


def seconds(rows: list[tuple[int, int, int, int, int]], areas: list[list[int]], speeds: Costs) -> float:
    table = np.array(areas, dtype=np.int64)
    return predict(Transfers.of(rows), table, 2, speeds, backward=False).seconds


def test_computation_alone_is_the_busiest_ranks() -> None:
    assert seconds([], [[3, 1], [2, 5]], costs()) == 6.0  # nobody waits: rank 1 takes 1 + 5
    assert seconds([], [[3, 1], [2, 5]], costs(call=0.25)) == 6.5
    assert predict(Transfers.of([]), np.array([[1]]), 2, costs(), backward=True).seconds == 2.5


def test_a_transfer_hides_behind_the_round_before_its_arrival() -> None:
    late = [(0, 1, 0, 1, 100)]  # 0.5 s and 100 bytes at 10 bytes/s
    assert seconds(late, [[0, 0], [0, 1]], costs()) == 10.5 + 1
    assert seconds(late, [[20, 20], [0, 1]], costs()) == 21
    assert seconds(late, [[4, 4], [0, 1]], costs()) == 10.5 + 1


def test_a_transfer_waits_for_both_sides() -> None:
    assert seconds([(1, 2, 0, 1, 100)], [[7, 0], [0, 0], [0, 1]], costs()) == 7 + 10.5 + 1
    assert seconds([(1, 2, 0, 1, 100)], [[0, 7], [0, 0], [0, 1]], costs()) == 7 + 10.5 + 1


def test_what_leaves_together_shares_the_link_and_directions_do_not() -> None:
    both = [(0, 1, 0, 1, 100), (0, 1, 0, 2, 100)]
    assert seconds(both, [[0, 0, 0], [0, 0, 0]], costs()) == 20.5
    assert seconds([(0, 1, 0, 2, 100), (0, 1, 1, 2, 100)], [[0, 0, 0]] * 2, costs()) == 20.5
    crossing = [(0, 1, 0, 1, 100), (0, 1, 1, 0, 100)]
    assert seconds(crossing, [[0, 0], [0, 0]], costs()) == 10.5
    assert seconds(crossing, [[0, 0], [0, 0]], costs(Link(0.5, 10.0, duplex=False))) == 20.5
    ring = [(0, 1, 0, 1, 100), (0, 1, 1, 2, 100), (0, 1, 2, 0, 100)]
    assert seconds(ring, [[0, 0, 0]] * 2, costs(Link(0.5, 10.0, duplex=False))) == 10.5


def test_what_is_needed_sooner_goes_first() -> None:
    """Batches of one departure run in the order in which they are needed, and those of one arrival together."""
    rows = [(0, 2, 0, 2, 100), (0, 1, 0, 1, 100), (0, 2, 0, 3, 100)]
    found = predict(Transfers.of(rows), np.zeros((3, 4), dtype=np.int64), 2, costs(), backward=False)
    assert found.starts[1].tolist() == [10.5, 10.5, 0, 0]
    assert found.starts[2].tolist() == [30.5, 10.5, 30.5, 30.5]


def test_a_link_is_busy_until_what_left_before_has_gone() -> None:
    rows = [(0, 3, 0, 1, 100), (1, 2, 0, 1, 100)]
    assert seconds(rows, [[0, 0]] * 4, costs()) == 20.5


def test_a_link_is_free_while_a_transfer_waits_for_its_other_side() -> None:
    both = [(1, 2, 0, 1, 100), (1, 2, 0, 2, 100)]  # rank 1 comes seven seconds late
    assert seconds(both, [[0, 7, 0], [0, 0, 0], [0, 0, 0]], costs()) == 20.5


def test_nodes_are_joined_by_the_last_link() -> None:
    far = Link(1.0, 1.0)
    assert seconds([(0, 1, 0, 1, 100)], [[0] * 4] * 2, costs(LINK, far, per_node=2)) == 10.5
    assert seconds([(0, 1, 1, 2, 100)], [[0] * 4] * 2, costs(LINK, far, per_node=2)) == 101
    # Levels are independent: one does not wait for the other.
    assert seconds([(0, 1, 1, 2, 100), (0, 1, 1, 0, 100)], [[0] * 4] * 2, costs(LINK, far, per_node=2)) == 101


SHAPE = {"length": 4096, "heads": 8, "kv_heads": 4, "head_dim": 64, "dtype": torch.bfloat16}


@pytest.mark.parametrize("strategy", [name for name in TABLE if name not in ("double_ring", "ulysses_ring")])
@pytest.mark.parametrize("mask", [Causal(), Full(), Causal() & (Window(300) | Sinks(4))], ids=str)
def test_every_pass_takes_at_least_its_work_and_its_bytes(strategy: str, mask: Causal) -> None:
    made = plan(mask, ZigZag(), world=4, strategy=strategy, **SHAPE)  # pyright: ignore[reportArgumentType]
    slow = Costs((Link(0.0, 1e6),), 100, forward=1e9, backward=1e9)
    for backward in (False, True):
        found = made.seconds(slow, backward=backward)
        received = max(made.received_bytes(rank, backward=backward) for rank in range(4))
        work = max(made.areas.sum(0)) * (10 if backward else 4) * 64 / 1e9
        assert found.seconds >= received / 1e6
        assert found.compute == pytest.approx(work)
        assert found.seconds >= work
        assert found.exposed == pytest.approx(found.seconds - found.compute)
        assert made.areas.sum(0).tolist() == made.backward_areas.sum(0).tolist()


def test_the_last_gradients_hide_behind_the_ranks_own_keys() -> None:
    """Where every step's computation can hide its transfers, hardly anything is exposed, backward too."""
    made = plan(Full(), Contiguous(), world=4, strategy="ring", **SHAPE)  # pyright: ignore[reportArgumentType]
    rate = 1e9
    seconds_of_a_step = made.areas[1].max() * 10 * 64 / rate
    speeds = Costs((Link(0.0, 8 * int(made.backward.bytes.max()) / seconds_of_a_step),), 100, rate, rate)
    for backward in (False, True):
        found = made.seconds(speeds, backward=backward)
        assert found.exposed <= 0.02 * found.compute
    without = predict(made.backward, made.areas, 64, speeds, backward=True)
    assert without.exposed > 2 * made.seconds(speeds, backward=True).exposed


def test_auto_takes_what_is_predicted_to_be_fastest_and_says_why() -> None:
    problem = plan(Causal(), ZigZag(), world=4, strategy="ring", **SHAPE).problem  # pyright: ignore[reportArgumentType]
    for speeds in (typical("cpu"), typical("cuda"), costs(Link(1e-9, 1e15), forward=1e9)):
        name, why = choose("auto", problem, speeds)
        assert name in TABLE
        assert why.startswith(f"{name}: ")
        assert speeds.source in why
    assert choose("ring", problem, typical("cpu")) == ("ring", "ring: asked for")
    with pytest.raises(ValueError, match="strategy: 'double_ring' needs a 2-D mesh"):
        choose("double_ring", problem, typical("cpu"))
    with pytest.raises(ValueError, match="strategy: 'teleport' is not one of auto, ring"):
        check_strategy("teleport")


def test_auto_keeps_within_the_bytes_it_may_hold() -> None:
    big = plan(Causal(), ZigZag(), world=64, strategy="ring", **{**SHAPE, "length": 1 << 20}).problem  # pyright: ignore[reportArgumentType]
    for held in (1 << 22, 1 << 34):
        name, _ = choose("auto", big, Costs((Link(1e-4, 1e10),), 100, 1e14, 1e14, gather_bytes=held))
        assert TABLE[name].holds(big) <= held or held == 1 << 22


def test_documents_within_ranks_move_nothing_whatever_the_strategy_costs() -> None:
    made = plan(Causal() & Documents([0, 1024, 2048, 3072, 4096]), Contiguous(), world=4, strategy="auto", **SHAPE)  # pyright: ignore[reportArgumentType]
    assert sum(made.received_bytes(rank) for rank in range(4)) == 0


def test_costs_are_saved_and_read(tmp_path: Path) -> None:
    path = tmp_path / "links.json"
    typical("cuda").save(path)
    assert Costs.load(path) == typical("cuda")
    path.write_text(json.dumps({"links": []}))
    with pytest.raises(ValueError, match="costs: .*ranks_per_node"):
        Costs.load(path)
