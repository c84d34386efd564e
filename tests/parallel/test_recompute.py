"""Activation checkpointing: every mode gives the plain gradients; what is exchanged, computed and put away in each."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny_layers import batch, build_model, context_of, gradients, sharded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dense import relative_rms
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.data import shard_parameters
from ringspan.parallel.hf_attention import NAME
from ringspan.parallel.offload import Kept, Offload
from ringspan.parallel.parts import parts_of
from ringspan.parallel.recompute import Mode, checkpoint_layers, keeps_attention
from ringspan.parallel.tensor import shard_layers, sum_replicated
from ringspan.parallel.testing import run_ranks

EDGES = [0, 10, 11, 30, 45]
MODES: tuple[Mode, ...] = ("full", "selective", "offload")


def prepared(kind: str, mode: Mode, lora: bool = False) -> tuple[Any, Offload]:
    """The tiny model with its layers checkpointed, and where they put things away: everything, however small."""
    model, home = build_model(kind, 9, torch.float64), Offload(smallest=0)
    if lora:
        torch.manual_seed(3)
        settings = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, settings).double().train()
    checkpoint_layers(parts_of(model).layers, mode, offload=home)
    return model, home


def worst_of(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    assert found.keys() == truth.keys()
    return max(relative_rms(found[name], each) for name, each in truth.items() if each.any())


def every_mode(group: dist.ProcessGroup | None, kind: str, lora: bool) -> list[Any]:
    """Differences to no checkpointing, by mode; bytes received without it and by mode; bytes of a forward alone."""
    plain = context_of(group, "zigzag")
    loss, truth = sharded(prepared(kind, "none", lora)[0], plain, EDGES, None)
    assert any(each.any() for each in truth.values())
    worst, received = {}, {"none": plain.traffic.received_payload}
    for mode in MODES:
        context = context_of(group, "zigzag", keep_attention=keeps_attention(mode))
        model, home = prepared(kind, mode, lora)
        found, gradient = sharded(model, context, EDGES, None)
        worst[mode] = max(abs(found - loss), worst_of(gradient, truth))
        received[mode] = context.traffic.received_payload
        assert (home.moved > 0) == (mode == "offload")
    alone = context_of(group, "zigzag")
    with torch.no_grad():
        local = alone.shard(batch(EDGES))
        prepared(kind, "none", lora)[0](**{**local, "shift_labels": None}, **alone.kwargs())
    return [worst, received, alone.traffic.received_payload]


@pytest.mark.parametrize(("kind", "lora"), [("mistral", False), ("gpt_oss", False), ("qwen2", True)])
@pytest.mark.parametrize("world", [1, 2])
def test_every_mode_gives_the_plain_gradients_and_only_full_exchanges_again(kind: str, lora: bool, world: int) -> None:
    results = [every_mode(None, kind, lora)] if world == 1 else run_ranks(every_mode, world, kind, lora)
    for worst, received, forward in results:
        assert worst == dict.fromkeys(MODES, 0.0)
        assert received["selective"] == received["offload"] == received["none"]
        assert received["full"] == received["none"] + forward
    assert (sum(result[2] for result in results) > 0) == (world > 1)


def test_the_backward_pass_computes_layers_again_but_attention_only_in_full() -> None:
    expected: dict[Mode, int] = {"none": 1, "full": 2, "selective": 2, "offload": 2}
    for mode, mlps in expected.items():
        model, _ = prepared("mistral", mode)
        runs = {"mlp": 0}

        def count(*_: Any, runs: dict[str, int] = runs) -> None:
            runs["mlp"] += 1

        for layer in parts_of(model).layers:
            layer.mlp.gate_proj.register_forward_hook(count)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
        sharded(model, context_of(None, "zigzag", keep_attention=keeps_attention(mode)), EDGES, None)
        assert runs["mlp"] == 3 * mlps, mode


def test_offload_puts_away_inputs_and_attention_of_all_layers_but_the_last() -> None:
    model, home = prepared("mistral", "offload")
    context = context_of(None, "zigzag", keep_attention=True)
    local = context.shard(batch(EDGES))
    del local["shift_labels"]
    keywords = context.kwargs()
    loss = model(**local, **keywords).logits.sum()
    hidden, out, lse = 2 * 45 * 32 * 8, 2 * 45 * 4 * 8 * 8, 2 * 45 * 4 * 8
    assert home.moved == 2 * (hidden + out + lse)
    kept = keywords[NAME].kept
    assert isinstance(kept, Kept)
    assert sorted(kept) == [0, 1, 2]
    loss.backward()
    assert len(kept) == 0
    assert home.buffers.bytes == home.moved  # each was made once, and is idle now
    model(**local, **context.kwargs()).logits.sum().backward()
    assert home.buffers.bytes * 2 == home.moved


def test_stages_that_share_a_pass_put_away_each_its_own() -> None:
    truth = sharded(prepared("mistral", "none")[0], context_of(None, "zigzag"), EDGES, None)
    model = build_model("mistral", 9, torch.float64)
    layers, homes = parts_of(model).layers, [Offload(smallest=0), Offload(smallest=0)]
    for home, run in zip(homes, (layers[:2], layers[2:]), strict=True):
        checkpoint_layers(run, "offload", offload=home)
    found = sharded(model, context_of(None, "zigzag", keep_attention=True), EDGES, None)
    assert worst_of(found[1], truth[1]) == 0.0
    assert homes[0].moved > 0
    assert homes[1].moved == 0  # its only layer is its last


def with_fsdp(group: dist.ProcessGroup, kind: str, lora: bool) -> dict[str, float]:
    """FSDP2 over the ranks that share the sequence; its gradients, gathered, by mode."""
    truth = sharded(prepared(kind, "none", lora)[0], context_of(group, "zigzag"), EDGES, None)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard_cp",))
    worst = {}
    for mode in MODES:
        model, home = prepared(kind, mode, lora)
        shard_parameters(model, parts_of(model).layers, mesh)
        context = context_of(group, "zigzag", keep_attention=keeps_attention(mode))
        given = batch(EDGES)
        count = int(SequenceContext().shard(given)["shift_labels"].ne(-100).sum())
        local = context.shard(given)
        labels = local.pop("shift_labels").flatten()
        logits = model(**local, **context.kwargs()).logits.flatten(0, 1)
        (nn.functional.cross_entropy(logits, labels, reduction="sum") / count).backward()
        found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(model).items()}
        worst[mode] = worst_of(found, truth[1])
        assert (home.moved > 0) == (mode == "offload")
    return worst


@pytest.mark.parametrize(("kind", "lora"), [("mistral", False), ("qwen2", True)])
def test_every_mode_composes_with_fsdp(kind: str, lora: bool) -> None:
    for worst in run_ranks(with_fsdp, 2, kind, lora):
        assert all(each <= 1e-12 for each in worst.values()), worst


def decoder_gradients(model: Any, context: SequenceContext) -> dict[str, torch.Tensor]:
    local = context.shard(batch(EDGES))
    del local["shift_labels"]
    parts_of(model).decoder(**local, **context.kwargs()).last_hidden_state.pow(3).sum().backward()
    return gradients(model)


def with_tensor(group: dist.ProcessGroup) -> dict[str, float]:
    """Tensor parallelism of two ranks, which have the same sequence: hidden states are shards of it between blocks."""
    truth = decoder_gradients(prepared("mistral", "none")[0], context_of(None, "zigzag"))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    worst = {}
    for mode in MODES:
        model, home = prepared("mistral", mode)
        shard_layers(model, mesh)
        context = context_of(None, "zigzag", keep_attention=keeps_attention(mode))
        local = context.shard(batch(EDGES))
        del local["shift_labels"]
        hidden = parts_of(model).decoder(**local, **context.kwargs()).last_hidden_state
        mine = slice(0, 23) if group.rank() == 0 else slice(23, 45)
        assert hidden.shape[1] == mine.stop - mine.start
        hidden.pow(3).sum().backward()
        sum_replicated(model.parameters(), group)
        assert (home.moved > 0) == (mode == "offload")
        found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(model).items()}
        worst[mode] = worst_of(found, truth)
    return worst


def test_every_mode_composes_with_tensor_parallelism() -> None:
    for worst in run_ranks(with_tensor, 2):
        assert all(each <= 1e-12 for each in worst.values()), worst


def test_a_mode_changes_no_name_or_class_and_none_ends_it() -> None:
    model = build_model("mistral", 9, torch.float64)
    before = [(name, type(module)) for name, module in model.named_modules()]
    for mode in MODES:
        checkpoint_layers(parts_of(model).layers, mode)
        assert model.is_gradient_checkpointing
        assert [(name, type(module)) for name, module in model.named_modules()] == before
    checkpoint_layers(parts_of(model).layers, "none")
    assert not model.is_gradient_checkpointing


def test_what_cannot_be_checkpointed_is_refused_by_name() -> None:
    layers = [parts_of(build_model("mistral", 9, torch.float64)).layers[0], nn.Linear(2, 2)]
    with pytest.raises(ValueError, match=r"activation_checkpointing: full, but layer 1 \(Linear\) is no Gradient"):
        checkpoint_layers(layers, "full")
    assert not layers[0].gradient_checkpointing
    with pytest.raises(ValueError, match="activation_checkpointing: 'some' is not one of none, full, selective, off"):
        checkpoint_layers([], "some")  # pyright: ignore[reportArgumentType]
    checkpoint_layers(layers[1:], "none")
