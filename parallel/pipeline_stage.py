"""A pipeline stage: a Hugging Face decoder with some of its layers, whose own forward runs on hidden states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ringspan.parallel.parts import Parts, parts_of
from ringspan.parallel.scorer import Batch, Loss


class Stage(nn.Module):
    """Some layers of a decoder; the first stage has the embedding, the last the norm, the head and the loss.

    Args:
        model: the whole model; the stage takes its modules out of it.
        run: which layers.
        loss: scores the last hidden states.
        tokens: to which hidden states are padded on their way, since a schedule's messages have one size.
        share: how many of so many tokens a tensor parallel rank has between layers.
        dtype: in which hidden states travel.
    """

    def __init__(
        self, model: nn.Module, run: range, loss: Loss, *, tokens: int, share: Callable[[int], int], dtype: torch.dtype
    ) -> None:
        super().__init__()
        parts = parts_of(model)
        self.run, self.tied = run, parts.tied
        self.first, self.last = run.start == 0, run.stop == len(parts.layers)
        self._loss, self._tokens, self._share, self._dtype = loss, tokens, share, dtype
        names = {id(module): name for name, module in model.named_modules()}
        self._names = {"decoder": names[id(parts.decoder)], "head": names[id(parts.head)]}
        self._embedding = f"{names[id(parts.embed)]}.weight"
        self.decoder = _some_layers(parts, run, first=self.first, last=self.last)
        self.head = parts.head if self.last else None
        self.batches: Sequence[Batch] = ()  # of the step at work; and what its losses are multiplied by
        self.scale = 1.0

    def forward(self, x: Tensor | None, *, index: Tensor | None = None, judged: Batch | None = None) -> Any:
        """Run the step's micro-batch of this index, or one that is judged.

        Args:
            x: hidden states [B, tokens or fewer, E]; the first stage takes its token ids from the batch.

        Returns:
            Hidden states, of a step padded to ``tokens``; from the last stage the scaled loss, or ``Loss.each``.
        """
        batch = judged if judged is not None else self.batches[int(index)]  # pyright: ignore[reportArgumentType]
        hidden = self._hidden(x, batch)
        if self.last:
            assert self.head is not None, "the last stage has it"
            if judged is not None:
                return self._loss.each(hidden, self.head, batch["shift_labels"])
            return self._loss.total(hidden, self.head, batch["shift_labels"]) * self.scale
        return hidden if judged is not None else F.pad(hidden, (0, 0, 0, self._tokens - hidden.shape[1]))

    def received(self, batch: Batch) -> tuple[int, int]:
        """Return (sequences, tokens) of the hidden states that this stage works on."""
        sequences, tokens = batch["input_ids"].shape
        return sequences, self._share(tokens)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this stage's parameters under the whole model's names; a tied head under the embedding's."""
        for name, parameter in self.named_parameters():
            full = self._whole_name(name)
            tied = self.tied and full == f"{self._names['head']}.weight"
            yield (self._embedding if tied else full), parameter

    def named_parts(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield this stage's modules that have weights of their own, or adapters, under the whole model's names."""
        for name, module in self.named_modules():
            tied = self.tied and not self.first and (name == "head" or name.startswith("head."))
            if name and not tied:
                yield self._whole_name(name), module

    def _whole_name(self, name: str) -> str:
        part, _, rest = name.partition(".")
        if part == "decoder" and rest.startswith("layers."):
            _, index, *below = rest.split(".", 2)
            rest = ".".join(["layers", str(int(index) + self.run.start), *below])
        return f"{self._names[part]}.{rest}" if rest else self._names[part]

    @property
    def embedding(self) -> str:
        """The name of the embedding's weight in the whole model."""
        return self._embedding

    def _hidden(self, x: Tensor | None, batch: Batch) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name not in ("shift_labels", "input_ids")}
        if self.first:
            inputs["input_ids"] = batch["input_ids"]
        else:
            assert x is not None, "only the first stage starts from token ids"
            inputs["inputs_embeds"] = x[:, : self.received(batch)[1]]
        hidden = self.decoder(**inputs).last_hidden_state
        return hidden if self.last else hidden.to(self._dtype)


def _some_layers(parts: Parts, run: range, *, first: bool, last: bool) -> nn.Module:
    """Return a decoder with some layers of another, sharing its modules."""
    decoder: Any = copy.copy(parts.decoder)
    decoder._modules = dict(parts.decoder._modules)
    decoder.layers = nn.ModuleList(parts.layers[index] for index in run)
    # The forward looks up the kind of its n-th layer here.
    config: Any = copy.copy(parts.decoder.config)
    config.num_hidden_layers = len(run)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in run]
    decoder.config = config
    if not first:
        decoder.embed_tokens = None
    if not last:
        decoder.norm = nn.Identity()
    return decoder
