"""Files and overrides: what is read, what is refused, and how it is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.configs.load import ConfigError, dump, load
from ringspan.configs.schema import Config

ROOT = Path(__file__).parents[2]
GOOD = """\
model: {path: m}
data:
  path: d.jsonl
  seq_length: 128k
train:
  max_steps: 10
  learning_rate: 1e-3
  output_dir: runs/x
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "c.yaml"
    file.write_text(text)
    return file


def faults(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert all("\n" not in fault for fault in caught.value.faults)
    assert str(caught.value) == "\n".join(caught.value.faults)
    return caught.value.faults


def test_reads_sizes_and_numbers_without_a_dot(tmp_path) -> None:
    config = load(write(tmp_path, GOOD))
    assert config.data.seq_length == 131072
    assert config.train.learning_rate == 1e-3


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_the_configs_that_come_along_are_valid(file: Path) -> None:
    assert load(file)


def test_every_fault_at_once_with_its_place(tmp_path) -> None:
    file = write(
        tmp_path,
        "model: {pth: m}\ndata:\n  seq_length: 0.3k\nseq_lenght: 5\ntrain:\n  max_steps: 10\n  warmup_steps: 11\n",
    )
    assert faults(file, "lora.alpa=2", "rope", "train.adam_beta1=1") == (
        "override rope: must be section.key=value",
        f"model.pth: unknown key; did you mean model.path? ({file}:1)",
        f"data.path: missing; needed: file, folder or glob, or a list of them ({file}:2)",
        f'data.seq_length: "0.3k" must be a positive whole number of tokens, as 4096, 128k or 1.5M ({file}:3)',
        "train.adam_beta1: 1 must be < 1 (override train.adam_beta1=1)",
        f"train.output_dir: missing; needed: the run folder: config, metrics, checkpoints, export, report ({file}:5)",
        "lora.alpa: unknown key; did you mean lora.alpha? (override lora.alpa=2)",
        f"seq_lenght: unknown key; did you mean data.seq_length? ({file}:4)",
        f"model.path: neither it nor model.config given; exactly one is needed ({file}:1)",
        f"train.warmup_steps: 11 must be <= train.max_steps=10 ({file}:7)",
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.max_step=3", "train.max_step: unknown key; did you mean train.max_steps?"),
        ("train.seq_length=3", "train.seq_length: unknown key; did you mean data.seq_length?"),
        ("max_steps=3", "max_steps: unknown key; did you mean train.max_steps?"),
        ("trian.max_steps=3", "trian: unknown key; did you mean train?"),
        ("parallel.quux=3", "parallel.quux: unknown key; parallel has cp, ulysses, dp_shard, "),
        ("extends=base.yaml", "extends: unknown key; a config has model, data, train,"),
    ],
)
def test_unknown_key_is_told_with_the_nearest_name(tmp_path, override: str, told: str) -> None:
    (fault,) = faults(write(tmp_path, GOOD), override)
    assert fault.startswith(told)
    assert fault.endswith(f"(override {override})")


def test_an_empty_file_names_all_that_is_needed(tmp_path) -> None:
    keys = [fault.split(":")[0] for fault in faults(write(tmp_path, ""))]
    assert keys == [
        "data.path", "data.seq_length", "train.max_steps", "train.output_dir", "model.path",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("- 1\n- 2\n", "[1, 2] is no config; it holds sections, as model"),
        ("model:\n\tpath: x\n", "not plain YAML: found character '\\t' that cannot start"),
        ("model: [\n", "not plain YAML: expected the node content"),
        ("model: {path: x}\n---\nmodel: {}\n", "not plain YAML: but found another document"),
        (f"model: {'[' * 500}{']' * 500}\n", "nested too deeply"),
        ("model: {path: 2026-13-45}\n", "not plain YAML: month must be in 1..12"),
        ("model: &m {path: x}\ndata: *m\n", "not plain YAML: alias *m; write the value out"),
        ("model: {path: \x00}\n", "not plain YAML: "),
    ],
)
def test_what_is_no_plain_yaml_is_refused_in_one_line(tmp_path, text: str, told: str) -> None:
    file = write(tmp_path, text)
    (fault,) = faults(file)
    assert fault.startswith(str(file))
    assert told in fault


@pytest.mark.parametrize("where", ["file", "override"])
def test_python_tags_build_nothing(tmp_path, where: str) -> None:
    witness = tmp_path / "witness"
    tag = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{witness}]]"
    if where == "file":
        (fault,) = faults(write(tmp_path, f"model: {{path: m}}\ndata: {tag}\n"))
    else:
        (fault,) = faults(write(tmp_path, GOOD), f"model.path={tag}")
    assert "could not determine a constructor for the tag" in fault
    assert not witness.exists()


def test_a_key_stands_once_and_is_a_name(tmp_path) -> None:
    file = write(tmp_path, f"{GOOD}train: {{max_steps: 2}}\nlora: {{1: 2, r: 0}}\n")
    assert faults(file) == (
        f"train: given twice ({file}:5 and {file}:9)",
        f"train.max_steps: given twice ({file}:6 and {file}:9)",
        f"lora: a key must be a name ({file}:10)",
        f"train.output_dir: missing; needed: the run folder: config, metrics, checkpoints, export, report ({file}:8)",
        f"lora.r: 0 must be >= 1 ({file}:10)",
    )


def test_missing_file_is_told_with_the_nearest(tmp_path) -> None:
    write(tmp_path, GOOD)
    wrong = tmp_path / "d.yaml"
    assert faults(wrong) == (f"{wrong}: no such file; did you mean {tmp_path / 'c.yaml'}?",)
    lost = tmp_path / "no" / "c.yaml"
    assert faults(lost) == (f"{lost}: no such file",)
    assert faults(tmp_path) == (f"{tmp_path}: cannot be read: Is a directory",)


def test_a_file_that_is_no_text(tmp_path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(b"model: \xff\xfe\n")
    assert faults(file) == (f"{file}: not UTF-8 text at byte 7; a config is a YAML file",)


def test_overrides_lie_over_the_file(tmp_path) -> None:
    config = load(
        write(tmp_path, GOOD),
        [
            "train.max_steps=20",
            "train.max_steps=30",
            "data.path=[a, b]",
            "rope.type=yarn",
            "lora={r: 4}",
            "model.path=null",
            "model.config.model_type=llama",
            "model.config.hidden_size=64",
            "model.tokenizer=t=u",
            "track.wandb=off",
            "eval.path=h",
            "eval.passkey_lengths=[512, 1k]",
        ],
    )
    assert config.train.max_steps == 30
    assert config.data.path == ["a", "b"]
    assert config.rope is not None
    assert config.rope.type == "yarn"
    assert config.lora is not None
    assert (config.lora.r, config.lora.alpha) == (4, 16.0)
    assert config.model.config == {"model_type": "llama", "hidden_size": 64}
    assert config.model.tokenizer == "t=u"
    assert config.track.wandb == "off"
    assert config.eval.passkey_lengths == [512, 1024]


def test_an_override_takes_a_fault_of_the_file_away(tmp_path) -> None:
    file = write(tmp_path, GOOD.replace("max_steps: 10", "max_steps: 0"))
    assert load(file, ["train.max_steps=1"]).train.max_steps == 1


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.max_steps", "override train.max_steps: must be section.key=value"),
        (".max_steps=1", "override .max_steps=1: must be section.key=value"),
        ("=1", "override =1: must be section.key=value"),
        ("train.seed.x=1", "override train.seed.x=1: train.seed is 7, which has no keys"),
        ("train.seed={", "override train.seed={: not plain YAML: expected the node content"),
    ],
)
def test_an_override_that_cannot_be_laid(tmp_path, override: str, told: str) -> None:
    (fault,) = faults(write(tmp_path, f"{GOOD}  seed: 7\n"), override)
    assert fault.startswith(told)


def test_sections_may_be_null(tmp_path) -> None:
    config = load(write(tmp_path, f"{GOOD}track:\nlora:\n"))
    assert config.track.log_every == 1
    assert config.lora is None


_TEXT = st.text(min_size=1).filter(lambda text: text.isprintable())
_FINITE = st.floats(min_value=1e-300, max_value=1e300)


@settings(max_examples=40, deadline=None)
@given(
    path=st.one_of(_TEXT, st.lists(_TEXT, min_size=1)),
    rate=_FINITE,
    name=st.none() | _TEXT,
    wandb=st.sampled_from(["off", "auto", "offline", "online"]),
    fields=st.dictionaries(_TEXT, st.none() | st.booleans() | st.integers() | _TEXT),
)
def test_what_dump_writes_load_reads(tmp_path_factory, path, rate, name, wandb, fields) -> None:
    config = Config.model_validate(
        {
            "model": {"config": {**fields, "model_type": "llama"}, "tokenizer": "t"},
            "data": {"path": path, "seq_length": "8k"},
            "train": {"max_steps": 3, "output_dir": "o", "learning_rate": rate},
            "rope": {"type": "yarn", "target_length": "1M"},
            "track": {"wandb": wandb, "name": name},
        }
    )
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load(file) == config


def test_load_needs_no_torch(tmp_path) -> None:
    code = (
        "import sys; from ringspan.configs.load import load; load(sys.argv[1]); "
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(tmp_path, GOOD))],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
