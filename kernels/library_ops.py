"""Other libraries' attention operators behind one signature: torch's flash and cuDNN, FlashAttention 2 and 3.

Every operator computes a whole rectangle in one call and rounds out to its inputs' dtype. ``causal`` means the lower
right one: the last row sees every key, each row before it one key fewer, and no row none. Backwards are repeatable bit
by bit, so cuDNN's, which is not, is left out. An operator is offered only after a small case came out right on the
device in question: signatures and shapes of these libraries move from release to release.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ringspan.kernels import reference
from ringspan.kernels.mask import Causal, Full, Span
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.work import work

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Operators:
    """A forward and a backward.

    forward(q, k, v, *, scale, causal) -> (out [B, M, H, D] in q's dtype, lse [B, M, H] fp32);
    backward(dout, q, k, v, out, lse, *, scale, causal) -> (dq, dk, dv) in their dtypes, given the final out and lse.
    q, dout, out [B, M, H, D]; k, v [B, N, G, D]; lse [B, M, H].
    """

    name: str
    forward: Forward
    backward: Backward


def flash_forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Torch's flash operator; its causal mask is the lower right one (torch.nn.attention.bias relies on it too)."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention.default
    out, lse, *_ = operator(_turn(q), _turn(k), _turn(v), 0.0, causal, False, scale=scale)
    return _turn(out), lse.transpose(1, 2)


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Torch's flash backward, made repeatable."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    state = torch.zeros(2, dtype=torch.int64, device=q.device).view(torch.uint64)  # of the dropout, which is 0
    with repeatable():
        grads = operator(
            *(_turn(x) for x in (dout, q, k, v, out)),
            lse.transpose(1, 2).contiguous(),
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            causal,
            state,
            state[0],
            scale=scale,
        )
    dq, dk, dv = (_turn(x) for x in grads)
    return dq, dk, dv


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Torch's cuDNN operator. Its causal mask is the upper left one: what is not square goes to the flash operator."""
    if causal and q.shape[1] != k.shape[1]:
        return flash_forward(q, k, v, scale=scale, causal=causal)
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, lse, *_ = operator(_turn(q), _turn(k), _turn(v), None, True, 0.0, causal, False, scale=scale)
    batch, rows, heads = q.shape[:3]
    return _turn(out), lse.reshape(batch, heads, rows).transpose(1, 2)  # some releases keep a last dimension of 1


def flash_attn_2() -> Operators | None:
    """Return FlashAttention 2's operators if a release with the known arguments (2.7 or later) is installed."""
    module = _import("flash_attn.flash_attn_interface")
    names = "_wrapped_flash_attn_forward", "_wrapped_flash_attn_backward"
    if module is None or not all(hasattr(module, name) for name in names):
        return None
    run, turn_back = (getattr(module, name) for name in names)
    common = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}

    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = run(q, k, v, dropout_p=0.0, softmax_scale=scale, causal=causal, return_softmax=False, **common)
        return out, lse.transpose(1, 2)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        fixed = {"dropout_p": 0.0, "softmax_scale": scale, "causal": causal, "deterministic": True, **common}
        turn_back(dout, q, k, v, out, lse.transpose(1, 2).contiguous(), *grads, **fixed, rng_state=None)
        return grads

    return Operators("FlashAttention 2", forward, backward)


def flash_attn_3() -> Operators | None:
    """Return FlashAttention 3's operators if a release that registers them with torch is installed."""
    module = _import("flash_attn_interface")
    names = "_flash_attn_forward", "_flash_attn_backward"
    if module is None or not all(hasattr(module, name) for name in names):
        return None
    run, turn_back = (getattr(module, name) for name in names)

    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = run(q, k, v, softmax_scale=scale, causal=causal)
        return out, lse.transpose(1, 2)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        fixed = {"softmax_scale": scale, "is_causal": causal, "deterministic": True}
        turn_back(dout, q, k, v, out, lse.transpose(1, 2).contiguous(), dq=dq, dk=dk, dv=dv, **fixed)
        return dq, dk, dv

    return Operators("FlashAttention 3", forward, backward)


@lru_cache(maxsize=64)
def operators(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Operators | None, str]:
    """Return the fastest operators that come out right on this device, or None, and one line that names all tried."""
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    found = [flash_attn_3() if hopper else None, None if hopper else flash_attn_2()]
    if head_dim <= 128:
        found.append(Operators("cuDNN forward, torch's flash backward", cudnn_forward, flash_backward))
    found += [flash_attn_2() if hopper else None, Operators("torch's flash operators", flash_forward, flash_backward)]
    tried = []
    for each in filter(None, found):
        wrong = check(each, device, dtype, head_dim)
        if wrong is None:
            return each, f"library: {each.name}" + "".join(f"; not {one}" for one in tried)
        tried.append(f"{each.name} ({wrong})")
    return None, "library: no operator works here: " + "; ".join(tried)


def check(taken: Operators, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run small cases with grouped heads against the reference backend; return what is wrong.

    A library that cannot compute here says so with an exception of its own choosing; whichever, it is not taken.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 96, 4), (2, 160, 2), (2, 160, 2), (2, 96, 4))
    q, keys, values, dout = (torch.randn(*s, head_dim, generator=generator).to(device, dtype) for s in shapes)
    scale = head_dim**-0.5
    for mask, rows, columns in (
        (Full(), Span(0, 96), Span(0, 160)),
        (Causal(), Span(64, 160), Span(0, 160)),
        (Causal(), Span(0, 96), Span(0, 96)),
    ):
        k, v = keys[:, : columns.size], values[:, : columns.size]
        each = work(mask, (rows,), (columns,))
        truth = Running.like(q)
        reference.forward(truth, q, k, v, each, scale=scale)
        exact = Gradients(*(torch.zeros(x.shape, dtype=truth.out.dtype, device=device) for x in (q, k, v)))
        reference.backward(exact, Saved(q, truth.out, truth.lse, dout), k, v, each, scale=scale)
        causal = mask == Causal()
        try:
            out, lse = taken.forward(q, k, v, scale=scale, causal=causal)
            grads = taken.backward(dout, q, k, v, out, lse, scale=scale, causal=causal)
        except Exception as error:  # noqa: BLE001
            return f"{type(error).__name__}: {(str(error).strip() or 'no words').splitlines()[0][:120]}"
        results = zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), (truth.out, truth.lse, *exact), strict=True)
        for name, found, wanted in results:
            if found.shape != wanted.shape:
                return f"{name} of a small case has shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
            error = float((found.float() - wanted).norm() / wanted.norm())
            if not error <= 0.02:
                return f"{name} of a small case is off by {error:.1e}"
    return None


@contextmanager
def repeatable() -> Iterator[None]:
    """Make torch's flash backward take its repeatable algorithm; everything is as before afterwards."""
    enabled = torch._C._get_deterministic_algorithms()
    warn_only = torch._C._get_deterministic_algorithms_warn_only()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    settings.fill_uninitialized_memory = False  # the operator writes all it allocates
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(enabled, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


def _turn(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _import(name: str) -> Any:
    """Return a module, or None where it is missing or does not load against this torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, AttributeError, RuntimeError):
        return None
