"""What a plan's picture shows, as plain arrays: live pairs on a grid of tiles, and who computes and waits when."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ringspan.dist_attn.areas import areas_by_segment
from ringspan.dist_attn.cost import Costs, Prediction
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.moves import Integers, Transfers
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.mask import Span

GRID = 256  # tiles along each side, at most
SHOWN = 8  # ranks in a time line

Floats = NDArray[np.float64]
Bars = list[tuple[float, float]]  # begin, end in seconds


def live_share(problem: Problem, grid: int = GRID) -> Floats:
    """Return [rows, columns]: which share of each tile's (query, key) pairs is live, mean over the KV heads.

    Tiles are even cuts of the sequence; of several batch rows the first.
    """
    edges = cuts(problem.length, grid)
    found = np.zeros((len(edges) - 1, len(edges) - 1))
    for part in problem.parts:
        if part.rows.start == 0:
            heads = part.groups if part.heads is None else len(part.heads)
            for row, (start, stop) in enumerate(zip(edges.tolist(), edges[1:].tolist(), strict=False)):
                found[row] += heads / problem.kv_heads * areas_by_segment(part.mask, [Span(start, stop)], edges)
    sizes = np.diff(edges)
    return found / (sizes[:, None] * sizes[None, :])


def cuts(length: int, grid: int = GRID) -> Integers:
    """Return the edges of at most ``grid`` even pieces."""
    pieces = min(grid, length)
    return np.arange(pieces + 1) * length // pieces


def holders(layout: Layout, world: int, length: int, grid: int = GRID) -> Integers:
    """Return the rank that holds the token in the middle of each piece."""
    edges = cuts(length, grid)
    spans = sorted((*span, rank) for rank in range(world) for span in layout.spans(rank, world, length))
    table = np.array(spans, dtype=np.int64)
    middle = (edges[:-1] + edges[1:]) // 2
    return table[np.searchsorted(table[:, 0], middle, side="right") - 1, 2]


def shown_ranks(ends: Floats) -> tuple[list[int], int | None]:
    """Return the ranks to draw (first, last, the slowest, some between), and the slowest where one stands out.

    Args:
        ends: when each rank is done.
    """
    world = len(ends)
    ranks = np.unique(np.linspace(0, world - 1, min(world, SHOWN)).round().astype(np.int64)).tolist()
    slowest = int(ends.argmax())
    if ends[slowest] <= 1.001 * np.median(ends):
        return ranks, None
    return sorted({*ranks, slowest}), slowest


@dataclass(frozen=True)
class Line:
    """One rank's time in one pass: computing, waiting for data, and data on its way to or from it on each level."""

    computing: Bars
    waiting: Bars
    moving: tuple[Bars, ...]


def line(rank: int, transfers: Transfers, prediction: Prediction, costs: Costs) -> Line:
    """Return the time line of one rank."""
    starts, ends = prediction.starts[:, rank], prediction.ends[:, rank]
    before = np.append(0.0, ends[:-1])
    waits = np.flatnonzero(starts > before)
    working = ends > starts
    computing = list(zip(starts[working].tolist(), ends[working].tolist(), strict=True))
    waiting = list(zip(before[waits].tolist(), starts[waits].tolist(), strict=True))
    return Line(computing, waiting, _moving(rank, transfers, prediction, costs, set(waits.tolist())))


def _moving(rank: int, transfers: Transfers, prediction: Prediction, costs: Costs, waits: set[int]) -> tuple[Bars, ...]:
    """Return when something is on its way to or from ``rank``, level by level.

    A transfer begins when both sides have come to its round and what went before it has left the link. Where the rank
    waits for a round's transfers, they take until it goes on, whatever kept them at the other side.
    """
    mine = np.flatnonzero((transfers.target == rank) | (transfers.source == rank))
    depart, arrive, source, target = (
        getattr(transfers, name)[mine] for name in ("depart", "arrive", "source", "target")
    )
    posted = np.maximum(prediction.starts[depart, source], prediction.starts[depart, target])
    apart = source // costs.ranks_per_node != target // costs.ranks_per_node
    level = np.minimum(apart, len(costs.links) - 1)
    found: list[Bars] = [[] for _ in costs.links]
    last: dict[int, tuple[float, int, int]] = {}  # of each round of arrival: when the latest is done, and its bar
    for number, link in enumerate(costs.links):
        free = {True: 0.0, False: 0.0}
        key = depart * 2 + (target == rank)
        some = np.flatnonzero(level == number)
        some = some[np.argsort(key[some], kind="stable")]
        for group in np.split(some, np.flatnonzero(np.diff(key[some])) + 1):
            if not len(group):
                continue
            inward = bool(target[group[0]] == rank)
            begin = max(free[inward], float(posted[group].max()))
            free[inward] = begin + float(transfers.bytes[mine[group]].sum()) / link.bandwidth
            end = free[inward] + link.latency
            needed = int(arrive[group].min())
            found[number].append((begin, end))
            if end >= last.get(needed, (-1.0, 0, 0))[0]:
                last[needed] = end, number, len(found[number]) - 1
    for round_, (end, number, index) in last.items():
        if round_ in waits:
            begin, _ = found[number][index]
            found[number][index] = begin, max(end, float(prediction.starts[round_, rank]))
    return tuple(found)


def covered(bars: Bars, edges: Floats) -> Floats:
    """Return which share of each stretch between ``edges`` the bars cover; where they overlap they count once."""
    union: Bars = []
    for begin, end in sorted(bars):
        if union and begin <= union[-1][1]:
            union[-1] = union[-1][0], max(end, union[-1][1])
        else:
            union.append((begin, end))
    if not union:
        return np.zeros(len(edges) - 1)
    times = np.array(union)
    so_far = np.cumsum(times[:, 1] - times[:, 0])
    before = np.column_stack([so_far - (times[:, 1] - times[:, 0]), so_far])
    return np.diff(np.interp(edges, times.ravel(), before.ravel())) / np.diff(edges)
