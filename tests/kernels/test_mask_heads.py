"""Masks that differ by KV head: which head gets which pattern, and who is refused or warned."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dense import pattern_table
from ringspan.kernels.mask import (
    Causal,
    Documents,
    Full,
    Groups,
    Mask,
    PerHead,
    Sinks,
    Span,
    Window,
    by_head,
    s2_attention,
    sf_attention,
)

MIXED = PerHead({(2, 6): Causal() & Window(8), (0, 2): Causal()})


def patterns(mask: Mask, total: int) -> list[Mask]:
    """Return each head's mask, of all heads at once."""
    found = {head: one for heads, one in by_head(mask, 0, total, total) for head in heads}
    return [found[head] for head in range(total)]


def test_a_mask_without_heads_is_one_group() -> None:
    mask = Causal() & Documents([0, 4])
    assert by_head(mask, 2, 3, 8) == (((0, 1, 2), mask),)


def test_ranges_of_heads_take_their_masks() -> None:
    assert by_head(MIXED, 0, 6, 6) == (((0, 1), Causal()), ((2, 3, 4, 5), Causal() & Window(8)))
    # A tensor-parallel rank counts its own heads from 0.
    assert by_head(MIXED, 1, 3, 6) == (((0,), Causal()), ((1, 2), Causal() & Window(8)))


def test_heads_with_equal_masks_are_one_group() -> None:
    mask = PerHead({(0, 1): Causal(), (1, 2): Full(), (2, 4): Causal()})
    assert by_head(mask, 0, 4, 4) == (((0, 2, 3), Causal()), ((1,), Full()))


def test_heads_stand_anywhere_in_an_expression() -> None:
    mask = (MIXED | Sinks(4)) & Documents([0, 4, 9]) & Causal()
    tail = Documents([0, 4, 9]) & Causal()
    assert by_head(mask, 1, 2, 6) == (
        ((0,), (Causal() | Sinks(4)) & tail),
        ((1,), ((Causal() & Window(8)) | Sinks(4)) & tail),
    )
    nested = PerHead({(0, 3): MIXED, (3, 6): s2_attention(4)})
    assert patterns(nested, 6)[1:4] == [Causal(), Causal() & Window(8), Causal() & Groups(4, 2)]


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PerHead({}), "at least one range"),
        (lambda: PerHead({(0, 2): Causal(), (1, 4): Full()}), r"disjoint, got \(0, 2\) and \(1, 4\)"),
        (lambda: PerHead({(2, 2): Causal()}), "stop must be an int of at least 3 .* got 2"),
        (lambda: PerHead({(-1, 2): Causal()}), "start must be an int of at least 0 .* got -1"),
        (lambda: PerHead({(0, True): Causal()}), "stop .* got True"),
        (lambda: PerHead({3: Causal()}), r"a range must be \(first, last \+ 1\), got 3"),  # pyright: ignore
        (lambda: PerHead({(0, 2): "causal"}), r"heads \(0, 2\) must have a mask, got 'causal'"),  # pyright: ignore
        (lambda: PerHead({(0, 2): Causal() & Documents([0, 4])}), "Documents inside PerHead"),
        (lambda: MIXED | Documents([0, 4]), "Documents under"),
        (lambda: by_head(MIXED, 0, 2, 7), "no mask for KV heads 6:7 of the model's 7"),
        (lambda: by_head(PerHead({(1, 2): Full()}), 0, 1, 2), "no mask for KV heads 0:1"),
        (lambda: by_head(PerHead({(0, 1): Full(), (2, 3): Full()}) & Causal(), 0, 1, 3), "no mask for KV heads 1:2"),
        (lambda: by_head(MIXED, 0, 2, 5), "masks for 6 KV heads, but the model has 5"),
        (lambda: by_head(Causal(), 4, 2, 5), "total must be an int of at least 6 .* got 5"),
        (lambda: by_head(Causal(), 0, 0, 5), "count must be an int of at least 1"),
        (lambda: s2_attention(1), "s2_attention: size must be an int of at least 2 .* got 1"),
        (lambda: sf_attention(8, sinks=0), "sf_attention: sinks must be an int of at least 1 .* got 0"),
        (lambda: sf_attention(8, unshifted=1.5), "unshifted must be a number from 0 to 1, got 1.5"),
        (lambda: sf_attention(8, unshifted=math.nan), "unshifted must be a number from 0 to 1, got nan"),
        (lambda: sf_attention(8, unshifted=True), "unshifted must be a number from 0 to 1, got True"),
    ],
)
def test_wrong_heads_are_refused(make: Callable[[], object], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mask", [MIXED, Causal() & (MIXED | Sinks(1)), s2_attention(4) & Documents([0, 4])])
def test_questions_about_positions_need_one_head(mask: Mask) -> None:
    span, position = Span(0, 4), torch.arange(4)
    questions: list[Callable[[], object]] = [
        lambda: mask.pieces(span),
        lambda: mask.reach(span),
        lambda: mask.full(span),
        lambda: mask.area(span, span),
        lambda: mask.cuts(span),
        lambda: mask.allowed(position, position),
    ]
    for question in questions:
        with pytest.raises(ValueError, match="differs by KV head; take it apart with by_head"):
            question()
    mask.check(4)


def test_causal_is_known_before_the_heads() -> None:
    assert MIXED.causal
    assert s2_attention(8).causal
    assert sf_attention(8).causal
    assert (s2_attention(8) & Documents([[0, 4], [0, 2, 4]])).causal
    assert not PerHead({(0, 1): Causal(), (1, 2): Full()}).causal
    assert (PerHead({(0, 1): Causal(), (1, 2): Full()}) & Causal()).causal


def test_s2_shifts_the_odd_heads() -> None:
    found = patterns(s2_attention(6), 4)
    position = torch.arange(20)
    for head, mask in enumerate(found):
        words = ("and", ("causal",), ("groups", 6, 3 if head % 2 else 0, False))
        assert torch.equal(mask.allowed(position[:, None], position), pattern_table(20, words))


def test_sf_adds_sinks_to_every_head_and_keeps_documents_apart() -> None:
    edges = [0, 7, 20]
    found = patterns(sf_attention(6, sinks=2) & Documents(edges), 4)
    position = torch.arange(20)
    for head, mask in enumerate(found):
        words = ("and", ("causal",), ("or", ("groups", 6, 3 if head % 2 else 0, False), ("sinks", 2)))
        assert torch.equal(mask.allowed(position[:, None], position), pattern_table(20, words, edges))


@given(st.integers(0, 20).map(lambda n: n / 20), st.integers(2, 40), st.data())
@settings(deadline=None)
def test_the_share_is_spread_evenly(share: float, total: int, data: st.DataObject) -> None:
    """Any heads in a row, a tensor-parallel rank's too, hold the share rounded up or down."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = patterns(sf_attention(8, unshifted=share), total)
    plain = [mask == Causal() & (Groups(8) | Sinks(4)) for mask in found]
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    exact = Fraction(round(share * 20), 20)
    assert sum(plain[start:stop]) in (math.floor((stop - start) * exact), math.ceil((stop - start) * exact))
    assert sum(plain) == math.ceil(total * exact)


def test_no_float_decides_about_a_head() -> None:
    """A tenth is a little more than 1/10 as a float; head 10 is the second of ten tenths all the same."""
    found = patterns(sf_attention(8, unshifted=0.1), 30)
    assert [head for head, mask in enumerate(found) if mask == Causal() & (Groups(8) | Sinks(4))] == [0, 10, 20]


def test_one_pattern_only_warns_once() -> None:
    for mask, total in ((s2_attention(8), 1), (sf_attention(8, unshifted=0.9), 4)):
        with pytest.warns(UserWarning, match="one pattern") as seen:
            assert len(by_head(mask & Documents([0, 9]), 0, total, total)) == 1
        assert len(seen) == 1
    for share in (0, 1.0):  # one pattern is what was asked for
        assert len(by_head(sf_attention(8, unshifted=share), 0, 4, 4)) == 1
