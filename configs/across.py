"""Rules between fields of a config, as plain functions of the values they need.

They stand apart from the sections so that a file with other faults is still checked by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Across(NamedTuple):
    """A fault between fields: the key it is told under, and what is wrong."""

    key: str
    text: str


def across(values: Mapping[str, Any]) -> list[Across]:
    """Return the faults between fields; a rule is skipped where a value that it needs is absent.

    Args:
        values: the fields that are right by themselves, by ``section.key``.
    """
    return [
        Across(needs[0], text)
        for rule, *needs in ACROSS
        if all(key in values for key in needs) and (text := rule(*(values[key] for key in needs)))
    ]


def _one_model(path: str | None, config: dict[str, Any] | None) -> str | None:
    if (path is None) == (config is None):
        found = "neither it nor" if path is None else "both it and"
        return f"{found} model.config given; exactly one is needed"
    return None


def _typed(config: dict[str, Any] | None) -> str | None:
    return "must name its model_type, as llama" if config is not None and "model_type" not in config else None


def _tokenizer(tokenizer: str | None, config: dict[str, Any] | None) -> str | None:
    return "missing; model.config comes without one" if config is not None and tokenizer is None else None


def _warmup(warmup: int, steps: int) -> str | None:
    return f"{warmup} must be <= train.max_steps={steps}" if warmup > steps else None


def _ranks(cp: int, length: int) -> str | None:
    if cp > length:
        return f"{cp} must be <= data.seq_length={length}: the sequence has no token for each rank"
    return None


def _every(every: int, path: object) -> str | None:
    return f"{every} needs eval.path; set it, or eval.every=0" if every and path is None else None


def _before(before: bool, path: object) -> str | None:
    return "true needs eval.path; set it, or eval.before=false" if before and path is None else None


def _passkeys(lengths: list[int], path: object) -> str | None:
    return f"{lengths} needs eval.path, whose text hides the keys" if lengths and path is None else None


def _passkey_fits(lengths: list[int], length: int) -> str | None:
    long = [one for one in lengths if one > length]
    return f"{', '.join(map(str, long))} must be <= data.seq_length={length}" if long else None


def _one_free(cp: int, shard: int | None, replicate: int, tp: int, pp: int) -> str | None:
    names = {"cp": cp, "dp_shard": shard, "dp_replicate": replicate, "tp": tp, "pp": pp}
    free = [name for name, size in names.items() if size == -1]
    return f"-1 for {', '.join(free)}; only one size may be left to the world" if len(free) > 1 else None


def _rings(ulysses: int, cp: int) -> str | None:
    return f"{ulysses} does not divide cp={cp} into rings of equal length" if cp > 0 and cp % ulysses else None


def _hybrid(strategy: str, ulysses: int) -> str | None:
    if strategy in ("double_ring", "ulysses_ring") and ulysses == 1:
        return f"{strategy} needs groups of close ranks; set parallel.ulysses to more than 1"
    return None


def _zero(engine: str, pp: int, tp: int) -> str | None:
    if engine == "deepspeed" and (pp, tp) != (1, 1):
        which = f"pp={pp}" if pp != 1 else f"tp={tp}"
        return f"deepspeed does not compose with {which}; use engine=fsdp, or pp=1 and tp=1 with more dp_shard or cp"
    return None


def _zero_copies(engine: str, replicate: int) -> str | None:
    if engine == "deepspeed" and replicate != 1:
        return f"deepspeed shards over all data parallel ranks, dp_replicate={replicate} would not; give dp_shard"
    return None


def _zero_config(config: object, engine: str) -> str | None:
    if config is not None and engine != "deepspeed":
        return f"given, but parallel.engine={engine}; set parallel.engine=deepspeed, or leave it out"
    return None


def _zero_offload(offload: bool, engine: str) -> str | None:
    if offload and engine == "deepspeed":
        return "true is FSDP2's; DeepSpeed's is zero_optimization.offload_optimizer in parallel.deepspeed"
    return None


ACROSS: tuple[tuple[Any, ...], ...] = (
    (_one_model, "model.path", "model.config"),
    (_typed, "model.config"),
    (_tokenizer, "model.tokenizer", "model.config"),
    (_warmup, "train.warmup_steps", "train.max_steps"),
    (_ranks, "parallel.cp", "data.seq_length"),
    (_every, "eval.every", "eval.path"),
    (_before, "eval.before", "eval.path"),
    (_passkeys, "eval.passkey_lengths", "eval.path"),
    (_one_free, "parallel.cp", "parallel.dp_shard", "parallel.dp_replicate", "parallel.tp", "parallel.pp"),
    (_rings, "parallel.ulysses", "parallel.cp"),
    (_hybrid, "attention.strategy", "parallel.ulysses"),
    (_zero, "parallel.engine", "parallel.pp", "parallel.tp"),
    (_zero_copies, "parallel.engine", "parallel.dp_replicate"),
    (_zero_config, "parallel.deepspeed", "parallel.engine"),
    (_zero_offload, "parallel.cpu_offload", "parallel.engine"),
    (_passkey_fits, "eval.passkey_lengths", "data.seq_length"),
)
