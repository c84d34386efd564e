"""``ringspan train`` end to end in child processes: ranks agree with one, resumes are exact, exports load elsewhere."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ringspan.finetune.shards import Reader

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_two_ranks_lose_like_one_and_torchrun_like_ringspan(tiny: Any) -> None:
    more = {"train": {"gradient_accumulation_steps": 2, "activation_checkpointing": True}}
    one, two, by_torchrun = (tiny.config(name, **more) for name in ("one", "two", "torchrun"))
    # Unequal documents and an odd length: a local mean, local positions or a lost token would show.
    assert tiny.train(one).returncode == 0
    done = tiny.train(two, "--parallel.cp", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    launched = tiny.train(by_torchrun, "parallel.cp=2", launcher=[*TORCHRUN, "-m", "ringspan.launch.train"])
    assert launched.returncode == 0, launched.stderr
    assert len(tiny.losses("one")) == 10
    # Two micro-batches of one sequence are one of two: divided by the scored tokens of the whole step.
    batch = tiny.config("batch", train={"batch_size": 2})
    assert tiny.train(batch).returncode == 0
    assert tiny.losses("batch") == pytest.approx(tiny.losses("one"), rel=1e-5)
    assert tiny.losses("two") == pytest.approx(tiny.losses("one"), rel=1e-5)
    assert tiny.losses("torchrun") == tiny.losses("two")
    assert tiny.losses("one")[-1] < tiny.losses("one")[0] - 0.5
    weights = [load_file(tiny.folder / name / "export" / "model.safetensors") for name in ("two", "torchrun")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    row = tiny.metrics("two")[-1]
    assert row["perf/bytes_per_step"] == row["perf/bytes_lower_bound"] > 0
    assert "step 10/10" in done.stdout
    assert "2 share each sequence (cp)" in done.stdout


def saved(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the whole weights of a checkpoint, whoever wrote them."""
    reader = Reader(run / "checkpoints" / f"step-{step:06d}")
    return {name: reader.whole(name) for name in reader.tensors if name.startswith("model/")}


def ranks_of(config: Path) -> list[str]:
    """Return the processes that run a config."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(config) in (folder / "cmdline").read_text() and "Z" not in (folder / "stat").read_text().split()[2]:
                found.append(folder.name)
    return found


def wait_for(path: Path, child: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.mark.parametrize("cp", [1, 2])
def test_a_killed_run_resumes_on_the_same_curve_bit_for_bit(tiny: Any, cp: int) -> None:
    settings = {
        "parallel": {"cp": cp},
        "checkpoint": {"every": 3},
        "train": {"max_steps": 12},
        "data": {"shuffle_block": 5},
        "lora": {"r": 4, "dropout": 0.1},
    }
    whole, broken = tiny.config("whole", **settings), tiny.config("broken", **settings)
    assert tiny.train(whole).returncode == 0
    child = tiny.start(broken)
    try:
        wait_for(tiny.folder / "broken" / "checkpoints" / "step-000006", child)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    # Ranks have sessions of their own, and end with who started them all the same.
    deadline = time.monotonic() + 30
    while left := ranks_of(broken):
        assert time.monotonic() < deadline, left
        time.sleep(0.01)
    assert len(tiny.metrics("broken")) < 12
    done = tiny.train(broken)
    assert done.returncode == 0, done.stderr
    assert "from step 0" not in done.stdout
    assert [row["step"] for row in tiny.metrics("broken")] == list(range(1, 13))
    assert tiny.losses("broken") == tiny.losses("whole")
    first, second = (saved(tiny.folder / name, 12) for name in ("whole", "broken"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_run_folder_and_the_export(tiny: Any) -> None:
    heldout = str(tiny.text / "heldout.jsonl")
    judged = {
        "path": heldout, "every": 5, "documents": 3, "before": True,
        "passkey_lengths": [130], "passkey_depths": 2, "passkey_trials": 1,
    }  # fmt: skip
    base = tiny.config("base")
    assert tiny.train(base).returncode == 0
    tuned = tiny.config(
        "tuned",
        model={"path": str(tiny.folder / "base" / "export"), "config": None, "tokenizer": None},
        data={"seq_length": 259},
        rope={"type": "yarn"},
        parallel={"cp": 2},
        eval=judged,
        lora={"r": 4},
        track={"wandb": "offline"},
    )
    done = tiny.train(tuned)
    assert done.returncode == 0, done.stderr
    folder = tiny.folder / "tuned"
    assert {p.name for p in folder.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "checkpoints", "export", "report.png", "evaluation.json", "wandb",
    }  # fmt: skip
    assert "yarn x2.02344 (128 -> 259 tokens)" in done.stdout
    evaluation = json.loads((folder / "evaluation.json").read_text())
    positions = evaluation["by_position"]
    assert len(positions["before"]) == len(positions["after"]) == len(positions["edges"]) - 1
    assert len(evaluation["passkey"]["after"]) == 2
    assert evaluation["bytes"]["total_received_per_step"] == evaluation["bytes"]["total_lower_bound_per_step"] > 0
    assert [row["step"] for row in tiny.metrics("tuned") if "eval/loss" in row] == [5, 10]
    stock = AutoModelForCausalLM.from_pretrained(folder / "export", attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    assert stock.config.rope_parameters["rope_type"] == "yarn"
    # The evaluation of the trained model through ours, on ranks, is what stock transformers finds in the export.
    total, count = 0.0, 0
    for line in (tiny.text / "heldout.jsonl").read_text().splitlines()[:3]:
        ids = torch.tensor(tokenizer(json.loads(line)["text"])["input_ids"][:259])[None]
        with torch.no_grad():
            logits = stock(input_ids=ids).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    sums = [loss * n for loss, n in zip(positions["after"], positions["tokens"], strict=True) if n]
    assert sum(positions["tokens"]) == count
    assert sum(sums) == pytest.approx(total, rel=1e-4)


def test_a_sparse_mask_trains_alike_on_two_ranks_and_moves_less(tiny: Any) -> None:
    masks = {"dense": None, "sparse": "causal & (window(16) | sinks(4))", "heads": "s2_attention(32)"}
    moved = {}
    for name, mask in masks.items():
        for cp in (1, 2):
            run = f"{name}{cp}"
            attention = {"layout": "contiguous", "strategy": "ring"} | ({"mask": mask} if mask else {})
            done = tiny.train(tiny.config(run, attention=attention, parallel={"cp": cp}))
            assert done.returncode == 0, done.stderr
            assert (mask or "as each layer declares it") in done.stdout
            if cp == 2:
                assert f"attention {mask or 'causal'}: ring: asked for" in done.stdout
        one, two = tiny.losses(f"{name}1"), tiny.losses(f"{name}2")
        assert max(abs(a - b) / b for a, b in zip(two, one, strict=True)) <= 1e-5
        rows = tiny.metrics(f"{name}2")
        assert all(row["perf/bytes_per_step"] == row["perf/bytes_lower_bound"] for row in rows)
        moved[name] = rows[0]["perf/bytes_per_step"]
    assert tiny.losses("sparse1") != tiny.losses("dense1")
    assert moved["sparse"] < moved["dense"] / 3
    assert moved["heads"] < moved["dense"] / 3


def test_auto_says_what_it_took_and_trains_alike(tiny: Any) -> None:
    done = tiny.train(tiny.config("auto", attention={"strategy": "auto"}, parallel={"cp": 2}))
    assert done.returncode == 0, done.stderr
    assert tiny.train(tiny.config("one")).returncode == 0
    assert max(abs(a - b) / b for a, b in zip(tiny.losses("auto"), tiny.losses("one"), strict=True)) <= 1e-5
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("attention causal: ")]
    assert "ms a layer" in line
    assert "typical figures of CPU ranks" in line


def test_bfloat16_trains(tiny: Any) -> None:
    done = tiny.train(tiny.config(model={"dtype": "bfloat16"}, parallel={"cp": 2}))
    assert done.returncode == 0, done.stderr
    assert tiny.losses()[-1] < tiny.losses()[0] - 0.5
    assert {tensor.dtype for tensor in saved(tiny.folder / "run", 10).values()} == {torch.float32}


def test_lora_trains_alike_on_two_ranks(tiny: Any) -> None:
    """Every adapter's gradient is summed over the ranks; the base stays as it was."""
    one, two = (tiny.config(name, lora={"r": 4}, train={"max_steps": 6}) for name in ("one", "two"))
    assert tiny.train(one).returncode == 0
    assert tiny.train(two, "--parallel.cp", "2").returncode == 0
    assert tiny.losses("two") == pytest.approx(tiny.losses("one"), rel=1e-5)
    adapters = [saved(tiny.folder / name, 6) for name in ("one", "two")]
    assert all("lora_" in key for key in adapters[0])
    for key, tensor in adapters[0].items():
        # An adapter whose gradient one rank lacked would drift by the size of Adam's steps.
        assert torch.allclose(adapters[1][key], tensor, rtol=0, atol=2e-3), key


@pytest.mark.needs("gxx")
def test_compiled_layers_lose_alike(tiny: Any) -> None:
    """Also with their activations computed anew, on two ranks."""
    steps = {"max_steps": 3}
    plain = tiny.train(tiny.config("plain", train=steps, parallel={"cp": 2}))
    assert plain.returncode == 0, plain.stderr
    more = {**steps, "compile": True, "activation_checkpointing": "selective"}
    done = tiny.train(tiny.config("compiled", train=more, parallel={"cp": 2}), timeout=400)
    assert done.returncode == 0, done.stderr
    assert tiny.losses("compiled") == pytest.approx(tiny.losses("plain"), rel=1e-5)


def test_parameters_gathered_in_bfloat16_train(tiny: Any) -> None:
    """Gradients and weights stay float32: the loss falls as without."""
    done = tiny.train(
        tiny.config(model={"dtype": "bfloat16"}, parallel={"dp_shard": 2, "gather_dtype": "bfloat16"}), timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert tiny.losses()[-1] < tiny.losses()[0] - 0.5
    assert {tensor.dtype for tensor in saved(tiny.folder / "run", 10).values()} == {torch.float32}
