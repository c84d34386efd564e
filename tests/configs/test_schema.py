"""Every rule of the schema, by a config that breaks it and the line that tells so."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ringspan.configs.explain import sections
from ringspan.configs.fields import parse_size
from ringspan.configs.load import ConfigError, load
from ringspan.configs.schema import Config

SMALLEST: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"path": "d.jsonl", "seq_length": 4096},
    "train": {"max_steps": 10, "output_dir": "runs/x"},
}
FILE = "model: {path: m}\ndata: {path: d, seq_length: 4k}\ntrain: {max_steps: 10, output_dir: o}\n"


def faults_of(tmp_path, *overrides: str) -> list[str]:
    """Return what is wrong with the smallest config under overrides, without the sources."""
    file = tmp_path / "c.yaml"
    file.write_text(FILE)
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    return [fault.rpartition(" (")[0] for fault in caught.value.faults]


@pytest.mark.parametrize(
    ("given", "tokens"),
    [(1, 1), (4096, 4096), ("4096", 4096), ("128k", 131072), ("128K", 131072), ("1M", 1048576)]
    + [("1.5M", 1572864), ("0.5k", 512), (" 8 k ", 8192), ("10m", 10485760)],
)
def test_size(given: object, tokens: int) -> None:
    assert parse_size(given) == tokens


@pytest.mark.parametrize(
    "given",
    [0, -1, 1.5, True, None, "", "k", "-1k", "0", "0.3k", "1.5", "1G", "1kk", "1e3", [1], "9" * 400] + [2**63],
)
def test_size_refused(given: object) -> None:
    with pytest.raises(ValueError, match="must be a positive whole number of tokens, as 4096"):
        parse_size(given)


def test_defaults() -> None:
    config = Config.model_validate(SMALLEST)
    assert config.model.dtype == "float32"
    assert (config.data.format, config.data.overlong, config.data.packing) == (
        "auto",
        "split",
        True,
    )
    assert (config.train.learning_rate, config.train.loss_chunk) == (1e-4, 1024)
    assert (config.attention.strategy, config.attention.layout) == ("auto", "zigzag")
    assert config.rope is None
    assert config.lora is None
    assert (config.parallel.cp, config.parallel.timeout_s) == (1, 600)
    assert (config.checkpoint.every, config.checkpoint.keep) == (0, 2)
    assert config.track.wandb == "off"
    assert config.eval.passkey_lengths == []


def test_every_setting_says_what_it_is() -> None:
    silent = [
        f"{section}.{key}"
        for section, kind in sections().items()
        for key, field in kind.model_fields.items()
        if not field.description
    ]
    assert silent == []
    assert all(kind.__doc__ for kind in sections().values())


def test_frozen() -> None:
    config = Config.model_validate(SMALLEST)
    with pytest.raises(ValidationError, match="frozen"):
        config.train.max_steps = 3


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("train.max_steps=0", "train.max_steps: 0 must be >= 1"),
        ("train.max_steps=2.0", "train.max_steps: 2.0 must be a whole number"),
        ("train.max_steps=true", "train.max_steps: true must be a whole number"),
        ("train.max_steps=ten", 'train.max_steps: "ten" must be a whole number'),
        ("train.warmup_steps=-1", "train.warmup_steps: -1 must be >= 0"),
        ("train.learning_rate=0", "train.learning_rate: 0 must be > 0"),
        ("train.learning_rate=.inf", "train.learning_rate: Infinity must be a finite number"),
        ("train.learning_rate=nan", "train.learning_rate: NaN must be a finite number"),
        ("train.learning_rate=fast", 'train.learning_rate: "fast" must be a number'),
        ("train.learning_rate=true", "train.learning_rate: true must be a number"),
        ("train.min_lr_ratio=1.1", "train.min_lr_ratio: 1.1 must be <= 1"),
        ("train.adam_beta2=1", "train.adam_beta2: 1 must be < 1"),
        ("train.max_grad_norm=0", "train.max_grad_norm: 0 must be > 0"),
        ("train.weight_decay=-0.1", "train.weight_decay: -0.1 must be >= 0"),
        ("train.seed=-1", "train.seed: -1 must be >= 0"),
        ("train.output_dir=''", 'train.output_dir: "" must not be empty'),
        ("train.output_dir=7", "train.output_dir: 7 must be a text; put it in quotes"),
        ("model.dtype=float16", "model.dtype: \"float16\" must be 'float32' or 'bfloat16'"),
        ("data.packing=1", "data.packing: 1 must be true or false"),
        ("data.path=[]", "data.path: [] must be a text or a list of texts, none empty"),
        ("data.path=[a, 3]", "data.path: ['a', 3] must be a text or a list of texts, none empty"),
        ("data.shuffle_block=-1", "data.shuffle_block: -1 must be >= 0"),
        ("rope={type: linear, factor: 1}", "rope.factor: 1 must be > 1"),
        ("lora.r=0", "lora.r: 0 must be >= 1"),
        ("lora.dropout=1.0", "lora.dropout: 1.0 must be < 1"),
        ("parallel.cp=0", "parallel.cp: 0 must be a number of ranks, or -1 for what the world leaves"),
        ("parallel=4", "parallel: 4 must hold keys of its own"),
        ("checkpoint.keep=0", "checkpoint.keep: 0 must be >= 1"),
        ("track.log_every=0", "track.log_every: 0 must be >= 1"),
        ("eval.passkey_lengths=1k", 'eval.passkey_lengths: "1k" must be a list, as [512, 1k]'),
    ],
)
def test_one_line_for_a_bad_value(tmp_path, override: str, fault: str) -> None:
    assert faults_of(tmp_path, override) == [fault]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["model.path=null"],
            "model.path: neither it nor model.config given; exactly one is needed",
        ),
        (
            ["model.config={model_type: llama}", "model.tokenizer=t"],
            "model.path: both it and model.config given; exactly one is needed",
        ),
        (
            ["model.path=null", "model.config={model_type: llama}"],
            "model.tokenizer: missing; model.config comes without one",
        ),
        (
            ["model.path=null", "model.config={hidden_size: 8}", "model.tokenizer=t"],
            "model.config: must name its model_type, as llama",
        ),
        (["train.warmup_steps=11"], "train.warmup_steps: 11 must be <= train.max_steps=10"),
        (
            ["parallel.cp=4097"],
            "parallel.cp: 4097 must be <= data.seq_length=4096: the sequence has no token for each rank",
        ),
        (
            ["parallel.tp=-1", "parallel.dp_shard=-1"],
            "parallel.cp: -1 for dp_shard, tp; only one size may be left to the world",
        ),
        (
            ["parallel.cp=4", "parallel.ulysses=3"],
            "parallel.ulysses: 3 does not divide cp=4 into rings of equal length",
        ),
        (
            ["attention.strategy=double_ring", "parallel.cp=4"],
            "attention.strategy: double_ring needs groups of close ranks; set parallel.ulysses to more than 1",
        ),
        (
            ["parallel.engine=deepspeed", "parallel.pp=2"],
            "parallel.engine: deepspeed does not compose with pp=2; use engine=fsdp, or pp=1 and tp=1 with more "
            "dp_shard or cp",
        ),
        (
            ["parallel.engine=deepspeed", "parallel.dp_replicate=2"],
            "parallel.engine: deepspeed shards over all data parallel ranks, dp_replicate=2 would not; give dp_shard",
        ),
        (
            ["parallel.deepspeed=ds.json"],
            "parallel.deepspeed: given, but parallel.engine=fsdp; set parallel.engine=deepspeed, or leave it out",
        ),
        (
            ["parallel.engine=deepspeed", "parallel.cpu_offload=true"],
            "parallel.cpu_offload: true is FSDP2's; DeepSpeed's is zero_optimization.offload_optimizer in "
            "parallel.deepspeed",
        ),
        (["eval.every=5"], "eval.every: 5 needs eval.path; set it, or eval.every=0"),
        (["eval.before=true"], "eval.before: true needs eval.path; set it, or eval.before=false"),
        (
            ["eval.passkey_lengths=[1k]"],
            "eval.passkey_lengths: [1024] needs eval.path, whose text hides the keys",
        ),
        (
            ["eval.passkey_lengths=[1k, 8k]", "eval.path=h"],
            "eval.passkey_lengths: 8192 must be <= data.seq_length=4096",
        ),
    ],
)
def test_one_line_for_values_that_contradict_each_other(tmp_path, overrides: list[str], fault: str) -> None:
    assert faults_of(tmp_path, *overrides) == [fault]


def test_rules_between_fields_hold_without_a_file() -> None:
    with pytest.raises(ValidationError, match="train.warmup_steps: 11 must be <= train.max_steps"):
        Config.model_validate({**SMALLEST, "train": {**SMALLEST["train"], "warmup_steps": 11}})


@pytest.mark.parametrize("edge", ["train.warmup_steps=10", "parallel.cp=4096", "train.seed=0"])
def test_edges_are_allowed(tmp_path, edge: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(FILE)
    load(file, [edge])
