"""A small attention, forward and backward, by the Triton kernels: short enough for compute-sanitizer.

Run: ``compute-sanitizer --error-exitcode 9 python benchmarks/gpu_small.py`` with ringspan importable. Ends with 1 where
the result is wrong.
"""

from __future__ import annotations

import sys

import torch

from ringspan.kernels.attention import attend
from ringspan.kernels.mask import Causal, Documents, Sinks, Span, Window

CASES = (  # length, mask, spans of queries and keys
    (70, Causal() & (Window(20) | Sinks(4)), None),
    (66, Causal() & Documents((0, 1, 33, 34, 66)), None),
    (64, Causal(), ((Span(30, 60), Span(200, 234)), (Span(0, 32), Span(218, 250)))),
)


def main() -> int:
    on_device = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_device else ("cpu", torch.float32)
    limit, worst = (2e-2, 0.0) if on_device else (2e-6, 0.0)
    for length, mask, spans in CASES:
        generator = torch.Generator().manual_seed(length)
        shapes = [(1, length, heads, 64) for heads in (2, 1, 1, 2)]
        q, k, v, dout = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in shapes)
        where = {} if spans is None else {"q_spans": spans[0], "k_spans": spans[1]}
        results = []
        for backend in ("triton", "reference"):
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            out, lse = attend(*leaves, mask=mask, backend=backend, **where)
            (out * dout).sum().backward()
            results.append([out, *(x.grad for x in leaves)])
            assert not lse.isnan().any()
        for name, found, wanted in zip(("out", "dq", "dk", "dv"), *results, strict=True):
            error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
            worst = max(worst, error)
            if not error <= limit:
                print(f"{mask} {name}: {error:.2e}")
    print(f"largest relative difference from the dense reference: {worst:.2e}, limit {limit:.0e}")
    return 0 if worst <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
