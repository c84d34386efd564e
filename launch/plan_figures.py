"""What attention costs on ranks that need not exist: bytes, work and seconds, for each kind of layer and strategy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ringspan.dist_attn.cost import Prediction
from ringspan.dist_attn.moves import Integers
from ringspan.dist_attn.planner import Plan, plan
from ringspan.dist_attn.strategies import TABLE
from ringspan.kernels.mask import Mask
from ringspan.launch.plan_inputs import Inputs
from ringspan.parallel.faults import Fault


@dataclass(frozen=True)
class Spread:
    """A quantity over the ranks."""

    min: int
    mean: float
    max: int

    @classmethod
    def of(cls, values: Integers) -> Spread:
        """Sum up one value per rank."""
        return cls(int(values.min()), float(values.mean()), int(values.max()))


@dataclass(frozen=True)
class Pass:
    """One pass of one layer.

    Args:
        received_bytes: that arrive at a rank.
        lower_bound_bytes: the fewest, mean over the ranks, where queries stay and gradients of keys go home.
        seconds: until the last rank is done; compute_seconds: of the rank that computes longest; exposed_seconds: the
            rest.
    """

    received_bytes: Spread
    lower_bound_bytes: float
    seconds: float
    compute_seconds: float
    exposed_seconds: float

    @property
    def ratio(self) -> float | None:
        """Bytes received over the lower bound; None where nothing has to move."""
        return self.received_bytes.mean / self.lower_bound_bytes if self.lower_bound_bytes else None


@dataclass(frozen=True)
class Offer:
    """What one strategy would do with one kind of layer.

    Args:
        refuses: why it cannot; None where it can.
        holds_bytes: of other ranks' keys and values, at once; too_large: more than "auto" admits.
    """

    strategy: str
    refuses: str | None
    holds_bytes: int = 0
    too_large: bool = False
    forward: Pass | None = None
    backward: Pass | None = None

    @property
    def seconds(self) -> float:
        """Of both passes."""
        return sum(each.seconds for each in (self.forward, self.backward) if each is not None)


@dataclass(frozen=True)
class Kind:
    """Layers that share a mask, and the strategy taken for them.

    Args:
        layers: their numbers.
        area: live (query, key) pairs of a rank, mean over the KV heads, summed over the batch's rows.
        imbalance: the busiest rank's live pairs over the mean.
        offers: all strategies; the one taken among them.
    """

    mask: str
    layers: tuple[int, ...]
    strategy: str
    why: str
    area: Spread
    imbalance: float
    offers: tuple[Offer, ...]

    @property
    def taken(self) -> Offer:
        """What the strategy taken costs."""
        return next(offer for offer in self.offers if offer.strategy == self.strategy)


@dataclass(frozen=True)
class Drawn:
    """What a picture of one kind of layer needs."""

    kind: Kind
    plan: Plan
    forward: Prediction
    backward: Prediction


def work_out(inputs: Inputs) -> list[Drawn]:
    """Plan every kind of layer with every strategy.

    Raises:
        Fault: if the strategy that the config asks for cannot serve a layer.
    """
    return [
        _kind(inputs, mask, numbers) for mask, numbers in zip(inputs.masks, inputs.shape.layers.values(), strict=True)
    ]


def _kind(inputs: Inputs, mask: Mask, layers: tuple[int, ...]) -> Drawn:
    shape = inputs.shape
    try:
        taken = plan(
            inputs.packed(mask),
            inputs.layout,
            world=inputs.mesh if len(inputs.mesh) == 2 else inputs.world,  # pyright: ignore[reportArgumentType]
            length=inputs.length,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            dtype=inputs.dtype,
            strategy=inputs.strategy,
            keep=inputs.keep,
            gradient_dtype=inputs.gradient_dtype,
            costs=inputs.costs,
        )
    except ValueError as error:
        raise Fault(f"attention.{error} (layers of mask {mask})") from error
    bound = np.array([taken.lower_bound_bytes(rank) for rank in range(inputs.world)]).mean()
    predictions: dict[str, tuple[Prediction, Prediction]] = {}
    offers = []
    for name, strategy in TABLE.items():
        if refusal := strategy.refuses(taken.problem):
            offers.append(Offer(name, refusal))
            continue
        each = taken if name == taken.strategy else replace(taken, strategy=name)
        predictions[name] = each.seconds(inputs.costs), each.seconds(inputs.costs, backward=True)
        forward, backward = (_pass(each, predictions[name][way], bound, bool(way)) for way in (0, 1))
        holds = strategy.holds(taken.problem)
        offers.append(Offer(name, None, holds, holds > inputs.costs.gather_bytes, forward, backward))
    area = Spread.of(np.array([taken.area(rank) for rank in range(inputs.world)]))
    kind = Kind(str(mask), layers, taken.strategy, taken.why, area, taken.imbalance(), tuple(offers))
    return Drawn(kind, taken, *predictions[taken.strategy])


def _pass(made: Plan, prediction: Prediction, bound: float, backward: bool) -> Pass:
    problem, transfers = made.problem, made.backward if backward else made.forward
    received = np.zeros(problem.world, dtype=np.int64)
    np.add.at(received, transfers.target, transfers.bytes)
    # Backward: keys and values once more, and dK and dV as often, in their own dtype.
    least = bound * (1 + problem.wired.itemsize / problem.dtype.itemsize) if backward else bound
    return Pass(Spread.of(received), float(least), prediction.seconds, prediction.compute, prediction.exposed)


@dataclass(frozen=True)
class Total:
    """All layers, for one micro-batch: attention alone."""

    forward_seconds: float
    backward_seconds: float
    exposed_seconds: float
    received_bytes: float
    tokens_per_second: float

    @classmethod
    def of(cls, kinds: list[Kind], tokens: int) -> Total:
        """Sum over the layers of all kinds; received_bytes: of both passes, mean over the ranks."""
        forward = backward = exposed = received = 0.0
        for kind in kinds:
            for each in (kind.taken.forward, kind.taken.backward):
                assert each is not None, "the strategy taken refuses nothing"
                exposed += len(kind.layers) * each.exposed_seconds
                received += len(kind.layers) * each.received_bytes.mean
                if each is kind.taken.forward:
                    forward += len(kind.layers) * each.seconds
                else:
                    backward += len(kind.layers) * each.seconds
        seconds = forward + backward
        return cls(forward, backward, exposed, received, tokens / seconds if seconds else float("inf"))


def as_json(inputs: Inputs, kinds: list[Kind], total: Total) -> dict[str, Any]:
    """Return everything as plain values; seconds and bytes."""
    shape, documents = inputs.shape, inputs.documents
    rows = None if documents is None else documents.rows or (documents.edges,)
    return {
        "model": {
            "name": shape.model,
            "heads": shape.heads,
            "kv_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "layers_without_attention": shape.other_layers,
            "dtype": str(inputs.dtype).removeprefix("torch."),
        },
        "world": inputs.world,
        "mesh": list(inputs.mesh),
        "length": inputs.length,
        "batch": inputs.batch,
        "documents": None if rows is None else [len(edges) - 1 for edges in rows],
        "layout": str(inputs.layout),
        "keep_attention": inputs.keep,
        "costs": asdict(inputs.costs),
        "kinds": [{**asdict(kind), "layers": list(kind.layers)} for kind in kinds],
        "total": asdict(total),
    }
