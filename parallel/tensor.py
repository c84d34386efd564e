"""Tensor parallelism: the ranks of a group share every layer's heads and features, and the vocabulary.

Weights that are shared out are DTensors; activations are plain tensors, and a module with such weights runs its own
forward on its rank's part of them (``tensor_weights``). So attention, and everything else a model's code does, sees
local heads and knows of nothing. Between blocks a hidden state is a shard of the tokens (``tensor_moves``); what is not
shared out, norms or a mixture of experts, works there, on its own tokens.

The one rule for gradients: a weight that is not shared out has on each rank the gradient of what that rank computed
(its tokens, or its heads), and ``sum_replicated`` adds them up after the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import wraps
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ringspan.parallel.data import sum_gradients
from ringspan.parallel.parts import Parts, parts_of
from ringspan.parallel.tensor_moves import gather_tokens, scatter_sum
from ringspan.parallel.tensor_weights import AXIS, Rows, cut, is_cut, rows_of, run_locally

_ATTENDS = "self_attn"  # the block of a layer whose tokens look at each other
# Where transformers has no plan for a model (gpt-oss): its attention.
_ATTENTION = {f"layers.*.{_ATTENDS}.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"}
_STAYS = {"replicated_with_grad_allreduce"}  # norms of heads: each rank has the gradient of its own heads
_EXPERTS = ".experts"  # a mixture of experts works on token shards


def check_tensor(config: Any, tp: int) -> None:
    """Check that ``tp`` ranks can share the layers of a transformers text config.

    Raises:
        ValueError: names the size that does not divide, or what the model's plan asks for and is not supported.
    """
    heads = int(config.num_attention_heads)
    sizes = {
        "query heads": heads,
        "KV heads": int(getattr(config, "num_key_value_heads", None) or heads),
    }
    if any(".mlp." in name for name in _plan(config)):
        sizes["MLP features (intermediate_size)"] = int(config.intermediate_size)
    for name, size in sizes.items():
        if size % tp:
            divisors = [each for each in range(1, size + 1) if not any(other % each for other in sizes.values())]
            raise ValueError(
                f"tp: {tp} ranks cannot share {size} {name}: {size} / {tp} is no whole number; "
                f"give one of {', '.join(map(str, divisors))}"
            )
    last = rows_of(config.vocab_size, tp, tp - 1)
    if last.start == last.stop:
        raise ValueError(
            f"tp: {tp} ranks cannot share a vocabulary of {config.vocab_size}: in parts of "
            f"{-(-config.vocab_size // tp)} the last rank has none; give fewer ranks"
        )


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the layers, embedding and head of a causal LM over a 1-D mesh named "tp", in place.

    Every rank holds the same weights when it calls this, and keeps its part. A LoRA is cut with its layer: of a layer
    cut by outputs the half that makes them, of one cut by inputs the half that takes them. Its dropout needs the same
    random state on all ranks of the mesh: the caller seeds them alike.

    Raises:
        ValueError: for sizes that do not divide, and by name for what cannot be cut; the model is then as it was.
    """
    if mesh.ndim != 1 or mesh.mesh_dim_names != (AXIS,):
        raise ValueError(f"mesh: {mesh.ndim}-D with names {mesh.mesh_dim_names}; give a 1-D mesh named {AXIS!r}")
    parts = parts_of(model)
    check_tensor(parts.config, mesh.size())
    plan = _plan(parts.config)
    found = [_blocks(layer, index, plan) for index, layer in enumerate(parts.layers)]
    _check_vocabulary(parts)
    _share_vocabulary(parts, mesh)
    for layer, blocks in zip(parts.layers, found, strict=True):
        tokens = _Tokens()
        layer.register_forward_pre_hook(tokens.note, with_kwargs=True)
        for name, ways in blocks.items():
            _share_block(layer.get_submodule(name), ways, tokens, mesh, whole=name != _ATTENDS)


def sum_replicated(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum over ``group`` the gradients of all parameters that are not shared out over it, in place.

    Where FSDP has cut a parameter over other ranks, their parts are summed.
    """
    sum_gradients([p for p in parameters if not is_cut(p)], group)


def vocabulary_rows(head: nn.Module) -> Rows:
    """Return which tokens of the vocabulary this rank's part of the head scores.

    Raises:
        ValueError: if the head is not shared out.
    """
    weight: Any = _base(head).weight
    if not isinstance(weight, DTensor) or not is_cut(weight):
        raise ValueError(f"head: {type(head).__name__} is not shared out; call shard_layers first, or give no group")
    mesh = weight.device_mesh[AXIS] if weight.device_mesh.ndim > 1 else weight.device_mesh
    return rows_of(weight.shape[0], mesh.size(), mesh.get_local_rank())


class _Tokens:
    """How many tokens the layer at work has, before they are sharded: a recompute notes it anew."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del args
        if kwargs.get("position_ids") is None:
            raise ValueError(
                f"tp: {type(layer).__name__} is called without position_ids, which tell how many tokens it has"
            )
        self.count = kwargs["position_ids"].shape[-1]


def _plan(config: Any) -> dict[str, str]:
    """Return which modules of a layer are cut, and how.

    Raises:
        ValueError: for a plan with an entry that is not understood.
    """
    plan = {}
    for name, how in (getattr(config, "base_model_tp_plan", None) or _ATTENTION).items():
        if how in _STAYS or _EXPERTS in name:
            continue
        if how not in ("colwise", "rowwise"):
            raise ValueError(f"tp: {config.model_type} wants {name} cut {how!r}, which is not supported; use tp=1")
        plan[name] = how
    return plan


def _blocks(layer: nn.Module, index: int, plan: dict[str, str]) -> dict[str, dict[str, str]]:
    """Return the blocks of a layer whose projections are cut, and how each of them is.

    Raises:
        ValueError: by name for what cannot be cut.
    """
    found = {}
    for name, block in layer.named_children():
        prefix = f"layers.*.{name}."
        ways = {key.removeprefix(prefix): how for key, how in plan.items() if key.startswith(prefix)}
        # A mixture of experts in the place of an MLP has none of its projections.
        ways = {child: how for child, how in ways.items() if isinstance(getattr(block, child, None), nn.Module)}
        if not ways:
            continue
        where = f"layers.{index}.{name}"
        for child in ways:
            _check_linear(getattr(block, child), f"{where}.{child}")
        if sorted(ways.values()).count("rowwise") != 1:
            raise ValueError(f"tp: {where} has not one projection whose results are summed, but {ways}; use tp=1")
        for own, _ in block.named_parameters(recurse=False):
            if own != "sinks":
                raise ValueError(f"tp: {where} has a parameter {own} of its own, which is not supported; use tp=1")
        found[name] = ways
    if _ATTENDS not in found:  # it would take a rank's tokens for all there are
        raise ValueError(f"tp: layers.{index} has no attention that transformers says how to cut; use tp=1")
    return found


def _share_block(block: nn.Module, ways: dict[str, str], tokens: _Tokens, mesh: DeviceMesh, *, whole: bool) -> None:
    """Cut a block's projections; it gets all tokens, and what its last projection gives is summed and scattered.

    With ``whole`` this is what the block returns, and is scattered there: an MLP may so take a few tokens at a time.
    """
    group = mesh.get_group()
    for child, how in ways.items():
        (_cut_inputs if how == "rowwise" else _cut_outputs)(getattr(block, child), mesh)

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        del module
        if args:
            return (gather_tokens(args[0], tokens.count, group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": gather_tokens(kwargs["hidden_states"], tokens.count, group)}

    block.register_forward_pre_hook(gather, with_kwargs=True)
    last = next(getattr(block, child) for child, how in ways.items() if how == "rowwise")
    summed = block if whole else last
    summed.register_forward_hook(lambda _, __, out: scatter_sum(out, group, recompute_first=not whole))
    if isinstance(getattr(block, "sinks", None), nn.Parameter):  # one for each query head
        cut(block, "sinks", 0, mesh)
        run_locally(block)


def _cut_outputs(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a projection by its output features; of an adapter, the half that makes them."""
    base = _base(module)
    cut(base, "weight", 0, mesh)
    if base.bias is not None:
        cut(base, "bias", 0, mesh)
    run_locally(base)
    for adapter in _adapters(module, "lora_B"):
        cut(adapter, "weight", 0, mesh)
        run_locally(adapter)


def _cut_inputs(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a projection by its input features; its results are partial sums, and one rank adds the bias."""
    base = _base(module)
    cut(base, "weight", 1, mesh)
    run_locally(base, bias_factor=float(mesh.get_local_rank() == 0))
    for adapter in _adapters(module, "lora_A"):
        cut(adapter, "weight", 1, mesh)
        run_locally(adapter)


def _check_vocabulary(parts: Parts) -> None:
    embed = type(parts.embed)
    if not issubclass(embed, nn.Embedding):
        library = embed.__module__.partition(".")[0]
        raise ValueError(f"tp: the embedding is a {embed.__name__} of {library}; adapters on it are not supported")
    _check_linear(parts.head, "the head")
    if parts.tied and _base(parts.head) is not parts.head:
        raise ValueError("tp: an adapter on a head that shares its weight with the embedding is not supported")


def _share_vocabulary(parts: Parts, mesh: DeviceMesh) -> None:
    """Cut embedding and head by the vocabulary; a weight they share stays one."""
    embed: Any = parts.embed
    tied, group = parts.tied, mesh.get_group()
    rows = rows_of(embed.num_embeddings, mesh.size(), mesh.get_local_rank())
    cut(embed, "weight", 0, mesh)
    if tied:
        parts.head.weight = embed.weight
        if getattr(parts.head, "bias", None) is not None:
            cut(parts.head, "bias", 0, mesh)
        run_locally(parts.head)
    else:
        _cut_outputs(parts.head, mesh)
    if embed.padding_idx is not None:  # its row gets no gradient
        embed.padding_idx = embed.padding_idx - rows.start if rows.start <= embed.padding_idx < rows.stop else None
    run_locally(embed)
    look_up = embed.forward

    @wraps(look_up)
    def forward(input: Tensor) -> Tensor:
        row, here = rows.find(input)
        return scatter_sum(look_up(row) * here[..., None], group)

    embed.forward = forward


def _check_linear(module: nn.Module, where: str) -> None:
    """Check that a projection is a linear layer, perhaps with a plain LoRA.

    Raises:
        ValueError: if not.
    """
    base = _base(module)
    if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
        raise ValueError(f"tp: {where} is a {type(base).__name__} of {_dtype(base)}; only plain linear layers are cut")
    if base is module:
        return
    halves = [*_adapters(module, "lora_A"), *_adapters(module, "lora_B")]
    biased = any(getattr(half, "bias", None) is not None for half in halves)
    if not halves or biased or getattr(module, "lora_variant", None):
        raise ValueError(f"tp: {where} has an adapter that is no plain LoRA (DoRA, lora_bias and others); use tp=1")


def _dtype(module: Any) -> str:
    return str(getattr(getattr(module, "weight", None), "dtype", "no dtype")).removeprefix("torch.")


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # pyright: ignore[reportCallIssue]


def _adapters(module: nn.Module, half: str) -> list[nn.Module]:
    held = getattr(module, half, None)
    return list(held.values()) if isinstance(held, nn.ModuleDict) else []
