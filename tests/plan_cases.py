"""A tiny run to plan for, its plan as JSON, and the library's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from ringspan.dist_attn import Mask, Plan, ZigZag
from ringspan.dist_attn import plan as planned
from ringspan.launch.cli import main

MODEL: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "sliding_window": 100,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}
LENGTH = 1024
EDGES = [0, 100, 300, 301, 1024]


def write_config(folder: Path) -> Path:
    """A run whose text and tokenizer are not there: a plan needs neither."""
    sections = {
        "model": {"config": MODEL, "tokenizer": "nowhere"},
        "data": {"path": "nowhere.jsonl", "seq_length": LENGTH},
        "train": {"max_steps": 1, "output_dir": str(folder / "run")},
        "parallel": {"cp": 4},
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(sections))
    (folder / "lengths.txt").write_text("100\n200\n1\n1k\n")
    return path


def told(config: Path, *arguments: str) -> dict[str, Any]:
    """Return the JSON of a plan."""
    file = config.parent / "plan.json"
    assert main(["plan", str(config), "--json", str(file), *arguments]) == 0
    return json.loads(file.read_text())


def reckoned(mask: Mask, world: int | tuple[int, int], **changed: Any) -> Plan:
    values: dict[str, Any] = {
        "length": LENGTH, "heads": 8, "kv_heads": 4, "head_dim": 16, "dtype": torch.float32, "strategy": "auto",
    }  # fmt: skip
    return planned(mask, ZigZag(), world=world, **values | changed)
