"""One row of the table: a library, how it is called, and what its interface has no word for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from peers.cases import Case
from torch import Tensor


@dataclass(frozen=True)
class Operator:
    """A library's attention, bound to one case and one rank.

    Attributes:
        rows: [L] global positions that this rank holds, in order; one beyond the sequence is padding (zeros).
        call: (q [1, L, H, D], k, v [1, L, G, D], sinks [H] or None) -> out [1, L, H, D], differentiable.
    """

    rows: Tensor
    call: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Sharded:
    """A Hugging Face model made parallel by a library, and this rank's part of the batch.

    Attributes:
        forward: () -> logits [1, L, vocabulary] of this rank's tokens.
        labels: [1, L] already shifted, -100 where not scored.
    """

    forward: Callable[[], Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Arm:
    """A row.

    Attributes:
        title: as printed; package: of install.PACKAGES, None where nothing has to be installed.
        called: what exactly is called, for the notes.
        operator: (case, group) -> Operator, for a row at the level of the operator.
        model: (case, group, model, batch) -> Sharded, for a row at the level of a Hugging Face model.
        implementation: the attention a model is built with before the library takes it over.
        lacks: what the interface cannot express, by feature ("documents", "window", "sinks"), and why.
    """

    title: str
    package: str | None
    called: str
    operator: Callable[[Case, dist.ProcessGroup], Operator] | None = None
    model: Callable[[Case, dist.ProcessGroup, Any, dict[str, Tensor]], Sharded] | None = None
    implementation: str = "sdpa"
    lacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """Return "operator" or "model"."""
        return "operator" if self.operator is not None else "model"

    def missing(self, case: Case) -> str | None:
        """Return why a case cannot even be asked for, or None."""
        asked = {"documents": case.boundaries is not None, "window": case.window is not None, "sinks": case.sinks}
        return next((self.lacks[name] for name, wanted in asked.items() if wanted and name in self.lacks), None)
