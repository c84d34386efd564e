"""The trained model as a Hugging Face folder that stock transformers loads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ringspan.finetune.export_weights import Part, index, write
from ringspan.finetune.publish import check_space, failure, put, remove, sync_tree
from ringspan.parallel.faults import Fault

REMEDY = "move train.output_dir to a larger disk"


class Export:
    """An export that appears whole or not at all, written by several ranks.

    The caller lets them agree in between: ``prepare`` on one, ``write`` on all, ``publish`` on one.

    Args:
        model: a transformers model, or one wrapped by peft; it does not change.
        folder: an older export there is replaced at the end.

    Raises:
        TypeError: for another kind of model.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore[reportCallIssue]
        if not isinstance(base, PreTrainedModel):
            raise TypeError(f"export takes a transformers model or a peft model, got {type(model).__name__}")
        self._base, self._tokenizer, self._folder = base, tokenizer, folder
        self._hidden = folder.parent / f".{folder.name}.tmp"

    def prepare(self, needed: int) -> None:
        """Make the hidden folder; needed: bytes about to be written.

        Raises:
            Fault: no room, or the disk refuses.
        """
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.parent.glob(f".{self._folder.name}*.tmp"):
                remove(leftover)
            check_space(needed, shutil.disk_usage(self._folder.parent).free, self._folder, REMEDY)
            self._hidden.mkdir()
        except OSError as error:
            raise Fault(failure(error, self._folder, needed, REMEDY)) from error

    def write(self, modules: Iterable[tuple[str, nn.Module]], part: Part) -> None:
        """Write this rank's files of weights (safetensors, dtype kept), adapters merged; collective in its stage.

        Raises:
            Fault: the disk refuses; an older export stays.
        """
        write(modules, self._hidden, part, lambda error, size: Fault(failure(error, self._folder, size, REMEDY)))

    def publish(self) -> Path:
        """Write configs and tokenizer, and make the folder visible; return it.

        Raises:
            Fault: the disk refuses; an older export stays.
        """
        try:
            held = index(self._hidden)
            self._check_names(set(held))
            self._write_configs(set(held), next(iter(held.values())))
            sync_tree(self._hidden)
            put(self._hidden, self._folder)
        except OSError as error:
            raise Fault(failure(error, self._folder, 0, REMEDY)) from error
        finally:
            self.abandon()
        return self._folder

    def abandon(self) -> None:
        """Remove what was written and not published."""
        shutil.rmtree(self._hidden, ignore_errors=True)

    def _write_configs(self, names: set[str], dtype: torch.dtype) -> None:
        config = copy.deepcopy(self._base.config)
        config.dtype = dtype
        config.architectures = [type(self._base).__name__]
        # An adapter on one of two tied embeddings unties them, and both are there.
        config.tie_word_embeddings = bool(config.tie_word_embeddings) and bool(self._tied_names() - names)
        generation = _generation_config(self._base, self._tokenizer)
        config.bos_token_id, config.eos_token_id = generation.bos_token_id, generation.eos_token_id
        config.save_pretrained(self._hidden)
        generation.save_pretrained(self._hidden)
        self._tokenizer.save_pretrained(self._hidden)

    def _check_names(self, names: set[str]) -> None:
        """Raise if the weights are not what a fresh model has: an adapter left over, say."""
        with torch.device("meta"):
            expected = set(type(self._base)(copy.deepcopy(self._base.config)).state_dict())
        if names - expected or expected - names - self._tied_names():
            raise RuntimeError(f"weights of {type(self._base).__name__} that do not fit it: {expected ^ names}")

    def _tied_names(self) -> set[str]:
        return set(self._base.all_tied_weights_keys or {}) if self._base.config.tie_word_embeddings else set()


def export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Export a model that this process holds alone; return the folder.

    Raises:
        Fault: no room, or the disk refuses; an older export stays.
    """
    made = Export(model, tokenizer, folder)
    made.prepare(sum(parameter.nbytes for parameter in model.parameters()) + 2**24)
    try:
        made.write(model.named_modules(), Part())
        return made.publish()
    finally:
        made.abandon()


def _generation_config(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return the model's generation config with token ids that the tokenizer agrees to."""
    out = copy.deepcopy(base.generation_config) or GenerationConfig()
    # An id that is no special token is a config class's default: an ordinary word here.
    special = set(tokenizer.all_special_ids)
    if out.bos_token_id not in special:
        out.bos_token_id = tokenizer.bos_token_id
    if out.pad_token_id not in special:
        out.pad_token_id = tokenizer.pad_token_id
    ends = out.eos_token_id if isinstance(out.eos_token_id, list) else [out.eos_token_id]
    # Every document trained on ended with the tokenizer's, so generation stops there.
    if tokenizer.eos_token_id not in ends:
        out.eos_token_id = tokenizer.eos_token_id
    try:
        out.validate(strict=True)
    except ValueError:
        # Some are published with sampling settings and sampling off: loaded, but never saved.
        out.do_sample = True
    return out
