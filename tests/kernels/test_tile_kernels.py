"""One tile: the fast kernel against its slow twin, and both against autograd in float64."""

from types import ModuleType

import pytest
import torch

from dense import attention, mask_table, relative_rms
from ringspan.kernels import cpu, reference
from ringspan.kernels.select import select

TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("kernel", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "keys", "causal"),
    [(1, 1, True), (63, 63, True), (130, 130, True), (37, 130, False), (1, 500, False)],
)
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 4, 32), (8, 2, 64), (3, 1, 33)])
def test_tile_matches_autograd(
    kernel: ModuleType,
    dtype: torch.dtype,
    rows: int,
    keys: int,
    causal: bool,
    heads: int,
    groups: int,
    dim: int,
) -> None:
    g = torch.Generator().manual_seed(rows + keys)

    def random(n: int, h: int) -> torch.Tensor:
        return torch.randn(2, n, h, dim, generator=g, dtype=torch.float64).to(dtype)

    q, k, v, dout = (
        random(rows, heads),
        random(keys, groups),
        random(keys, groups),
        random(rows, heads),
    )
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    table = mask_table(rows, causal=True) if causal else torch.ones(rows, keys, dtype=torch.bool)
    out_truth, lse_truth = attention(exact[0], exact[1], exact[2], table, scale=0.2)
    grads_truth = torch.autograd.grad(out_truth, exact, dout.double())
    out, lse = kernel.tile_forward(q, k, v, scale=0.2, causal=causal)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = kernel.tile_backward(dout, q, k, v, out, lse, scale=0.2, causal=causal)
    for found, truth in zip((out, lse, *grads), (out_truth, lse_truth, *grads_truth), strict=True):
        if truth.detach().abs().max() < 1e-12:  # over a single key the gradients of q and k vanish
            assert found.abs().max() < 10 * TOLERANCE[dtype]
        else:
            assert relative_rms(found, truth.detach()) <= TOLERANCE[dtype]


def test_select_says_which_kernel_and_why() -> None:
    kernel, why = select(torch.device("cpu"))
    assert kernel is cpu
    assert why.startswith("cpu:")
    kernel, why = select(torch.device("meta"))
    assert kernel is reference
    assert "no kernel for meta" in why
