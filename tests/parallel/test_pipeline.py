"""Pipelines refuse what they cannot run; stages name their weights as the whole model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig

import ringspan.parallel.context  # noqa: F401 - registers "ringspan" with transformers
from ringspan.finetune.loss import ChunkedLoss
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.mesh import Sizes, mesh_of
from ringspan.parallel.pipeline import Pipeline, check_pipeline, lost_when_split
from ringspan.parallel.scorer import Direct, Scorer
from ringspan.parallel.testing import run_ranks

EDGES = ([0, 10, 11, 30, 45], [0, 45], [0, 7, 45], [0, 44, 45])


def model(tied: bool, lora: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 5, "tie_word_embeddings": tied, "initializer_range": 0.2})
    made = AutoModelForCausalLM.from_config(config, attn_implementation="ringspan", dtype=torch.float64)
    return get_peft_model(made, LoraConfig(r=2, target_modules="all-linear")) if lora else made


def batches(context: SequenceContext) -> list[dict[str, Any]]:
    made = []
    for number, edges in enumerate(EDGES):
        ids = torch.randint(0, 97, (2, 45), generator=torch.Generator().manual_seed(number))
        made.append(context.shard({"input_ids": ids, "labels": ids, "document_boundaries": edges}) | context.kwargs())
    return made


def piped(group: dist.ProcessGroup, schedule: str, tied: bool, lora: bool) -> list[Any]:
    mesh, context = mesh_of(Sizes(pp=dist.get_world_size(group)), "cpu"), SequenceContext()
    whole = model(tied, lora)
    names = {name for name, _ in whole.named_parameters()}
    truth = model(tied, lora)
    plain = Direct(Scorer(truth, ChunkedLoss(7)))
    right = plain.backward(batches(context), 0.1)
    judged = plain.losses(batches(context)[1])
    assert judged is not None
    pipeline = Pipeline(
        whole, mesh["pp"], schedule=schedule, micro_batches=len(EDGES), loss=ChunkedLoss(7),
        batch=2, tokens=45, length=45,
    )  # fmt: skip
    found = pipeline.losses(batches(context)[1])  # before the schedule knows its sizes, and after
    loss = pipeline.backward(batches(context), 0.1)
    again = pipeline.losses(batches(context)[1])
    pipeline.sum_tied()
    held = dict(pipeline.named_parameters())
    assert set(held) <= names
    assert pipeline.copies <= set(held)
    stock = dict(truth.named_parameters())
    worst = 0.0
    for name, parameter in held.items():
        grad = stock[name].grad
        if grad is not None:
            assert parameter.grad is not None, name
            worst = max(worst, float((parameter.grad - grad).abs().max() / grad.abs().max()))
    same = [None if each is None else [bool(torch.allclose(a, b)) for a, b in zip(each, judged, strict=True)]
            for each in (found, again)]  # fmt: skip
    parts = sorted(name for name, _ in pipeline.named_modules() if name.endswith("self_attn"))
    return [float(loss), float(right), worst, same, sorted(held), sorted(pipeline.copies), parts]


@pytest.mark.parametrize(
    ("schedule", "world", "tied", "lora"),
    [
        ("gpipe", 2, False, False),
        ("1f1b", 3, True, False),
        ("1f1b", 2, True, True),
        ("interleaved", 2, True, False),
        ("zero_bubble", 2, False, False),
    ],
)
def test_stages_together_are_the_model(schedule: str, world: int, tied: bool, lora: bool) -> None:
    ranks = run_ranks(piped, world, schedule, tied, lora)
    assert sum(found[0] for found in ranks) == pytest.approx(ranks[0][1], rel=1e-12)
    assert [found[0] != 0 for found in ranks] == [False] * (world - 1) + [True]
    for rank, (_, _, worst, same, names, copies, _) in enumerate(ranks):
        assert worst <= 1e-9
        assert same == ([[True, True]] * 2 if rank == world - 1 else [None, None])
        assert bool(copies) == (tied and rank == world - 1)
        assert len(names) == len(set(names))
    held = [name for found in ranks for name in found[4] if name not in found[5]]
    assert sorted(held) == sorted(name for name, _ in model(tied, lora).named_parameters())
    attention = [name for found in ranks for name in found[6]]
    assert sorted(attention) == [name for name, _ in model(tied, lora).named_modules() if name.endswith("self_attn")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 8, "1f1b", 8), r"pp: 1f1b makes 8 stages, and 4 layers are too few for them; lower pp"),
        ((4, 4, "interleaved", 8), r"8 stages \(2 on each of 4 ranks\), and 4 layers are too few.*schedule=1f1b"),
        ((8, 2, "interleaved", 5), r"2 rounds \(5 micro-batches / pp 2\), which do not divide 5; make gradient_acc"),
        ((8, 2, "dance", 5), "schedule: 'dance' is not one of gpipe, 1f1b, interleaved, zero_bubble"),
        ((8, 2, "zero_bubble", 4, "LoRA"), "loses the gradients of LoRA; take schedule=1f1b or interleaved"),
    ],
)
def test_what_cannot_run_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pipeline(*arguments)


def test_what_a_split_backward_pass_loses() -> None:
    assert lost_when_split(["a.weight"], frozen=False) == ""
    assert lost_when_split(["a.sinks"], frozen=False) == "learned sinks"
    assert lost_when_split(["a.sinks"], frozen=True) == "learned sinks and of LoRA"
