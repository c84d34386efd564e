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
    decoder.config = _config_of_some(parts.decoder.config, run, len(parts.layers))
    if not first:
        decoder.embed_tokens = None
    if not last:
        decoder.norm = nn.Identity()
    return decoder


def _config_of_some(config: Any, run: range, layers: int) -> Any:
    """Return a copy of a decoder's config whose lists by layer (``layer_types``, ``layer_rope_theta``) are of ``run``.

    The forward looks its n-th layer up there by n, and a stage counts from its own first layer.
    """
    config = copy.copy(config)
    by_layer = {name: value for name, value in vars(config).items() if "layer" in name and _has(value, layers)}
    config.num_hidden_layers = len(run)
    for name, value in by_layer.items():
        setattr(config, name, [value[index] for index in run])
    return config


def _has(value: Any, layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == layers


class _Mark(nn.Module):
    """Stands in for the last norm: what it does shows whether it was called once, and on what."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def check_decoder(model: nn.Module) -> None:
    """Check that a decoder does to hidden states nothing but its layers and the last norm.

    Some scale their inputs, or drop some out, whether these are embeddings or not (Granite): stages would each do it
    again, and train another model in silence. So the decoder's own forward is tried without layers.

    Raises:
        ValueError: names the model, what it does, and the remedy.
    """
    parts = parts_of(model)
    name = type(parts.base).__name__
    decoder: Any = _some_layers(parts, range(0), first=False, last=True)
    decoder.norm, decoder.training = _Mark(), True  # of this copy alone
    weight = next(parts.decoder.parameters())
    x = torch.linspace(-1, 1, 2 * int(parts.config.hidden_size), dtype=weight.dtype, device=weight.device)
    x = x.view(1, 2, -1)
    positions = torch.arange(2, device=weight.device)[None]
    try:
        with torch.no_grad():
            found = decoder(inputs_embeds=x, position_ids=positions, use_cache=False).last_hidden_state
    except Exception as error:  # whatever the model's code raises, it cannot be a stage
        words = " ".join(str(error).split())
        raise ValueError(
            f"model: {name}'s decoder does not run on hidden states alone, as a pipeline stage must "
            f"({type(error).__name__}: {words}); set pp to 1"
        ) from error
    if found.shape != x.shape or not torch.equal(found, x + 1):
        raise ValueError(
            f"model: {name}'s decoder changes hidden states outside of its layers and last norm, which every pipeline "
            "stage would do again; set pp to 1"
        )
