"""By which hops pieces travel: halves both ways, halos, trees for sink tokens, nodes entered once."""

from ringspan.dist_attn import Causal, Contiguous, Documents, Full, Sinks, Span, Window, ZigZag
from ringspan.dist_attn.schedule import schedule


def test_causal_zigzag_saves_a_quarter_and_balances() -> None:
    world, length = 8, 8 * 1024
    plan_ = schedule(Causal(), ZigZag(), world, length)
    rows = sum(plan_.received_rows(rank) for rank in range(world))
    assert rows == (world - 1) * length * 3 // 4
    areas = [plan_.area(rank) for rank in range(world)]
    assert max(areas) / (sum(areas) / world) <= 1.02
    # First halves go from neighbour to neighbour; second halves start at rank 0, past whom nobody needs them.
    assert all((hop.target - hop.source) % world == 1 or hop.target == 0 for hop in plan_.hops)
    assert all(hop.source == hop.owner for hop in plan_.hops if hop.target == 0 and hop.source != world - 1)


def test_causal_zigzag_works_alike_in_every_step_of_every_rank() -> None:
    made = schedule(Causal(), ZigZag(), 8, 8 * 1024)
    assert made.areas.shape == (8, 8)
    assert set(made.areas[1:].flatten().tolist()) == {2 * 512 * 512}


def test_a_window_is_a_halo_from_the_left_and_sinks_come_from_the_first_rank() -> None:
    plan_ = schedule(Causal() & (Window(10) | Sinks(4)), Contiguous(), 4, 400)
    for rank in range(1, 4):
        came = {(hop.owner, hop.span) for hop in plan_.hops if hop.target == rank}
        halo = (rank - 1, Span(100 * rank - 10, 100 * rank))
        assert came == {halo, (0, Span(0, 4))}


def test_documents_within_ranks_cost_no_bytes() -> None:
    plan_ = schedule(Causal() & Documents([0, 16, 32, 48, 64]), Contiguous(), 4, 64)
    assert not plan_.hops


def test_a_double_ring_enters_a_node_once_for_a_piece() -> None:
    made = schedule(Full(), Contiguous(), (4, 2), 8000)
    for piece in {hop.piece for hop in made.hops}:
        mine = [hop for hop in made.hops if hop.piece == piece]
        entered = sorted(hop.target // 2 for hop in mine if hop.source // 2 != hop.target // 2)
        returned = sorted(hop.target // 2 for hop in mine if hop.home // 2 != hop.target // 2)
        others = sorted({0, 1, 2, 3} - {piece[0] // 2})
        assert entered == returned == others


def test_what_every_rank_needs_goes_round_both_ways() -> None:
    made = schedule(Full(), Contiguous(), 5, 5000)
    ways = {(hop.target - hop.source) % 5: 0 for hop in made.hops}
    for hop in made.hops:
        ways[(hop.target - hop.source) % 5] += hop.span.size
    assert ways == {1: 4 * 2500, 4: 4 * 2500}


def test_a_few_rows_that_all_need_take_as_many_steps_as_the_logarithm() -> None:
    made = schedule(Causal() & (Window(10) | Sinks(4)), Contiguous(), 64, 64 * 200)
    sinks = [hop for hop in made.hops if hop.span == Span(0, 4)]
    assert len(sinks) == 63  # each rank once
    assert max(hop.step for hop in sinks) == 6
    assert sum(hop.home == 0 for hop in sinks) == 6  # summed on the way, not all at the owner


def test_the_rest_of_a_ranks_own_keys_hides_the_halos_gradients_and_does_not_wait_for_sink_rows() -> None:
    made = schedule(Causal() & (Window(300) | Sinks(4)), Contiguous(), 4, 4000)
    assert made.columns.back.max() == 3  # a few sink rows come to the third rank
    assert made.half_after.tolist() == [1, 1, 1, 1]
    for rank in range(4):
        first, second = made.own_halves(rank)
        assert made.backward_areas[0, rank] == first.area
        assert made.backward_areas[2, rank] - made.areas[2:3, rank].sum() == second.area


def test_gradients_are_summed_along_a_chain_and_come_home_once() -> None:
    made = schedule(Full(), Contiguous(), 5, 5000)
    for piece in {hop.piece for hop in made.hops}:
        mine = [hop for hop in made.hops if hop.piece == piece]
        assert len(mine) == 4
        assert [hop.home == hop.owner for hop in mine].count(True) == 1
