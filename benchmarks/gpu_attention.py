"""Parts ``dense`` and ``sparse``: forward and backward of our operator beside its peers, on live area.

TFLOP/s count 4 * area * head_dim * query heads for a forward and 2.5 times that for a backward, whatever a kernel
computes; ``share`` is that rate over the rate of a large bf16 product in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu_cases
import torch
from gpu_cases import Case
from gpu_clock import Clock
from gpu_peers import PEERS, Run, Unfit
from gpu_record import Record
from torch import Tensor

from ringspan.kernels.attention import attend

ROW_S = 75  # of one operator on one case, compilation in
SAMPLES = 509  # rows, about, that are compared with the first operator's of the case


def run(record: Record) -> None:
    """Measure all cases of the part, the most important first."""
    clock = Clock(record.dry)
    torch.manual_seed(0)
    product: dict[str, Any] = {}
    with record.row("matmul", 30) as row:
        if row is not None:
            product = clock.matmul()
            row.update(product)
    rate = product.get("tflops") or next(r["tflops"] for r in record.data["rows"] if r["key"] == "matmul")
    for case in getattr(gpu_cases, record.part)(record.dry):
        measure(record, clock, case, rate)


def ours(backend: str, case: Case, clock: Clock) -> Run:
    """Our operator with one of its backends; out in the inputs' dtype, as a model takes it."""
    if clock.dry and backend == "library":
        raise Unfit("its operators run on CUDA alone")
    return lambda q, k, v: attend(q, k, v, mask=case.mask, backend=backend, out_dtype=q.dtype)[0]


def arms(case: Case) -> Iterator[tuple[str, Callable[[Case, Clock], Run]]]:
    """Yield what runs on a case: ours by backend, then the peers."""
    yield "ringspan triton", lambda case, clock: ours("triton", case, clock)
    if case.peers == gpu_cases.DENSE_PEERS:
        yield "ringspan library", lambda case, clock: ours("library", case, clock)
    for name in case.peers:
        yield name, PEERS[name]


def measure(record: Record, clock: Clock, case: Case, rate: float) -> None:
    """Add one row per operator for a case."""
    first: dict[str, Tensor] = {}
    inputs: list[Tensor] = []
    for name, make in arms(case):
        key = f"{case.key}: {name}"
        if key in record.keys:
            continue
        if not inputs:
            shape = (1, case.length)
            heads = (case.heads, case.groups, case.groups, case.heads)
            inputs = [clock.random(*shape, count, case.dim) for count in heads]
        with record.row(key, ROW_S, **case.facts(), operator=name) as row:
            if row is None:
                continue
            try:
                attention = make(case, clock)
            except Unfit as error:
                row["skipped"] = str(error)
            except ImportError as error:
                row["skipped"] = f"not installed: {error}"
            else:
                row.update(timed(clock, case, attention, inputs, rate, first))
        clock.release()


def timed(
    clock: Clock, case: Case, attention: Run, inputs: list[Tensor], rate: float, first: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the figures of an operator: forward, backward, and how far its out is from the first operator's."""
    q, k, v, dout = inputs
    dout = dout.detach()
    row: dict[str, Any] = {}

    def rates(figures: dict[str, Any], factor: float) -> dict[str, Any]:
        tflops = factor * case.flops / (figures["ms"] * 1e-3) / 1e12
        return {**figures, "tflops": tflops, "share": tflops / rate}

    row["forward"] = rates(clock.milliseconds(lambda: attention(q, k, v)), 1)
    out = attention(q, k, v)
    stride = max(1, case.length // SAMPLES)
    sample = out.detach()[:, ::stride].float()
    truth = first.setdefault("out", sample)
    row["difference"] = float((sample - truth).norm() / truth.norm())
    if not out.requires_grad:
        return row | {"backward_skipped": "this operator has no backward on the CPU"}
    grads = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    samples = [x[:, ::stride].float() for x in grads]
    for name, found in zip(("dq", "dk", "dv"), samples, strict=True):
        wanted = first.setdefault(name, found)
        row[f"difference_{name}"] = float((found - wanted).norm() / wanted.norm())
    del grads
    row["backward"] = rates(
        clock.milliseconds(lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)), 2.5
    )
    return row
