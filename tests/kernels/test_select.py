"""Which kernel is taken, and what each refuses, in words."""

import pytest
import torch

from ringspan.kernels import cpu, reference
from ringspan.kernels.mask import Causal, Span, Window
from ringspan.kernels.select import BACKENDS, select
from ringspan.kernels.work import work

CPU = torch.device("cpu")


def test_select_says_which_kernel_and_why() -> None:
    kernel = select(CPU, torch.float32, 64)
    assert (kernel.name, kernel.module) == ("cpu", cpu)
    assert kernel.why.startswith("cpu: torch's flash operator")
    assert (kernel.forward, kernel.backward) == (cpu.forward, cpu.backward)


def test_a_kernel_is_taken_by_name() -> None:
    kernel = select(CPU, torch.float64, 64, backend="reference")
    assert kernel.module is reference
    assert kernel.why == "reference: asked for by name"
    assert set(BACKENDS) == {"auto", "cpu", "triton", "library", "reference"}


def test_what_none_serves_is_refused_with_every_reason() -> None:
    with pytest.raises(ValueError, match="backend: none serves torch.int64 on cpu: cpu "):
        select(CPU, torch.int64, 64)


def test_the_library_serves_only_rows_that_meet_nothing_else() -> None:
    spans = (Span(0, 64),)
    for alone in (None, work(Causal() & Window(8), spans, spans)):
        with pytest.raises(ValueError, match="backend: library refuses: "):
            select(CPU, torch.bfloat16, 64, backend="library", alone=alone)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    from ringspan.kernels.attention import attend

    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 20, 2, 8, generator=g).to(dtype).requires_grad_() for _ in range(3))
    mask = Causal() & Window(4)
    out, _ = attend(q, k, v, mask=mask)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    truth, _ = attend(*exact, mask=mask)
    assert torch.equal(out, truth)
    grads = torch.autograd.grad(out.sum(), [q, k, v])
    wide = torch.autograd.grad(truth.sum(), exact)
    assert all(torch.equal(a, b.to(dtype)) for a, b in zip(grads, wide, strict=True))
