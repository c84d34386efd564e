"""The strategies by name: how each plans, runs, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

from ringspan.dist_attn import (
    dist_attention,
    dist_attention_plan,
    gather,
    gather_plan,
    ring,
    ring_plan,
    ulysses,
    ulysses_plan,
)
from ringspan.dist_attn.cost import Costs, predict
from ringspan.dist_attn.executor import Executor, Wiring
from ringspan.dist_attn.moves import Moves
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.select import Backend


class Strategy(NamedTuple):
    """One way to exchange a sharded sequence.

    ``moves`` plans on integers; ``executor`` makes what runs on one rank; ``refuses`` gives one line where this
    strategy cannot serve the problem; ``holds`` the bytes of other ranks' keys and values that a rank has at once.
    """

    moves: Callable[[Problem], Moves]
    executor: Callable[[Problem, Wiring, Backend, float], Executor]
    refuses: Callable[[Problem], str | None]
    holds: Callable[[Problem], int]


def _anything(problem: Problem) -> str | None:
    del problem
    return None


def _needs_mesh(problem: Problem) -> str | None:
    if len(problem.mesh) == 2:
        return None
    return (
        f"needs a 2-D mesh (nodes, ranks in a node), not a flat group of {problem.world} ranks; "
        "give group=init_device_mesh(device, (nodes, ranks in a node))"
    )


def _two_messages(problem: Problem) -> int:
    """The ring holds the keys of this step and of the next (more where documents are paced: ``pace.KEY_SHARES``)."""
    share = -(-problem.length // problem.world)
    return 4 * problem.batch * share * problem.kv_heads * problem.head_dim * problem.dtype.itemsize


TABLE: dict[str, Strategy] = {
    "ring": Strategy(ring_plan.moves, ring.executor, _anything, _two_messages),
    "double_ring": Strategy(
        partial(ring_plan.moves, double=True),
        partial(ring.executor, double=True),
        _needs_mesh,
        _two_messages,
    ),
    "all_gather": Strategy(gather_plan.moves, gather.executor, _anything, gather_plan.holds),
    "ulysses": Strategy(ulysses_plan.moves, ulysses.executor, ulysses_plan.refuses, ulysses_plan.holds),
    "ulysses_ring": Strategy(
        partial(ulysses_plan.moves, inner_moves=ring_plan.moves),
        partial(ulysses.executor, inner_executor=ring.executor),
        partial(ulysses_plan.refuses, inner_refuses=_anything),
        partial(ulysses_plan.holds, inner_holds=_two_messages),
    ),
    "dist_attention": Strategy(
        dist_attention_plan.moves,
        dist_attention.executor,
        dist_attention_plan.refuses,
        dist_attention_plan.holds,
    ),
}
NAMES = ("auto", *TABLE)
MARGIN = 0.05  # the ring holds the least and sends the least: another strategy must be predicted this much faster


def check_strategy(strategy: str) -> None:
    """Raise ValueError for a strategy that does not exist."""
    if strategy not in NAMES:
        raise ValueError(f"strategy: {strategy!r} is not one of {', '.join(NAMES)}")


def choose(strategy: str, problem: Problem, costs: Costs) -> tuple[str, str]:
    """Return the strategy to take and one line of why; the same on every rank, from plain values.

    Raises:
        ValueError: if the strategy that was asked for cannot serve the problem.
    """
    check_strategy(strategy)
    if strategy == "auto":
        return _cheapest(problem, costs)
    if refusal := TABLE[strategy].refuses(problem):
        raise ValueError(f"strategy: {strategy!r} {refusal}")
    return strategy, f"{strategy}: asked for"


@lru_cache(maxsize=256)
def _cheapest(problem: Problem, costs: Costs) -> tuple[str, str]:
    """Take the strategy whose forward and backward pass are predicted to take least; earlier in the table on a tie."""
    if problem.world == 1:
        return "ring", "ring: one rank holds all tokens"
    seconds: dict[str, float] = {}
    for name, each in TABLE.items():
        if each.refuses(problem):
            continue
        if name == "ring" or each.holds(problem) <= costs.gather_bytes:
            seconds[name] = sum(seconds_of(each.moves(problem), problem, costs))
    best = min(seconds, key=lambda name: seconds[name] * (1 if name == "ring" else 1 + MARGIN))
    others = ", ".join(f"{name} {1e3 * time:.2f}" for name, time in seconds.items() if name != best)
    return best, f"{best}: {1e3 * seconds[best]:.2f} ms a layer ({others or 'no other fits'}; {costs.source})"


def seconds_of(moves: Moves, problem: Problem, costs: Costs) -> tuple[float, float]:
    """Return the predicted seconds of the forward and of the backward pass."""
    forward, backward = (
        predict(moves.transfers(backward=way), moves.areas(backward=way), problem.head_dim, costs, backward=way).seconds
        for way in (False, True)
    )
    return forward, backward
