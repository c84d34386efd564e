"""Bad input ends ``ringspan train`` in one clear line: code 2 before ranks start, code 1 later, printed once."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"path": "nowhere.jsonl", "made_by": "make text"}}, "nowhere.jsonl.*make it with: make text"),
        ({"data": {"path": "../x.jsonl", "root": "."}}, "outside"),
        ({"model": {"config": {"model_type": "lama"}}}, "unknown model_type 'lama'"),
        ({"model": {"path": "runs/none/here", "config": None}}, "model.path: runs/none/here is not there"),
        ({"model": {"tokenizer": "./none"}}, "model.tokenizer: ./none cannot be read"),
        (
            {"rope": {"type": "linear"}},
            "target length 100 is within the model's 128 positions; remove the rope section",
        ),
        ({"eval": {"path": "none.jsonl", "every": 1}}, "none.jsonl"),
        ({"parallel": {"cp": 200}}, "cp"),
        ({"attention": {"mask": "causal & windw(8)"}}, "attention.mask: .*windw.*window"),
        ({"attention": {"mask": "causal & __import__('os')"}}, "attention.mask: "),
        ({"attention": {"mask": "window(4, 2)"}}, r"attention.mask: .*later tokens.*causal & \(window\(4, 2\)\)"),
        ({"attention": {"mask": "causal & documents(0, 9)"}}, "attention.mask: .*"),
        ({"attention": {"mask": "per_head({(0, 3): causal})"}}, "attention.mask: .*3 KV heads.*has 2"),
        ({"train": {"output_dir": "/proc/here"}}, "train.output_dir: /proc/here cannot be written"),
    ],
)
def test_faults_before_any_rank(tiny: Any, sections: dict[str, Any], message: str) -> None:
    if sections.get("rope"):
        sections = {**sections, "data": {"seq_length": 100}}
    done = tiny.train(tiny.config(**sections))
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("ringspan")]
    assert len(lines) == len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, lines[0]), lines[0]
    assert done.stdout == ""


def test_a_world_that_the_config_contradicts(tiny: Any) -> None:
    path = tiny.config(parallel={"cp": 4})
    done = tiny.train(path, launcher=[*TORCHRUN, "-m", "ringspan.launch.train"])
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("ringspan: ")]
    assert said == [
        "ringspan: parallel: dp_shard: 2 ranks / (pp 1 x dp_replicate 1 x cp 4 x tp 1 = 4) is no whole number; "
        "change one of them"
    ]
    done = tiny.train(path, "parallel.dp_shard=1", launcher=[*TORCHRUN, "-m", "ringspan.launch.train"])
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("ringspan: ")]
    assert said == [
        "ringspan: parallel: pp 1 x dp_replicate 1 x dp_shard 1 x cp 4 x tp 1 = 4 ranks, but there are 2; start 4, or "
        "let one size be -1 to take the rest"
    ]


def test_ranks_with_different_configs_stop_before_anything_is_built(tiny: Any) -> None:
    path = tiny.config(parallel={"cp": 2})
    # Each rank of the launcher adds its own rank to the settings.
    script = tiny.folder / "rank.py"
    script.write_text(
        "import os, sys\nfrom ringspan.launch.train import main\n"
        "sys.exit(main([sys.argv[1], 'train.seed=' + os.environ['RANK']]))\n"
    )
    done = tiny.train(path, launcher=[*TORCHRUN, str(script)])
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("ringspan: ")]
    assert len(said) == 1, done.stderr
    assert "config" in said[0]
    assert not (tiny.folder / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallel": {"tp": 4}}, r"parallel\.tp: 4 ranks cannot share 2 KV heads: 2 / 4 is no whole number"),
        ({"parallel": {"pp": 3}}, r"parallel\.pp: 1f1b makes 3 stages, and 2 layers are too few"),
        ({"parallel": {"pp": 2, "schedule": "interleaved"}}, r"4 stages \(2 on each of 2 ranks\), and 2 layers"),
        (
            {"parallel": {"cp": 8, "ulysses": 8}, "attention": {"strategy": "ulysses"}},
            "attention.strategy: 'ulysses' cannot deal 4 query heads to 8 ranks",
        ),
        ({"parallel": {"dp_shard": -1}}, "a size of -1 takes what the world leaves, and without a GPU nothing says"),
        (
            {"parallel": {"engine": "deepspeed", "deepspeed": "none.json"}},
            "parallel.deepspeed: none.json cannot be read",
        ),
        (
            {"parallel": {"cp": 2, "engine": "deepspeed", "deepspeed": {"gradient_clipping": 0.5}}},
            "parallel.deepspeed: gradient_clipping is 0.5, but train.max_grad_norm is 1.0; make them equal",
        ),
        (
            {"parallel": {"cp": 2, "engine": "deepspeed", "deepspeed": {"optimizer": {"type": "Adam"}}}},
            "parallel.deepspeed: optimizer is set, but the optimizer is AdamW",
        ),
    ],
)
def test_meshes_and_engines_that_cannot_be(tiny: Any, sections: dict[str, Any], message: str) -> None:
    done = tiny.train(tiny.config(**sections))
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_a_broken_line_found_while_training_stops_all_ranks_once(tiny: Any) -> None:
    good = (tiny.text / "train.jsonl").read_text().splitlines()
    broken = tiny.folder / "broken.jsonl"
    broken.write_text("\n".join([*good[:1], '{"text": "cut off', *good[1:]]) + "\n")
    path = tiny.config(data={"path": str(broken)}, parallel={"cp": 2})
    done = tiny.train(path)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "broken.jsonl:2" in done.stderr
    skipped = tiny.config("skipped", data={"path": str(broken), "on_bad_line": "skip"}, parallel={"cp": 2})
    done = tiny.train(skipped)
    assert done.returncode == 0, done.stderr
    assert "bad_lines=1" in done.stdout


def test_a_checkpoint_of_another_model(tiny: Any) -> None:
    path = tiny.config()
    assert tiny.train(path).returncode == 0
    again = tiny.train(path, "--train.max_steps", "12", "--model.config.hidden_size", "64")
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1, again.stderr
    assert "another model" in again.stderr
    never = tiny.train(path, "--checkpoint.resume", "never")
    assert never.returncode == 2
    assert "checkpoint.resume: never, but" in never.stderr
    on = tiny.train(path, "--train.max_steps", "12")
    assert on.returncode == 0, on.stderr
    assert [row["step"] for row in tiny.metrics()] == list(range(1, 13))


def test_a_full_disk_at_save_keeps_what_was_saved(tiny: Any) -> None:
    """A real limit on file sizes: the log still fits, the second checkpoint does not."""
    path = tiny.config(checkpoint={"every": 4}, train={"max_steps": 4})
    assert tiny.train(path).returncode == 0
    # A shell's limit counts KiB blocks of 1024 bytes; weights take more than 64 KiB.
    limited = ["bash", "-c", 'ulimit -f 64; exec "$0" -m ringspan.launch.cli train "$@"', sys.executable]
    done = tiny.train(path, "--train.max_steps", "8", launcher=limited)
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    folder = tiny.folder / "run" / "checkpoints"
    assert (folder / "latest").read_text().strip() == "step-000004"
    assert sorted(p.name for p in folder.iterdir() if not p.name.startswith(".")) == ["latest", "step-000004"]
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]
    assert tiny.train(path, "--train.max_steps", "8").returncode == 0
    assert json.loads((tiny.folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 8
