"""Which kernel serves a tile, and why: the only place that looks at the device."""

from __future__ import annotations

from types import ModuleType

import torch

from ringspan.kernels import cpu, reference


def select(device: torch.device) -> tuple[ModuleType, str]:
    """Return the kernel module for ``device`` (with ``tile_forward`` and ``tile_backward``) and one line of why."""
    if device.type == "cpu":
        return cpu, "cpu: torch's flash operator, tile by tile"
    return (
        reference,
        f"reference: no kernel for {device.type} yet; dense per tile, memory grows with its area",
    )
