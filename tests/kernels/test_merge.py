"""The (out, lse) algebra: guarded merge, sinks joined once, and the gradient of the sinks."""

import math

import pytest
import torch

from dense import attention, mask_table, relative_rms
from ringspan.kernels.merge import join_sinks, merge, sinks_gradient

INF = math.inf


def merged(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    out, lse = torch.tensor([[a[0]]]), torch.tensor([a[1]])
    merge(out, lse, torch.tensor([[b[0]]]), torch.tensor([b[1]]))
    return float(out), float(lse)


@pytest.mark.parametrize("gap", [0.0, 1.0, 90.0, 200.0, 1000.0])
def test_merge_of_two_keys_is_their_softmax(gap: float) -> None:
    out, lse = merged((1.0, 0.0), (3.0, gap))
    weight = 1 / (1 + math.exp(-gap))
    assert out == pytest.approx(1 + 2 * weight, rel=1e-6)
    assert lse == pytest.approx(gap + math.log1p(math.exp(-gap)), rel=1e-6)
    assert merged((3.0, gap), (1.0, 0.0)) == pytest.approx((out, lse), rel=1e-6)


def test_merge_with_empty_rows_has_no_nan() -> None:
    assert merged((0.0, -INF), (5.0, 2.0)) == (5.0, 2.0)
    assert merged((5.0, 2.0), (0.0, -INF)) == (5.0, 2.0)
    assert merged((0.0, -INF), (0.0, -INF)) == (0.0, -INF)


def test_merge_of_64_parts_keeps_fp32_accuracy() -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 32, generator=g, dtype=torch.float64) for n in (8, 512, 512))
    truth, lse_truth = attention(q, k, v, torch.ones(8, 512, dtype=torch.bool))
    out, lse = torch.zeros(1, 8, 2, 32), torch.full((1, 8, 2), -INF)
    for k_part, v_part in zip(k.split(8, 1), v.split(8, 1), strict=True):
        part, part_lse = attention(q, k_part, v_part, torch.ones(8, 8, dtype=torch.bool))
        merge(out, lse, part.float(), part_lse.float())
    assert relative_rms(out, truth) < 2e-6  # bf16 accumulation gives 1e-2 here
    assert relative_rms(lse, lse_truth) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sinks_joined_once_match_an_extra_column(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(2, 9, h, 16, generator=g, dtype=torch.float64) for h in (4, 2, 2, 4))
    dlse = torch.randn(2, 9, 4, generator=g, dtype=torch.float64)
    sinks = torch.tensor([3.0, -2.0, 8.0, 0.5], dtype=torch.float64, requires_grad=True)
    table = mask_table(9, causal=True)
    out_truth, lse_truth = attention(q, k, v, table, sinks=sinks)
    ((out_truth * dout).sum() + (lse_truth * dlse).sum()).backward()
    bare, bare_lse = attention(q, k, v, table)
    out, lse = join_sinks(bare.to(dtype), bare_lse.to(dtype), sinks.detach().to(dtype))
    delta = (dout.to(dtype) * out).sum(-1) - dlse.to(dtype)
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    assert relative_rms(out, out_truth.detach()) < bound
    assert relative_rms(lse, lse_truth.detach()) < bound
    assert sinks.grad is not None
    assert relative_rms(sinks_gradient(lse, sinks.detach().to(dtype), delta), sinks.grad) < 4 * bound


def test_sinks_on_rows_without_keys() -> None:
    out, lse = torch.zeros(1, 1, 2, 4), torch.full((1, 1, 2), -INF)
    sinks = torch.tensor([1.5, -INF])
    joined_out, joined = join_sinks(out, lse, sinks)
    assert torch.equal(joined_out, torch.zeros_like(out))
    assert joined.flatten().tolist() == [1.5, -INF]
    # d lse' / d s is 1 where the sink is all there is, and 0 where there is nothing at all.
    assert sinks_gradient(joined, sinks, -torch.ones(1, 1, 2)).tolist() == [1.0, 0.0]
