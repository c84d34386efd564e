"""The Triton kernels against dense attention in float64: results, gradients, and what must not change them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from interpreter import DEVICE, as_hardware, bits, counted_products, triton_attention
from tables import TableSweep, TableWork, Truth, truth, work_of
from torch import Tensor

from dense import relative_rms
from ringspan.kernels import triton_launch
from ringspan.kernels.merge import join_sinks
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.triton_launch import Options, tile_of

# Rounding of P and dS to the inputs' dtype; fp32 has none.
OUT = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
GRADIENT = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
PERSISTENT = Options(persistent=True, descriptors=True)


@pytest.fixture(autouse=True)
def _hardware() -> Iterator[None]:
    with as_hardware():
        yield


def table_of(name: str, rows: int, columns: int) -> Tensor:
    """Return who sees whom: [rows, columns] bool."""
    q, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    shift = columns - rows
    if name == "full":
        return torch.ones(rows, columns, dtype=torch.bool)
    if name == "causal":
        return k <= q + shift
    if name == "late keys":  # the first rows see nothing
        return k <= q - rows // 2
    if name == "narrow":  # a window smaller than any tile
        return (k <= q + shift) & (k > q + shift - 5)
    if name == "wide":  # a window larger than a tile, and sinks
        return (k <= q + shift) & ((k > q + shift - 100) | (k < 4))
    if name == "sinks":  # three stretches a row
        return (k <= q + shift) & ((k > q + shift - 20) | (k < 4) | ((k >= 40) & (k < 47)))
    if name == "documents":  # some of one token
        edges = torch.tensor([0, 1, 2, 30, 31, 90, 91, 400])
        same = torch.bucketize(q, edges, right=True) == torch.bucketize(k, edges, right=True)
        return same & (k <= q)
    if name == "zigzag":  # rows of rank 1 of 4, keys of rank 2
        half = lambda n, first, second: torch.where(  # noqa: E731
            torch.arange(n) < n // 2, torch.arange(n) + first * 70, torch.arange(n) - n // 2 + second * 70
        )
        return half(columns, 2, 5)[None, :] <= half(rows, 1, 6)[:, None]
    if name == "holes":  # rows without a key between others
        return (k <= q) & (q % 7 != 3)
    raise ValueError(name)


class Inputs:
    """Random operands of a table, rounded to ``dtype``, and the truth for them."""

    def __init__(
        self,
        table: Tensor,
        heads: int,
        groups: int,
        dim: int,
        dtype: torch.dtype,
        batch: int = 1,
        sink: float | None = None,
    ) -> None:
        g = torch.Generator().manual_seed(heads + 31 * dim + table.shape[0])
        rows, columns = table.shape
        normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
        self.q, self.dout = normal(batch, rows, heads, dim).to(DEVICE), normal(batch, rows, heads, dim).to(DEVICE)
        self.k, self.v = normal(batch, columns, groups, dim).to(DEVICE), normal(batch, columns, groups, dim).to(DEVICE)
        self.dlse = normal(batch, rows, heads).float().to(DEVICE)
        self.sinks = None if sink is None else torch.full((heads,), sink, device=DEVICE)
        self.table, self.scale = table, dim**-0.5

    def forward(self, work: Any, options: Options = triton_attention.DEFAULT, **other: Tensor) -> Running:
        total = Running.like(self.q)
        k, v = other.get("k", self.k), other.get("v", self.v)
        triton_attention.forward(total, other.get("q", self.q), k, v, work, scale=self.scale, options=options)
        return total

    def saved(self, total: Running) -> Saved:
        out, lse = (total.out, total.lse) if self.sinks is None else join_sinks(total.out, total.lse, self.sinks)
        return Saved(self.q, out, lse, self.dout, self.dlse)

    def backward(self, saved: Saved, *works: Any, options: Options = triton_attention.DEFAULT) -> Gradients:
        total = Gradients(*(torch.zeros(x.shape, device=DEVICE) for x in (self.q, self.k, self.v)))
        for work in works:
            triton_attention.backward(total, saved, self.k, self.v, work, scale=self.scale, options=options)
        return total

    def truth(self) -> Truth:
        return truth(self.q, self.k, self.v, self.table, self.dout, self.dlse, self.scale, self.sinks)


def check(inputs: Inputs, total: Running, gradients: Gradients, saved: Saved) -> None:
    true, dtype = inputs.truth(), inputs.q.dtype
    live = torch.isfinite(true.lse)
    assert torch.equal(torch.isfinite(saved.lse).cpu(), live)
    assert torch.equal(total.out.cpu()[~live], torch.zeros_like(total.out.cpu()[~live]))
    assert relative_rms(saved.out.cpu(), true.out) <= OUT[dtype]
    assert relative_rms(saved.lse.cpu()[live], true.lse[live]) <= 2e-6
    for found, wanted in zip(gradients, (true.dq, true.dk, true.dv), strict=True):
        assert relative_rms(found.cpu(), wanted) <= GRADIENT[dtype]


FULL = pytest.mark.full
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


# Every table, every option, every dtype, odd lengths, GQA 1 to 8 and head dimensions up to 256 at least once.
@pytest.mark.parametrize(
    ("name", "rows", "columns", "heads", "groups", "dim", "dtype", "options"),
    [
        ("causal", 130, 130, 4, 2, 64, FP32, triton_attention.DEFAULT),
        ("causal", 130, 130, 2, 1, 128, BF16, PERSISTENT),
        ("full", 63, 130, 2, 2, 40, FP32, PERSISTENT),
        ("late keys", 130, 63, 2, 1, 32, FP32, triton_attention.DEFAULT),
        ("narrow", 130, 130, 2, 2, 16, FP32, PERSISTENT),
        ("wide", 190, 190, 1, 1, 32, BF16, triton_attention.DEFAULT),
        ("sinks", 130, 130, 2, 1, 32, FP32, PERSISTENT),
        ("documents", 130, 130, 2, 1, 64, FP32, triton_attention.DEFAULT),
        ("zigzag", 130, 126, 2, 2, 32, FP32, triton_attention.DEFAULT),
        ("holes", 63, 63, 8, 1, 8, FP32, triton_attention.DEFAULT),
        ("causal", 33, 33, 1, 1, 16, FP16, triton_attention.DEFAULT),
        ("full", 63, 33, 1, 1, 256, FP32, triton_attention.DEFAULT),
        ("full", 1, 63, 8, 2, 96, BF16, PERSISTENT),
        ("sinks", 63, 63, 2, 2, 1, FP32, triton_attention.DEFAULT),
        *(
            pytest.param(name, rows, columns, 4, groups, dim, dtype, options, marks=FULL)
            for name in ("causal", "wide", "sinks", "documents", "zigzag", "holes")
            for rows, columns in ((63, 130), (500, 500))
            for groups, dim, dtype, options in (
                (4, 32, FP32, PERSISTENT),
                (2, 72, BF16, triton_attention.DEFAULT),
                (1, 256, FP32, triton_attention.DEFAULT),
            )
        ),
    ],
)
def test_results_and_gradients(
    name: str, rows: int, columns: int, heads: int, groups: int, dim: int, dtype: torch.dtype, options: Options
) -> None:
    inputs = Inputs(table_of(name, rows, columns), heads, groups, dim, dtype)
    work = work_of(inputs.table)
    total = inputs.forward(work, options)
    saved = inputs.saved(total)
    check(inputs, total, inputs.backward(saved, work, options=options), saved)


def test_one_row_and_one_key() -> None:
    """The weight is 1: out is v, and of the logit's gradient only dlse is left, by cancellation."""
    inputs = Inputs(table_of("causal", 1, 1), 4, 1, 32, FP32)
    total, true = inputs.forward(work_of(inputs.table)), inputs.truth()
    gradients = inputs.backward(inputs.saved(total), work_of(inputs.table))
    assert torch.equal(total.out, inputs.v.expand(-1, -1, 4, -1))
    for found, wanted in zip((total.lse, *gradients), (true.lse, true.dq, true.dk, true.dv), strict=True):
        torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=4e-6)


@pytest.mark.parametrize("sink", [-3.0, 12.0])
def test_saved_rows_that_include_a_learned_sink(sink: float) -> None:
    inputs = Inputs(table_of("late keys", 70, 70), 2, 1, 32, torch.float32, batch=2, sink=sink)
    work = work_of(inputs.table)
    total = inputs.forward(work)
    saved = inputs.saved(total)
    check(inputs, total, inputs.backward(saved, work), saved)


@pytest.mark.parametrize("options", [triton_attention.DEFAULT, PERSISTENT])
def test_two_calls_over_disjoint_keys_are_one_over_all(options: Options) -> None:
    table = table_of("late keys", 130, 130)  # rows that see nothing in either call, in one, in both
    inputs = Inputs(table, 2, 1, 32, torch.float32)
    first, second = table.clone(), table.clone()
    first[:, 20:90] = False
    second[:, :20] = second[:, 90:] = False
    works = work_of(first), work_of(second)
    total = Running.like(inputs.q)
    for work in works:
        triton_attention.forward(total, inputs.q, inputs.k, inputs.v, work, scale=inputs.scale, options=options)
    saved = inputs.saved(total)
    check(inputs, total, inputs.backward(saved, *works, options=options), saved)


def test_sweeps_with_orders_of_their_own() -> None:
    """As of a dilated mask: rows and keys by residue class, one sweep per stretch of the table, each in its order."""
    table = table_of("causal", 90, 70)
    inputs = Inputs(table, 2, 1, 32, torch.float32, batch=2)
    near = (torch.arange(90)[:, None] - torch.arange(70)[None, :]) % 3 == 0
    order = lambda n: torch.argsort(torch.arange(n) % 3, stable=True)  # noqa: E731
    work: Any = TableWork((TableSweep(table & near, order(90), order(70)), TableSweep(table & ~near)))
    total = inputs.forward(work)
    saved = inputs.saved(total)
    check(inputs, total, inputs.backward(saved, work), saved)


def test_a_block_of_keys_that_every_row_sees_is_cut_and_added_up() -> None:
    table = table_of("sinks", 700, 700)
    inputs = Inputs(table, 2, 1, 16, torch.float32)
    work = work_of(table)
    plan = triton_attention.schedule_of(work.sweeps[0], DEVICE, "keys", tile_of("keys", inputs.q, Options()), 1)
    if triton_attention.INTERPRETED:
        assert plan.workspace > 1
    total = inputs.forward(work)
    saved = inputs.saved(total)
    gradients = inputs.backward(saved, work)
    check(inputs, total, gradients, saved)
    again = inputs.backward(saved, work, options=PERSISTENT)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(gradients, again, strict=True))


def test_bitwise_the_same_again_and_with_every_way_to_run() -> None:
    inputs = Inputs(table_of("sinks", 130, 130), 2, 1, 32, torch.float32, batch=2)
    work = work_of(inputs.table)
    total = inputs.forward(work)
    saved = inputs.saved(total)
    gradients = inputs.backward(saved, work)
    for options in (Options(), Options(descriptors=True), Options(persistent=True), Options(sm_margin=1)):
        again = inputs.forward(work, options)
        assert torch.equal(bits(again.out), bits(total.out))
        assert torch.equal(bits(again.lse), bits(total.lse))
        # Compiled for descriptors the order within a product may differ; results then differ in the last bit.
        if triton_attention.INTERPRETED or options.descriptors is None:
            found = inputs.backward(saved, work, options=options)
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(gradients, found, strict=True))


def test_heads_that_run_in_turns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six batch rows and heads, four side by side, then the other two."""
    inputs = Inputs(table_of("causal", 70, 70), 3, 3, 16, FP32, batch=2)
    work = work_of(inputs.table)
    before = inputs.forward(work)
    saved = inputs.saved(before)
    gradients = inputs.backward(saved, work)
    monkeypatch.setattr(triton_launch, "CACHE", 4 * 2 * 70 * 16 * 4)
    after = inputs.forward(work)
    assert torch.equal(bits(after.out), bits(before.out))
    found = inputs.backward(saved, work)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(gradients, found, strict=True))


@pytest.mark.skipif(not triton_attention.INTERPRETED, reason="counts the interpreter's matmuls")
@pytest.mark.parametrize("name", ["causal", "sinks", "documents", "holes"])
@pytest.mark.parametrize("options", [triton_attention.DEFAULT, PERSISTENT])
def test_visited_tiles_are_the_exact_minimum(name: str, options: Options) -> None:
    inputs = Inputs(table_of(name, 130, 130), 2, 1, 16, torch.float32)
    work = work_of(inputs.table)

    def minimum(kernel: str) -> int:
        tile = tile_of(kernel, inputs.q, options)
        return int(work.sweeps[0].tiles(tile.rows, tile.columns)[0].sum()) * inputs.q.shape[2]

    with counted_products() as products:
        total = inputs.forward(work, options)
    assert products[0] == 2 * minimum("forward")
    saved = inputs.saved(total)
    with counted_products() as products:
        inputs.backward(saved, work, options=options)
    assert products[0] == 3 * minimum("query") + 4 * minimum("keys")


@pytest.mark.parametrize("key", [0, 64, 129])
def test_a_key_touches_only_the_rows_that_see_it(key: int) -> None:
    table = table_of("sinks", 130, 130)
    inputs = Inputs(table, 2, 1, 32, torch.float32)
    work = work_of(table)
    before = inputs.forward(work).out
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, key], v[:, key] = torch.nan, torch.nan
    masked = table.clone()
    masked[:, key] = False
    after = inputs.forward(work, k=torch.nan_to_num(k, 9.0), v=torch.nan_to_num(v, 9.0)).out
    changed = (before != after).flatten(2).any(2)[0].cpu()
    assert torch.equal(changed, table[:, key])


def test_nothing_to_see_adds_nothing() -> None:
    inputs = Inputs(torch.zeros(20, 30, dtype=torch.bool), 2, 1, 16, torch.float32)
    total = inputs.forward(work_of(inputs.table))
    assert total.fresh
    assert not total.out.any()
    assert all(not x.any() for x in inputs.backward(inputs.saved(total), work_of(inputs.table)))
