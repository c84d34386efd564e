"""Pipeline parallelism: stages of a Hugging Face decoder, run by torch's schedules.

A stage is the model's own decoder with some of its layers: the model's forward runs as it is, on hidden states in place
of token ids. Hidden states are all that travels: tokens, positions and documents of each micro-batch are with every
stage already, for all stages of a rank of the sequence read the same batches. All ranks of a stage follow one schedule,
and so enter their exchanges in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    PipelineScheduleMulti,
    PipelineScheduleSingle,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from ringspan.parallel.data import local
from ringspan.parallel.parts import parts_of
from ringspan.parallel.pipeline_stage import Stage, check_decoder
from ringspan.parallel.scorer import Batch, Loss, reshard
from ringspan.parallel.stages import cut, layer_cost
from ringspan.parallel.tensor_moves import shares

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero_bubble": ScheduleInterleavedZeroBubble,
}
_VIRTUAL = {"interleaved": 2}  # stages on each rank; one for the other schedules
Prepare = Callable[[nn.Module, Sequence[nn.Module]], None]


def check_pipeline(layers: int, pp: int, schedule: str, micro_batches: int) -> None:
    """Check that a schedule can run.

    Raises:
        ValueError: names the argument, its value, the rule and the remedy.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule: {schedule!r} is not one of {', '.join(SCHEDULES)}")
    stages = pp * _VIRTUAL.get(schedule, 1)
    if stages > layers:
        each = f" ({_VIRTUAL[schedule]} on each of {pp} ranks)" if schedule in _VIRTUAL else ""
        raise ValueError(
            f"pp: {schedule} makes {stages} stages{each}, and {layers} layers are too few for them; lower pp"
            + (", or take schedule=1f1b" if each else "")
        )
    rounds = max(1, micro_batches // pp)
    if schedule in ("interleaved", "zero_bubble") and micro_batches % rounds:
        raise ValueError(
            f"schedule: {schedule} goes in {rounds} rounds ({micro_batches} micro-batches / pp {pp}), which do not "
            f"divide {micro_batches}; make gradient_accumulation_steps a multiple of {pp}"
        )


class Pipeline:
    """The runner of a model in pipeline stages; of ``model``'s layers this rank keeps its own.

    Args:
        model: a causal LM, the same on every rank, or tensor parallel already.
        mesh: the stages' ranks, 1-D.
        schedule: one of ``SCHEDULES``; 1f1b with fewer micro-batches than stages is gpipe.
        micro_batches: of a step.
        loss: scores the last hidden states.
        batch: sequences of a micro-batch.
        tokens: the most tokens of a sequence that this rank can have.
        length: of a whole sequence, to reckon what a layer costs.
        tp: tensor parallel ranks, and which of them this is; between layers they share the tokens.
        prepare: called with each stage of this rank and its layers, to shard, checkpoint or compile them. Under
            zero_bubble, what FSDP has gathered of a stage stays so for the whole step.

    Raises:
        ValueError: what the schedule or the model's decoder cannot do, see ``check_pipeline`` and ``check_decoder``.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        *,
        schedule: str,
        micro_batches: int,
        loss: Loss,
        batch: int,
        tokens: int,
        length: int,
        tp: tuple[int, int] = (1, 0),
        prepare: Prepare = lambda stage, layers: None,
    ) -> None:
        parts, rank, ranks = parts_of(model), mesh.get_local_rank(), mesh.size()
        check_pipeline(len(parts.layers), ranks, schedule, micro_batches)
        check_decoder(model)
        weight = next(parts.decoder.parameters())
        self._device, self._dtype, self._group = weight.device, weight.dtype, mesh.get_group()
        self._rank, self._ranks = rank, ranks
        self._micro_batches, self._batch, self._tokens = micro_batches, batch, tokens

        def share(count: int) -> int:
            return shares(count, tp[0])[tp[1]]

        runs = _runs(model, ranks * _VIRTUAL.get(schedule, 1), length)
        self._stages = len(runs)
        mine = range(rank, len(runs), ranks)
        options: dict[str, Any] = {"tokens": share(tokens), "share": share, "dtype": self._dtype}
        self.stages = {index: Stage(model, runs[index], loss, **options) for index in mine}
        self._width = int(parts.config.hidden_size)
        _forget_layers(model)
        for stage in self.stages.values():
            prepare(stage, list(stage.decoder.layers))  # pyright: ignore[reportArgumentType]
            if schedule == "zero_bubble":
                _keep_gathered(stage)
        self._schedule = self._scheduled(schedule, micro_batches, (batch, share(tokens)))
        holds_both = all(index in self.stages for index in (0, self._stages - 1))
        tied_last = next((s.embedding for s in self.stages.values() if s.last and s.tied), None)
        self.copies = frozenset() if tied_last is None or holds_both else frozenset({tied_last})

    def backward(self, batches: Sequence[Batch], scale: float) -> Tensor:
        """See ``Runner``; as many batches as ``micro_batches``.

        Raises:
            ValueError: for another number of batches, or one of another size than the pipeline was made for.
        """
        self._check(batches)
        for stage in self.stages.values():
            stage.batches, stage.scale = batches, scale
        index = torch.arange(len(batches))
        losses: list[Tensor] = []
        first = (index,) if 0 in self.stages else ()
        self._schedule.step(*first, index=index, target=index, losses=losses, return_outputs=False)
        for stage in self.stages.values():
            stage.batches = ()
        if not losses:
            return torch.zeros((), device=self._device)
        return torch.stack([loss.detach() for loss in losses]).sum()

    @torch.no_grad()
    def losses(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """See ``Runner``."""
        hidden: Any = None
        for index in range(self._stages):
            stage, holder = self.stages.get(index), index % self._ranks
            if stage is None:
                continue
            if index and (source := (index - 1) % self._ranks) != holder:
                hidden = torch.empty(*stage.received(batch), self._width, dtype=self._dtype, device=self._device)
                dist.recv(hidden, group=self._group, group_src=source)
            was_training = stage.training
            stage.eval()
            hidden = stage(hidden, judged=batch)
            stage.train(was_training)
            reshard(stage)
            if not stage.last and (target := (index + 1) % self._ranks) != holder:
                dist.send(hidden.contiguous(), group=self._group, group_dst=target)
        return hidden if self._stages - 1 in self.stages else None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this rank's parameters under the whole model's names."""
        for stage in self.stages.values():
            yield from stage.named_weights()

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield this rank's modules under the whole model's names; a tied head is left to the first stage."""
        for stage in self.stages.values():
            yield from stage.named_parts()

    def sum_tied(self) -> None:
        """Give both copies of a tied embedding the sum of their gradients, added in one order; once a step."""
        ends = {0: self.stages.get(0), self._stages - 1: self.stages.get(self._stages - 1)}
        held = {index: stage for index, stage in ends.items() if stage is not None and stage.tied}
        if len(held) != 1:  # this rank has neither, or one stage is both
            return
        ((index, stage),) = held.items()
        weight = dict(stage.named_weights())[stage.embedding]
        if not weight.requires_grad:
            return
        assert weight.grad is not None, "both ends of a tied embedding have a gradient"
        mine = local(weight.grad)
        other, peer = torch.empty_like(mine), (self._stages - 1 - index) % self._ranks
        sends = dist.P2POp(dist.isend, mine.contiguous(), group=self._group, group_peer=peer)
        receives = dist.P2POp(dist.irecv, other, group=self._group, group_peer=peer)
        for work in dist.batch_isend_irecv([sends, receives]):
            work.wait()
        mine.copy_(mine + other if index == 0 else other + mine)

    def _scheduled(self, name: str, micro_batches: int, shape: tuple[int, int]) -> Any:
        # Sizes are given, so that torch neither runs a stage to learn them nor sends them as pickles.
        travels = torch.empty(*shape, self._width, dtype=self._dtype, device="meta", requires_grad=True)
        number = torch.empty(1, dtype=torch.int64, device="meta")
        loss = torch.empty((), dtype=self._dtype, device="meta", requires_grad=True)
        stages: list[Any] = [
            PipelineStage(
                stage,
                index,
                self._stages,
                self._device,
                input_args=number if stage.first else travels,
                output_args=loss if stage.last else travels,
                group=self._group,
            )
            for index, stage in self.stages.items()
        ]
        kind = ScheduleGPipe if name == "1f1b" and micro_batches < self._stages else SCHEDULES[name]
        settings: dict[str, Any] = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
        if issubclass(kind, PipelineScheduleMulti):
            return kind(stages, micro_batches, **settings)
        assert issubclass(kind, PipelineScheduleSingle)
        return kind(stages[0], micro_batches, **settings)

    def _check(self, batches: Sequence[Batch]) -> None:
        if len(batches) != self._micro_batches:
            raise ValueError(f"batches: {len(batches)}, but the schedule is of micro_batches={self._micro_batches}")
        for number, batch in enumerate(batches):
            sequences, tokens = batch["input_ids"].shape
            if sequences != self._batch or tokens > self._tokens:
                raise ValueError(
                    f"batches: number {number} has {sequences} x {tokens} tokens, and what travels between stages "
                    f"holds {self._batch} x {self._tokens}; give the pipeline batch={sequences} and tokens of at "
                    f"least {tokens}"
                )


def _runs(model: nn.Module, stages: int, length: int) -> tuple[range, ...]:
    """Cut a model's layers by cost; the loss is the last stage's, the embedding costs about nothing."""
    parts = parts_of(model)
    config = parts.config
    heads = int(config.num_attention_heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    costs = [layer_cost(sum(p.numel() for p in layer.parameters()), heads, head_dim, length) for layer in parts.layers]
    return cut(costs, stages, last=float(config.vocab_size * config.hidden_size))


def _keep_gathered(stage: nn.Module) -> None:
    """Let FSDP keep a stage's parameters from the forward to the end of the step.

    A backward pass that is taken apart looks its weights up among the stage's parameters. Those given back meanwhile
    are no longer the ones that were computed with: torch finds nothing, and leaves them without gradients in silence.
    """
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False)


def _forget_layers(model: nn.Module) -> None:
    """Take layers, embedding and head out of the model, so that those of other ranks leave memory."""
    parts: Any = parts_of(model)
    for holder, name in ((parts.decoder, "layers"), (parts.decoder, "embed_tokens"), (parts.decoder, "norm")):
        setattr(holder, name, None)
    parts.base.set_output_embeddings(None)
