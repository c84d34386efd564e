"""The trained model as a Hugging Face folder that stock transformers loads.

Adapters are merged beside the live model, a layer at a time on a copy of that layer: adding and
subtracting floats in place would leave the model a little different, and training may go on.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ringspan.finetune.publish import new_folder


def export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """Write weights (safetensors, dtype kept), configs and tokenizer; return the folder.

    Args:
        model: a transformers model, or one wrapped by peft.get_peft_model; it does not change.
        tokenizer: saved beside it; its special tokens go into the generation config.
        folder: an older export there is replaced at the end.

    Raises:
        Fault: no room, or the disk refuses; an older export stays.
    """
    base, state = (model, model.state_dict()) if isinstance(model, PreTrainedModel) else _merged(model)
    _check_names(base, state)
    config = copy.deepcopy(base.config)
    config.dtype = base.dtype
    config.architectures = [type(base).__name__]
    config.tie_word_embeddings = _still_tied(base, state)
    generation = _generation_config(base, tokenizer)
    config.bos_token_id, config.eos_token_id = generation.bos_token_id, generation.eos_token_id
    needed = sum(t.nbytes for t in {t.data_ptr(): t for t in state.values()}.values()) + 2**24
    remedy = "move train.output_dir to a larger disk"
    leftovers = f".{folder.name}.*.tmp"
    with new_folder(folder, needed=needed, leftovers=leftovers, remedy=remedy) as temporary:
        base.save_pretrained(temporary, state_dict=state)
        # Over what save_pretrained wrote of the live model's.
        config.save_pretrained(temporary)
        generation.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return folder


def _merged(model: nn.Module) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Return the model inside peft's wrapper, and its state dict with the adapters merged."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(model, PeftModel):
        raise TypeError(f"export takes a transformers model or a peft model, got {type(model).__name__}")
    base: Any = model.get_base_model()
    state = base.state_dict()
    for prefix, module in base.named_modules(remove_duplicate=False):
        if isinstance(module, BaseTunerLayer):
            # The layer's own arithmetic, so that every kind of adapter is right.
            twin = copy.deepcopy(module)
            with torch.no_grad():
                twin.merge()
            plain = twin.get_base_layer()
        elif isinstance(module, ModulesToSaveWrapper):
            plain = module.modules_to_save[module.active_adapters[0]]
        else:
            continue
        for name in [name for name in state if name.startswith(f"{prefix}.")]:
            del state[name]
        state |= {f"{prefix}.{name}": tensor for name, tensor in plain.state_dict().items()}
    return base, state


def _check_names(base: PreTrainedModel, state: dict[str, Tensor]) -> None:
    """Raise if the state is not what a fresh model has: an adapter left over, say."""
    with torch.device("meta"):
        expected = set(type(base)(copy.deepcopy(base.config)).state_dict())
    if expected != set(state):
        raise RuntimeError(f"weights of {type(base).__name__} that do not fit it: {expected ^ set(state)}")


def _still_tied(base: PreTrainedModel, state: dict[str, Tensor]) -> bool:
    """Return whether both embeddings may be stored as one; an adapter on one unties them."""
    if not base.config.tie_word_embeddings:
        return False
    names = [name for pair in (base.all_tied_weights_keys or {}).items() for name in pair]
    return all(state[name].data_ptr() == state[names[0]].data_ptr() for name in names)


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
