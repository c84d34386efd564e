"""Part ``tune``: time the tiles of each Triton kernel and name the fastest; ``kernels/triton_tiles.py`` is the table.

Causal, one row per tile, as it is measured. A tile that does not fit, or that the compiler fails on, is a row too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from gpu_cases import K
from gpu_clock import Clock
from gpu_record import DEVICE_LOST, DeviceLost, Record, deadline
from torch import Tensor

from ringspan.kernels import triton_attention
from ringspan.kernels.mask import Causal, Span
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.triton_launch import Options, major_of
from ringspan.kernels.triton_tiles import CANDIDATES, INTERPRETER, TILES, Key, Tile, key, tune
from ringspan.kernels.work import work

TILE_S = 40  # of one tile, compilation in
HEADS, GROUPS = 32, 8


class Passed(Exception):
    """This tile has no time; its row says why."""


def run(record: Record) -> None:
    """Tune the kernels of head dimension 128, then of 64, until the part's time is up."""
    clock = Clock(record.dry)
    torch.manual_seed(0)
    for width in (16,) if record.dry else (128, 64):
        for kernel in ("forward", "keys", "query"):
            if f"{kernel}, hd {width}: best" not in record.keys:
                best(record, clock, kernel, width)
            clock.release()


def best(record: Record, clock: Clock, kernel: str, width: int) -> None:
    """Add a row per tile and one that names the fastest."""
    heads, groups, length = (2, 1, 64) if record.dry else (HEADS, GROUPS, 16 * K)
    q, dout = (clock.random(1, length, heads, width).detach() for _ in range(2))
    k, v = (clock.random(1, length, groups, width).detach() for _ in range(2))
    place = key(kernel, major_of(q.device), width, q.element_size())
    computed = calls(kernel, place, (q, k, v, dout))
    at: dict[str, Tile] = {}
    times: dict[Tile, float] = {}

    def timed(tile: Tile) -> object:
        at["tile"] = tile
        return computed(tile)

    def bench(call: Callable[[], object]) -> float:
        if record.left < 10:
            raise Passed("the part's time is up")
        try:
            with deadline(TILE_S):
                figures = clock.milliseconds(call, budget_s=0.3)
        except Exception as error:  # noqa: BLE001 - a compiler raises what it likes
            words = f"{type(error).__name__}: {str(error).strip()[:200]}"
            record.add(name(kernel, width, at.get("tile")), failed=words)
            if any(sign in words for sign in DEVICE_LOST):
                raise DeviceLost(words) from error
            raise Passed(words) from error
        times[at["tile"]] = figures["ms"]
        record.add(name(kernel, width, at["tile"]), **figures)
        return figures["ms"]

    candidates = [tile for tile in tiles(place) if name(kernel, width, tile) not in record.keys]
    try:
        fastest = tune(TILES, place, timed, candidates=candidates, bench=bench, failures=(Passed,))[place]
    except RuntimeError as error:
        record.add(f"{kernel}, hd {width}: best", failed=str(error))
        return
    found = {"ms": times[fastest], "table": str(TILES[place]), "table_ms": times.get(TILES[place])}
    record.add(f"{kernel}, hd {width}: best", tile=str(fastest), tried=len(times), **found)


def name(kernel: str, width: int, tile: Tile | None) -> str:
    """Return the key of a tile's row."""
    return f"{kernel}, hd {width}: {tuple(tile) if tile else 'no tile'}"


def tiles(place: Key) -> list[Tile]:
    """Return the candidates worth a compilation; two small ones where the interpreter runs them."""
    if place.major == INTERPRETER:
        return [Tile(32, 32, 4, 1), Tile(64, 64, 4, 1)]
    # Four warps hold no 128-wide tile at head dimension 128 without spilling kilobytes.
    return [
        tile
        for tile in CANDIDATES
        if tile.warps == 8 or tile.rows * tile.columns < 128 * 64 or place.width < 128
        if not (tile.descriptors and place.major < 9)
    ]


def calls(kernel: str, place: Key, tensors: tuple[Tensor, ...]) -> Callable[[Tile], object]:
    """Return what runs a kernel with a tile; of a backward both kernels run, one of them with it."""
    q, k, v, dout = tensors
    whole = (Span(0, q.shape[1]),)
    each, scale = work(Causal(), whole, whole), q.shape[-1] ** -0.5
    total = Running.like(q)
    triton_attention.forward(total, q, k, v, each, scale=scale)
    saved = Saved(q, total.out, total.lse, dout)
    grads = Gradients(*(torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v)))

    def computed(tile: Tile) -> object:
        how = Options(tiles=TILES.replace(place, tile))
        if kernel == "forward":
            fresh = Running(total.out, total.lse, bytearray(q.shape[1]))
            return triton_attention.forward(fresh, q, k, v, each, scale=scale, options=how)
        return triton_attention.backward(grads, saved, k, v, each, scale=scale, options=how)

    return computed
