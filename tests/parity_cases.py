"""Meshes held against one rank: what each runs, and how. Shared by the tests and by docs/parallelism.md's table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ringspan.configs.load import load
from ringspan.configs.schema import Config
from ringspan.finetune.corpus import train_tokenizer
from ringspan.finetune.model import read_tokenizer
from ringspan.launch import build, engines
from ringspan.launch.meter import Meter
from ringspan.launch.ranks import Place
from ringspan.launch.state import State
from ringspan.launch.train import train_step
from ringspan.launch.verify import compare, one_rank
from ringspan.parallel.mesh import mesh_of

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
    "bos_token_id": None, "eos_token_id": 0, "initializer_range": 0.1,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": False},
    "gpt_oss": {
        **LLAMA, "model_type": "gpt_oss", "head_dim": 8, "sliding_window": 9, "num_local_experts": 2,
        "num_experts_per_tok": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
    },
}  # fmt: skip
SPARSE = "causal & (window(16) | sinks(4))"
STEPS = 10
WORDS = ["def", "return", "import", "class", "self", "value", "for", "while", "if", "else", "print", "range", "list"]


def write_text(folder: Path) -> Path:
    """Write twelve documents of about 600 characters, four held out, and a byte tokenizer; return the folder."""
    folder.mkdir(exist_ok=True)
    documents = [" ".join(WORDS[(i * i + j * (i + 3)) % len(WORDS)] for i in range(100 + 7 * j)) for j in range(16)]
    for name, part in (("train", documents[:12]), ("heldout", documents[12:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
    train_tokenizer(documents, 257).save_pretrained(folder / "tokenizer")
    return folder


@dataclass(frozen=True)
class Case:
    """One mesh, one model, and what else is in the config: ``section.key`` by value."""

    name: str
    parallel: dict[str, int]
    kind: str = "llama"
    settings: dict[str, Any] = field(default_factory=dict)
    full: bool = False  # left to make test-all

    @property
    def needs(self) -> str | None:
        """The system tool that it cannot do without: DeepSpeed compiles a part of itself."""
        return "gxx" if self.settings.get("parallel.engine") == "deepspeed" else None

    @property
    def world(self) -> int:
        """Ranks in all."""
        return prod(size for name, size in self.parallel.items() if name != "ulysses")

    def overrides(self, folder: Path, text: Path) -> list[str]:
        """Return the case as overrides of an empty config."""
        settings = {
            "model.config": KINDS[self.kind],
            "model.tokenizer": str(text / "tokenizer"),
            "data.path": str(text / "train.jsonl"),
            "data.seq_length": 131,
            "train.learning_rate": 1e-3,
            "train.max_steps": STEPS,
            "train.warmup_steps": 10,
            "train.gradient_accumulation_steps": 2,
            "train.loss_chunk": 50,
            "train.output_dir": str(folder / "run"),
            "attention.strategy": "ring",
            **{f"parallel.{name}": size for name, size in self.parallel.items()},
            **self.settings,
        }
        return [f"{key}={json.dumps(value)}" for key, value in settings.items()]

    def config(self, folder: Path, text: Path) -> Config:
        """Return the case's config."""
        empty = folder / "empty.yaml"
        empty.write_text("{}")
        return load(empty, self.overrides(folder, text))


def on_mesh(group: dist.ProcessGroup, config: Config) -> dict[str, Any]:
    """Run one rank: verify the first step, then train; return the worst errors and the losses."""
    world = dist.get_world_size(group)
    mesh = mesh_of(engines.sizes(config, launched=False).resolved(world), "cpu")
    place = Place(dist.get_rank(group), world, torch.device("cpu"), group, mesh)
    report = compare(config, place, read_tokenizer(build.tokenizer_path(config)))
    worst = max(report.gradients, key=lambda name: report.gradients[name])
    return {
        "faults": report.faults(config.model.dtype),
        "loss": report.loss,
        "norm": report.norm,
        "scored": report.scored,
        "gradients": len(report.gradients),
        "worst": (worst, report.gradients[worst]),
        "losses": losses(config, place),
    }


def losses(config: Config, place: Place) -> list[float]:
    """Train and return each step's loss."""
    state = State.start(config, place, read_tokenizer(build.tokenizer_path(config)), None)
    context = build.make_context(config, place)
    meter = Meter(config, place, state.trained, context)
    return [train_step(config, place, state, context, meter)["train/loss"] for _ in range(STEPS)]


def truth(config: Config, dp: int) -> list[float]:
    """Return the losses of one rank that trains on the sequences of all."""
    return losses(one_rank(config, dp), Place(0, 1, torch.device("cpu"), None))


CP = {"attention.mask": SPARSE}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """Return the settings of a ZeRO stage."""
    return {
        "parallel.engine": "deepspeed",
        "parallel.deepspeed": {"zero_optimization": {"stage": stage}, "gradient_clipping": "auto"},
        **settings,
    }


CASES = (
    Case("dp2", {"dp_shard": 2}, settings=CP),
    Case("dp_replicate2", {"dp_replicate": 2}),
    Case("cp2", {"cp": 2}, settings=CP),
    Case("tp2", {"tp": 2}, settings=CP),
    Case("pp2", {"pp": 2}, settings=CP),
    Case("pp2-interleaved", {"pp": 2}, settings={"parallel.schedule": "interleaved"}),
    Case(
        "pp2-gpipe-balanced",
        {"pp": 2, "cp": 2},
        "qwen3",
        {"parallel.schedule": "gpipe", "attention.layout": "balanced"},
    ),
    Case("pp2-zero_bubble", {"pp": 2}, "qwen3", {"parallel.schedule": "zero_bubble"}),
    Case("pp2-cp2-zero_bubble", {"pp": 2, "cp": 2}, "gpt_oss", {"parallel.schedule": "zero_bubble"}),
    Case("pp2-dp2-zero_bubble", {"pp": 2, "dp_shard": 2}, settings={"parallel.schedule": "zero_bubble", "lora.r": 4}),
    Case("dp2-cp2", {"dp_shard": 2, "cp": 2}, "gpt_oss"),
    Case("hsdp2-cp2", {"dp_replicate": 2, "cp": 2}, settings={"lora.r": 4, "train.activation_checkpointing": "full"}),
    Case("cp2-tp2", {"cp": 2, "tp": 2}, "gpt_oss", {"train.activation_checkpointing": "selective"}),
    Case("cp2-tp2-s2-lora", {"cp": 2, "tp": 2}, settings={"lora.r": 4, "attention.mask": "s2_attention(32)"}),
    Case("dp2-tp2", {"dp_shard": 2, "tp": 2}, "qwen3", {"train.mlp_tile": 20}),
    Case("pp2-cp2", {"pp": 2, "cp": 2}, "gpt_oss", {"train.activation_checkpointing": "selective"}),
    Case("pp2-cp2-lora", {"pp": 2, "cp": 2}, settings={"lora.r": 4, **CP}),
    Case("pp2-tp2", {"pp": 2, "tp": 2}),
    Case("cp4-ulysses2", {"cp": 4, "ulysses": 2}, settings={"attention.strategy": "ulysses_ring", **CP}),
    Case("cp4-double", {"cp": 4, "ulysses": 2}, "gpt_oss", {"attention.strategy": "double_ring"}),
    Case(
        "dp2-cp2-tp2", {"dp_shard": 2, "cp": 2, "tp": 2}, settings={"train.activation_checkpointing": "offload", **CP}
    ),
    Case("pp2-dp2-cp2", {"pp": 2, "dp_shard": 2, "cp": 2}, settings=CP),
    Case("zero1-cp2", {"cp": 2}, settings=zero(1, **CP)),
    Case("zero2-cp2", {"cp": 2}, "gpt_oss", zero(2)),
    Case("zero3-cp2", {"cp": 2}, settings=zero(3, **CP)),
    Case("zero1-dp2-cp2", {"dp_shard": 2, "cp": 2}, settings=zero(1), full=True),
    Case("zero2-dp2-cp2-lora", {"dp_shard": 2, "cp": 2}, settings=zero(2, **{"lora.r": 4, **CP})),
    Case(
        "zero3-dp2-cp2", {"dp_shard": 2, "cp": 2}, "qwen3", zero(3, **{"train.activation_checkpointing": "selective"})
    ),
    Case("dp2-host", {"dp_shard": 2}, settings={"parallel.cpu_offload": True}),
    Case("pp2-cp2-tp2", {"pp": 2, "cp": 2, "tp": 2}, "qwen3", full=True),
    Case("pp2-hsdp2-tp2", {"pp": 2, "dp_replicate": 2, "tp": 2}, "gpt_oss", full=True),
)


def product() -> tuple[Case, ...]:
    """Return every mesh with every model and with what changes its layers: the nightly run."""
    meshes = {
        "cp2": {"cp": 2},
        "cp4": {"cp": 4},
        "dp2-cp2": {"dp_shard": 2, "cp": 2},
        "cp2-tp2": {"cp": 2, "tp": 2},
        "pp2-cp2": {"pp": 2, "cp": 2},
        "pp2-dp2": {"pp": 2, "dp_shard": 2},
        "hsdp2-tp2": {"dp_replicate": 2, "tp": 2},
    }
    changes: dict[str, dict[str, Any]] = {
        "plain": {},
        "lora-full": {"lora.r": 4, "train.activation_checkpointing": "full"},
        "balanced-offload": {"attention.layout": "balanced", "train.activation_checkpointing": "offload"},
        "tiles-s2": {"train.mlp_tile": 33, "attention.mask": "s2_attention(32)"},
    }
    return tuple(
        Case(f"{mesh}-{kind}-{change}", sizes, kind, settings, full=True)
        for mesh, sizes in meshes.items()
        for kind in KINDS
        for change, settings in changes.items()
    )
