"""What strips reach and how many pairs they hold: closed forms, no loop over rows.

With ``d = key - row`` the pairs of distance d between rows [a, b) and keys [c, e) are ``max(0, min(e, b + d) -
max(c, a + d))`` many: a trapezoid in d. Reach, rows and area follow from the distances a strip has left once it is cut
to those rows and keys; consecutive ones differ by its step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ringspan.kernels.masks.span import END, Span, gaps, union
from ringspan.kernels.masks.strips import Strip, aligned, subtract


def exists(strip: Strip, q_span: Span) -> bool:
    """Return whether a row of ``q_span`` (not empty) sees a key by this strip."""
    low = strip.low if strip.low > strip.first - q_span.stop else strip.first - q_span.stop + 1
    high = strip.high if strip.high < strip.last - q_span.start else strip.last - q_span.start
    if strip.step > 1:
        low = aligned(low, strip.step, strip.offset)
    return low < high and strip.first < strip.last


def reach(strip: Strip, q_span: Span) -> list[Span]:
    """Return the keys that a row of ``q_span`` sees by this strip, exactly; sorted, disjoint, maybe touching."""
    low, high = _distances(strip, q_span)
    if low > high:
        return []
    if q_span.size >= strip.step:
        return [Span(max(strip.first, q_span.start + low), min(strip.last, q_span.stop + high))]
    found = range(low, high + 1, strip.step)
    return [Span(max(strip.first, q_span.start + d), min(strip.last, q_span.stop + d)) for d in found]


def rows(strip: Strip, q_span: Span) -> list[Span]:
    """Return the rows of ``q_span`` that see a key by this strip, exactly; sorted, disjoint, maybe touching."""
    low, high = _distances(strip, q_span)
    if low > high:
        return []
    if strip.last - strip.first >= strip.step:
        return [Span(max(q_span.start, strip.first - high), min(q_span.stop, strip.last - low))]
    found = range(high, low - 1, -strip.step)
    return [Span(max(q_span.start, strip.first - d), min(q_span.stop, strip.last - d)) for d in found]


def area(strip: Strip, q_span: Span, k_span: Span) -> int:
    """Return the number of pairs of ``q_span`` and ``k_span`` in this strip, exactly."""
    first, last = max(strip.first, k_span.start), min(strip.last, k_span.stop)
    if first >= last or q_span.start >= q_span.stop:
        return 0
    step, offset = strip.step, strip.offset
    low, high = _distances(strip._replace(first=first, last=last), q_span)

    def ramp(corner: int) -> int:
        """Sum of max(0, d - corner) over the strip's distances."""
        start = max(low, aligned(corner + 1, step, offset))
        count = (high - start) // step + 1
        return count * (start - corner) + step * (count * (count - 1) // 2) if count > 0 else 0

    # The trapezoid is four ramps; the last one begins behind every distance.
    return ramp(first - q_span.stop) - ramp(first - q_span.start) - ramp(last - q_span.stop)


def reach_of(strips: Iterable[Strip], q_span: Span) -> tuple[Span, ...]:
    """Return the keys that a row of ``q_span`` sees by any of the strips, exactly."""
    return union(span for strip in strips for span in reach(strip, q_span))


def full_of(strips: Sequence[Strip], q_span: Span) -> tuple[Span, ...]:
    """Return the keys that each row of ``q_span`` sees by one of the strips.

    Exact for a single row and for strips without a step. With one, neighbouring rows never see one key by the same
    strip, so it is left out: what is returned is full, and one mask's is exact.
    """
    if q_span.size == 1:
        return reach_of(strips, q_span)
    unseen = [Strip(0, END)]
    for strip in strips:
        if strip.step == 1:
            unseen = [part for each in unseen for part in subtract(each, strip) if exists(part, q_span)]
    return gaps(reach_of(unseen, q_span), Span(0, END))


def _distances(strip: Strip, q_span: Span) -> tuple[int, int]:
    """Return the least and the greatest distance at which a row of ``q_span`` sees a key; least > greatest if none."""
    low, high = max(strip.low, strip.first - q_span.stop + 1), min(strip.high, strip.last - q_span.start) - 1
    if strip.step == 1:
        return low, high
    return aligned(low, strip.step, strip.offset), high - (high + strip.offset) % strip.step
