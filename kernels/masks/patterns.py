"""The single masks: Causal, Full, Window, Sinks, Groups, Dilated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from ringspan.kernels.masks.composition import Mask
from ringspan.kernels.masks.span import END, Span
from ringspan.kernels.masks.strips import EVERYTHING, Strip, tidy


@dataclass(frozen=True, repr=False)
class Full(Mask):
    """Every query sees every key."""

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=q.device)

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        return (EVERYTHING,)

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return True

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True, repr=False)
class Causal(Mask):
    """A query sees itself and every earlier key."""

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        return q >= k

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        return (Strip(-END, END, high=1),)

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return False

    def __str__(self) -> str:
        return "causal"


@dataclass(frozen=True, repr=False)
class Window(Mask):
    """Query q sees the keys ``q - left <= k <= q + right``: left + 1 keys for a causal query.

    Hugging Face's ``sliding_window=n`` is ``Window(n - 1)``.
    """

    left: int
    right: int = 0

    def __post_init__(self) -> None:
        whole("Window", "left", self.left, 0)
        whole("Window", "right", self.right, 0)

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        return (q - k <= self.left) & (k - q <= self.right)

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        return (Strip(-END, END, -self.left, self.right + 1),)

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return self.right >= 1

    def __str__(self) -> str:
        return f"window({self.left}, {self.right})" if self.right else f"window({self.left})"


@dataclass(frozen=True, repr=False)
class Sinks(Mask):
    """Every query sees the first ``n`` keys of their document, wherever Documents stands in the expression.

    Not causal by itself: write ``Causal() & (Window(1024) | Sinks(4))``.
    """

    n: int
    anchored = True

    def __post_init__(self) -> None:
        whole("Sinks", "n", self.n, 1)

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        return k - k_start < self.n

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        return (Strip(document, document + self.n),)

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return key - document < self.n

    def __str__(self) -> str:
        return f"sinks({self.n})"


@dataclass(frozen=True, repr=False)
class Groups(Mask):
    """A query sees the keys of its own group: ``floor((q - shift) / size) == floor((k - shift) / size)``.

    LongLoRA's shifted groups without their wrap-around: the first and the last may be short.

    Args:
        size: positions per group.
        shift: where a group begins; any int.
        per_document: positions count from the start of their document, not from 0.
    """

    size: int
    shift: int = 0
    per_document: bool = False
    cutting = True

    def __post_init__(self) -> None:
        whole("Groups", "size", self.size, 1)
        whole("Groups", "shift", self.shift, 1 - END)
        if not isinstance(self.per_document, bool):
            raise ValueError(f"Groups: per_document must be True or False, got {self.per_document!r}")

    @property
    def anchored(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether groups count from document starts."""
        return self.per_document

    @property
    @override
    def period(self) -> int:
        return self.size

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        if self.per_document:
            q, k = q - q_start, k - k_start
        return (q - self.shift) // self.size == (k - self.shift) // self.size

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        return (Strip(*next(groups)),)

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return (key - self.shift - document * self.per_document) % self.size != 0

    @override
    def group(self, row: int, document: int) -> Span:
        origin = self.shift + document if self.per_document else self.shift
        start = row - (row - origin) % self.size
        return Span(start, start + self.size)

    def __str__(self) -> str:
        shift = f", {self.shift}" if self.shift else ""
        return f"groups({self.size}{shift}{', per_document=True' if self.per_document else ''})"


@dataclass(frozen=True, repr=False)
class Dilated(Mask):
    """Query q sees ``window`` keys, ``dilation`` apart, itself the last: ``q - m * dilation`` for 0 <= m < window."""

    window: int
    dilation: int

    def __post_init__(self) -> None:
        whole("Dilated", "window", self.window, 1)
        whole("Dilated", "dilation", self.dilation, 1)

    @override
    def sees(self, q: Tensor, k: Tensor, q_start: Tensor, k_start: Tensor) -> Tensor:
        back = q - k
        return (back >= 0) & (back % self.dilation == 0) & (back // self.dilation < self.window)

    @override
    def strips(self, document: int, groups: Iterator[Span]) -> tuple[Strip, ...]:
        strip = tidy(Strip(-END, END, -(self.window - 1) * self.dilation, 1, self.dilation, 0))
        return (strip,) if strip else ()

    @override
    def next_seen(self, key: int, document: int) -> bool:
        return False

    def __str__(self) -> str:
        return f"dilated({self.window}, {self.dilation})"


def whole(mask: str, argument: str, value: object, least: int) -> None:
    """Raise ValueError unless ``value`` is an int of at least ``least`` and below 2**62."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < END:
        rule = "an int" if least < 0 else f"an int of at least {least}"
        raise ValueError(f"{mask}: {argument} must be {rule} and below 2**62, got {value!r}")
