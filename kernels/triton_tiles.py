"""Which tile each Triton kernel uses, by architecture, head dimension and element size; and finding a better one.

A table, not a tuner at run time: two runs use the same tiles and round alike. ``tune`` measures on request and returns
a new table. The 16-bit entries compile without spills for sm_80 and sm_90 on the plain grid (benchmarks/codegen.py
holds them to it); those for 8 fit the 99 KiB of shared memory that every GPU since sm_80 has. fp32 is multiplied
exactly, without tensor cores: its entries are for correctness, and spill above a head dimension of 128.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

INTERPRETER = 0  # the "architecture" of Triton's interpreter, whose cost is per tile, whatever the size


class Tile(NamedTuple):
    """A block of ``rows`` queries by ``columns`` keys; warps and pipeline stages; how it runs.

    ``resident`` programs of a persistent grid share a processor. ``descriptors``: loads what it streams by TMA.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    resident: int = 1
    descriptors: bool = False


class Key(NamedTuple):
    """What a tile depends on: kernel "forward", "query" (dQ) or "keys" (dK and dV); head dimension up to ``width``."""

    major: int
    width: int
    size: int
    kernel: str


def key(kernel: str, major: int, head_dim: int, size: int) -> Key:
    """Return the table's key for a device's compute capability ``major`` (0: interpreter) and element ``size`` bytes.

    Hopper (9) has entries of its own; every other takes those for 8, which need nothing newer.

    Raises:
        ValueError: the head dimension is above 256.
    """
    if not 0 < head_dim <= 256:
        raise ValueError(f"the Triton kernels take head dimensions 1 to 256, not {head_dim}; use the reference backend")
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    return Key(major if major in (INTERPRETER, 9) else 8, width, 4 if size > 2 else 2, kernel)


@dataclass(frozen=True)
class Tiles:
    """A table of tiles."""

    table: dict[Key, Tile]

    def __getitem__(self, key: Key) -> Tile:
        return self.table[key]

    def replace(self, key: Key, tile: Tile) -> Tiles:
        """Return the table with one entry replaced."""
        return Tiles({**self.table, key: tile})


def _table() -> dict[Key, Tile]:
    table = {
        Key(INTERPRETER, width, size, kernel): Tile(rows, columns, 4, 1)
        for width in (64, 128, 256)
        for size in (2, 4)
        for kernel, rows, columns in (("forward", 64, 32), ("query", 32, 64), ("keys", 32, 64))
    }
    for major, width, size, kernel, tile in _COMPILED:
        table[Key(major, width, size, kernel)] = tile
    return table


_COMPILED = (
    (8, 64, 2, "forward", Tile(128, 64, 8, 3)),
    (8, 64, 2, "query", Tile(64, 64, 4, 2, 2)),
    (8, 64, 2, "keys", Tile(32, 128, 8, 2)),
    (8, 128, 2, "forward", Tile(128, 64, 8, 2)),
    (8, 128, 2, "query", Tile(64, 64, 8, 2)),
    (8, 128, 2, "keys", Tile(64, 64, 8, 2)),
    (8, 256, 2, "forward", Tile(64, 32, 8, 2)),
    (8, 256, 2, "query", Tile(64, 32, 8, 1)),
    (8, 256, 2, "keys", Tile(32, 32, 8, 1)),
    (9, 64, 2, "forward", Tile(128, 128, 8, 2, 1, True)),
    (9, 64, 2, "query", Tile(128, 128, 8, 2, 1, True)),
    (9, 64, 2, "keys", Tile(64, 128, 8, 2, 1, True)),
    (9, 128, 2, "forward", Tile(128, 128, 8, 2, 1, True)),
    (9, 128, 2, "query", Tile(128, 64, 8, 2, 1, True)),
    (9, 128, 2, "keys", Tile(32, 128, 8, 2)),
    (9, 256, 2, "forward", Tile(128, 64, 8, 2, 1, True)),
    (9, 256, 2, "query", Tile(64, 64, 8, 2, 1, True)),
    (9, 256, 2, "keys", Tile(32, 64, 8, 2, 1, True)),
    *(
        (major, width, 4, kernel, tile)
        for major in (8, 9)
        for width, kernel, tile in (
            (64, "forward", Tile(32, 32, 4, 1)),
            (64, "query", Tile(32, 32, 8, 1)),
            (64, "keys", Tile(32, 32, 8, 1)),
            (128, "forward", Tile(16, 32, 8, 1)),
            (128, "query", Tile(16, 16, 8, 1)),
            (128, "keys", Tile(16, 16, 8, 1)),
            (256, "forward", Tile(16, 16, 8, 1)),
            (256, "query", Tile(16, 16, 8, 1)),
            (256, "keys", Tile(16, 16, 8, 1)),
        )
    ),
)  # fmt: skip

TILES = Tiles(_table())

CANDIDATES = tuple(
    Tile(rows, columns, warps, stages, 1, descriptors)
    for rows, columns in ((128, 128), (128, 64), (64, 128), (64, 64), (32, 128), (128, 32))
    for warps in (4, 8)
    for stages in (2, 3)
    for descriptors in (True, False)
)


def tune(
    tiles: Tiles,
    key: Key,
    run: Callable[[Tile], object],
    *,
    candidates: Iterable[Tile] = CANDIDATES,
    bench: Callable[[Callable[[], object]], float] | None = None,
    failures: tuple[type[Exception], ...] = (),
) -> Tiles:
    """Return ``tiles`` with the fastest of the candidates (and of what stands there) for ``key``.

    Args:
        run: runs the kernel once with a given tile.
        candidates: the tiles to try; descriptors only where the architecture has them.
        bench: milliseconds of a call; None: triton.testing.do_bench.
        failures: what a tile that does not fit raises: such a tile is passed over.
    """
    measure: Callable[[Callable[[], object]], Any] | None = bench
    if measure is None:
        from triton.testing import do_bench as measure
    timed = []
    for tile in dict.fromkeys((tiles[key], *candidates)):
        if tile.descriptors and key.major == 8:
            continue
        try:
            timed.append((measure(lambda tile=tile: run(tile)), tile))
        except failures:
            continue
    if not timed:
        raise RuntimeError(f"no tile runs for {key}")
    return tiles.replace(key, min(timed, key=lambda one: one[0])[1])
