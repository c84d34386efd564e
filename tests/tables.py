"""Work made by brute force from a table of who sees whom, for kernels that know no masks; and its dense truth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dense import attention
from ringspan.kernels.runs import Runs


def intervals(row: Tensor) -> list[tuple[int, int]]:
    """Return the stretches of True in a row, half-open."""
    edges = torch.diff(torch.cat([row.new_zeros(1), row, row.new_zeros(1)]).int())
    return list(zip((edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist(), strict=True))


@dataclass(eq=False)
class TableSweep:
    """A sweep over a table [M, N], in an order of its own where ``rows`` or ``keys`` are given."""

    table: Tensor
    rows: Tensor | None = None
    keys: Tensor | None = None

    def __post_init__(self) -> None:
        for dim, order in enumerate((self.rows, self.keys)):
            if order is not None:
                self.table = self.table.index_select(dim, order)
        self.height, self.width = self.table.shape

    def bounds_on(self, device: torch.device) -> Tensor:
        found = [intervals(row) for row in self.table]
        bounds = torch.zeros(2, max(1, *map(len, found)), self.height, dtype=torch.int32)
        for m, row in enumerate(found):
            for s, (start, stop) in enumerate(row):
                bounds[:, s, m] = torch.tensor([start, stop])
        return bounds.to(device)

    def tiles(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return per tile whether some pair is live, and whether all are and none lies outside."""
        down, across = -(-self.height // rows), -(-self.width // columns)
        padded = torch.zeros(down * rows, across * columns, dtype=torch.bool)
        padded[: self.height, : self.width] = self.table
        blocks = padded.view(down, rows, across, columns).transpose(1, 2)
        return blocks.flatten(2).any(2), blocks.flatten(2).all(2)

    def row_runs(self, rows: int, columns: int) -> Runs:
        some, every = self.tiles(rows, columns)
        inside = torch.ones_like(self.table)
        whole = TableSweep(inside).tiles(rows, columns)[1]
        if self.height % rows:  # rows beyond the last do not count here
            last = self.table[self.height // rows * rows :].all(0)
            for column in range(some.shape[1]):
                one = last[column * columns : (column + 1) * columns]
                every[-1, column] = bool(one.all()) and len(one) == columns
        assert not (every & ~whole)[:-1].any()
        return csr(some, every)

    def column_runs(self, rows: int, columns: int) -> Runs:
        some, every = self.tiles(rows, columns)
        return csr(some.T, every.T)


@dataclass(eq=False)
class TableWork:
    """What a backend reads of a work: its sweeps."""

    sweeps: tuple[TableSweep, ...] = field(default=())


def csr(some: Tensor, every: Tensor) -> Runs:
    """Return the runs of full tiles and of tiles to mask, block by block."""
    pointers, runs = [0], []
    for one, full in zip(some, every, strict=True):
        for kind in (full, one & ~full):
            runs += intervals(kind)
            pointers.append(len(runs))
    return Runs(torch.tensor(pointers, dtype=torch.int32), torch.tensor(runs, dtype=torch.int32).view(-1, 2))


def work_of(table: Tensor) -> Any:
    """Return the work of a table in one sweep, none where nothing is live. It stands in for a kernels.work.Work."""
    return TableWork((TableSweep(table),) if table.any() else ())


@dataclass
class Truth:
    """Dense results and gradients in float64; rows without a key have out 0, lse -inf and no gradient."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def truth(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    dout: Tensor,
    dlse: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> Truth:
    """Return attention and its gradients by autograd through dense.attention, in float64.

    Args:
        q, dout: [B, M, H, D]; k, v: [B, N, G, D]; table: [M, N]; dlse: [B, M, H]; sinks: [H].
    """
    q, k, v, dout, dlse = (x.detach().double().cpu() for x in (q, k, v, dout, dlse))
    live = table.any(1) if sinks is None else torch.ones(len(table), dtype=torch.bool)
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    some_out, some_lse = attention(
        q[:, live], k, v, table[live], scale, None if sinks is None else sinks.double().cpu()
    )
    loss = (some_out * dout[:, live]).sum() + (some_lse * dlse[:, live]).sum()
    out[:, live], lse[:, live] = some_out.detach(), some_lse.detach()
    return Truth(out, lse, *torch.autograd.grad(loss, inputs))
