"""One table of the kernels' arguments, for launching them and for compiling them where no GPU is.

Constants and options are made here for both, so that what is checked without a GPU is what runs on one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from ringspan.kernels import triton_tiles
from ringspan.kernels.triton_backward import query_kernel
from ringspan.kernels.triton_backward_keys import keys_kernel, reduce_kernel
from ringspan.kernels.triton_forward import forward_kernel
from ringspan.kernels.triton_tiles import TILES, Tile

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)  # TRITON_INTERPRET was set when the kernels were read
PART = 16  # rows of a cut block that one program adds up

_INPUTS = {"q", "k", "v", "dout"}
_WIDE = {"out", "lse", "dq", "dk", "dv", "parts", "levels", "deltas"}
_TABLES = {"bounds", "blocks", "slots", "pointers", "runs", "splits"}


@dataclass(frozen=True)
class Kernel:
    """A kernel, the inputs that it streams (by descriptors where it may), and which side of the tile they lie on."""

    fn: Any
    streamed: tuple[str, ...] = ()
    streams_rows: bool = False

    def streamed_block(self, tile: Tile) -> int:
        """Return how many rows of a streamed input one load takes."""
        return tile.rows if self.streams_rows else tile.columns


KERNELS = {
    "forward": Kernel(forward_kernel, ("k", "v")),
    "query": Kernel(query_kernel, ("k", "v")),
    "keys": Kernel(keys_kernel, ("q", "dout"), streams_rows=True),
    "reduce": Kernel(reduce_kernel),
}


def block_width(head_dim: int) -> int:
    """Return the head dimension that a tile is padded to: the next power of two, at least a matmul's 16."""
    return max(16, 1 << (head_dim - 1).bit_length())


def constants(
    name: str,
    tile: Tile,
    head_dim: int,
    *,
    intervals: int = 1,
    accumulate: bool = False,
    descriptors: bool = False,
    persistent: bool = False,
) -> dict[str, Any]:
    """Return a kernel's constexpr arguments; each takes those it has."""
    values = {
        "D": head_dim,
        "BLOCK_D": block_width(head_dim),
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "INTERVALS": intervals,
        "ACCUMULATE": accumulate,
        "DESCRIPTORS": descriptors,
        "PERSISTENT": persistent,
        "PRECISION": "ieee",  # of fp32 products; 16-bit ones are exact
        "PART": PART,
    }
    return {argument: values[argument] for argument in KERNELS[name].fn.arg_names if argument in values}


def options(name: str, tile: Tile) -> dict[str, int]:
    """Return the compiler's options for a kernel and tile."""
    return (
        {"num_warps": 4, "num_stages": 1} if name == "reduce" else {"num_warps": tile.warps, "num_stages": tile.stages}
    )


@dataclass(frozen=True)
class Source:
    """What triton.compiler.ASTSource takes (fn, signature, constexprs, attrs), the compiler's options, and the tile."""

    fn: Any
    signature: dict[str, str]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]
    tile: Tile


def source(
    name: str,
    major: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    intervals: int = 2,
    accumulate: bool = False,
    descriptors: bool | None = None,
    persistent: bool = False,
    tile: Tile | None = None,
) -> Source:
    """Return a kernel as it is launched on compute capability ``major``, with aligned tensors.

    Args:
        name: one of KERNELS. descriptors: None: as the tile says. tile: None: the table's.
    """
    kernel = KERNELS[name]
    if tile is None:
        of = "keys" if name == "reduce" else name
        tile = TILES[triton_tiles.key(of, major, head_dim, dtype.itemsize)]
    descriptors = tile.descriptors if descriptors is None else descriptors
    fixed = constants(
        name,
        tile,
        head_dim,
        intervals=intervals,
        accumulate=accumulate,
        descriptors=descriptors,
        persistent=persistent,
    )
    signature, attrs = {}, {}
    for index, argument in enumerate(kernel.fn.arg_names):
        if argument in fixed:
            signature[argument] = "constexpr"
        elif descriptors and argument in kernel.streamed:
            block = f"1, 1, {kernel.streamed_block(tile)}, {block_width(head_dim)}"
            signature[argument] = f"tensordesc<{DTYPES[dtype]}[{block}]>"
        else:
            signature[argument] = _type(argument, dtype)
            if signature[argument].startswith("*") or _aligned(argument):
                attrs[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.fn.arg_names.index(argument),): value for argument, value in fixed.items()}
    return Source(kernel.fn, signature, constexprs, attrs, options(name, tile), tile)


def _type(argument: str, dtype: torch.dtype) -> str:
    if argument in _INPUTS:
        return f"*{DTYPES[dtype]}"
    if argument in _WIDE:
        return "*fp32"
    if argument in _TABLES:
        return "*i32"
    return "fp32" if argument == "scale" else "i32"


def _aligned(argument: str) -> bool:
    """Whether an integer is a multiple of 16 in practice: strides of rows of heads, and the padded length."""
    return argument == "padded" or (argument.endswith(("_batch", "_row", "_head")) and not argument.startswith("lse"))
