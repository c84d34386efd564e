"""The fused merge, sinks and row data against merge.py and Saved.delta, strided and padded."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from interpreter import DEVICE, as_hardware
from torch import Tensor

from dense import relative_rms
from ringspan.kernels import merge as plain
from ringspan.kernels import triton_merge
from ringspan.kernels.state import Saved


@pytest.fixture(autouse=True)
def _hardware() -> Iterator[None]:
    with as_hardware():
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def parts(make: Callable[..., Tensor], dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return two partial results over 2 x 37 rows of 3 heads; some rows empty in one, the other, or both."""
    out, other = make(2, 37, 3, dim, seed=1), make(2, 37, 3, dim, seed=2)
    lse, other_lse = 40 * normal(2, 37, 3, seed=3), 40 * normal(2, 37, 3, seed=4)
    for rows, (x, level) in ((slice(0, 9), (out, lse)), (slice(5, 20), (other, other_lse))):
        x[:, rows], level[:, rows] = 0, -torch.inf
    return out, lse, other, other_lse


def strided(*shape: int, seed: int) -> Tensor:
    batch, rows, heads, dim = shape
    return normal(batch, heads, rows, dim + 3, seed=seed).transpose(1, 2)[..., :dim]


@pytest.mark.parametrize("make", [normal, strided])
@pytest.mark.parametrize("dim", [16, 5])
def test_merge(make: Callable[..., Tensor], dim: int) -> None:
    out, lse, other, other_lse = parts(make, dim)
    wanted, wanted_lse = out.clone(), lse.clone()
    plain.merge(wanted, wanted_lse, other, other_lse)
    triton_merge.merge(out, lse, other, other_lse)
    assert relative_rms(out, wanted) < 1e-7
    finite = torch.isfinite(wanted_lse)
    assert not finite.all()
    assert torch.equal(torch.isfinite(lse), finite)
    assert relative_rms(lse[finite], wanted_lse[finite]) < 1e-7


@pytest.mark.parametrize("make", [normal, strided])
def test_join_sinks(make: Callable[..., Tensor]) -> None:
    out, lse, _, _ = parts(make, 16)
    sinks = torch.tensor([3.0, -torch.inf, 90.0], device=DEVICE)
    wanted, wanted_lse = plain.join_sinks(out, lse, sinks)
    found, found_lse = triton_merge.join_sinks(out, lse, sinks)
    assert relative_rms(found, wanted) < 1e-6
    finite = torch.isfinite(wanted_lse)
    assert not finite.all()
    assert torch.equal(torch.isfinite(found_lse), finite)
    assert relative_rms(found_lse[finite], wanted_lse[finite]) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_dlse", [True, False])
def test_row_data(dtype: torch.dtype, with_dlse: bool) -> None:
    out, lse, dout, dlse = parts(strided, 16)
    q = torch.empty(out.shape, dtype=dtype, device=DEVICE)
    saved = Saved(q, out.to(dtype), lse, dout.to(dtype), torch.nan_to_num(dlse, 0, 0, 0) if with_dlse else None)
    levels, deltas = triton_merge.prepare(saved)
    assert levels.shape == deltas.shape == (2, 3, triton_merge.PADDING)
    assert relative_rms(triton_merge.delta(saved), saved.delta) < 1e-6
    assert not deltas[:, :, 37:].any()
    wanted = torch.where(lse == -torch.inf, torch.inf, lse * torch.log2(torch.tensor(torch.e))).transpose(1, 2)
    live = torch.isfinite(wanted)
    assert torch.equal(torch.isposinf(levels[:, :, :37]), ~live)
    assert torch.isposinf(levels[:, :, 37:]).all()
    assert relative_rms(levels[:, :, :37][live], wanted[live]) < 1e-6
    assert triton_merge.prepare(saved)[0] is levels


def test_float64_is_refused_by_name() -> None:
    out, lse = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"float64: use ringspan\.kernels\.merge"):
        triton_merge.merge(out, lse, out, lse)
    with pytest.raises(ValueError, match="float64"):
        triton_merge.join_sinks(out, lse, lse)
