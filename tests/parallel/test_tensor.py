"""Tensor parallel models give the loss and every gradient of stock transformers on one rank, also with other axes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tensor_cases import ATTENTION, MLP, WHOLE, Case, build, by_ours, truth
from tiny_layers import batch
from torch.distributed.tensor import DTensor

from dense import relative_rms
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.mesh import Sizes, mesh_of
from ringspan.parallel.parts import parts_of
from ringspan.parallel.tensor import shard_layers, vocabulary_rows
from ringspan.parallel.testing import run_ranks

BOUND = {"gemma3": 1e-5, "gpt_oss": 1e-5}  # some round inside to fp32


def in_tiles(mlp: Any) -> None:
    """Let an MLP take at most 10 tokens at a time."""
    whole = mlp.forward
    mlp.forward = lambda x: torch.cat([whole(part) for part in x.split(10, dim=1)], dim=1)


def compare(group: dist.ProcessGroup, case: Case) -> list[Any]:
    """Return the errors of the loss and of the worst gradient, its name, and how many gradients are not zero."""
    mesh, model = mesh_of(case.sizes, "cpu"), build(case)
    if case.recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    shard_layers(model, mesh["tp"])
    if case.tiles:
        for layer in parts_of(model).layers:
            in_tiles(layer.mlp)
    loss, grads = by_ours(model, mesh, case)
    if dist.get_rank(group):
        # The whole is the same everywhere, and this rank's sums of what is not cut must be too.
        return [float(sum(grad.square().sum() for grad in grads.values()))]
    loss_truth, grads_truth = truth(case)
    assert list(grads) == list(grads_truth)
    errors = {name: relative_rms(grads[name], right) for name, right in grads_truth.items()}
    worst = max(errors, key=lambda name: errors[name])
    seen = sum(bool(grad.any()) for grad in grads_truth.values())
    squares = float(sum(grad.square().sum() for grad in grads.values()))
    return [squares, abs(loss - loss_truth) / loss_truth, errors[worst], worst, seen]


def check(case: Case) -> None:
    (squares, loss, gradient, name, seen), *others = run_ranks(compare, case.sizes.world, case)
    bound = BOUND.get(case.kind, 1e-9)
    assert loss <= bound
    assert gradient <= bound, name
    assert seen > 10
    assert all(other == pytest.approx(squares, rel=1e-12) for (other,) in others)


CASES = {
    "llama": Case("llama"),
    "mistral": Case("mistral"),
    "qwen2": Case("qwen2"),  # biases of what is cut by outputs
    "qwen3": Case("qwen3", edges=WHOLE),  # norms of heads
    "qwen2_moe": Case("qwen2_moe"),  # experts on token shards
    "gemma3": Case("gemma3"),  # a scaled embedding, tied to the head, with padding in its first row
    "gpt_oss": Case("gpt_oss"),  # sinks, a bias of what is cut by inputs, experts
    "four ranks": Case("llama", Sizes(tp=4), changes={"num_key_value_heads": 4}),  # vocabulary: 25, 25, 25 and 22
    "tied": Case("qwen3", changes={"tie_word_embeddings": True}),
    "cp": Case("gpt_oss", Sizes(cp=2, tp=2)),
    "cp with a mask by KV head": Case("mistral", Sizes(cp=2, tp=2), WHOLE, mask="s2_attention(8)"),
    "a mask by KV head": Case("llama", edges=WHOLE, mask="s2_attention(8)"),
    "replicas": Case("qwen2", Sizes(dp_shard=2, tp=2)),
    "fsdp": Case("qwen3", Sizes(dp_shard=2, tp=2), fsdp=True),
    "fsdp tied": Case("gemma3", Sizes(dp_shard=2, tp=2), fsdp=True, recompute=True),
    "fsdp over cp": Case("gpt_oss", Sizes(cp=2, tp=2), fsdp=True, recompute=True),
    "recompute": Case("gpt_oss", recompute=True),
    # Two ranks see no token, and so no expert: their graphs are others.
    "more ranks than tokens": Case(
        "gpt_oss", Sizes(tp=4), [0, 2], changes={"num_key_value_heads": 4}, recompute=True, keep=False
    ),
    "an mlp in tiles": Case("llama", tiles=True),
    "lora": Case("llama", lora=[*ATTENTION, *MLP, "lm_head"]),
    "lora with fsdp": Case("mistral", Sizes(dp_shard=2, tp=2), lora=["q_proj", "o_proj"], fsdp=True, recompute=True),
}


@pytest.mark.parametrize("name", CASES)
def test_every_gradient_is_that_of_stock_transformers_on_one_rank(name: str) -> None:
    check(CASES[name])


def held(group: dist.ProcessGroup, case: Case) -> list[Any]:
    """Return the bytes this rank holds, of parameters and beneath them, and whether a tied weight is one parameter."""
    del group
    model = build(case)
    shard_layers(model, mesh_of(case.sizes, "cpu")["tp"])
    parts = parts_of(model)
    weights = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
    cut = sum(isinstance(p, DTensor) for p in parts.layers[0].parameters())
    rows = vocabulary_rows(parts.head)
    return [sum(w.nbytes for w in weights), sum(storages.values()), cut, parts.tied, [rows.start, rows.stop, rows.size]]


def test_a_rank_holds_its_part_and_the_whole_is_let_go() -> None:
    case = Case("qwen3", changes={"tie_word_embeddings": True})
    whole = sum(p.nbytes for p in build(case).parameters())
    for rank, (bytes_, beneath, cut, tied, rows) in enumerate(run_ranks(held, 2, case)):
        assert bytes_ == beneath
        assert bytes_ < 0.52 * whole  # norms stay whole, and the vocabulary is 49 + 48
        assert cut == 7
        assert tied
        assert rows == [[0, 49, 97], [49, 97, 97]][rank]


def outside(group: dist.ProcessGroup, token: int) -> str:
    del group
    case = Case("mistral")
    model = build(case)
    shard_layers(model, mesh_of(case.sizes, "cpu")["tp"])
    given = {**batch(WHOLE), "input_ids": torch.full((1, 9), token), "labels": torch.zeros(1, 9, dtype=torch.long)}
    context = SequenceContext()
    local = context.shard({**given, "document_boundaries": [0, 9]})
    del local["shift_labels"]
    try:
        parts_of(model).decoder(**local, **context.kwargs())
    except IndexError as error:
        return str(error)
    return "ran"


@pytest.mark.parametrize("token", [97, -1])
def test_a_token_outside_of_the_vocabulary_fails_on_every_rank_as_without_tensor_parallelism(token: int) -> None:
    assert run_ranks(outside, 2, token) == ["index out of range in self"] * 2
