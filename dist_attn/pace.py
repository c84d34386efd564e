"""When pieces travel where ranks do not have the same work in the same step, as with packed documents. Integers only.

Step by step, every rank would wait in each step for the one that has most to do in it. So steps become slots of time:
a rank computes a piece in the slot that it comes to by the work before it; if all have equal work in the sum, all are
in the same slot at the same time. Pieces come straight from their owners, as far ahead as ``KEY_SHARES`` allow;
gradients go straight home, and are added as late as ``GRADIENT_SHARES`` allow. Within these windows of rows ranks may
be ahead of each other or behind without waiting.
"""

from __future__ import annotations

import numpy as np

from ringspan.dist_attn.hops import FIELDS, Hops
from ringspan.dist_attn.moves import Integers
from ringspan.dist_attn.routes import DIRECT

SLOTS = 64  # of one pass, or two for each rank where there are more ranks
KEY_SHARES = 4  # of keys that a rank has before or under it: received or on their way, and those it computes on
GRADIENT_SHARES = 8  # of gradients that are on their way to a rank, or wait to be added


def paced(hops: Hops, own: Integers, areas: Integers, share: int) -> Hops:
    """Return the same hops with slots for steps, and the times at which direct ones leave and are added.

    Args:
        hops: routed ``direct``; pieces of a few rows may go by trees, and keep their steps.
        own: [world], live pairs of each rank's queries with its own keys.
        areas: [hops], live pairs of each hop's target with its keys.
        share: rows of keys that each rank holds, about.
    """
    table = hops.table.copy()
    depart, step, target, home, back, add = (
        table[:, FIELDS.index(name)] for name in ("depart", "step", "target", "home", "back", "add")
    )
    direct = np.flatnonzero(depart == DIRECT)
    by_target = direct[np.lexsort((step[direct], target[direct]))]
    step[by_target] = _slots(own, target[by_target], areas[by_target])
    depart[by_target] = _departures(target[by_target], step[by_target], hops.rows[by_target], KEY_SHARES * share)
    back[direct] = step[direct]
    by_home = direct[np.lexsort((back[direct], home[direct]))]
    window = GRADIENT_SHARES * share
    add[by_home] = _additions(home[by_home], back[by_home], hops.rows[by_home], window, int(back.max(initial=0)) + 1)
    return Hops(table, hops.points)


def _slots(own: Integers, target: Integers, areas: Integers) -> Integers:
    """Return the slot in which each target begins a piece; pieces in the order of targets, and of computing."""
    world = len(own)
    whole = own.copy()
    np.add.at(whole, target, areas)
    before, first = _before(areas), np.searchsorted(target, target)
    done = own[target] + before[:-1] - before[first]
    return np.maximum(1, done * max(SLOTS, 2 * world) // max(int(whole.max(initial=0)), 1))


def _departures(target: Integers, step: Integers, rows: Integers, window: int) -> Integers:
    """Return the first slot from which on the pieces up to this one fit the target's window of rows."""
    first, before = np.searchsorted(target, target), _before(rows)
    slots = _keys(target, step)
    last = np.searchsorted(slots, slots, side="right")  # one slot's pieces are here together
    done = np.maximum(np.searchsorted(before, before[last] - window), first)  # pieces before this one must be computed
    after = np.where(done > first, step[np.maximum(done - 1, 0)] + 1, 0)
    return np.minimum(after, step - 1)


def _additions(home: Integers, back: Integers, rows: Integers, window: int, end: int) -> Integers:
    """Return the slot after which each gradient is added: when the next would not fit its home's window, or the end."""
    before = _before(rows)
    slots = _keys(home, back)
    first = np.searchsorted(slots, slots)  # those of one slot come together
    full = np.searchsorted(before, before[first] + window, side="right") - 1  # the first that does not fit
    mine = full < np.searchsorted(home, home, side="right")
    return np.maximum(np.where(mine, back[np.minimum(full, len(back) - 1)], end), back + 1)


def _before(rows: Integers) -> Integers:
    """Return the sum of all before each, and of all."""
    return np.append(0, rows.cumsum())


def _keys(ranks: Integers, slots: Integers) -> Integers:
    """Return numbers that ascend by rank, then slot."""
    return ranks * (int(slots.max(initial=0)) + 1) + slots
