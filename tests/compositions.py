"""Random masks, as words for the truth and as the library's values."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from dense import pattern_table
from ringspan.kernels.mask import And, Causal, Dilated, Documents, Full, Groups, Mask, Or, Sinks, Window

Words = tuple[Any, ...]


class Case(NamedTuple):
    """A mask, its pattern in words, and the table of it."""

    mask: Mask
    words: Words
    boundaries: list[int] | None
    length: int

    @property
    def table(self) -> torch.Tensor:
        return pattern_table(self.length, self.words, self.boundaries)


small = st.integers(1, 8)
leaves: st.SearchStrategy[Words] = st.one_of(
    st.just(("full",)),
    st.just(("causal",)),
    st.tuples(st.just("window"), st.integers(0, 8), st.integers(0, 3)),
    st.tuples(st.just("sinks"), st.integers(1, 4)),
    st.tuples(st.just("groups"), small, st.integers(-3, 9), st.booleans()),
    st.tuples(st.just("dilated"), small, st.integers(1, 5)),
)


def _nested(inner: st.SearchStrategy[Words]) -> st.SearchStrategy[Words]:
    parts = st.lists(inner, min_size=2, max_size=3)
    return st.tuples(st.sampled_from(["and", "or"]), parts).map(lambda made: (made[0], *made[1]))


patterns = st.recursive(leaves, _nested, max_leaves=5)


def built(words: Words) -> Mask:
    """Return the library's mask of a pattern."""
    name, *given_ = words
    if name in ("and", "or"):
        return (And if name == "and" else Or)(tuple(built(each) for each in given_))
    makers = {"full": Full, "causal": Causal, "window": Window, "sinks": Sinks, "groups": Groups, "dilated": Dilated}
    return makers[name](*given_)


def names(words: Words) -> set[str]:
    """Return the names that occur in a pattern."""
    return {words[0]}.union(*(names(each) for each in words[1:] if isinstance(each, tuple)))


@st.composite
def cases(draw: st.DrawFn, longest: int = 24) -> Case:
    """Draw a composition, alone or with Documents before or behind it."""
    words = draw(patterns)
    length = draw(st.integers(1, longest))
    mask = built(words)
    if not draw(st.booleans()):
        return Case(mask, words, None, length)
    inner = draw(st.sets(st.integers(1, length - 1), max_size=6)) if length > 1 else set()
    boundaries = [0, *sorted(inner), length]
    packed = Documents(boundaries)
    return Case(mask & packed if draw(st.booleans()) else packed & mask, words, boundaries, length)


@st.composite
def spans(draw: st.DrawFn, length: int) -> tuple[int, int]:
    """Draw a range of positions that is not empty."""
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))
