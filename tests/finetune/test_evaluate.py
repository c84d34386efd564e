"""Evaluation on ranks equals evaluation on one; buckets and pass keys mean what they say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ringspan.finetune.evaluate import (
    Judge,
    edges_up_to,
    held_out,
    loss_by_position,
    passkey_accuracy,
)
from ringspan.finetune.loss import ChunkedLoss
from ringspan.finetune.model import build, read_config
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.faults import Fault
from ringspan.parallel.mesh import Sizes, mesh_of
from ringspan.parallel.scorer import Direct, Scorer
from ringspan.parallel.testing import run_ranks

FIELDS: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
DOCUMENTS = [[(7 * i + j) % 128 for i in range(n)] for j, n in enumerate((150, 97, 2, 3))]
EDGES = [0, 64, 128, 150]


class Characters:
    """A tokenizer of single characters."""

    eos_token_id = None

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 128 for c in text]}


def model() -> Any:
    return build(read_config(None, FIELDS), path=None, seed=3).base


def judge(group: dist.ProcessGroup | None, dp: int = 1) -> Judge:
    """``dp`` groups of ranks share the examples, and the ranks of a group each example."""
    runner = Direct(Scorer(model(), ChunkedLoss(50)))
    if group is None or dp == 1:
        return Judge(runner, SequenceContext(group), torch.device("cpu"), group)
    mesh = mesh_of(Sizes(dp_shard=dp, cp=dist.get_world_size(group) // dp), "cpu")
    return Judge(runner, SequenceContext(mesh.context), torch.device("cpu"), group, share=(mesh.place["dp"], dp))


def by_position(group: dist.ProcessGroup | None, dp: int = 1) -> tuple[list[float], list[int]]:
    return loss_by_position(judge(group, dp), DOCUMENTS, EDGES)


def test_buckets_hold_the_loss_of_their_positions() -> None:
    stock = model()
    sums, counts = by_position(None)
    wanted, scored = [0.0] * 3, [0] * 3
    for document in DOCUMENTS:
        ids = torch.tensor(document)[None]
        with torch.no_grad():
            logits = stock(input_ids=ids, use_cache=False).logits[0]
        for i in range(len(document) - 1):
            bucket = 0 if i < 64 else 1 if i < 128 else 2
            wanted[bucket] += float(F.cross_entropy(logits[i], ids[0, i + 1]))
            scored[bucket] += 1
    assert counts == scored
    assert sums == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("dp", [1, 2])
def test_ranks_judge_like_one(dp: int) -> None:
    sums, counts = by_position(None)
    # Documents shorter than the world are among them, and fewer in the last turn than there are groups.
    for found_sums, found_counts in run_ranks(by_position, 4 if dp == 1 else 6, dp if dp == 1 else 3):
        assert found_counts == counts
        assert found_sums == pytest.approx(sums, rel=1e-5)


def keys(group: dist.ProcessGroup | None, knows: bool, dp: int = 1) -> list[list[float]]:
    one = judge(group, dp)
    return passkey_accuracy(
        replace(one, runner=_Oracle()) if knows else one,
        Characters(),
        lengths=[200, 230],
        depths=[0.0, 0.5, 1.0],
        trials=2,
        filler=list(range(97, 120)),
        seed=1,
    )


class _Oracle:
    """Runs a model that always knows the next token: reads it from the sequence; where a shard ends, from the label."""

    def backward(self, batches: Any, scale: float) -> torch.Tensor:
        raise NotImplementedError

    def losses(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = batch["input_ids"], batch["shift_labels"]
        follows = batch["position_ids"][:, 1:] == batch["position_ids"][:, :-1] + 1
        hits = torch.ones_like(labels, dtype=torch.bool)
        hits[:, :-1] = torch.where(follows, ids[:, 1:] == labels[:, :-1], True)
        return torch.zeros(labels.shape), hits


def test_passkeys_are_found_by_one_who_knows_and_missed_by_one_who_does_not() -> None:
    assert keys(None, knows=True) == [[1.0, 1.0]] * 3
    assert keys(None, knows=False) == [[0.0, 0.0]] * 3
    assert run_ranks(keys, 2, False) == [[[0.0, 0.0]] * 3] * 2


def test_held_out_prefers_documents_that_fill_the_length(tmp_path: Path) -> None:
    file = tmp_path / "h.jsonl"
    texts = ["a" * 5, "b" * 50, "c" * 8, "d" * 60, "e"]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert [len(d) for d in held_out(str(file), Characters(), length=20, count=2)] == [20, 20]
    assert [len(d) for d in held_out(str(file), Characters(), length=20, count=9)] == [20, 20, 8, 5]
    file.write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(Fault, match="no document of two tokens"):
        held_out(str(file), Characters(), length=20, count=2)


def test_edges_double_up_to_the_length() -> None:
    assert edges_up_to(512) == [0, 64, 128, 256, 512]
    assert edges_up_to(1000) == [0, 64, 128, 256, 512, 1000]
    assert edges_up_to(40) == [0, 40]


def test_groups_of_ranks_share_the_pass_keys() -> None:
    assert run_ranks(keys, 4, True, 2) == [[[1.0, 1.0]] * 3] * 4
    assert run_ranks(keys, 4, False, 2) == [[[0.0, 0.0]] * 3] * 4
