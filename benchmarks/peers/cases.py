"""What every peer is asked to compute: small problems in words and numbers, and their dense truth in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import dense  # tests/dense.py, the truth that our tests use; a cell's path has tests/

DIM = 16


@dataclass(frozen=True)
class Case:
    """One causal problem.

    Attributes:
        name: column of the table.
        length: global tokens; heads, kv_heads: of q and of k, v.
        boundaries: of packed documents, 0 first and the length last; None: one document.
        window: sliding window as Hugging Face counts it (this many keys, the query's own included); None: all.
        sinks: whether each head has a learned sink logit.
    """

    name: str
    length: int = 512
    heads: int = 8
    kv_heads: int = 8
    boundaries: tuple[int, ...] | None = None
    window: int | None = None
    sinks: bool = False

    def table(self) -> Tensor:
        """Return [length, length] bool: row i sees column j."""
        words: tuple = ("causal",)
        if self.window is not None:
            words = ("and", words, ("window", self.window - 1, 0))
        return dense.pattern_table(self.length, words, list(self.boundaries) if self.boundaries else None)

    def positions(self) -> Tensor:
        """Return [length] ints: position ids that start anew with each document."""
        position = torch.arange(self.length)
        if self.boundaries:
            starts = torch.tensor(self.boundaries)
            position = position - starts[torch.bucketize(position, starts, right=True) - 1]
        return position


EDGES = (0, 200, 211, 389, 512)  # four documents: longer and shorter than a share, divisible by nothing


def cases(world: int) -> dict[str, Case]:
    """Return the columns of the table for so many ranks; equal heads, except where heads are the question."""
    made = (
        Case("dense causal"),
        Case("GQA", kv_heads=world),
        Case("KV heads < ranks", kv_heads=world // 2),
        Case("odd length", length=509),
        Case("documents", boundaries=EDGES),
        Case("window", window=50),
        Case("learned sinks", sinks=True),
        Case("window + sinks + documents", window=50, sinks=True, boundaries=EDGES),
    )
    return {case.name: case for case in made}


@dataclass(frozen=True)
class Tensors:
    """q, dout [1, L, H, D], k, v [1, L, G, D], sinks [H] or None: the same on every rank, in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    sinks: Tensor | None


def tensors(case: Case) -> Tensors:
    """Return inputs and a random upstream gradient; equal in every process."""
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    q, dout = (normal(1, case.length, case.heads, DIM) for _ in range(2))
    k, v = (normal(1, case.length, case.kv_heads, DIM) for _ in range(2))
    return Tensors(2 * q, k, v, dout, normal(case.heads) + 1 if case.sinks else None)


def truth(case: Case, given: Tensors) -> dict[str, Tensor]:
    """Return out, dq, dk, dv (and dsinks) of dense attention in float64 on the same inputs."""
    q, k, v = (x.double().requires_grad_() for x in (given.q, given.k, given.v))
    sinks = None if given.sinks is None else given.sinks.double().requires_grad_()
    out, _ = dense.attention(q, k, v, case.table(), sinks=sinks)
    out.backward(given.dout.double())
    found = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if sinks is not None:
        found["dsinks"] = sinks.grad
    return {name: tensor.detach() for name, tensor in found.items() if tensor is not None}
