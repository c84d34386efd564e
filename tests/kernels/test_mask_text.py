"""Masks as text: what is written reads back as the same value, and what is wrong is named with its place."""

from __future__ import annotations

import subprocess
import sys

import pytest
from compositions import built, patterns
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.kernels.mask import (
    And,
    Causal,
    Dilated,
    Documents,
    Full,
    Groups,
    Mask,
    Or,
    PerHead,
    Sinks,
    Window,
    parse,
    s2_attention,
    sf_attention,
)

TEXTS = {
    "causal": Causal(),
    "full": Full(),
    "causal & (window(1024) | sinks(4))": Causal() & (Window(1024) | Sinks(4)),
    "causal & window(1024) | sinks(4)": (Causal() & Window(1024)) | Sinks(4),
    "window(4, 2)": Window(4, 2),
    "documents(0, 10, 20)": Documents([0, 10, 20]),
    "documents((0, 2, 4), (0, 4))": Documents([[0, 2, 4], [0, 4]]),
    "documents((0, 4))": Documents([[0, 4]]),
    "groups(1024)": Groups(1024),
    "groups(1024, 512)": Groups(1024, 512),
    "groups(8, -4)": Groups(8, -4),
    "groups(1024, per_document=True)": Groups(1024, per_document=True),
    "groups(1024, 512, per_document=True)": Groups(1024, 512, True),
    "dilated(64, 8)": Dilated(64, 8),
    "per_head({(0, 2): causal, (2, 4): window(8)})": PerHead({(0, 2): Causal(), (2, 4): Window(8)}),
    "s2_attention(1024)": s2_attention(1024),
    "sf_attention(1024, sinks=4, unshifted=0.5)": sf_attention(1024),
    "sf_attention(8, sinks=2, unshifted=1.0) & documents(0, 9)": sf_attention(8, 2, 1) & Documents([0, 9]),
}


@st.composite
def expressions(draw: st.DrawFn) -> Mask:
    """Draw a composition with heads anywhere and Documents, perhaps per row, where they may stand."""
    plain = patterns.map(built)
    halves = st.tuples(plain, plain).map(lambda two: PerHead({(0, 1): two[0], (1, 8): two[1]}))
    mixes = st.builds(sf_attention, st.integers(2, 9), st.integers(1, 9), st.floats(0, 1))
    many: list[Mask] = draw(
        st.lists(st.one_of(plain, halves, mixes, st.builds(s2_attention, st.integers(2, 9))), max_size=3)
    )
    if len(many) > 1:
        many = [draw(st.sampled_from([And, Or]))(tuple(many))]
    edges = st.sets(st.integers(1, 99), min_size=1).map(lambda inner: [0, *sorted(inner)])
    if not many or draw(st.booleans()):
        many.append(Documents(draw(st.one_of(edges, st.lists(edges, min_size=1, max_size=3)))))
    return many[0] if len(many) == 1 else draw(st.permutations(many).map(lambda two: two[0] & two[1]))


@pytest.mark.parametrize(("text", "mask"), TEXTS.items())
def test_texts_of_masks(text: str, mask: Mask) -> None:
    assert str(mask) == text
    assert parse(text) == mask


@given(expressions())
@settings(deadline=None, max_examples=150)
def test_what_is_written_reads_back(mask: Mask) -> None:
    again = parse(str(mask))
    assert again == mask
    assert hash(again) == hash(mask)
    assert str(again) == str(mask)


def test_other_spellings() -> None:
    assert parse("  causal()&\n (window(left=8)\t| sinks(n=4))  ") == Causal() & (Window(8) | Sinks(4))
    assert parse("((causal))") == Causal()
    assert parse("sf_attention(8)") == sf_attention(8)
    assert parse("documents([0, 4], [0, 2, 4])") == Documents([[0, 4], [0, 2, 4]])
    assert parse("full & (causal & window(3))") == Full() & Causal() & Window(3)
    assert parse("sf_attention(8, unshifted=2.5e-1)") == sf_attention(8, unshifted=0.25)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("causl & window(3)", "'causl' at column 1: no mask is named causl; did you mean causal. known"),
        ("causal & (Window(3) | sinks(4))", r"'Window\(3\)' at column 11: .*; did you mean window. known"),
        ("causal &\n  cusal", "'cusal' at column 12"),
        ("zzz", "no mask is named zzz; known are causal, full, window, sinks, .* per_head"),
        ("causal & window", "'window' at column 10: missing a required argument: 'left'; window takes .left, right=0."),
        ("window(1, 2, 3)", "too many positional arguments; window takes .left, right=0."),
        ("window(lefd=3)", "at column 1: window takes no lefd; did you mean left."),
        ("causal & window(-1)", r"'window\(-1\)' at column 10: Window: left must be an int of at least 0 .* got -1"),
        ("groups(8.5)", "Groups: size must be .* got 8.5"),
        ("window(x)", "'x' at column 8: a number is expected"),
        ("window(1 + 1)", r"'1 \+ 1' at column 8: a number is expected"),
        ("window(left=1, left=2)", "column 1: arguments are written out, each once"),
        ("documents", "documents needs brackets"),
        ("documents(0, 3, 3)", "strictly increasing, .* got 3 before 3"),
        ("documents(x=3)", "'3' at column 13: documents takes boundaries without names"),
        ("causal | documents(0, 4)", r"column 1: Documents under \|"),
        ("per_head(causal)", "per_head takes one table"),
        ("per_head({2: causal})", r"'2' at column 11: a range of KV heads is written \(first, last \+ 1\)"),
        ("per_head({(0, 2): causal, (0, 2): full})", r"'\(0, 2\)' at column 27: .* given twice"),
        ("per_head({(0, 2): causal, (1, 3): full})", "ranges must be disjoint"),
        ("per_head({(0, 2): cusal})", "'cusal' at column 19"),
        ("", "'' at column 1: a mask is expected"),
        ("causal, full", "'causal, full' at column 1: a mask is expected"),
        ("3", "'3' at column 1: a mask is expected"),
        ("causal + full", "a mask is expected"),
        ("causal if full else causal", "a mask is expected"),
        ("causal.parts", "a mask is expected"),
        ("lambda: causal", "a mask is expected"),
        ("causal &", "unfinished or wrong at column 9"),
        ("window(3", "unfinished or wrong"),
        ("causal)(", r"unexpected '\)' at column 7"),
        ("causal # all", "unexpected '#' at column 8"),
        ("__import__('os')", 'unexpected "\'" at column 12'),
        ("ca\N{CYRILLIC SMALL LETTER ES}usal", "unexpected .* at column 3"),
        ("not " * 5000 + "causal", "too complex|unfinished"),
        ("(" * 40 + "causal" + ")" * 40, "more than 32 brackets within brackets at column 33"),
        ("causal & " * 1001 + "causal", "more than 1000 operators"),
        (" " * (1 << 20) + "causal", "at most 1048576 are read"),
        ("window(" + "9" * 5000 + ")", "unfinished or wrong"),
        (3, "must be text, got 3"),
    ],
)
def test_wrong_text_is_named_with_its_place(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        parse(text)
    assert str(error.value).startswith("mask: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@given(st.text(alphabet="causlfwindo&|(){}[]:,.0123456789= -+_\n", max_size=40))
@settings(deadline=None, max_examples=150)
def test_any_text_is_a_mask_or_one_line(text: str) -> None:
    found: Mask | str
    try:
        found = parse(text)
    except ValueError as error:
        found = str(error)
    assert "\n" not in found if isinstance(found, str) else parse(str(found)) == found


def test_a_long_packing_reads_back_and_hashes_once() -> None:
    mask = Causal() & Documents(range(10_001))
    assert parse(str(mask)) == mask
    assert hash(mask) == hash(parse(str(mask)))


def test_the_text_and_the_documents_hash_are_the_same_in_every_process() -> None:
    """Plans of all ranks are compared by a digest of the text; a mask that travels keeps its hash."""
    text = "causal & (window(8) | sinks(4)) & documents(0, 3, 9)"
    program = f"from ringspan.kernels.mask import parse; m = parse({text!r}); print(m, hash(m.documents))"
    other = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert other.stdout == f"{text} {hash(Documents([0, 3, 9]))}\n"
