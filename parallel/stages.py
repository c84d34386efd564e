"""Which layers a pipeline stage gets: contiguous runs, whose costliest is as cheap as can be. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache


def cut(costs: Sequence[float], stages: int, *, first: float = 0.0, last: float = 0.0) -> tuple[range, ...]:
    """Return the layers of each stage, at least one for each, so that the costliest stage costs least.

    Args:
        costs: of each layer.
        first, last: what the first stage (embedding) and the last (head and loss) have to do besides.

    Raises:
        ValueError: for more stages than layers.
    """
    layers = len(costs)
    if stages > layers:
        raise ValueError(f"pp: {stages} stages need as many layers, the model has {layers}; give at most {layers}")
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost)

    @cache
    def best(stage: int, start: int) -> tuple[float, int]:
        """Return the cost of the costliest stage from ``stage`` on, and where ``stage`` stops."""
        own = first if stage == 0 else 0.0
        if stage == stages - 1:
            return own + before[layers] - before[start] + last, layers
        choices = [
            (max(own + before[stop] - before[start], best(stage + 1, stop)[0]), stop)
            for stop in range(start + 1, layers - (stages - stage - 1) + 1)
        ]
        return min(choices)

    runs, start = [], 0
    for stage in range(stages):
        stop = best(stage, start)[1]
        runs.append(range(start, stop))
        start = stop
    return tuple(runs)


def layer_cost(parameters: int, heads: int, head_dim: int, length: int) -> float:
    """Return multiply-adds of a token in one layer: its weights, and causal attention over half of ``length`` keys."""
    return parameters + heads * head_dim * length  # q k and p v, over length / 2 keys each
