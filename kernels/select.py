"""Which kernel serves a call, and why: the only place that chooses."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch

from ringspan.kernels.work import Work

BACKENDS = ("auto", "cpu", "triton", "library", "reference")


@dataclass(frozen=True)
class Backend:
    """A kernel module that was taken, and one line of why.

    ``forward`` and ``backward`` add into ``Running`` and ``Gradients``; see ``kernels.state``.
    """

    name: str
    module: ModuleType
    why: str
    again: Callable[[Work], Backend] | None = field(default=None, compare=False, repr=False)

    def alone(self, work: Work) -> Backend:
        """Return the kernel for a call that is all that its rows meet: one that rounds its result may serve it."""
        return self if self.again is None else self.again(work)

    @property
    def forward(self) -> Callable[..., None]:
        """(total: Running, q, k, v, work, *, scale) -> None: merge these keys' results into ``total``."""
        return self.module.forward

    @property
    def backward(self) -> Callable[..., None]:
        """(total: Gradients, saved, k, v, work, *, scale) -> None: add these pairs' gradients to ``total``."""
        return self.module.backward


def select(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, backend: str = "auto", alone: Work | None = None
) -> Backend:
    """Return the kernel for a call.

    Args:
        backend: "auto", or one by name.
        alone: the call's work, where it is all that its rows meet: a kernel that rounds its result may serve it.

    Raises:
        ValueError: if the named one cannot do it, or none can: what is missing, and the remedy.
    """

    def again(work: Work) -> Backend:
        return select(device, dtype, head_dim, backend=backend, alone=work)

    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend != "auto":
        reason = _refusal(backend, device, dtype, head_dim, alone)
        if reason:
            raise ValueError(f"backend: {backend} refuses: {reason}")
        return Backend(backend, _module(backend), f"{backend}: asked for by name", again)
    reasons: list[str] = []
    for name in ("cpu",) if device.type == "cpu" else ("library", "triton", "reference"):
        reason = _refusal(name, device, dtype, head_dim, alone)
        if reason is None:
            instead = f"; not {'; not '.join(reasons)}" if reasons else ""
            return Backend(name, _module(name), f"{name}: {_module(name).WHY}{instead}", again)
        reasons.append(f"{name} ({reason})")
    raise ValueError(f"backend: none serves {dtype} on {device}: {'; '.join(reasons)}")


def _module(name: str) -> ModuleType:
    """Import a backend when it is needed: Triton is not there on every machine."""
    return importlib.import_module("ringspan.kernels." + ("triton_attention" if name == "triton" else name))


def _refusal(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, alone: Work | None) -> str | None:
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton==3.7.1"
    module = _module(name)
    reason = module.refuses(device, dtype, head_dim)
    if reason is None and name == "library":
        return "its rows meet more keys than this call's" if alone is None else module.serves(alone, dtype)
    return reason
