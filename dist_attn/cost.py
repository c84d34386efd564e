"""How long a plan takes: bytes, FLOPs, links and kernel rates in, seconds out; overlap included.

Every rank goes through its rounds: it waits for what a round needs, sends what leaves, computes. A transfer begins when
both sides have come to its round and its link is free in that direction; what leaves a rank at once shares the link.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ringspan.dist_attn.moves import Integers, Transfers

FORWARD_FLOPS, BACKWARD_FLOPS = 4, 10  # a live pair, head and feature: two products forward, five backward

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Link:
    """One level of the network, as one rank sees it.

    Args:
        latency: seconds a message takes besides its bytes.
        bandwidth: bytes a second, each direction.
        duplex: whether two ranks send to each other at once; over one gloo connection they take turns.
    """

    latency: float
    bandwidth: float
    duplex: bool = True


@dataclass(frozen=True)
class Costs:
    """Speeds that a prediction reckons with.

    Args:
        links: of each level: between ranks of a node, then between nodes (one level: the same everywhere).
        ranks_per_node: neighbours in rank order share a node.
        forward, backward: FLOP/s of the attention kernel.
        call: seconds of one round's kernel calls besides their FLOPs.
        gather_bytes: the most that "auto" lets a strategy hold of other ranks' keys and values at once.
        source: where the figures come from, for messages.
    """

    links: tuple[Link, ...]
    ranks_per_node: int
    forward: float
    backward: float
    call: float = 0.0
    gather_bytes: int = 1 << 30
    source: str = "given"

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Read what ``save`` or ``benchmarks/links.py`` wrote."""
        return cls.of(json.loads(path.read_text()))

    @classmethod
    def of(cls, values: dict[str, Any]) -> Costs:
        """Build from plain values.

        Raises:
            ValueError: for a value that is missing or unknown.
        """
        try:
            links = tuple(Link(**link) for link in values["links"])
            return cls(**{**values, "links": links})
        except (TypeError, KeyError) as error:
            raise ValueError(f"costs: {error}; the fields are those of cost.Costs") from error


def typical(device: str) -> Costs:
    """Return round figures for a device type, to compare strategies with where nothing was measured."""
    if device == "cuda":  # NVLink inside nodes of eight, a 400 Gbit/s NIC per GPU between them, an H100-class kernel
        links = (Link(8e-6, 300e9), Link(20e-6, 45e9))
        return Costs(links, 8, forward=450e12, backward=330e12, call=10e-6, source="typical figures of CUDA nodes")
    links = (Link(100e-6, 1.5e9, duplex=False),)
    return Costs(links, 1 << 30, forward=50e9, backward=40e9, call=100e-6, source="typical figures of CPU ranks")


@dataclass(frozen=True)
class Prediction:
    """How long one pass takes.

    Args:
        seconds: until the last rank is done.
        compute: of the rank that computes longest.
        exposed: what the exchange adds: ``seconds - compute``.
        starts, ends: [rounds, world]: when each rank begins a round, and has computed it.
    """

    seconds: float
    compute: float
    exposed: float
    starts: Floats
    ends: Floats


def predict(transfers: Transfers, areas: Integers, head_dim: int, costs: Costs, *, backward: bool) -> Prediction:
    """Predict one pass of one call.

    Args:
        transfers, areas: of the plan's ``Moves``.
        head_dim: features of a head.
        costs: speeds.
        backward: which pass ``transfers`` belongs to.
    """
    rounds = max(len(areas), int(transfers.arrive.max(initial=0)) + 1)
    areas = np.pad(areas, ((0, rounds - len(areas)), (0, 0)))
    world = areas.shape[1]
    rate = costs.backward if backward else costs.forward
    work = areas * ((BACKWARD_FLOPS if backward else FORWARD_FLOPS) * head_dim / rate) + costs.call * (areas > 0)
    ready = np.zeros((rounds + 1, world))
    starts, ends = np.zeros((rounds, world)), np.zeros((rounds, world))
    wires = _Wires(costs, world)
    batches = _batches(transfers, rounds)
    for number in range(rounds):
        starts[number] = np.maximum(ready[number], ends[number - 1] if number else 0.0)
        for leaving in batches[number]:  # in the order in which they are posted: the most urgent first
            sides = transfers.source[leaving], transfers.target[leaving]
            done = wires.send(*sides, transfers.bytes[leaving], starts[number])
            for side in sides:  # the sender too goes on only when its message has left
                np.maximum.at(ready, (transfers.arrive[leaving], side), done)
        ends[number] = starts[number] + work[number]
    seconds = float(max(ends[-1].max(initial=0.0), ready.max(initial=0.0)))
    compute = float(work.sum(0).max(initial=0.0))
    return Prediction(seconds, compute, seconds - compute, starts, ends)


def _batches(transfers: Transfers, rounds: int) -> list[list[Integers]]:
    """Return, for each round, what leaves before it: a batch (indices) for each round that it is needed in."""
    found: list[list[Integers]] = [[] for _ in range(rounds)]
    order = np.lexsort((transfers.arrive, transfers.depart))
    keys = np.stack([transfers.depart, transfers.arrive])[:, order]
    for batch in np.split(order, np.flatnonzero(np.diff(keys).any(0)) + 1):
        if len(batch):
            found[transfers.depart[batch[0]]].append(batch)
    return found


class _Wires:
    """When each rank's links are free, by level and direction."""

    def __init__(self, costs: Costs, world: int) -> None:
        self.costs = costs
        self.out = np.zeros((len(costs.links), world))
        self.back = np.zeros((len(costs.links), world))

    def send(self, source: Integers, target: Integers, size: Integers, now: Floats) -> Floats:
        """Return when each of these transfers, posted in one round, is done."""
        costs, done = self.costs, np.zeros(len(source))
        apart = (source // costs.ranks_per_node != target // costs.ranks_per_node).astype(np.int64)
        level = np.minimum(apart, len(costs.links) - 1)
        for number, link in enumerate(costs.links):
            some = level == number
            if not some.any():
                continue
            done[some] = self._level(number, link, source[some], target[some], size[some] / link.bandwidth, now)
        return done

    def _level(self, number: int, link: Link, a: Integers, b: Integers, taken: Floats, now: Floats) -> Floats:
        """All that one round sends over one level: what leaves a rank shares its link, what comes to it likewise.

        While a transfer waits for its other side, the link is free for others.
        """
        posted = np.maximum(now[a], now[b])
        done = posted + taken
        for free, side in ((self.out[number], a), (self.back[number], b)):
            np.maximum.at(free, side, now[side])
            np.add.at(free, side, taken)
            done = np.maximum(done, free[side])
        if not link.duplex:
            done = np.maximum(done, self._in_turns(a, b, taken, posted))
            np.maximum.at(self.out[number], a, done)
            np.maximum.at(self.back[number], b, done)
        return done + link.latency

    def _in_turns(self, a: Integers, b: Integers, taken: Floats, posted: Floats) -> Floats:
        """Return when two ranks that send to each other are done, one direction after the other."""
        world = self.out.shape[1]
        _, pair = np.unique(np.minimum(a, b) * world + np.maximum(a, b), return_inverse=True)
        total, latest = np.zeros(pair.max() + 1), np.zeros(pair.max() + 1)
        np.add.at(total, pair, taken)
        np.maximum.at(latest, pair, posted)
        return (latest + total)[pair]
