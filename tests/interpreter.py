"""The Triton kernels as tests take them: compiled where a GPU is, else in Triton's interpreter.

Import this before anything of ringspan.kernels.triton_*: the kernels are interpreted or compiled as they were read.
Computes bf16 as hardware does: the interpreter multiplies its bits as integers and truncates casts, without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.experimental.gluon  # noqa: F401  # read with the first descriptor; must agree with the kernels

    from ringspan.kernels import triton_attention

    if before is None:
        del os.environ["TRITON_INTERPRET"]  # subprocesses compile for real
else:
    from ringspan.kernels import triton_attention

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

__all__ = ["DEVICE", "as_hardware", "counted_products", "triton_attention", "wide"]


def wide(data: np.ndarray) -> np.ndarray:
    """Return bf16 bits as fp32 numbers."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def narrow(data: np.ndarray) -> np.ndarray:
    """Return fp32 numbers as bf16 bits, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


@contextmanager
def as_hardware() -> Iterator[None]:
    """Inside the block, make the interpreter's bf16 products and casts those of a GPU, and its overflows silent."""
    builder: Any = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl
    function: Any = interpreter.InterpretedFunction
    plain_call = function.__call__
    module: Any = interpreter
    plain_patch = module._patch_lang_tensor

    def dot(self, a, b, d, precision, imprecise):
        if tl.bfloat16 in (a.dtype.scalar, b.dtype.scalar):
            product = np.matmul(wide(a.data), wide(b.data))
            return interpreter.TensorHandle(product + d.data, d.dtype.scalar)
        return plain_dot(self, a, b, d, precision, imprecise)

    def cast(self, source, target):
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(narrow(source.data), tl.bfloat16)
        if kinds == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(wide(source.data), tl.float32)
        return plain_cast(self, source, target)

    def call(self, *args, **kwargs):
        # Called from a running kernel, which has patched triton.language: doing so again takes a third of the time.
        if self.fn.__module__.startswith("ringspan."):
            return self.rewrite()(*args, **kwargs)
        return plain_call(self, *args, **kwargs)

    def patch(tensor, scope):
        plain_patch(tensor, scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # Triton 3.6 asks numpy 2.4 for what it refuses

    builder.create_dot, builder.cast_impl = dot, cast
    module._patch_lang_tensor = patch
    function.__call__ = call
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        builder.create_dot, builder.cast_impl = plain_dot, plain_cast
        function.__call__ = plain_call
        module._patch_lang_tensor = plain_patch


@contextmanager
def counted_products() -> Iterator[list[int]]:
    """Count the interpreter's matmuls inside the block, in the list's only number."""
    builder: Any = interpreter.InterpreterBuilder
    plain, count = builder.create_dot, [0]

    def dot(*args):
        count[0] += 1
        return plain(*args)

    builder.create_dot = dot
    try:
        yield count
    finally:
        builder.create_dot = plain


def bits(x: Tensor) -> Tensor:
    """Return a tensor's bits, so that equality also compares NaN and the sign of zero."""
    return x.contiguous().view(torch.uint8)
