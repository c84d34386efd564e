"""A Hugging Face causal LM with our attention plugged in: built, scaled, adapted, checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ringspan.finetune import rope as rope_scaling
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.faults import Fault
from ringspan.parallel.hf_attention import NAME


@dataclass(frozen=True)
class Lora:
    """LoRA as peft understands it."""

    r: int
    alpha: float
    dropout: float
    target_modules: str | Sequence[str]


@dataclass(frozen=True)
class Trained:
    """A model, and what it was before any mesh cut it: parameters by name, with their shape, and whether trained."""

    model: nn.Module
    base: PreTrainedModel
    rope: rope_scaling.Rope | None
    whole: Mapping[str, tuple[tuple[int, ...], bool]]

    def counts(self) -> tuple[int, int]:
        """Return (all parameters, trainable ones)."""
        sizes = [(prod(shape), trainable) for shape, trainable in self.whole.values()]
        return sum(n for n, _ in sizes), sum(n for n, trainable in sizes if trainable)

    def fingerprint(self) -> dict[str, Any]:
        """Return what a checkpoint must share with the model it is loaded into."""
        shapes = {name: list(shape) for name, (shape, _) in self.whole.items()}
        digest = hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:16]
        parameters = dict(getattr(self.base.config, "rope_parameters", None) or {})
        return {
            "model_type": self.base.config.model_type,
            "parameters": self.counts()[0],
            "trainable": self.counts()[1],
            "shapes": digest,
            "rope": {key: parameters[key] for key in sorted(parameters)},
        }


class Heads(NamedTuple):
    """A model as attention sees it: query heads, KV heads, features of a head."""

    heads: int
    kv_heads: int
    head_dim: int


def heads_of(hf_config: Any) -> Heads:
    """Return the heads of a transformers text config; what it leaves out follows from the rest."""
    heads = int(hf_config.num_attention_heads)
    kv_heads = int(getattr(hf_config, "num_key_value_heads", None) or heads)
    return Heads(heads, kv_heads, int(getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads))


def local_heads(hf_config: Any, tp: int) -> Heads:
    """Return the heads that one of ``tp`` tensor parallel ranks has."""
    whole = heads_of(hf_config)
    return Heads(whole.heads // tp, whole.kv_heads // tp, whole.head_dim)


def read_config(path: str | None, fields: Mapping[str, Any] | None, made_by: str | None = None) -> Any:
    """Return the transformers config of a model id or folder, or of given fields.

    Raises:
        Fault: if the folder is missing (naming ``made_by``), or the model type is unknown or no causal LM.
    """
    if fields is not None:
        kind = fields.get("model_type")
        if kind not in CONFIG_MAPPING:
            raise Fault(
                f"model.config: unknown model_type {kind!r}; it must be one that transformers knows, such as llama"
            )
        config = CONFIG_MAPPING[str(kind)](**{key: value for key, value in fields.items() if key != "model_type"})
    else:
        assert path is not None
        if (made_by or _is_local(path)) and not (Path(path) / "config.json").is_file():
            remedy = f"make it with: {made_by}" if made_by else "give a folder that holds config.json, or a model id"
            raise Fault(f"model.path: {path} is not there or holds no config.json; {remedy}")
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise Fault(f"model.path: {path} cannot be read: {_first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Fault(f"model: {config.model_type} is not a causal language model")
    return config


def read_tokenizer(path: str) -> Any:
    """Return the tokenizer of a folder or model id."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Fault(f"model.tokenizer: {path} cannot be read: {_first_line(error)}") from error


def build(
    config: Any,
    *,
    path: str | None,
    rope: rope_scaling.Rope | None = None,
    lora: Lora | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Trained:
    """Return the model with ringspan attention: weights from ``path``, or random from ``seed``; weights are fp32.

    Args:
        config: from ``read_config``; changed in place by ``rope``.

    Raises:
        Fault: if the weights cannot be read, the rope scaling is not live, or logits are not head(hidden states).
    """
    if rope is not None:
        rope_scaling.apply(config, rope)
    torch.manual_seed(seed)
    if path is None:
        base = AutoModelForCausalLM.from_config(
            config, attn_implementation=NAME, dtype=torch.float32, trust_remote_code=False
        )
    else:
        try:
            base = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                attn_implementation=NAME,
                dtype=torch.float32,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except (OSError, ValueError) as error:
            raise Fault(f"model.path: {path} cannot be loaded: {_first_line(error)}") from error
    if rope is not None:
        rope_scaling.check(base, rope)
    _check_head(base)
    if device is not None:
        base.to(device)  # pyright: ignore[reportArgumentType]
    model: nn.Module = base if lora is None else _adapt(base, lora, seed)
    return Trained(model, base, rope, {n: (tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()})


def _adapt(base: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    targets = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    torch.manual_seed(seed)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] - peft only divides it by r
        lora_dropout=lora.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, settings)  # pyright: ignore[reportReturnType]
    except ValueError as error:
        raise Fault(f"lora.target_modules: {_first_line(error)}") from error


@torch.no_grad()
def _check_head(base: PreTrainedModel) -> None:
    """The loss runs the head on chunks of hidden states; refuse a model whose logits are anything else."""
    kind, head = base.config.model_type, base.get_output_embeddings()
    if head is None:
        raise Fault(f"model: {kind} has no output head")
    ids = torch.arange(8)[None] % base.config.vocab_size
    context = SequenceContext()
    base.eval()
    local = context.shard({"input_ids": ids.to(base.device)})
    logits = base(**local, **context.kwargs()).logits
    hidden = base.base_model(**local, **context.kwargs()).last_hidden_state
    if not torch.allclose(logits, head(hidden), rtol=1e-4, atol=1e-5):
        raise Fault(
            f"model: {kind} changes its logits after the output head (soft-capping or scaling), which the chunked loss "
            "cannot follow; this model type is not supported"
        )
    base.train()


def _is_local(path: str) -> bool:
    """A path with a leading dot or slash, an existing one, or one of more than two parts is no model id."""
    return path.startswith((".", "/", "~")) or Path(path).exists() or path.count("/") != 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
