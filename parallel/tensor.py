"""Tensor parallelism: the ranks of a group share every layer's heads and features, and the vocabulary.

Weights that are shared out are DTensors; activations are plain tensors, and a module with such weights runs its own forward
on its rank's part of them. So attention, and everything else a model's code does, sees local heads and knows of nothing.
Between blocks a hidden state is a shard of the tokens (``tensor_moves``); what is not shared out, norms or a mixture of
experts, works there, on its own tokens.

The one rule for gradients: a weight that is not shared out has on each rank the gradient of what that rank computed, and
``sum_replicated`` adds them up after the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ringspan.parallel.data import sum_gradients
from ringspan.parallel.parts import Parts, parts_of
from ringspan.parallel.tensor_moves import gather_tokens, scatter_sum

# Where transformers has no plan for a model (gpt-oss): its attention.
_ATTENTION = {f"layers.*.self_attn.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"}
_STAYS = {"replicated_with_grad_allreduce"}  # norms of heads: each rank has the gradient of its own heads
_EXPERTS = ".experts"  # a mixture of experts works on token shards


def check_tensor(config: Any, tp: int) -> None:
    """Check that ``tp`` ranks can share the layers of a transformers text config.

    Raises:
        ValueError: names the size that does not divide.
    """
    heads = int(config.num_attention_heads)
    sizes = {
        "query heads": heads,
        "KV heads": int(getattr(config, "num_key_value_heads", None) or heads),
    }
    if any(".mlp." in name and _EXPERTS not in name for name in _plan(config)):
        sizes["MLP features (intermediate_size)"] = int(config.intermediate_size)
    for name, size in sizes.items():
        if size % tp:
            divisors = [each for each in range(1, size + 1) if not any(other % each for other in sizes.values())]
            raise ValueError(
                f"tp: {tp} ranks cannot share {size} {name}: {size} / {tp} is no whole number; "
                f"give one of {', '.join(map(str, divisors))}"
            )
    if config.vocab_size < tp:
        raise ValueError(f"tp: {tp} ranks cannot share a vocabulary of {config.vocab_size}")


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Share out the layers, embedding and head of a causal LM over a 1-D mesh, in place.

    Every rank holds the same weights when it calls this, and keeps its part. Under LoRA the adapters are cut with their
    layer. Dropout of adapters needs the same random state on all ranks of the mesh.

    Raises:
        ValueError: for sizes that do not divide, or a model whose plan is not understood.
    """
    parts = parts_of(model)
    check_tensor(parts.config, mesh.size())
    _share_vocabulary(parts, mesh)
    plan = _plan(parts.config)
    for layer in parts.layers:
        tokens = _Tokens()
        layer.register_forward_pre_hook(tokens.note, with_kwargs=True)
        for name, block in layer.named_children():
            prefix = f"layers.*.{name}."
            ways = {key.removeprefix(prefix): how for key, how in plan.items() if key.startswith(prefix)}
            ways = {child: how for child, how in ways.items() if isinstance(getattr(block, child, None), nn.Module)}
            if ways:
                _share_block(block, ways, tokens, mesh)


def sum_replicated(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sum over ``group`` the gradients of all parameters that are not shared out over it, in place."""
    sum_gradients([p for p in parameters if not _shared(p)], group)


def vocabulary_start(head: nn.Module) -> int:
    """Return the first token of the vocabulary that this rank's part of the head scores."""
    weight: Any = _base(head).weight
    return _range(weight.shape[0], weight.device_mesh["tp"] if weight.device_mesh.ndim > 1 else weight.device_mesh)[0]


class _Tokens:
    """How many tokens the layer at work has, before they are sharded: a recompute notes it anew."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del layer, args
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


def _share_block(block: nn.Module, ways: dict[str, str], tokens: _Tokens, mesh: DeviceMesh) -> None:
    """Cut a block's projections; it gets all tokens, and what its last projection gives is summed and scattered."""
    group = mesh.get_group()
    for child, how in ways.items():
        module = block.get_submodule(child)
        (_cut_rows if how == "rowwise" else _cut_columns)(module, mesh)
        if how == "rowwise":
            module.register_forward_hook(lambda _, __, out: scatter_sum(out, group))

    def gather(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        del module
        if args:
            return (gather_tokens(args[0], tokens.count, group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": gather_tokens(kwargs["hidden_states"], tokens.count, group)}

    block.register_forward_pre_hook(gather, with_kwargs=True)
    if isinstance(getattr(block, "sinks", None), nn.Parameter):  # one for each query head
        _cut(block, "sinks", 0, mesh)
        _run_locally(block)


def _cut_columns(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a projection by its output features; of an adapter, the half that makes them."""
    base = _base(module)
    _cut(base, "weight", 0, mesh)
    if base.bias is not None:
        _cut(base, "bias", 0, mesh)
    _run_locally(base)
    for adapter in _adapters(module, "lora_B"):
        _cut(adapter, "weight", 0, mesh)
        _run_locally(adapter)


def _cut_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a projection by its input features; its results are partial sums, and one rank adds the bias."""
    base = _base(module)
    _cut(base, "weight", 1, mesh)
    _run_locally(base, bias_factor=float(mesh.get_local_rank() == 0))
    for adapter in _adapters(module, "lora_A"):
        _cut(adapter, "weight", 1, mesh)
        _run_locally(adapter)


def _share_vocabulary(parts: Parts, mesh: DeviceMesh) -> None:
    """Cut embedding and head by the vocabulary; a weight they share stays one."""
    embed, head, tied = parts.embed, parts.head, parts.tied
    if not isinstance(embed, nn.Embedding):
        raise ValueError(f"tp: the embedding is a {type(embed).__name__} (an adapter?), which cannot be shared out")
    start, stop = _range(embed.num_embeddings, mesh)
    if not tied:
        _cut_columns(head, mesh)
    _cut(embed, "weight", 0, mesh)
    if tied:
        head.weight = embed.weight
        _run_locally(head)
    if embed.padding_idx is not None:  # its row gets no gradient
        embed.padding_idx = embed.padding_idx - start if start <= embed.padding_idx < stop else None
    _run_locally(embed)
    look_up, group = embed.forward, mesh.get_group()

    @wraps(look_up)
    def forward(input: Tensor) -> Tensor:
        here = (input >= start) & (input < stop)
        rows = look_up(torch.where(here, input - start, 0))
        return scatter_sum(rows * here[..., None], group)

    embed.forward = forward


def _cut(module: nn.Module, name: str, dim: int, mesh: DeviceMesh) -> None:
    whole = getattr(module, name)
    # Every rank has the whole: no source, so that nothing is sent.
    part = distribute_tensor(whole.detach(), mesh, [Shard(dim)], src_data_rank=None)
    setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))


def _run_locally(module: nn.Module, bias_factor: float | None = None) -> None:
    """Let a module's forward find its rank's part of each weight in its place."""
    run: Callable[..., Any] = module.forward

    @wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        held = dict(module._parameters)
        try:
            for name, parameter in held.items():
                if isinstance(parameter, DTensor):
                    module._parameters[name] = parameter.to_local()  # pyright: ignore[reportArgumentType]
                elif name == "bias" and parameter is not None and bias_factor is not None:
                    module._parameters[name] = parameter * bias_factor  # pyright: ignore[reportArgumentType]
            return run(*args, **kwargs)
        finally:
            module._parameters.update(held)

    module.forward = forward


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # pyright: ignore[reportCallIssue]


def _adapters(module: nn.Module, half: str) -> Iterator[nn.Module]:
    held = getattr(module, half, None)
    return iter(held.values()) if isinstance(held, nn.ModuleDict) else iter(())


def _shared(parameter: Tensor) -> bool:
    if not isinstance(parameter, DTensor):
        return False
    names = parameter.device_mesh.mesh_dim_names or ()
    return any(
        name == "tp" and not isinstance(placement, Replicate)
        for name, placement in zip(names, parameter.placements, strict=True)
    )


def _range(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Return which of ``size`` rows this rank holds, as ``Shard(0)`` cuts."""
    chunk = -(-size // mesh.size())
    start = min(size, mesh.get_local_rank() * chunk)
    return start, min(size, start + chunk)
