"""The same meshes under every launcher: ringspan train, torchrun, deepspeed; both engines lose alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2", "--module"]
MODULE = "ringspan.launch.train"
STEPS = {"train": {"max_steps": 4, "gradient_accumulation_steps": 2}}


def test_an_unset_dp_shard_takes_up_the_world_of_a_launcher_alone(tiny: Any) -> None:
    done = tiny.train(tiny.config("torchrun", **STEPS), launcher=[*TORCHRUN, "2", "-m", MODULE])
    assert done.returncode == 0, done.stderr
    assert "2 groups with sequences of their own (dp)" in done.stdout
    own = tiny.train(tiny.config("own", **STEPS), "--parallel.dp_shard", "2")
    assert own.returncode == 0, own.stderr
    assert tiny.losses("own") == tiny.losses("torchrun")
    one = tiny.train(tiny.config("one", **STEPS))
    assert one.returncode == 0, one.stderr
    assert "1: 1 share each sequence" in one.stdout
    two = tiny.train(tiny.config("two", **STEPS), "--parallel.tp", "2")
    assert two.returncode == 0, two.stderr
    assert "2 share each layer (tp)" in two.stdout
    assert tiny.losses("two") == pytest.approx(tiny.losses("one"), rel=1e-5)


@pytest.mark.needs("gxx")
def test_the_deepspeed_launcher_runs_either_engine(tiny: Any, extensions: None) -> None:
    """It hands each rank an argument --local_rank of its own."""
    zero = tiny.config("zero", parallel={"cp": 2, "engine": "deepspeed"}, **STEPS)
    done = tiny.train(zero, launcher=[*DEEPSPEED, MODULE])
    assert done.returncode == 0, done.stderr
    assert "parameters sharded over 2 by DeepSpeed ZeRO" in done.stdout
    fsdp = tiny.train(tiny.config("fsdp", parallel={"cp": 2}, **STEPS), launcher=[*DEEPSPEED, MODULE])
    assert fsdp.returncode == 0, fsdp.stderr
    assert "parameters sharded over 2 by FSDP2" in fsdp.stdout
    assert tiny.losses("zero") == pytest.approx(tiny.losses("fsdp"), rel=1e-5)
    # Both exports are whole.
    sizes = {(tiny.folder / name / "export" / "model.safetensors").stat().st_size for name in ("zero", "fsdp")}
    assert len(sizes) == 1


@pytest.mark.needs("gxx")
def test_a_ds_config_file_is_read(tiny: Any, extensions: None) -> None:
    (tiny.folder / "ds.json").write_text('{"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}')
    parallel = {"cp": 2, "engine": "deepspeed", "deepspeed": "ds.json"}
    done = tiny.train(tiny.config(parallel=parallel, checkpoint={"every": 2}, **STEPS))
    assert done.returncode == 0, done.stderr
    again = tiny.train(tiny.config(parallel={"cp": 2}), "--train.max_steps", "6", "train.gradient_accumulation_steps=2")
    assert again.returncode == 0, again.stderr
    assert "from step 4" in again.stdout
    assert "note: a step trained on" not in again.stdout
    more = tiny.train(tiny.config(parallel={"cp": 2}), "--train.max_steps", "7")
    assert more.returncode == 0, more.stderr
    assert "note: a step trained on 2 sequences until step 6, and on 1 from now on" in more.stdout
    assert len(tiny.losses()) == 7
