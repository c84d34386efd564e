"""Timing on a CUDA device: events, warm-up, median of several, a cache flushed before each run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

import torch
from torch import Tensor

FLUSH_BYTES = 256 << 20  # several times the level 2 cache of an H100 or H200
DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s, SXM parts


@dataclass(frozen=True)
class Clock:
    """Times functions on the device, or on the CPU by the wall clock in a dry run."""

    dry: bool

    @property
    def device(self) -> torch.device:
        """Where everything is computed."""
        return torch.device("cpu" if self.dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """bf16; in a dry run fp32, for the interpreter computes bf16 wrongly."""
        return torch.float32 if self.dry else torch.bfloat16

    @cached_property
    def _flush(self) -> Tensor:
        return torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self.device)

    def milliseconds(self, work: Callable[[], object], budget_s: float = 2.0) -> dict[str, Any]:
        """Return the median time of ``work`` and the spread, over 3 to 20 runs within about ``budget_s``.

        The first run, which may compile, is timed apart (``first_ms``); a second one warms up.
        """
        began = time.perf_counter()
        work()
        self.wait()
        first = (time.perf_counter() - began) * 1e3
        if self.dry:
            return {"ms": first, "runs": 1, "first_ms": first}
        once = self._once(work)
        runs = int(min(max(budget_s * 1e3 / max(once, 1e-3), 3), 20))
        taken = sorted(self._once(work) for _ in range(runs))
        return {"ms": median(taken), "ms_min": taken[0], "ms_max": taken[-1], "runs": runs, "first_ms": first}

    def _once(self, work: Callable[[], object]) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        work()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def wait(self) -> None:
        """Let everything that was asked for come to its end."""
        if not self.dry:
            torch.cuda.synchronize()

    def release(self) -> None:
        """Hand back what the allocator keeps, so that the next row starts from the same place."""
        if not self.dry:
            torch.cuda.empty_cache()

    def random(self, *shape: int) -> Tensor:
        """Return random numbers, a leaf that takes gradients; never zeros, on which a device runs faster."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype).requires_grad_()

    def matmul(self) -> dict[str, Any]:
        """Return the rate of a large product on random data: what the shares of all other rows are shares of."""
        side = 64 if self.dry else 8192
        a, b = (self.random(side, side).detach() for _ in range(2))
        taken = self.milliseconds(lambda: a @ b)
        rate = 2 * side**3 / (taken["ms"] * 1e-3)
        name = "" if self.dry else torch.cuda.get_device_name()
        sheet = next((rate for part, rate in DATASHEET.items() if part in name), None)
        return {**taken, "side": side, "tflops": rate / 1e12, "datasheet_tflops": sheet and sheet / 1e12}
