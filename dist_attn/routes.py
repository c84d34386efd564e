"""By which hops a piece of keys reaches the ranks that need it, and its gradient the owner. Integers only.

A *pattern* is an owner and the set of ranks that need a piece; pieces of one pattern share one route, so the cost of
planning grows with the patterns, not with the tokens.

- ring: neighbour hops while each rank on the way needs the piece, straight from the owner where some do not.
  Where every rank needs every piece, each is halved, and the halves go one way each.
- straight from the owner to each rank, where ``pace`` is to choose when.
- a few rows that many ranks need (sink tokens) go by a binomial tree: log2 of the ranks, not as many steps as ranks.
- double ring: between nodes by a ring of nodes, each node entered once; inside a node from rank to rank.
"""

from __future__ import annotations

import numpy as np

from ringspan.dist_attn.moves import Integers

SMALL_ROWS = 64  # pieces of up to this many rows are bound by latency, not by bytes
MANY_RANKS = 4  # fewer ranks than this are reached as quickly one after the other
DIRECT = -1  # departure of a hop that starts at the owner and may leave at any time
LEG = ("depart", "step", "source", "target", "home", "back", "add")  # columns of a route; fields of ``steps.Hop``


def ring(owner: int, needers: Integers, world: int, direction: int = 1) -> Integers:
    """Go round once, in the order of ranks (``direction`` -1: the other way): [hops, LEG].

    Each run of neighbours that need the piece is a chain, which the owner starts; what nobody on the way needs is not
    carried past. A piece is computed at the step of its distance from the owner, whoever sends it: so the work of a
    causal zigzag is the same in every step of every rank, and nobody waits for a slower one.
    """
    distance = np.sort(direction * (needers - owner) % world)
    rank, own = (owner + direction * distance) % world, np.full(len(distance), owner)
    starts = np.append(True, np.diff(distance) > 1)
    ends = np.append(starts[1:], True)
    source = np.where(starts, own, np.append(owner, rank[:-1]))
    home = np.where(ends, own, np.append(rank[1:], owner))
    depart = np.where(starts & (distance > 1), DIRECT, distance - 1)
    return np.column_stack([depart, distance, source, rank, home, distance, distance + 1])


def straight(owner: int, needers: Integers, world: int) -> Integers:
    """Send the piece from its owner to each rank, and each gradient home; steps are the distance clockwise."""
    distance = np.sort((needers - owner) % world)
    own = np.full(len(distance), owner)
    rank = (owner + distance) % world
    return np.column_stack([np.full(len(distance), DIRECT), distance, own, rank, own, distance, distance + 1])


def tree(owner: int, needers: Integers, world: int) -> Integers:
    """Binomial tree over the ranks that need the piece; gradients return along it, from the leaves."""
    rank = np.append(owner, (owner + np.sort((needers - owner) % world)) % world)
    index = np.arange(1, len(rank))
    step = np.floor(np.log2(index)).astype(np.int64) + 1
    parent = rank[index - (1 << (step - 1))]
    depth = int(step[-1])
    back = 2 * depth - step
    return np.column_stack([step - 1, step, parent, rank[1:], parent, back, back + 1])


def double_ring(owner: int, needers: Integers, nodes: int, inside: int, direction: int = 1) -> Integers:
    """Ring of nodes outside, chain of ranks inside; a piece and its gradient cross to another node once each.

    Args:
        owner, needers: flat ranks, node * inside + place.
        nodes, inside: the mesh.
        direction: the way round the nodes, +1 or -1.
    """
    home_node, place = divmod(owner, inside)
    away, near = direction * (needers // inside - home_node) % nodes, (needers % inside - place) % inside
    order = np.lexsort([near, away])  # node after node; in a node from the rank at the owner's place on
    rank, away = needers[order], away[order]
    first = np.append(True, away[1:] != away[:-1])
    # The rank by which a piece enters each node; -1 where the node does not need it.
    entry = np.full(nodes, -1)
    entry[away[first]], entry[0] = rank[first], owner
    before = entry[away - 1]
    # A rank's place in its chain; in the owner's own node the chain starts one after it.
    index = np.arange(len(rank)) - np.maximum.accumulate(np.where(first, np.arange(len(rank)), 0)) + (away == 0)
    crosses = first & (away > 0)
    step = away * inside + index
    previous = np.append(owner, rank[:-1])
    source = np.where(crosses, np.where(before < 0, owner, before), np.where(first, owner, previous))
    depart = np.where(crosses, np.where(before < 0, DIRECT, (away - 1) * inside), step - 1)
    home = np.append(np.where(first[1:], owner, rank[1:]), owner)
    return np.column_stack([depart, step, source, rank, home, step, step + 1])
