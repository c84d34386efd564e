"""``ringspan verify`` passes what is right, and names what is wrong: planted faults are found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity_cases import SPARSE, Case

from ringspan.configs.schema import Config
from ringspan.finetune.model import read_tokenizer
from ringspan.kernels.mask import Causal
from ringspan.launch import build, engines
from ringspan.launch.ranks import Place
from ringspan.launch.verify import compare
from ringspan.parallel import context, hf_attention, scorer
from ringspan.parallel.mesh import mesh_of
from ringspan.parallel.testing import run_ranks

LENGTH = 131  # of a sequence of the cases
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_the_command_passes_a_mesh_that_is_right(tiny: Any) -> None:
    path = tiny.config(parallel={"cp": 2, "tp": 2}, attention={"mask": SPARSE})
    done = tiny.train(path, launcher=[sys.executable, "-m", "ringspan.launch.cli", "verify"])
    assert done.returncode == 0, done.stderr
    assert "verify: passed" in done.stdout
    assert "cp 2 x tp 2, fsdp; against one rank" in done.stdout
    assert not (tiny.folder / "run" / "metrics.jsonl").exists()
    # The same under torchrun; an unset dp_shard takes up the world.
    launched = tiny.train(tiny.config("two"), launcher=[*TORCHRUN, "-m", "ringspan.launch.verify"])
    assert launched.returncode == 0, launched.stderr
    assert "dp_shard 2, fsdp" in launched.stdout


def local_mean() -> None:
    plain = scorer.Scorer.forward

    def forward(self: Any, *, shift_labels: torch.Tensor, each: bool = False, **inputs: Any) -> Any:
        found: Any = plain(self, shift_labels=shift_labels, each=each, **inputs)
        whole = shift_labels.shape[1] == LENGTH  # the one rank's
        return found if whole else found / (shift_labels != -100).sum() * 50

    scorer.Scorer.forward = forward


def dropped_sinks() -> None:
    run = hf_attention.run
    hf_attention.run = lambda *args, **kwargs: run(*args, **{**kwargs, "sinks": None} if kwargs["group"] else kwargs)


def dropped_window() -> None:
    run = hf_attention.run
    hf_attention.run = lambda *args, **kwargs: run(*args, **{**kwargs, "mask": Causal()} if kwargs["group"] else kwargs)


def local_positions() -> None:
    shard = context.SequenceContext.shard

    def cut(self: Any, batch: Any) -> dict[str, Any]:
        local = shard(self, batch)
        return local if self.world == 1 else {**local, "position_ids": torch.arange(local["input_ids"].shape[1])[None]}

    context.SequenceContext.shard = cut


def planted(group: dist.ProcessGroup, config: Config, fault: Callable[[], None]) -> list[str]:
    """Plant a fault where several ranks compute; the one rank that they are held against is spared."""
    world = dist.get_world_size(group)
    mesh = mesh_of(engines.sizes(config, launched=False).resolved(world), "cpu")
    place = Place(dist.get_rank(group), world, torch.device("cpu"), group, mesh)
    fault()
    return compare(config, place, read_tokenizer(build.tokenizer_path(config))).faults("float32")


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (local_mean, "llama", "loss: "),
        (dropped_sinks, "gpt_oss", "gradient of model.layers.0.self_attn.sinks"),
        (dropped_window, "gpt_oss", "loss: "),
        (local_positions, "qwen3", "loss: "),
    ],
)
def test_a_planted_fault_is_found(
    fault: Callable[[], None], kind: str, words: str, tmp_path: Path, text_folder: Path
) -> None:
    config = Case("planted", {"cp": 2}, kind).config(tmp_path, text_folder)
    found = run_ranks(planted, 2, config, fault)
    assert found[0] == found[1]
    assert any(line.startswith(words) for line in found[0]), found[0]
    assert any(line.startswith("gradient of ") for line in found[0])


def test_the_command_fails_by_name(tiny: Any) -> None:
    """A rank that trains on other tokens than it should: exit 1, and the worst tensor is named."""
    script = tiny.folder / "planted.py"
    script.write_text(
        "import os, sys\nimport torch\nfrom ringspan.parallel import scorer\nplain = scorer.Scorer.forward\n"
        "def forward(self, *, shift_labels, each=False, **inputs):\n"
        "    return plain(self, shift_labels=shift_labels, each=each, **inputs) * 1.5\n"
        "if os.environ['RANK'] == '1':\n    scorer.Scorer.forward = forward\n"
        "from ringspan.launch.verify import main\nsys.exit(main())\n"
    )
    done = tiny.train(tiny.config(), "parallel.dp_shard=2", launcher=[*TORCHRUN, str(script)])
    assert done.returncode == 1
    assert "verify: FAILED, loss: " in done.stdout
    assert "DIFFERS         gradient of model." in done.stdout
