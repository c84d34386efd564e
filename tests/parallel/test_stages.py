"""Layers are cut into runs whose costliest is as cheap as can be."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringspan.parallel.stages import cut, layer_cost


def cost(costs: list[int], runs: tuple[range, ...], first: int, last: int) -> float:
    sums = [sum(costs[index] for index in run) for run in runs]
    sums[0] += first
    sums[-1] += last
    return max(sums)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(0, 20),
    st.integers(0, 20),
)
def test_no_other_cut_is_cheaper(costs: list[int], stages: int, first: int, last: int) -> None:
    layers = len(costs)
    if stages > layers:
        with pytest.raises(ValueError, match=f"pp: {stages} stages need as many layers, the model has {layers}"):
            cut(costs, stages, first=first, last=last)
        return
    found = cut(costs, stages, first=first, last=last)
    assert [index for run in found for index in run] == list(range(layers))
    assert all(len(run) > 0 for run in found)
    every = [(0, *inner, layers) for inner in combinations(range(1, layers), stages - 1)]
    tried = [tuple(range(a, b) for a, b in zip(edges, edges[1:], strict=False)) for edges in every]
    assert cost(costs, found, first, last) == min(cost(costs, runs, first, last) for runs in tried)


def test_the_head_counts() -> None:
    """With a vocabulary that costs three layers, the last stage has three fewer."""
    even = cut([1.0] * 9, 3)
    assert [len(run) for run in even] == [3, 3, 3]
    assert [len(run) for run in cut([1.0] * 9, 3, last=3.0)] == [4, 4, 1]


def test_attention_grows_with_the_length() -> None:
    short, long = (layer_cost(1000, 4, 8, length) for length in (10, 1000))
    assert short == 1000 + 4 * 8 * 10
    assert long - short == 4 * 8 * 990
