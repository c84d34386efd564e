"""By which hops a piece of keys reaches the ranks that need it, and its gradient the owner. Integers only.

A *pattern* is an owner and the set of ranks that need a piece; pieces of one pattern share one route, so the cost of
planning grows with the patterns, not with the tokens.

- ring: neighbour hops, both ways round, while each rank on the way needs the piece; straight from the owner to the
  others. A piece that all ranks need is halved, and each half goes round one way: links carry both directions at once.
- a few rows that many ranks need (sink tokens) go by a binomial tree: log2 of the ranks, not as many steps as ranks.
- double ring: between nodes by a ring of nodes, each node entered once; inside a node from rank to rank.
"""

from __future__ import annotations

import numpy as np

from ringspan.dist_attn.moves import Integers

SMALL_ROWS = 64  # pieces of up to this many rows are bound by latency, not by bytes
MANY_RANKS = 4  # fewer ranks than this are reached as quickly one after the other
DIRECT = -1  # departure of a hop that starts at the owner and may leave at any time
LEG = ("depart", "step", "source", "target", "home", "back")  # columns of a route; fields of ``steps.Hop``


def ring(owner: int, needers: Integers, world: int) -> Integers:
    """Chain by neighbours each way while every rank needs the piece; send the rest directly: [hops, LEG]."""
    need = np.zeros(world, dtype=bool)
    need[(needers - owner) % world] = True  # by distance from the owner
    ahead = int(np.argmin(np.append(need[1:], False)))
    behind = int(np.argmin(np.append(need[:ahead:-1], False)))
    distance = np.flatnonzero(need[ahead + 1 : world - behind]) + ahead + 1
    step, own = np.minimum(distance, world - distance), np.full(len(distance), owner)
    direct = np.column_stack([np.full(len(distance), DIRECT), step, own, (owner + distance) % world, own, step])
    return np.concatenate([one_way(owner, ahead, world, +1), one_way(owner, behind, world, -1), direct])


def one_way(owner: int, count: int, world: int, direction: int) -> Integers:
    """Chain ``count`` neighbours; the gradient follows one step behind and goes home from the last."""
    step = np.arange(1, count + 1)
    rank = (owner + direction * np.arange(count + 2)) % world
    rank[count + 1] = owner
    return np.column_stack([step - 1, step, rank[:count], rank[1 : count + 1], rank[2 : count + 2], step])


def tree(owner: int, needers: Integers, world: int) -> Integers:
    """Binomial tree over the ranks that need the piece; gradients return along it, from the leaves."""
    rank = np.append(owner, (owner + np.sort((needers - owner) % world)) % world)
    index = np.arange(1, len(rank))
    step = np.floor(np.log2(index)).astype(np.int64) + 1
    parent = rank[index - (1 << (step - 1))]
    depth = int(step[-1])
    return np.column_stack([step - 1, step, parent, rank[1:], parent, 2 * depth - step])


def double_ring(owner: int, needers: Integers, nodes: int, inside: int, direction: int = 0) -> Integers:
    """Ring of nodes outside, chain of ranks inside; a piece and its gradient cross to another node once each.

    Args:
        owner, needers: flat ranks, node * inside + place.
        nodes, inside: the mesh.
        direction: +1 or -1: one way round the nodes; 0: both, while the nodes on the way need the piece.
    """
    home_node, place = divmod(owner, inside)
    away, near = (needers // inside - home_node) % nodes, (needers % inside - place) % inside
    order = np.lexsort([near, away])  # node after node; in a node from the rank at the owner's place on
    rank, away = needers[order], away[order]
    first = np.append(True, away[1:] != away[:-1])
    # Chains of nodes, each way while every node on the way needs the piece.
    wants = np.zeros(nodes + 1, dtype=bool)
    wants[away] = True
    ahead = int(np.argmin(wants[1:])) if direction >= 0 else 0
    behind = int(np.argmin(np.append(wants[nodes - 1 : ahead : -1], False))) if direction <= 0 else 0
    hops = np.where(away <= ahead, away, nodes - away)
    chained = (away <= ahead) | (nodes - away <= behind)
    hops = np.where(chained, hops, np.minimum(away, nodes - away))
    entry = np.full(nodes + 1, owner)
    entry[away[first]] = rank[first]
    entry[0] = entry[nodes] = owner
    before = np.where(away <= ahead, away - 1, away + 1)
    # A rank's place in its chain; in the owner's own node the chain starts one after it.
    index = np.arange(len(rank)) - np.maximum.accumulate(np.where(first, np.arange(len(rank)), 0)) + (away == 0)
    crosses = first & (away > 0)
    step = hops * inside + index
    step[away == 0] = index[away == 0]
    previous = np.append(owner, rank[:-1])
    source = np.where(crosses, np.where(chained, entry[before], owner), np.where(first, owner, previous))
    depart = np.where(crosses, np.where(chained, (hops - 1) * inside, DIRECT), step - 1)
    home = np.append(np.where(first[1:], owner, rank[1:]), owner)
    return np.column_stack([depart, step, source, rank, home, step])
