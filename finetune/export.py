"""The trained model as a Hugging Face folder that stock transformers loads."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from ringspan.finetune.export_weights import Part, index, write
from ringspan.finetune.publish import check_space, failure, put, remove, sync_tree
from ringspan.parallel.data import whole
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
        self._fresh = _fresh(base)
        self._converted = _is_converted(self._fresh)

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

    def write(
        self, modules: Iterable[tuple[str, nn.Module]], part: Part, gather: Callable[[Tensor], Tensor] = whole
    ) -> None:
        """Write this rank's files of weights (safetensors, dtype kept), adapters merged; collective in its stage.

        Args:
            modules: this rank's, by name in the whole model.
            gather: returns all of a tensor of them, on every rank.

        Raises:
            Fault: the disk refuses; an older export stays.
        """

        def failed(error: Exception, size: int) -> Fault:
            return Fault(failure(error, self._folder, size, REMEDY))

        write(modules, self._hidden, part, failed, self._stored, gather)

    def publish(self) -> Path:
        """Write configs and tokenizer, and make the folder visible; return it.

        Raises:
            Fault: the disk refuses; an older export stays.
        """
        try:
            held = index(self._hidden)
            self._check(held)
            self._write_configs(set(held), next(iter(held.values())).dtype)
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

    def _check(self, held: Mapping[str, Tensor]) -> None:
        """Raise if the weights are not what a fresh model has: an adapter left over, say."""
        state = self._fresh.state_dict()
        wanted = {name: tensor.shape for name, tensor in self._stored(state).items()}
        tied = set(self._stored({name: state[name] for name in self._tied_names()}))
        found = {name: tensor.shape for name, tensor in held.items()}
        wrong = {name for name in wanted | found if wanted.get(name) != found.get(name)}
        if wrong - (tied - set(found)):
            raise RuntimeError(f"weights of {type(self._base).__name__} that do not fit it: {sorted(wrong)}")

    def _tied_names(self) -> set[str]:
        return set(self._base.all_tied_weights_keys or {}) if self._base.config.tie_word_embeddings else set()

    def _stored(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return revert_weight_conversion(self._fresh, dict(weights)) if self._converted else weights


def _fresh(base: PreTrainedModel) -> Any:
    """Return such a model without weights, which no mesh has cut."""
    with torch.device("meta"):
        out: Any = type(base)(copy.deepcopy(base.config))
    out._weight_conversions = getattr(base, "_weight_conversions", None)  # what was done when it was loaded
    return out


def _is_converted(fresh: Any) -> bool:
    """Whether files on the hub have other weights than the model, a mixture's experts one by one, say.

    Only where each weight of the model can be converted by itself. Transformers loads both, other programs the hub's.
    """
    state = fresh.state_dict()
    whole = {name: tensor.shape for name, tensor in revert_weight_conversion(fresh, dict(state)).items()}
    apart: dict[str, torch.Size] = {}
    for key, weight in state.items():
        apart |= {name: tensor.shape for name, tensor in revert_weight_conversion(fresh, {key: weight}).items()}
    return whole == apart and set(whole) != set(state)


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
