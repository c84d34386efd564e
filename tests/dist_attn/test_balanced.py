"""The layout that looks at the masks: even tokens, even work by brute-force counts, few keys to fetch."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from typing import Any

import pytest
from compositions import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from dense import pattern_table
from ringspan.dist_attn.balance_ledger import ledger
from ringspan.dist_attn.balanced import Balanced
from ringspan.dist_attn.layout import Contiguous, Layout, ZigZag
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
    overlap,
    s2_attention,
    union,
)

Patterns = list[tuple[Mask, int]]


def boundaries(length: int, documents: int, seed: int, *, longest: int = 0) -> list[int]:
    """Return the edges of documents of very different lengths; the first has at least ``longest`` tokens."""
    draw = random.Random(seed)
    sizes = [draw.lognormvariate(0, 1) for _ in range(documents)]
    edges, total = {0, length}, sum(sizes)
    for count in range(1, documents):
        edges.add(longest + int(sum(sizes[:count]) / total * (length - longest)))
    return sorted(edges)


def shares(layout: Layout, world: int, length: int) -> list[tuple[Span, ...]]:
    return [layout.spans(rank, world, length) for rank in range(world)]


def imbalance(layout: Layout, patterns: Patterns, world: int, length: int) -> float:
    """Return the greatest over the mean of the ranks' live pairs, which the masks count exactly."""
    everything = Span(0, length)
    held = shares(layout, world, length)
    areas = [sum(weight * mask.area(span, everything) for mask, weight in patterns for span in spans) for spans in held]
    return max(areas) * world / sum(areas)


def fetched(layout: Layout, patterns: Patterns, world: int, length: int) -> int:
    """Return the key rows that ranks see and do not hold, summed over ranks and layers."""
    total = 0
    for held in shares(layout, world, length):
        for mask, weight in patterns:
            seen = union(key for span in held for cut in mask.cuts(span) for key in mask.reach(cut))
            seen = overlap(seen, [Span(0, length)])
            total += weight * sum(span.size for span in seen)
            total -= weight * sum(span.size for span in overlap(seen, held))
    return total


@given(cases(), st.integers(1, 30))
def test_the_ledger_counts_pairs_exactly(case: Case, grain: int) -> None:
    book = ledger([(case.mask, 3)], case.length, grain)
    assert int(book.size.sum()) == case.length
    assert int(book.size.max()) <= grain
    for start, size, area in zip(book.start, book.size, book.area, strict=True):
        assert area == case.table[start : start + size].sum()


@pytest.mark.parametrize("edges", [None, [0, 7, 8, 31, 40]])
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (Causal(), ("causal",)),
        (Full(), ("full",)),
        (Window(5, 3), ("window", 5, 3)),
        (Causal() & Window(9), ("and", ("causal",), ("window", 9, 0))),
        (Causal() & Groups(8, 3), ("and", ("causal",), ("groups", 8, 3, False))),
    ],
)
def test_the_ledger_knows_what_a_cut_hides(mask: Mask, words: Any, edges: list[int] | None) -> None:
    table = pattern_table(40, words, edges)
    book = ledger([(mask & Documents(edges) if edges else mask, 1)], 40, 3)
    for number, (start, size) in enumerate(zip(book.start.tolist(), book.size.tolist(), strict=True)):
        assert book.before[0, 0, number] == table[start:, :start].any(0).sum()
        assert book.after[1, 0, number] == table[: start + size, start + size :].any(0).sum()


@given(cases(longest=120), st.integers(1, 9), st.integers(1, 40))
def test_shares_are_equal_and_hold_every_token_once(case: Case, world: int, block: int) -> None:
    held = shares(Balanced(case.mask, block), world, case.length)
    for spans in held:
        assert all(span.start < span.stop for span in spans)
        assert all(a.stop < b.start for a, b in zip(spans, spans[1:], strict=False))
    assert sorted(p for spans in held for span in spans for p in range(*span)) == list(range(case.length))
    sizes = {sum(span.size for span in spans) for spans in held}
    assert sizes <= {case.length // world, case.length // world + 1}


@settings(deadline=None)
@given(cases(longest=700), st.integers(1, 8), st.integers(1, 200))
def test_work_is_even_by_brute_force(case: Case, world: int, block: int) -> None:
    rows = case.table.sum(1)
    held = shares(Balanced(case.mask, block), world, case.length)
    work = [sum(int(rows[a:b].sum()) for a, b in spans) for spans in held]
    # A hundredth to save keys, and what does not divide: one token at each of a share's cuts.
    assert max(work) <= 1.01 * sum(work) / world + 2 * int(rows.max())


@pytest.mark.parametrize(("documents", "longest"), [(1, 0), (9, 0), (60, 0), (400, 0), (200, 40000)])
@pytest.mark.parametrize("world", [2, 5, 8])
def test_packed_documents_are_even(documents: int, longest: int, world: int) -> None:
    length = 65536 + 77
    mask = Causal() & Documents(boundaries(length, documents, world, longest=longest))
    assert imbalance(Balanced(mask), [(mask, 1)], world, length) <= 1.01
    if documents > 1:
        assert imbalance(ZigZag(), [(mask, 1)], world, length) > 1.02  # there is something to do


def test_layers_are_summed() -> None:
    length, world = 65536, 8
    edges = boundaries(length, 50, 3)
    local = Causal() & (Window(500) | Sinks(4)) & Documents(edges)
    layers: Patterns = [(Causal() & Documents(edges), 3), (local, 13)]
    layout = Balanced(layers)
    assert imbalance(layout, layers, world, length) <= 1.01
    assert imbalance(Balanced(layers[0][0]), layers, world, length) > 1.02  # another model, another layout
    assert layout != Balanced([(mask, 1) for mask, _ in layers])


def test_kv_heads_count_by_their_masks() -> None:
    length, world = 16384, 4
    mask = PerHead({(0, 1): Causal(), (1, 4): Causal() & Window(255)}) & Documents(boundaries(length, 20, 1))
    patterns = [(one, len(heads)) for heads, one in by_head(mask, 0, 4, 4)]
    assert imbalance(Balanced(mask, kv_heads=4), patterns, world, length) <= 1.01
    layers: Patterns = [(mask, 2), (Causal(), 1)]
    summed: Patterns = [*((one, 2 * heads) for one, heads in patterns), (Causal(), 4)]
    assert imbalance(Balanced(layers, kv_heads=4), summed, world, length) <= 1.01


def test_batch_rows_share_a_layout() -> None:
    length, world = 16384, 4
    packings = [boundaries(length, 20, row) for row in range(3)]
    mask = Causal() & Documents(packings)
    patterns: Patterns = [(Causal() & Documents(edges), 1) for edges in packings]
    assert imbalance(Balanced(mask), patterns, world, length) <= 1.01
    layers: Patterns = [(mask, 1), (Causal(), 2)]  # the other layer meets each of the batch's rows, too
    assert imbalance(Balanced(layers), [*patterns, (Causal(), 6)], world, length) <= 1.01


@pytest.mark.parametrize("world", [2, 3, 8, 16])
def test_dense_causal_is_as_good_as_zigzag(world: int) -> None:
    length = 32768
    dense: Patterns = [(Causal(), 1)]
    assert imbalance(Balanced(Causal()), dense, world, length) <= 1.01
    assert fetched(Balanced(Causal()), dense, world, length) <= 1.01 * fetched(ZigZag(), dense, world, length)


def test_windows_keep_neighbours_together() -> None:
    mask = Causal() & Window(255)
    assert shares(Balanced(mask), 8, 65536) == shares(Contiguous(), 8, 65536)
    assert shares(Balanced(Full()), 8, 65536) == shares(Contiguous(), 8, 65536)


def test_documents_that_fit_stay_whole() -> None:
    edges = list(range(0, 32769, 1024))
    mask = Causal() & Documents(edges)
    assert fetched(Balanced(mask), [(mask, 1)], 8, 32768) == 0
    # Hundreds of short ones: at most one in a gap at each rank's end is cut, near its start.
    draw, edges = random.Random(0), [0]
    while edges[-1] < 65000:
        edges.append(edges[-1] + draw.randint(50, 300))
    mask = Causal() & Documents(edges)
    layout, length = Balanced(mask), edges[-1]
    assert imbalance(layout, [(mask, 1)], 8, length) <= 1.01
    assert fetched(layout, [(mask, 1)], 8, length) < 300
    assert fetched(Contiguous(), [(mask, 1)], 8, length) > 300


@pytest.mark.parametrize(("world", "seed"), [(8, 1), (16, 1), (32, 1), (16, 2)])  # the last one takes evening out
def test_a_document_too_much_for_a_rank_is_cut_and_few_others(world: int, seed: int) -> None:
    length = 1 << 18
    edges = boundaries(length, 900, seed)
    mask = Causal() & Documents(edges)
    layout = Balanced(mask)
    assert imbalance(layout, [(mask, 1)], world, length) <= 1.01
    cuts = {point for spans in shares(layout, world, length) for span in spans for point in span}
    assert len(cuts - set(edges)) <= 1.2 * world  # arcs alone make more


def test_a_token_more_than_a_share_can_hold_is_no_fault() -> None:
    """One document of the many has nearly all pairs, in fewer tokens than there are ranks."""
    length, world = 64, 8
    edges = [0, 4, *range(5, length + 1)]
    mask = Full() & Documents(edges)
    rows = pattern_table(length, ("full",), edges).sum(1)
    work = sorted(sum(int(rows[a:b].sum()) for a, b in spans) for spans in shares(Balanced(mask), world, length))
    assert sum(work) == 16 + 60
    assert work[-1] <= 4 + 7  # no rank has two of its four tokens


def test_a_layout_is_fitted_to_its_documents() -> None:
    length, world = 8192, 4
    packed = Documents(boundaries(length, 12, 2))
    layers: Patterns = [(Causal(), 1), (Causal() & Window(99), 2)]
    fitted = Balanced(layers, 64).fitted(packed)
    assert fitted == Balanced([(mask & packed, count) for mask, count in layers], 64)
    assert imbalance(fitted, [(mask & packed, count) for mask, count in layers], world, length) <= 1.01
    assert Balanced(layers).fitted(None) == Balanced(layers)
    with pytest.raises(ValueError, match="2 Documents"):
        fitted.fitted(packed)


@pytest.mark.parametrize("documents", [1, 300])
def test_a_million_tokens_on_64_ranks_take_no_time(documents: int) -> None:
    length, world = 1 << 20, 64
    mask = Causal() & Documents(boundaries(length, documents, 0))
    Balanced(Causal()).spans(0, 2, 64)  # imports and caches
    began = time.process_time()
    held = shares(Balanced(mask), world, length)
    assert time.process_time() - began < 1
    assert {sum(span.size for span in spans) for spans in held} == {length // world}
    assert imbalance(Balanced(mask), [(mask, 1)], world, length) <= 1.01


def test_every_process_finds_the_same() -> None:
    code = (
        "import hashlib\n"
        "from ringspan.dist_attn.balanced import Balanced\n"
        "from ringspan.kernels.mask import Causal, Documents, Window, s2_attention\n"
        "edges = sorted({0, 50000, *(i * i * 7919 % 50000 for i in range(80))})\n"
        "layers = [(s2_attention(4096) & Documents(edges), 2), (Causal() & Window(999) & Documents(edges), 5)]\n"
        "layout = Balanced(layers, kv_heads=3)\n"
        "held = [layout.spans(rank, 7, 50000) for rank in range(7)]\n"
        "print(layout, hashlib.sha256(repr(held).encode()).hexdigest())\n"
    )
    found: set[str] = set()
    for seed in ("0", "1"):
        run = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        found.add(
            subprocess.run(run, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120).stdout
        )
    assert len(found) == 1
    assert found.pop().startswith("Balanced(s2_attention(4096) & documents(0, ")


def test_the_text_is_short_and_tells_layouts_apart() -> None:
    assert str(Balanced(Causal())) == "Balanced(causal, block=128)"
    pair = [(Causal(), 2), (Causal() & Window(9), 3)]
    assert str(Balanced(pair, 64)) == "Balanced(causal x 2 + causal & window(9) x 3, block=64)"
    assert str(Balanced(s2_attention(8), kv_heads=2)) == "Balanced(s2_attention(8), block=128, kv_heads=2)"
    packed = [Balanced(Causal() & Documents([*range(0, 3000, 3), end])) for end in (3000, 3001)]
    assert len({*map(str, packed)}) == 2
    assert max(len(str(layout)) for layout in packed) < 120


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "masks must be a mask, or pairs"),
        (("causal",), "masks must be a mask, or pairs"),
        (([Causal()],), "masks must be a mask, or pairs"),
        (([(Causal(), 0)],), "layers of causal must be an int of at least 1, got 0"),
        (([(Causal(), 1.5)],), "layers of causal must be an int of at least 1, got 1.5"),
        ((Causal(), 0), "block must be an int of at least 1, got 0"),
        ((s2_attention(64),), r"s2_attention\(64\) differs by KV head; give kv_heads"),
        (
            ([(Documents([[0, 4], [0, 2, 4]]), 1), (Documents([[0, 4]] * 3), 1)],),
            "masks for 2 and 3 batch rows; all layers see the same batch",
        ),
    ],
)
def test_bad_arguments_are_named(arguments: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"Balanced: {words}"):
        Balanced(*arguments)


def test_what_does_not_fit_is_refused_when_it_is_asked_for() -> None:
    with pytest.raises(ValueError, match="Documents ends at 8 but the sequence has 9"):
        Balanced(Causal() & Documents([0, 8])).spans(0, 2, 9)
    with pytest.raises(ValueError, match="masks for 2 KV heads, but the model has 1"):
        Balanced(PerHead({(0, 1): Causal(), (1, 2): Full()}), kv_heads=1).spans(0, 2, 9)
    with pytest.raises(ValueError, match="kv_heads must be an int of at least 1, got 0"):
        Balanced(Causal(), kv_heads=0)
    with pytest.raises(ValueError, match="rank: 2 is not within a world of 2"):
        Balanced(Causal()).spans(2, 2, 9)
