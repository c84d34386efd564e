"""What DeepSpeed is told: the user's config with ``auto`` filled in, or one line that says what contradicts ours."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ringspan.parallel.faults import Fault

AUTO = "auto"
# Sections that would do what is done here already, or in another way.
_REFUSED = {
    "optimizer": "the optimizer is AdamW with train.learning_rate, adam_beta1, adam_beta2 and weight_decay",
    "scheduler": "the schedule is train.warmup_steps and min_lr_ratio",
    "fp16": "weights are float32; set model.dtype=bfloat16 to compute in it",
    "amp": "weights are float32; set model.dtype=bfloat16 to compute in it",
    "bf16": "weights, gradients and optimizer state are float32; set model.dtype=bfloat16 to compute in it",
    "torch_autocast": "set model.dtype=bfloat16",
    "pipeline": "ZeRO does not compose with pipeline stages here; use parallel.engine=fsdp and parallel.pp",
    "tensor_parallel": "ZeRO does not compose with tensor parallelism here; use parallel.engine=fsdp and parallel.tp",
    "sequence_parallel_size": "ranks that share a sequence are parallel.cp",
    "data_efficiency": "the data are read by data.path",
    "curriculum_learning": "the data are read by data.path",
    "activation_checkpointing": "set train.activation_checkpointing",
    "gradient_accumulation_dtype": "gradients are summed in float32",
    "prescale_gradients": "gradients are summed, never averaged",
    "gradient_predivide_factor": "gradients are summed, never averaged",
    "communication_data_type": "gradients are summed in float32",
    "zero_allow_untested_optimizer": "it is set as torch's AdamW needs it",
}
LARGEST_STAGE = 3  # the one that shards parameters, too


def read(given: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a ds_config: from a JSON file, or as it is given inline; None is an empty one.

    Raises:
        Fault: the file is missing or not a JSON object.
    """
    if given is None:
        return {}
    if not isinstance(given, str):
        return copy.deepcopy(dict(given))
    path = Path(given)
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Fault(f"parallel.deepspeed: {path} cannot be read: {error.strerror}; give a JSON file") from error
    except ValueError as error:
        raise Fault(f"parallel.deepspeed: {path} is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise Fault(f"parallel.deepspeed: {path} holds a {type(body).__name__}, not an object of settings")
    return body


def resolve(
    given: Mapping[str, Any], *, micro_batch: int, micro_batches: int, ranks: int, max_norm: float
) -> dict[str, Any]:
    """Return the ds_config that runs.

    Args:
        given: the user's; ``auto`` and what is absent is filled in, the rest passed through.
        micro_batch: sequences of a micro-batch, train.batch_size.
        micro_batches: of a step, train.gradient_accumulation_steps.
        ranks: of data and sequence together; to DeepSpeed each of them is a data parallel rank, and its batch size
            counts a shard of a sequence like a sequence.
        max_norm: train.max_grad_norm.

    Raises:
        Fault: for a key that contradicts our settings, or that does what is done here already.
    """
    out = copy.deepcopy(dict(given))
    for name, why in _REFUSED.items():
        if _says_something(name, out.pop(name, None)):
            raise Fault(f"parallel.deepspeed: {name} is set, but {why}; leave {name} out")
    ours: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (micro_batch, "train.batch_size"),
        "gradient_accumulation_steps": (micro_batches, "train.gradient_accumulation_steps"),
        "gradient_clipping": (max_norm, "train.max_grad_norm"),
    }
    batch = micro_batch * micro_batches * ranks
    if out.pop("train_batch_size", AUTO) not in (AUTO, batch):
        raise Fault(
            f"parallel.deepspeed: train_batch_size is {given['train_batch_size']}, but train.batch_size {micro_batch} "
            f"x gradient_accumulation_steps {micro_batches} x {ranks} ranks = {batch}; write auto, or leave it out"
        )
    for name, (value, setting) in ours.items():
        if (theirs := out.get(name, AUTO)) not in (AUTO, value):
            raise Fault(
                f"parallel.deepspeed: {name} is {theirs!r}, but {setting} is {value!r}; make them equal, or write auto"
            )
        out[name] = value
    out["zero_optimization"] = _zero(out.get("zero_optimization"))
    out.setdefault("steps_per_print", 10**9)  # progress is shown by the caller
    out["zero_allow_untested_optimizer"] = True
    return out


def _says_something(name: str, value: Any) -> bool:
    """Whether a section is more than absent, switched off, or left to us."""
    if value is None or value == AUTO:
        return False
    if not isinstance(value, Mapping):
        return True
    if name == "optimizer" and value.get("type") == "AdamW":  # as other trainers write it: ours, its numbers auto
        return any(number != AUTO for number in value.get("params", {}).values())
    return value.get("enabled", True) not in (False, AUTO)


def _zero(given: Any) -> dict[str, Any]:
    if given is None or given == AUTO:
        return {"stage": 2}
    if not isinstance(given, Mapping):
        raise Fault(f"parallel.deepspeed: zero_optimization is {given!r}; it must hold keys, as stage")
    # What is left of auto follows from the model in other trainers; DeepSpeed's own defaults serve.
    out = {key: value for key, value in given.items() if value != AUTO}
    stage = out.setdefault("stage", 2)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 1 <= stage <= LARGEST_STAGE:
        raise Fault(
            f"parallel.deepspeed: zero_optimization.stage is {stage!r}; give 1, 2 or {LARGEST_STAGE} "
            "(without sharding: parallel.engine=fsdp)"
        )
    return out
