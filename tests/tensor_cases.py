"""Models on a mesh with tensor parallelism, their loss and whole gradients, and stock transformers' on one rank."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import SIZES
from tiny_layers import EAGER, EXPERTS, batch, config_of
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from ringspan.finetune.loss import ChunkedLoss
from ringspan.kernels.masks.expression import parse
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.data import shard_parameters, sum_gradients
from ringspan.parallel.mesh import Mesh, Sizes
from ringspan.parallel.parts import parts_of
from ringspan.parallel.scorer import Scorer
from ringspan.parallel.tensor import sum_replicated

PACKED, WHOLE = [0, 10, 11, 30, 45], [0, 45]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


class Case(NamedTuple):
    """A model on a mesh; ``changes`` to its config, modules with a ``lora``, a ``mask`` in place of its own."""

    kind: str
    sizes: Sizes = Sizes(tp=2)
    edges: list[int] = PACKED
    changes: dict[str, Any] | None = None
    lora: list[str] | None = None
    mask: str | None = None
    fsdp: bool = False
    recompute: bool = False
    keep: bool = True  # attention, for the recompute
    tiles: bool = False


def build(case: Case, implementation: str = "ringspan") -> Any:
    torch.manual_seed(0)
    # Llama's has biases also where results are summed.
    biased = LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True, initializer_range=0.2)
    config = biased if case.kind == "llama" else config_of(case.kind, 7)
    for name, value in (case.changes or {}).items():
        setattr(config, name, value)
    options = {"experts_implementation": "eager"} if case.kind in EXPERTS else {}  # the usual ones know no float64
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32, **options)
    if case.lora is not None:
        adapters = LoraConfig(r=4, lora_alpha=8, target_modules=case.lora, init_lora_weights=False)
        model = get_peft_model(model, adapters, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "norm" in name or "sinks" in name or name.endswith("bias"):  # what starts as a constant hides mistakes
            nn.init.normal_(parameter, 0.7, 0.3)
    return model.double().train()


def first_tokens(case: Case) -> dict[str, Any]:
    """Two rows of tokens, up to the last edge."""
    given, length = batch(case.edges), case.edges[-1]
    return {name: x[:, :length] if isinstance(x, Tensor) else x for name, x in given.items()}


def truth(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Transformers alone, a document at a time; for a mask that it has not, one rank of ours."""
    model, given = build(case, "eager" if case.kind in EAGER else "sdpa"), first_tokens(case)
    if case.mask is not None:
        return by_ours(build(case), None, case)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for a, b in zip(case.edges, case.edges[1:], strict=False):
        logits = model(input_ids=given["input_ids"][:, a:b], use_cache=False).logits[:, :-1]
        total = total + F.cross_entropy(logits.flatten(0, 1), given["labels"][:, a + 1 : b].flatten(), reduction="sum")
        count += logits.shape[0] * logits.shape[1]
    (total / count).backward()
    return float(total.detach() / count), whole_gradients(model)


def by_ours(model: nn.Module, mesh: Mesh | None, case: Case) -> tuple[float, dict[str, Tensor]]:
    """The mean loss over all ranks, and its whole gradients; each dp rank has a row of the batch."""
    place = mesh.place if mesh is not None else {"dp": 0, "tp": 0}
    sizes = mesh.sizes if mesh is not None else Sizes()
    kv_heads = parts_of(model).config.num_key_value_heads
    context = SequenceContext(
        mesh.context if mesh is not None and sizes.cp > 1 else None,
        mask=None if case.mask is None else parse(case.mask),
        keep_attention=case.recompute and case.keep,
        first_kv_head=place["tp"] * kv_heads // sizes.tp,
        total_kv_heads=kv_heads,
    )
    given = first_tokens(case)
    count = SequenceContext().shard(given)["shift_labels"].ne(-100).sum()
    mine = {name: x.chunk(sizes.dp_shard)[place["dp"]] if isinstance(x, Tensor) else x for name, x in given.items()}
    scorer = Scorer(model, ChunkedLoss(16, mesh.group("tp") if mesh is not None else None))
    if mesh is not None and case.fsdp:
        shard_parameters(scorer, parts_of(model).layers, mesh.shards)
    loss = scorer(**context.shard(mine), **context.kwargs()) / count
    loss.backward()
    total = loss.detach().clone()
    if mesh is not None:
        sum_replicated(model.parameters(), mesh["tp"].get_group())
        if not case.fsdp:
            sum_gradients(model.parameters(), mesh.group("dp_cp"))
        dist.all_reduce(total, group=mesh["dp_cp"].get_group())
    return float(total), whole_gradients(model)


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter's gradient; an expert that no token took has none, which is zero."""
    grads = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
