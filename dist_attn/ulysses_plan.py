"""Ulysses: heads are exchanged for sequence, so that a rank has all rows of a few heads. Integers only.

On a mesh (nodes, places in a node) the exchange is within a node; the rows of a node's heads are then one rank's share
of an inner problem over the nodes, which another strategy plans. With one node there is nothing left to exchange.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from typing_extensions import override

from ringspan.dist_attn import local
from ringspan.dist_attn.heads import Deal, deal, parts_for
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.moves import Integers, Moves, Transfers
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.mask import Span, union

InnerMoves = Callable[[Problem], Moves]


@dataclass(frozen=True)
class Merged(Layout):
    """A node holds what its ranks hold.

    Args:
        layout: of the ranks; inner: how many a node has.
    """

    layout: Layout
    inner: int

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        ranks = range(rank * self.inner, (rank + 1) * self.inner)
        return union(span for one in ranks for span in self.layout.spans(one, world * self.inner, length))


@dataclass(frozen=True)
class UlyssesMoves:
    """The plan. Rows go to heads in round 0, the inner rounds follow, and results go home after the last of them.

    Args:
        inner: plans of the inner problems, one for each place in a node.
        places: ranks that exchange heads for sequence with one another.
    """

    problem: Problem
    inner: tuple[Moves, ...]
    places: int

    @cached_property
    def passes(self) -> tuple[tuple[tuple[Integers, Transfers], ...], ...]:
        """The inner areas and transfers of each place, forward and backward."""
        return tuple(
            tuple((each.areas(backward=way), each.transfers(backward=way)) for each in self.inner)
            for way in (False, True)
        )

    def rounds(self, backward: bool) -> int:
        """Return the rounds of the inner plan that has the most."""
        found = self.passes[backward]
        return max(max(len(areas), int(moved.arrive.max(initial=-1)) + 1) for areas, moved in found)

    def transfers(self, *, backward: bool) -> Transfers:
        """Return what moves within the nodes, and between them."""
        rows, keys = self._rows
        queries = np.array([len(each.queries) for each in self._deals])
        heads = np.array([len(each.keys) for each in self._deals])
        shared = np.array([len(each.shared) for each in self._deals])
        problem, dim, size = self.problem, self.problem.head_dim, self.problem.dtype.itemsize
        wide = problem.wide.itemsize
        # Bytes from rank [node, place] to each place, and from each place to that rank.
        away = problem.batch * dim * size * (_outer(rows, queries) + 2 * _outer(keys, heads))
        home = problem.batch * _outer(rows, queries) * (dim * (wide if problem.sinks else size) + wide)
        if backward:
            away *= problem.keep
            away += problem.batch * _outer(rows, queries) * (dim * size + 2 * wide)
            each = (heads - shared) * size + shared * problem.wired.itemsize
            home = problem.batch * dim * (_outer(rows, queries) * size + 2 * _outer(keys, each))
        last = self.rounds(backward) + 1
        between = [self._between(place, moved) for place, (_, moved) in enumerate(self.passes[backward])]
        return Transfers.join([self._inside(0, away), *between, self._inside(last, home.swapaxes(1, 2))])

    def areas(self, *, backward: bool = False) -> Integers:
        """Return [inner rounds + 3, world]: nothing in the first round and the last two."""
        found = np.zeros((self.rounds(backward) + 3, self.problem.world), dtype=np.int64)
        for place, (areas, _) in enumerate(self.passes[backward]):
            found[1 : len(areas) + 1, place :: self.places] = areas
        return found

    @property
    def _deals(self) -> tuple[Deal, ...]:
        return deals(self.problem, self.places)

    @cached_property
    def _rows(self) -> tuple[Integers, Integers]:
        """Rows of queries and of keys, [nodes, places]."""
        problem, ranks = self.problem, range(self.problem.world)
        each = (
            [layout.share(rank, problem.world, problem.length) for rank in ranks]
            for layout in (problem.layout, problem.kv_layout)
        )
        rows, keys = (np.array(one, dtype=np.int64).reshape(-1, self.places) for one in each)
        return rows, keys

    def _inside(self, depart: int, moved: Integers) -> Transfers:
        """Return transfers of [nodes, source place, target place] bytes."""
        node, source, target = np.nonzero(moved * (1 - np.eye(self.places, dtype=np.int64)))
        base, start = node * self.places, np.full(len(node), depart)
        return Transfers(start, start + 1, base + source, base + target, moved[node, source, target])

    def _between(self, place: int, found: Transfers) -> Transfers:
        """Return the inner transfers of one place, its nodes as ranks of the whole, behind round 0."""
        source, target = (x * self.places + place for x in (found.source, found.target))
        return Transfers(found.depart + 1, found.arrive + 1, source, target, found.bytes)


def moves(problem: Problem, inner_moves: InnerMoves | None = None) -> UlyssesMoves:
    """Plan for a problem.

    Args:
        inner_moves: plans what is left between the nodes of a 2-D mesh; None: all ranks are one node.
    """
    places = places_of(problem, inner_moves is not None)
    plan_inner = local.moves if inner_moves is None else inner_moves
    inner = tuple(plan_inner(inner_problem(problem, places, place)) for place in range(places))
    return UlyssesMoves(problem, inner, places)


def refuses(problem: Problem, inner_refuses: Callable[[Problem], str | None] | None = None) -> str | None:
    """Return one line where heads cannot be dealt, or the inner strategy refuses.

    Args:
        inner_refuses: of the strategy between the nodes of a 2-D mesh; None: all ranks are one node.
    """
    if inner_refuses is not None and len(problem.mesh) != 2:
        return (
            f"needs a 2-D mesh (nodes, ranks in a node), not a flat group of {problem.world} ranks; "
            "give group=init_device_mesh(device, (nodes, ranks in a node)), or take 'ulysses'"
        )
    places = places_of(problem, inner_refuses is not None)
    if reason := _too_few(problem.heads, places):
        return reason
    if inner_refuses is None:
        return None
    found = (inner_refuses(inner_problem(problem, places, place)) for place in range(places))
    return next((reason for reason in found if reason), None)


def holds(problem: Problem, inner_holds: Callable[[Problem], int] | None = None) -> int:
    """Return the bytes of keys and values that a rank has at once: those of its heads, as they came and in order.

    Args:
        inner_holds: of the strategy between the nodes of a 2-D mesh; None: all ranks are one node.
    """
    places = places_of(problem, inner_holds is not None)
    found = []
    for place in range(places):
        inside = inner_problem(problem, places, place)
        rows = max(inside.kv_layout.share(node, inside.world, problem.length) for node in range(inside.world))
        own = 4 * problem.batch * rows * inside.kv_heads * problem.head_dim * problem.dtype.itemsize
        found.append(own + (0 if inner_holds is None else inner_holds(inside)))
    return max(found)


def places_of(problem: Problem, hybrid: bool) -> int:
    """Return how many ranks exchange heads for sequence with one another."""
    return problem.mesh[-1] if hybrid else problem.world


def deals(problem: Problem, places: int) -> tuple[Deal, ...]:
    """Return the heads of each place.

    Raises:
        ValueError: if there are fewer query heads than places.
    """
    if reason := _too_few(problem.heads, places):
        raise ValueError(f"ulysses: {reason}")
    return deal(problem.heads, problem.kv_heads, places)


def inner_problem(problem: Problem, places: int, place: int) -> Problem:
    """Return what is left for the ranks of one place, one in each node: all rows of a node, some heads."""
    mine = deals(problem, places)[place]
    return replace(
        problem,
        parts=parts_for(problem.parts, mine.local),
        layout=Merged(problem.layout, places),
        kv_layout=Merged(problem.kv_layout, places),
        mesh=(problem.world // places,),
        heads=len(mine.queries),
        kv_heads=len(mine.local),
        first_kv_head=problem.first_kv_head + mine.keys.start,
    )


@lru_cache(maxsize=1024)
def rows_of(layout: Layout, world: int, length: int, rank: int, places: int) -> tuple[Span, ...]:
    """Return where the rows of ``rank`` lie among its node's, all of them ascending."""
    held = Merged(layout, places).spans(rank // places, world // places, length)
    starts = [0, *accumulate(span.size for span in held)]
    found: list[Span] = []
    at = 0
    for span in layout.spans(rank, world, length):
        while held[at].stop <= span.start:
            at += 1
        start = starts[at] + span.start - held[at].start
        found.append(Span(start, start + span.size))
    return tuple(found)


def _outer(rows: Integers, heads: Integers) -> Integers:
    """Return [nodes, places, places]: rows of each rank times heads of each place."""
    return rows[:, :, None] * heads[None, None, :]


def _too_few(heads: int, places: int) -> str | None:
    if heads >= places:
        return None
    return (
        f"cannot deal {heads} query heads to {places} ranks, for each needs one; take 'ring', "
        f"or a 2-D mesh with at most {heads} ranks in a node"
    )
