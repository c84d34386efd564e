"""All hops of a schedule as columns of integers: keys cut into pieces, and each piece routed.

Pieces of one owner, one set of ranks and one kind share a route, which is found once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ringspan.dist_attn.moves import Integers
from ringspan.dist_attn.routes import DIRECT, LEG, MANY_RANKS, SMALL_ROWS, double_ring, ring, straight, tree
from ringspan.dist_attn.steps import Hop
from ringspan.kernels.mask import Span

# Kinds of routes: the ring, a tree, the halves that go round the other way, straight to each rank.
CHAIN, TREE, BEHIND, STRAIGHT = range(4)
FIELDS = (*LEG, "owner", "segment")


@dataclass(frozen=True, eq=False)
class Hops:
    """All hops of a schedule as columns of equal length, and the key segments that they move.

    Columns are ``Hop``'s fields; ``segment`` i is the keys ``points[i]`` to ``points[i + 1]``.
    """

    table: Integers  # [hops, len(FIELDS)]
    points: Integers

    def __getattr__(self, name: str) -> Integers:
        """Return a column."""
        if name not in FIELDS:
            raise AttributeError(name)
        return self.table[:, FIELDS.index(name)]

    @property
    def rows(self) -> Integers:
        """Key rows of each hop."""
        return np.diff(self.points)[self.table[:, -1]]

    def select(self, chosen: np.ndarray) -> list[Hop]:
        """Return some hops (a boolean or index array) as values, ordered by step, source, target and keys."""
        some = self.table[chosen]
        some = some[np.lexsort([some[:, FIELDS.index(key)] for key in ("segment", "target", "source", "step")])]
        spans = zip(self.points[some[:, -1]].tolist(), self.points[some[:, -1] + 1].tolist(), strict=True)
        return [Hop._make([*row[:-1], Span(*span)]) for row, span in zip(some.tolist(), spans, strict=True)]


def pieces(held: Sequence[Sequence[Span]], needs: Sequence[Sequence[Span]]) -> tuple[Integers, Integers, np.ndarray]:
    """Cut the keys wherever the owner or the set of ranks that need them changes.

    Returns:
        owners [M], segments [M, 2], wanted [M, world] (bool), of pieces in ascending order; also unwanted ones.
    """
    world = len(held)
    kept = np.array([(*span, rank) for rank, spans in enumerate(held) for span in spans], dtype=np.int64).reshape(-1, 3)
    kept = kept[np.argsort(kept[:, 0])]
    asked = np.array([(*span, rank) for rank, spans in enumerate(needs) for span in spans], dtype=np.int64)
    asked = asked.reshape(-1, 3)
    points = np.unique(np.concatenate([kept[:, :2].ravel(), asked[:, :2].ravel()]))
    if not len(points):
        return np.zeros(0, np.int64), np.zeros((0, 2), np.int64), np.zeros((0, world), bool)
    change = np.zeros((len(points), world), dtype=np.int8)
    np.add.at(change, (np.searchsorted(points, asked[:, 0]), asked[:, 2]), 1)
    np.add.at(change, (np.searchsorted(points, asked[:, 1]), asked[:, 2]), -1)
    wanted = change.cumsum(0, dtype=np.int8)[:-1].astype(bool)
    span_of = np.searchsorted(kept[:, 0], points[:-1], side="right") - 1
    # Neighbours of one owner's span that the same ranks need are one piece.
    fresh = np.ones(len(points) - 1, dtype=bool)
    fresh[1:] = (span_of[1:] != span_of[:-1]) | (wanted[1:] != wanted[:-1]).any(1)
    starts = np.flatnonzero(fresh)
    stops = np.append(starts[1:], len(points) - 1)
    return kept[span_of[starts], 2], np.stack([points[starts], points[stops]], 1), wanted[starts]


def route_all(
    owners: Integers, segments: Integers, wanted: np.ndarray, mesh: tuple[int, ...], *, direct: bool = False
) -> Hops:
    """Route every piece; pieces of one owner, one set of ranks and one kind share a route.

    Args:
        owners, segments, wanted: of ``pieces``.
        mesh: (world,), or (nodes, ranks in a node).
        direct: pieces go from their owner to each rank, not round the ring, and when is left open (``DIRECT``);
            for a flat world.
    """
    world, rows, count = int(np.prod(mesh)), segments[:, 1] - segments[:, 0], wanted.sum(1)
    kind = np.where((rows <= SMALL_ROWS) & (count >= MANY_RANKS), TREE, STRAIGHT if direct else CHAIN)
    for_all = (kind == CHAIN) & (count == world - 1) & (rows > SMALL_ROWS)
    if for_all.any() and mesh[0] > 2 and (for_all | (kind == TREE) | (count == 0)).all():
        middle = segments.sum(1)[for_all] // 2
        twice = 1 + for_all
        segments, owners, wanted, kind = (np.repeat(x, twice, axis=0) for x in (segments, owners, wanted, kind))
        first = np.flatnonzero(np.repeat(for_all, twice))[::2]
        segments[first, 1], segments[first + 1, 0] = middle, middle
        kind[first + 1] = BEHIND
    routes, pattern = _routes(owners, wanted, kind, mesh)
    made = _laid_out(routes, pattern, owners, segments)
    if not direct:
        _let_direct_hops_leave_early(made.table)
    return made


def _routes(
    owners: Integers, wanted: np.ndarray, kind: Integers, mesh: tuple[int, ...]
) -> tuple[list[Integers], Integers]:
    """Return the distinct routes, and which of them each piece takes."""
    key = np.concatenate([owners[:, None], kind[:, None], np.packbits(wanted, axis=1)], 1)
    _, firsts, pattern = np.unique(key, axis=0, return_index=True, return_inverse=True)
    routes = [_route(int(kind[i]), int(owners[i]), np.flatnonzero(wanted[i]), mesh) for i in firsts]
    return routes, pattern.ravel()


def _route(kind: int, owner: int, needers: Integers, mesh: tuple[int, ...]) -> Integers:
    if not len(needers):
        return np.zeros((0, len(LEG)), dtype=np.int64)
    world, direction = int(np.prod(mesh)), -1 if kind == BEHIND else 1
    if kind == STRAIGHT:
        return straight(owner, needers, world)
    if kind == TREE:
        return tree(owner, needers, world)
    return double_ring(owner, needers, *mesh, direction) if len(mesh) == 2 else ring(owner, needers, world, direction)


def _laid_out(routes: list[Integers], pattern: Integers, owners: Integers, segments: Integers) -> Hops:
    """Write the hops of every piece."""
    if len(segments) and (segments[1:, 0] != segments[:-1, 1]).any():
        raise ValueError("kv_layout: leaves keys without an owner; its ranks' spans must cover the whole sequence")
    tables = []
    by_pattern = np.argsort(pattern, kind="stable")
    edges = np.searchsorted(pattern[by_pattern], np.arange(len(routes) + 1))
    for number, legs in enumerate(routes):
        pieces = by_pattern[edges[number] : edges[number + 1]]
        if len(legs):
            way = np.tile(legs, (len(pieces), 1))
            which = np.repeat(pieces, len(legs))
            tables.append(np.column_stack([way, owners[which], which]))
    table = np.concatenate(tables) if tables else np.zeros((0, len(FIELDS)), dtype=np.int64)
    points = np.append(segments[:, 0], segments[-1:, 1]) if len(segments) else np.zeros(1, dtype=np.int64)
    return Hops(table, points)


def _let_direct_hops_leave_early(table: Integers) -> None:
    """A direct hop depends on nothing: it is on its way while its target computes what came before."""
    depart, step, target = (table[:, FIELDS.index(name)] for name in ("depart", "step", "target"))
    direct = np.flatnonzero(depart == DIRECT)
    if not len(direct):
        return
    steps = int(step.max()) + 1
    busy = np.zeros((int(target.max()) + 1, steps), dtype=bool)
    busy[:, 0] = True  # every rank computes its own keys first
    busy[target, step] = True
    # For each step the last busy one before it.
    before = np.maximum.accumulate(np.where(busy, np.arange(steps), 0), axis=1)
    table[direct, FIELDS.index("depart")] = before[target[direct], step[direct] - 1]


def inside(points: Integers, held: Sequence[Span]) -> np.ndarray:
    """Return which segments lie in one of the (ascending) spans; none is cut by their edges."""
    starts = np.array([span.start for span in held], dtype=np.int64)
    stops = np.array([span.stop for span in held], dtype=np.int64)
    if not len(held):
        return np.zeros(len(points) - 1, dtype=bool)
    at = np.searchsorted(starts, points[:-1], side="right") - 1
    return (at >= 0) & (points[:-1] < stops[np.maximum(at, 0)])
