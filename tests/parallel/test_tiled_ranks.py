"""Tiles under FSDP2 and tensor parallelism: as many collectives as without, the same gradients."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiled_cases import EDGES, run, worst_of
from tiny_layers import batch, build_model, context_of, gradients
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from ringspan.parallel.context import SequenceContext
from ringspan.parallel.data import shard_parameters
from ringspan.parallel.parts import parts_of
from ringspan.parallel.recompute import checkpoint_layers, keeps_attention
from ringspan.parallel.tensor import shard_layers, sum_replicated
from ringspan.parallel.testing import run_ranks
from ringspan.parallel.tiled import tile_mlps


class Collectives(TorchDispatchMode):
    """Counts them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and ("gather" in func.name() or "reduce" in func.name()):
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


def with_fsdp(group: dist.ProcessGroup, mode: Any) -> list[Any]:
    """The difference to no tiles and one copy; collectives of a step with and without tiles."""
    truth = run(build_model("mistral", 9, torch.float64), group)
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard_cp",))
    counts, worst = [], 0.0
    for tokens in (None, 7):
        model = build_model("mistral", 9, torch.float64)
        if tokens is not None:
            tile_mlps(parts_of(model).layers, tokens)
        checkpoint_layers(parts_of(model).layers, mode)
        shard_parameters(model, parts_of(model).layers, mesh)
        context = context_of(group, "zigzag", keep_attention=keeps_attention(mode))
        given = batch(EDGES)
        count = int(SequenceContext().shard(given)["shift_labels"].ne(-100).sum())
        local = context.shard(given)
        labels = local.pop("shift_labels").flatten()
        with Collectives() as calls:
            logits = model(**local, **context.kwargs()).logits.flatten(0, 1)
            (nn.functional.cross_entropy(logits, labels, reduction="sum") / count).backward()
        counts.append(dict(calls.counts))
        found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(model).items()}
        worst = max(worst, worst_of({**found, "loss": truth["loss"]}, truth))
    return [worst, *counts]


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_fsdp_gathers_and_reduces_a_layer_as_often_as_without_tiles(mode: str) -> None:
    for worst, plain, tiled in run_ranks(with_fsdp, 2, mode):
        assert worst <= 1e-12
        # Three layers and the root: a layer is gathered for each pass, and reduced once.
        assert sorted(plain.values()) == [4, 7], plain
        assert tiled == plain


def with_tensor(group: dist.ProcessGroup, mode: Any) -> float:
    """Tensor parallel ranks: of an MLP each has a part of the features, and all tokens."""

    def found(model: Any) -> dict[str, Tensor]:
        checkpoint_layers(parts_of(model).layers, mode)
        context = context_of(None, "zigzag", keep_attention=keeps_attention(mode))
        local = context.shard(batch(EDGES))
        del local["shift_labels"]
        parts_of(model).decoder(**local, **context.kwargs()).last_hidden_state.pow(3).sum().backward()
        return gradients(model)

    truth, model = found(build_model("mistral", 9, torch.float64)), build_model("mistral", 9, torch.float64)
    shard_layers(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)))
    tile_mlps(parts_of(model).layers, 7)
    found(model)
    sum_replicated(model.parameters(), group)
    whole = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients(model).items()}
    return worst_of(whole, truth)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_tiles_compose_with_tensor_parallelism(mode: str) -> None:
    assert all(worst <= 1e-12 for worst in run_ranks(with_tensor, 2, mode))


# Where a graph ends, the compiler looks whether the tensors it gets have a gradient; these are no leaves.
