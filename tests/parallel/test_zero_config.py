"""What DeepSpeed is told: ``auto`` filled in, the rest passed through, contradictions refused naming both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ringspan.parallel.faults import Fault
from ringspan.parallel.zero_config import read, resolve

OURS: dict[str, Any] = {"micro_batch": 2, "micro_batches": 3, "ranks": 4, "max_norm": 0.5}


def test_auto_and_nothing_are_filled_in_alike() -> None:
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    auto: dict[str, Any] = dict.fromkeys((*names, "zero_optimization", "fp16"), "auto")
    adam = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"}}
    found = resolve({**auto, "bf16": {"enabled": "auto"}, "optimizer": adam}, **OURS)
    assert found == resolve({}, **OURS)
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 3
    assert found["gradient_clipping"] == 0.5  # DeepSpeed's own default is 1
    assert found["zero_optimization"] == {"stage": 2}
    assert "train_batch_size" not in found


def test_offload_and_other_keys_are_passed_through() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 1000, "stage3_prefetch": "auto"}
    found = resolve({"zero_optimization": zero, "wall_clock_breakdown": True, "train_batch_size": 24}, **OURS)
    assert found["zero_optimization"] == {key: value for key, value in zero.items() if value != "auto"}
    assert found["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, but train.max_grad_norm is 0.5; make them equal, or"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps is 1, but train.gradient_accumulation_steps"),
        ({"train_batch_size": 8}, r"train_batch_size is 8, but train.batch_size 2 x .* 3 x 4 ranks = 24"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is set, but the optimizer is AdamW with train.learning_rate"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler is set, but the schedule is train.warmup_steps"),
        ({"fp16": {"enabled": True}}, "fp16 is set, but weights are float32"),
        ({"bf16": {"enabled": True}}, "bf16 is set, but weights, gradients and optimizer state are float32"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size is set, but ranks that share a sequence are"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.1, "eps": "auto"}}}, "optimizer is set, but"),
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0; give 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage is True"),
        ({"zero_optimization": 2}, "zero_optimization is 2; it must hold keys, as stage"),
    ],
)
def test_contradictions_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Fault, match=message):
        resolve(given, **OURS)


def test_what_is_switched_off_is_no_contradiction() -> None:
    resolve({"fp16": {"enabled": False}, "bf16": {"enabled": False}, "optimizer": None}, **OURS)


def test_a_file_or_a_block(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert read(str(path)) == {"zero_optimization": {"stage": 1}}
    block = {"zero_optimization": {"stage": 1}}
    copied = read(block)
    copied["zero_optimization"]["stage"] = 3
    assert block["zero_optimization"]["stage"] == 1
    assert read(None) == {}
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list, not an object")):
        path.write_text(text)
        with pytest.raises(Fault, match=message):
            read(str(path))
    with pytest.raises(Fault, match="cannot be read: No such file"):
        read(str(tmp_path / "none.json"))
