"""Evaluation on ranks equals evaluation on one; buckets and pass keys mean what they say."""

import contextlib
import json
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
from ringspan.finetune.model import build, read_config
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.faults import Fault
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


def judge(group: dist.ProcessGroup | None) -> Judge:
    trained = build(read_config(None, FIELDS), path=None, seed=3)
    return Judge(trained, SequenceContext(group), torch.device("cpu"), contextlib.nullcontext, chunk=50)


def by_position(group: dist.ProcessGroup | None) -> tuple[list[float], list[int]]:
    return loss_by_position(judge(group), DOCUMENTS, EDGES)


def test_buckets_hold_the_loss_of_their_positions() -> None:
    model = judge(None).trained.base
    sums, counts = by_position(None)
    wanted, scored = [0.0] * 3, [0] * 3
    for document in DOCUMENTS:
        ids = torch.tensor(document)[None]
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0]
        for i in range(len(document) - 1):
            bucket = 0 if i < 64 else 1 if i < 128 else 2
            wanted[bucket] += float(F.cross_entropy(logits[i], ids[0, i + 1]))
            scored[bucket] += 1
    assert counts == scored
    assert sums == pytest.approx(wanted, rel=1e-5)


def test_ranks_judge_like_one() -> None:
    sums, counts = by_position(None)
    for found_sums, found_counts in run_ranks(by_position, 4):  # documents shorter than the world among them
        assert found_counts == counts
        assert found_sums == pytest.approx(sums, rel=1e-5)


def keys(group: dist.ProcessGroup | None, knows: bool) -> list[list[float]]:
    one = judge(group)
    if knows:  # a head that copies: hidden states are the next token's one-hot
        one = Judge(_Oracle(), one.context, one.device, one.autocast, one.chunk)  # pyright: ignore[reportArgumentType]
    return passkey_accuracy(
        one,
        Characters(),
        lengths=[200, 230],
        depths=[0.0, 0.5, 1.0],
        trials=2,
        filler=list(range(97, 120)),
        seed=1,
    )


class _Oracle:
    """Stands for a model that always knows the next token: reads it from the labels' own sequence."""

    def __init__(self) -> None:
        self.model = torch.nn.Identity()
        self.head = torch.nn.Identity()

    def decoder(self, input_ids: torch.Tensor, **_: object) -> Any:
        ids = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
        return type("Out", (), {"last_hidden_state": F.one_hot(ids, 128).float()})


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
