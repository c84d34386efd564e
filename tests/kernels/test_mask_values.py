"""Masks as values: equality, what they refuse, documents and batch rows."""

from collections.abc import Callable

import pytest

from ringspan.kernels.mask import (
    And,
    Causal,
    Dilated,
    Documents,
    Full,
    Groups,
    Mask,
    Or,
    Sinks,
    Span,
    Window,
    batch_rows,
    of_row,
    row_count,
    s2_attention,
)


@pytest.mark.parametrize("bad", [[1, 4], [0], [0, 3, 3], [0, 4, 2], [], [0, 2.0, 4], [0, True, 4], [[0, 4], 4]])
def test_documents_refuse_bad_boundaries(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="Documents boundaries must be") as error:
        Documents(bad)
    assert "\n" not in str(error.value)


def test_a_refused_list_of_boundaries_is_not_printed_whole() -> None:
    with pytest.raises(ValueError, match="got 7 before 7") as error:
        Documents([*range(8), *range(7, 9000)])
    assert len(str(error.value)) < 120


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Window(-1), "Window: left must be an int of at least 0 and below 2[*]{2}62, got -1"),
        (lambda: Window(1, -1), "Window: right .* at least 0 .* got -1"),
        (lambda: Window(1.0), "Window: left .* got 1.0"),  # pyright: ignore[reportArgumentType]
        (lambda: Window(True), "Window: left .* got True"),
        (lambda: Window(1 << 62), "Window: left .* below"),
        (lambda: Sinks(0), "Sinks: n .* at least 1 .* got 0"),
        (lambda: Groups(0), "Groups: size .* at least 1 .* got 0"),
        (lambda: Groups(4, 0.5), "Groups: shift must be an int and .* got 0.5"),  # pyright: ignore[reportArgumentType]
        (lambda: Groups(4, 0, 1), "Groups: per_document .* got 1"),  # pyright: ignore[reportArgumentType]
        (lambda: Dilated(0, 1), "Dilated: window .* at least 1 .* got 0"),
        (lambda: Dilated(1, 0), "Dilated: dilation .* at least 1 .* got 0"),
        (lambda: And((Causal(),)), "And takes two or more masks, got 1"),
        (lambda: Or(()), "Or takes two or more masks, got 0"),
        (lambda: Causal() | Documents([0, 4]), r"Documents under \|"),
        (lambda: Causal() & (Window(1) | (Sinks(1) & Documents([0, 4]))), r"Documents under \|"),
        (lambda: Documents([0, 4]) & Causal() & Documents([0, 2, 4]), "at most one"),
    ],
)
def test_masks_refuse_what_they_cannot_mean(make: Callable[[], Mask], named: str) -> None:
    with pytest.raises(ValueError, match=named) as error:
        make()
    assert "\n" not in str(error.value)


def test_only_masks_combine() -> None:
    with pytest.raises(TypeError):
        _ = Causal() & True  # pyright: ignore[reportOperatorIssue]
    with pytest.raises(TypeError):
        _ = Causal() | None  # pyright: ignore[reportOperatorIssue]


def test_masks_are_values() -> None:
    one, two = (Causal() & Documents([0, 2, 4]) for _ in range(2))
    assert one == two
    assert len({one, two, Causal()}) == 2
    assert str(one) == repr(one) == "causal & documents(0, 2, 4)"
    assert Window(3) != Window(4)
    assert Window(2, 3) != Dilated(2, 3)
    assert Groups(8, per_document=True) != Groups(8)


def test_what_is_written_alike_is_one_value() -> None:
    a, b, c = Causal(), Window(3), Sinks(2)
    assert (a & b) & c == a & (b & c) == And((a, b, c))
    assert (a | b) | c == a | (b | c) == Or((a, b, c))
    assert (a & b) | c != a & (b | c)


def test_documents_must_end_at_the_length() -> None:
    with pytest.raises(ValueError, match="ends at 4 but the sequence has 5"):
        (Causal() & Documents([0, 4])).check(5)
    with pytest.raises(ValueError, match="ends at 4 but the sequence has 5"):
        (s2_attention(4) & Documents([[0, 5], [0, 4]])).check(5)
    (Causal() & Documents([0, 5])).check(5)
    (Causal() | Sinks(8)).check(5)


def test_queries_lie_within_the_documents() -> None:
    mask = Causal() & Documents([0, 2, 4])
    for question in (mask.pieces, mask.reach, mask.full, mask.cuts):
        with pytest.raises(ValueError, match="queries 2 to 5 are not within 0 to 4"):
            question(Span(2, 5))
    assert mask.pieces(Span(2, 2)) == ()


def test_one_boundary_list_per_row_is_taken_apart() -> None:
    mask = Causal() & Documents([[0, 2, 4], [0, 4]])
    assert of_row(mask, 1) == Causal() & Documents([0, 4])
    assert batch_rows(mask, 2) == [Causal() & Documents([0, 2, 4]), Causal() & Documents([0, 4])]
    assert row_count(mask) == 2
    with pytest.raises(ValueError, match="2 boundary lists for 3 batch rows"):
        batch_rows(mask, 3)
    with pytest.raises(ValueError, match="2 masks for 3 batch rows"):
        batch_rows([Causal(), Full()], 3)
    with pytest.raises(ValueError, match="answers no question about one row"):
        mask.reach(Span(0, 4))


def test_rows_are_taken_from_any_expression() -> None:
    rule = s2_attention(4) & (Window(3) | Sinks(1))
    mask = rule & Documents([[0, 2, 4], [0, 4]])
    assert row_count(mask) == 2
    assert row_count(rule) is None
    assert of_row(mask, 0) == rule & Documents([0, 2, 4])
    assert of_row(rule, 5) is rule
    assert batch_rows(rule, 3) == [rule] * 3
    assert of_row(Documents([[0, 2], [0, 1, 2]]), 1) == Documents([0, 1, 2])
