"""Around the Triton kernels: real masks' work, strides and offsets, options, refusals, the table of tiles."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from interpreter import DEVICE, as_hardware, triton_attention
from tables import truth, work_of

from dense import relative_rms
from ringspan.kernels.mask import Causal, Dilated, Documents, Mask, Sinks, Window
from ringspan.kernels.masks.span import Span
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.triton_launch import Options, describable, descriptor, tile_of
from ringspan.kernels.triton_source import INTERPRETED, KERNELS, constants, source
from ringspan.kernels.triton_tiles import TILES, Tile, key, tune
from ringspan.kernels.triton_tune import tuned
from ringspan.kernels.work import work


@pytest.fixture(autouse=True)
def _hardware() -> Iterator[None]:
    with as_hardware():
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


QUERIES, KEYS = (Span(20, 50), Span(130, 160)), (Span(0, 40), Span(100, 150))


@pytest.mark.parametrize(
    "mask",
    [
        Causal(),
        Causal() & (Window(30) | Sinks(3)),
        Causal() & Dilated(8, 3),
        Causal() & Documents((0, 1, 33, 120, 160)),
    ],
    ids=str,
)
def test_the_work_of_masks_over_two_spans_a_side(mask: Mask) -> None:
    q_pos, k_pos = (torch.cat([torch.arange(*span) for span in side]) for side in (QUERIES, KEYS))
    table = mask.allowed(q_pos[:, None], k_pos[None, :])
    q, dout, dlse = normal(1, 60, 2, 16), normal(1, 60, 2, 16, seed=1), normal(1, 60, 2, seed=2)
    k, v = normal(1, 90, 1, 16, seed=3), normal(1, 90, 1, 16, seed=4)
    here = work(mask, QUERIES, KEYS)
    total = Running.like(q)
    triton_attention.forward(total, q, k, v, here, scale=0.3)
    gradients = Gradients(*(torch.zeros_like(x) for x in (q, k, v)))
    triton_attention.backward(gradients, Saved(q, total.out, total.lse, dout, dlse), k, v, here, scale=0.3)
    true = truth(q, k, v, table, dout, dlse, 0.3)
    assert torch.equal(torch.isfinite(total.lse).cpu(), torch.isfinite(true.lse))
    for found, wanted in zip((total.out, *gradients), (true.out, true.dq, true.dk, true.dv), strict=True):
        assert relative_rms(found.cpu(), wanted) <= 2e-6


def test_tensors_of_any_strides() -> None:
    """Heads before rows, a slice of a larger tensor, and one whose last stride is not 1."""
    table = torch.ones(40, 50, dtype=torch.bool).tril()
    q = normal(2, 2, 40, 24).transpose(1, 2)[..., 3:19]
    k = normal(2, 50, 16, 1).transpose(2, 3)
    v = normal(2, 50, 3, 16)[:, :, 1:2]
    dout, dlse = normal(2, 40, 2, 16, seed=1), normal(2, 2, 40, seed=2).transpose(1, 2)
    total = Running(normal(2, 2, 40, 20)[..., :16].transpose(1, 2), normal(2, 2, 40).transpose(1, 2), bytearray(40))
    here = work_of(table)
    triton_attention.forward(total, q, k, v, here, scale=0.25)
    gradients = Gradients(*(torch.zeros(2, n, h, 40, device=DEVICE)[..., 8:24] for n, h in ((40, 2), (50, 1), (50, 1))))
    triton_attention.backward(gradients, Saved(q, total.out, total.lse, dout, dlse), k, v, here, scale=0.25)
    true = truth(q, k, v, table, dout, dlse, 0.25)
    for found, wanted in zip((total.out, total.lse, *gradients), vars(true).values(), strict=True):
        assert relative_rms(found.cpu(), wanted) <= 2e-6


def test_offsets_beyond_32_bits() -> None:
    """Rows 2^27 elements apart: row 16 lies 2^31 elements from the start. Only the pages touched are ever real."""
    step, rows = 1 << 27, 20
    far = torch.empty(rows * step, dtype=torch.float16, device=DEVICE)
    q, k, v, dout = (far[16 * i :].as_strided((1, rows, 1, 16), (16, step, 16, 1)) for i in range(4))
    for i, x in enumerate((q, k, v, dout)):
        x.copy_(normal(1, rows, 1, 16, seed=i).half())
    table = torch.ones(rows, rows, dtype=torch.bool).tril()
    total, dlse = Running.like(q.contiguous()), torch.zeros(1, rows, 1, device=DEVICE)
    triton_attention.forward(total, q, k, v, work_of(table), scale=0.25)
    gradients = Gradients(*(torch.zeros(1, rows, 1, 16, device=DEVICE) for _ in range(3)))
    saved = Saved(q, total.out, total.lse, dout)
    triton_attention.backward(gradients, saved, k, v, work_of(table), scale=0.25)
    true = truth(q, k, v, table, dout, dlse, 0.25)
    for found, wanted in zip((total.out, *gradients), (true.out, true.dq, true.dk, true.dv), strict=True):
        assert relative_rms(found.cpu(), wanted) <= 1e-3


def test_descriptors_are_for_aligned_tensors_only() -> None:
    aligned = torch.zeros(1, 8, 2, 16)
    assert describable(aligned)
    assert describable(aligned.transpose(1, 2))
    assert not describable(torch.zeros(1, 8, 2, 15))  # rows 30 floats apart
    assert not describable(torch.zeros(1, 8, 2, 20)[..., 1:17])  # begins in the middle of 16 bytes
    odd = torch.zeros(3, 8, 2, 15)[:1, :, :1, :12].as_strided((1, 8, 1, 12), (7, 32, 5, 1))
    assert describable(odd)  # strides of dimensions of size 1 do not matter
    made = descriptor(odd, 32)
    assert (made.shape, made.strides, made.block_shape) == ([1, 1, 8, 12], [16, 16, 32, 1], [1, 1, 32, 16])


@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [
        (torch.float64, 64, "no float64; take the reference backend"),
        (torch.bfloat16, 257, "head dimension 257; the kernels take 1 to 256"),
        (torch.float16, 256, None),
        (torch.float32, 1, None),
    ],
)
def test_refusals_name_the_remedy(dtype: torch.dtype, head_dim: int, words: str | None) -> None:
    reason = triton_attention.refuses(DEVICE, dtype, head_dim)
    assert (reason is None) if words is None else (reason is not None and words in reason)
    if words is not None:
        q = torch.zeros(1, 1, 1, head_dim, dtype=dtype, device=DEVICE)
        table = work_of(torch.ones(1, 1, dtype=torch.bool))
        with pytest.raises(ValueError, match=words):
            triton_attention.forward(Running.like(q), q, q, q, table, scale=1.0)


def test_other_devices_and_scales_are_refused() -> None:
    reason = triton_attention.refuses(torch.device("meta"), torch.float32, 64)
    assert reason is not None
    assert "no kernels for meta" in reason
    q = torch.zeros(1, 1, 1, 16, device=DEVICE)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scale must be positive"):
            triton_attention.forward(Running.like(q), q, q, q, work_of(torch.ones(1, 1).bool()), scale=scale)


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the persistent grid"):
        Options(sm_margin=4, persistent=False)
    with pytest.raises(ValueError, match="not -1"):
        Options(sm_margin=-1)
    q = torch.zeros(1, 1, 1, 16, device=DEVICE)
    with pytest.raises(ValueError, match="leaves none of the"):
        triton_attention.forward(
            Running.like(q), q, q, q, work_of(torch.ones(1, 1).bool()), scale=1.0, options=Options(sm_margin=10_000)
        )  # fmt: skip


def test_the_table_has_a_tile_for_every_kernel() -> None:
    for major in (0, 8, 9, 10, 12):
        for head_dim in (1, 64, 65, 128, 129, 256):
            for size in (2, 4):
                for kernel in ("forward", "query", "keys"):
                    tile = TILES[key(kernel, major, head_dim, size)]
                    assert tile.descriptors is False or major == 9
                    assert min(tile.rows, tile.columns) >= 16
    with pytest.raises(ValueError, match="head dimensions 1 to 256, not 257"):
        key("forward", 9, 257, 2)


def test_tuning_installs_the_fastest_that_runs() -> None:
    one, other, never = Tile(64, 64, 4, 1), Tile(32, 32, 4, 1), Tile(128, 128, 4, 1)
    mine = key("forward", 9, 128, 2)
    times = {one: 3.0, other: 2.0, TILES[mine]: 2.5}

    def run(tile: Tile) -> None:
        if tile == never:
            raise MemoryError
        called.append(tile)

    def bench(call) -> float:
        call()
        return times[called[-1]]

    called: list[Tile] = []
    tuned = tune(TILES, mine, run, candidates=(one, never, other), bench=bench, failures=(MemoryError,))
    assert tuned[mine] == other
    assert TILES[mine] != other
    assert tuned.table == {**TILES.table, mine: other}
    assert set(called) == set(times)
    times[TILES[mine]] = 1.0
    assert tune(TILES, mine, run, candidates=(one, other), bench=bench)[mine] == TILES[mine]
    with pytest.raises(RuntimeError, match="no tile runs"):
        tune(tuned.replace(mine, never), mine, run, candidates=(), bench=bench, failures=(MemoryError,))


def test_a_tuned_table_is_used() -> None:
    q = normal(1, 40, 1, 16)
    mine = key("forward", 0 if INTERPRETED else torch.cuda.get_device_capability()[0], 16, 4)
    options = Options(tiles=TILES.replace(mine, Tile(16, 16, 4, 1)))
    assert tile_of("forward", q, options) == Tile(16, 16, 4, 1)
    here = work_of(torch.ones(40, 40, dtype=torch.bool))
    total = Running.like(q)
    triton_attention.forward(total, q, q, q, here, scale=0.25, options=options)
    out = truth(q, q, q, torch.ones(40, 40).bool(), q, torch.zeros(1, 40, 1), 0.25).out
    assert relative_rms(total.out.cpu(), out) <= 2e-6


def test_tuning_on_operands_times_every_kernel_and_keeps_what_it_does_not_measure() -> None:
    q, here = normal(1, 20, 1, 16), work_of(torch.ones(20, 20, dtype=torch.bool))
    small, times = Tile(16, 16, 4, 1), iter([2.0, 1.0] * 3)

    def bench(call) -> float:
        call()
        return next(times)

    tiles = tuned(q, q, q, here, scale=0.25, candidates=[small], bench=bench)
    changed = {one.kernel: tile for one, tile in tiles.table.items() if tile != TILES[one]}
    assert changed == dict.fromkeys(("forward", "query", "keys"), small)
    assert sum(tile != TILES[one] for one, tile in tiles.table.items()) == 3


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_source_for_compiling_names_every_argument(name: str) -> None:
    for descriptors in (False, True):
        one = source(name, 9, 128, torch.bfloat16, descriptors=descriptors)
        assert list(one.signature) == one.fn.arg_names
        fixed = {one.fn.arg_names[index]: value for (index,), value in one.constexprs.items()}
        assert fixed == constants(name, one.tile, 128, intervals=2, descriptors=descriptors)
        kinds = set(one.signature.values())
        assert any(kind.startswith("tensordesc<bf16[1, 1, ") for kind in kinds) == (descriptors and name != "reduce")
    streamed = SimpleNamespace(forward=64, query=64, keys=32, reduce=64)
    assert KERNELS[name].streamed_block(Tile(32, 64, 4, 1)) == getattr(streamed, name)
