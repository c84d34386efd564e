"""Tiles measured on the device at hand, on request: ``tuned`` returns a table to pass on in ``Options``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ringspan.kernels import triton_attention, triton_tiles
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.triton_launch import Options, major_of
from ringspan.kernels.triton_tiles import CANDIDATES, TILES, Tile, Tiles
from ringspan.kernels.work import Work

FAILURES = (OutOfResources, CompilationError, PTXASError)  # of a tile that does not fit


def tuned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    work: Work,
    *,
    scale: float,
    tiles: Tiles = TILES,
    candidates: Iterable[Tile] = CANDIDATES,
    bench: Callable[[Callable[[], object]], float] | None = None,
) -> Tiles:
    """Return ``tiles`` with the fastest of the candidates for operands like these, for each of the three kernels.

    Results of other tiles differ in their last bits: a run that must repeat another bit by bit keeps its table.

    Args:
        q: [B, M, H, D]; k, v: [B, N, G, D]; work, scale: as in triton_attention.forward.
        bench: milliseconds of a call; None: triton.testing.do_bench.
    """
    candidates = tuple(candidates)
    total = Running.like(q)
    triton_attention.forward(total, q, k, v, work, scale=scale)
    saved = Saved(q, total.out, total.lse, q)
    gradients = Gradients(*(torch.zeros(x.shape, device=x.device) for x in (q, k, v)))
    for kernel in ("forward", "query", "keys"):
        mine = triton_tiles.key(kernel, major_of(q.device), q.shape[-1], q.dtype.itemsize)

        def run(tile: Tile, kernel: str = kernel, mine: triton_tiles.Key = mine, table: Tiles = tiles) -> None:
            options = Options(tiles=table.replace(mine, tile))
            if kernel == "forward":
                triton_attention.forward(Running.like(q), q, k, v, work, scale=scale, options=options)
            else:  # both kernels run; the other one's time is the same for every candidate
                triton_attention.backward(gradients, saved, k, v, work, scale=scale, options=options)

        tiles = triton_tiles.tune(tiles, mine, run, candidates=candidates, bench=bench, failures=FAILURES)
    return tiles
