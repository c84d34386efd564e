"""What a step cost: tokens a second, memory of each rank, bytes moved beside the bytes that had to be."""

from __future__ import annotations

import resource
import time
from collections import Counter
from typing import Any

import torch

from ringspan.configs.schema import Config
from ringspan.dist_attn import Documents, Mask, Plan, plan
from ringspan.dist_attn.layout import Layout
from ringspan.finetune.model import Trained, local_heads
from ringspan.launch.ranks import Place
from ringspan.parallel.boundaries import Packed, rows_of
from ringspan.parallel.context import SequenceContext


class Meter:
    """Counts over a run; rows are for the tracker, the summary for the report."""

    def __init__(self, config: Config, place: Place, trained: Trained, context: SequenceContext) -> None:
        self._place, self._context, self._trained = place, context, trained
        self._heads = local_heads(trained.base.config, place.sizes.tp)
        self._dtype = getattr(torch, config.model.dtype)
        self._steps = 0
        self._seconds = 0.0
        self._tokens = 0
        self._bound = torch.zeros(place.world, dtype=torch.float64)  # bytes each rank had to receive, over the run
        self._batches: list[tuple[tuple[int, ...], Layout]] = []  # the step's documents, a batch row each, and its cut
        self._seen = context.traffic.received_payload
        self._received = torch.zeros(place.world, dtype=torch.float64)
        self._peaks = [self.peak_gib(place)] * place.world

    def plan(self, packed: Packed, batch: int) -> None:
        """Note a micro-batch; what it costs is planned from the masks that its layers turn out to have."""
        self._batches += [(edges, packed.layout) for edges in rows_of(packed, batch)]

    def _costs(self) -> tuple[float, float]:
        """Return this rank's lower bound in bytes, and its live pairs, of the step's attention over all layers.

        The bound is the ring's, whose exact pieces meet it: K and V are needed twice (forward, backward), dK and dV
        once. Over all ranks dK and dV arrive as often as rows were needed; where they arrive is the plan's.
        """
        rank, bound, area = self._place.at("cp"), 0.0, 0.0
        for mask, layers in Counter(self._context.layer_masks.values()).items():
            for edges, layout in self._batches:
                each = self._planned(mask, edges, layout)
                gradients = each.received_bytes(rank, backward=True) - each.received_bytes(rank)
                bound += layers * (2 * each.lower_bound_bytes(rank) + gradients)
                area += layers * each.area(rank)
        self._batches = []
        return bound, area

    def _planned(self, mask: Mask, edges: tuple[int, ...], layout: Layout) -> Plan:
        return plan(
            mask if len(edges) == 2 else mask & Documents(edges),
            layout,
            world=self._place.sizes.cp,
            length=edges[-1],
            **self._heads._asdict(),
            dtype=self._dtype,
            gradient_dtype=self._context.gradient_dtype,
            first_kv_head=self._context.first_kv_head,
            total_kv_heads=self._context.total_kv_heads,
        )

    def row(self, began: float, data_time: float, tokens: int) -> dict[str, float]:
        """Return the step's numbers; every rank must call it. tokens: of all ranks' sequences."""
        received = self._context.traffic.received_payload - self._seen
        self._seen = self._context.traffic.received_payload
        mine = [received, self.peak_gib(self._place), *self._costs()]
        gathered = self._place.gather(torch.tensor(mine, dtype=torch.float64, device=self._place.device))
        received, self._peaks, bound, area = torch.stack(gathered, dim=1).tolist()
        seconds = time.monotonic() - began
        flops = self._flops(tokens, sum(area))
        if self._steps:  # the first step warms up
            self._seconds, self._tokens = self._seconds + seconds, self._tokens + tokens
        self._steps += 1
        self._bound += torch.tensor(bound, dtype=torch.float64)
        self._received += torch.tensor(received, dtype=torch.float64)
        row = {
            "perf/tokens_per_second": tokens / seconds,
            "perf/tokens_per_second_per_rank": tokens / seconds / self._place.world,
            "perf/tflops_per_rank": flops / seconds / self._place.world / 1e12,
            "perf/step_time": seconds,
            "perf/data_time": data_time,
            "perf/bytes_per_step": sum(received),
            "perf/bytes_lower_bound": sum(bound),
            "memory/peak_gib": max(self._peaks),
        }
        row |= {f"memory/peak_gib_rank{rank}": peak for rank, peak in enumerate(self._peaks)}
        return row

    def _flops(self, tokens: int, area: float) -> float:
        """Return model FLOPs of the step: 6 a parameter and token; 12 a live pair (of all layers), head and feature."""
        parameters, trainable = self._trained.counts()
        dense = tokens * (4 * parameters + 2 * trainable)
        return dense + 12.0 * area * self._heads.heads * self._heads.head_dim

    def summary(self) -> dict[str, Any]:
        """Return the run's averages for evaluation.json; nothing where no step was made."""
        steps = self._steps
        if not steps:
            return {}
        return {
            "bytes": {
                "received_per_step": [float(each) / steps for each in self._received],
                "lower_bound_per_step": [float(each) / steps for each in self._bound],
                "total_received_per_step": float(self._received.sum()) / steps,
                "total_lower_bound_per_step": float(self._bound.sum()) / steps,
                "unit": "bytes",
            },
            "memory": {"peak_gib": self._peaks},
            "throughput": {
                "tokens_per_second": self._tokens / self._seconds if self._seconds else None,
                "ranks": self._place.world,
            },
        }

    @staticmethod
    def peak_gib(place: Place) -> float:
        """Return this process's peak memory: the allocator's on a GPU, resident size on the CPU."""
        if place.device.type == "cuda":
            return torch.cuda.max_memory_allocated(place.device) / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
