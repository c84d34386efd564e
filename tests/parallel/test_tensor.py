"""Tensor parallel models give the loss and every gradient of stock transformers on one rank, also with other axes."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from tiny import SIZES
from tiny_layers import EAGER, EXPERTS, batch, config_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from dense import relative_rms
from ringspan.finetune.loss import ChunkedLoss
from ringspan.kernels.masks.expression import parse
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.data import shard_parameters, sum_gradients
from ringspan.parallel.mesh import Mesh, Sizes, mesh_of
from ringspan.parallel.parts import parts_of
from ringspan.parallel.scorer import Scorer
from ringspan.parallel.tensor import check_tensor, shard_layers, sum_replicated, vocabulary_rows
from ringspan.parallel.testing import run_ranks

PACKED, WHOLE = [0, 10, 11, 30, 45], [0, 45]
BOUND = {"gemma3": 1e-5, "gpt_oss": 1e-5}  # some round inside to fp32
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


def truth(case: Case) -> tuple[float, dict[str, Tensor]]:
    """Transformers alone, a document at a time; for a mask that it has not, one rank of ours."""
    model, given = build(case, "eager" if case.kind in EAGER else "sdpa"), batch(case.edges)
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
        keep_attention=case.recompute,
        first_kv_head=place["tp"] * kv_heads // sizes.tp,
        total_kv_heads=kv_heads,
    )
    given = batch(case.edges)
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


REFUSED: dict[str, tuple[str, Any]] = {
    "KV heads": (r"tp: 4 ranks cannot share 2 KV heads: 2 / 4 is no whole number; give one of 1, 2$", {}),
    "heads": (r"tp: 4 ranks cannot share 2 query heads: 2 / 4", {"num_attention_heads": 2}),
    "features": (
        r"tp: 4 ranks cannot share 30 MLP features \(intermediate_size\)",
        {"num_key_value_heads": 4, "intermediate_size": 30},
    ),
    "vocabulary": (
        r"tp: 4 ranks cannot share a vocabulary of 5: in parts of 2 the last rank has none",
        {"num_key_value_heads": 4, "vocab_size": 5},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_sizes_that_do_not_divide_are_refused_with_the_numbers(name: str) -> None:
    message, changes = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        check_tensor(LlamaConfig(**{**SIZES, **changes}), 4)


def test_a_plan_that_is_not_understood_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"phi3 wants layers.\*.self_attn.qkv_proj cut 'colwise_gather_output'"):
        check_tensor(Phi3Config(**SIZES), 2)


def test_experts_need_no_features_that_divide() -> None:
    check_tensor(config_of("gpt_oss", 7).__class__(**{**SIZES, "intermediate_size": 63}), 2)


def refused(group: dist.ProcessGroup, how: str) -> list[Any]:
    """Return what was said, and whether the model is as it was."""
    del group
    adapters: dict[str, dict[str, Any]] = {
        "dora": {"target_modules": ["q_proj"], "use_dora": True},
        "lora_bias": {"target_modules": ["q_proj"], "lora_bias": True},
        "embedding": {"target_modules": ["embed_tokens"]},
        "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "tied head": {"target_modules": ["lm_head"]},
    }
    tied = {"tie_word_embeddings": how == "tied head"}
    model = build(Case("qwen2" if how == "lora_bias" else "mistral", changes=tied))
    if how in adapters:
        model = get_peft_model(model, LoraConfig(r=2, **adapters[how]))
    parts = parts_of(model)
    if how == "no attention":
        parts.config.base_model_tp_plan = {f"layers.*.mlp.{name}": "colwise" for name in MLP[:2]}
        parts.config.base_model_tp_plan["layers.*.mlp.down_proj"] = "rowwise"
    if how == "nothing summed":
        parts.config.base_model_tp_plan = {f"layers.*.self_attn.{name}": "colwise" for name in ATTENTION[:3]}
    if how == "a parameter":
        parts.layers[2].self_attn.temperature = nn.Parameter(torch.ones(4))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("x" if how == "mesh" else "tp",))
    before = list(model.parameters())
    try:
        shard_layers(model, mesh)
        said = "cut"
    except ValueError as error:
        said = str(error)
    return [said, all(a is b for a, b in zip(before, model.parameters(), strict=True))]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mesh", "mesh: 1-D with names ('x',); give a 1-D mesh named 'tp'"),
        ("dora", "tp: layers.0.self_attn.q_proj has an adapter that is no plain LoRA"),
        ("lora_bias", "tp: layers.0.self_attn.q_proj has an adapter that is no plain LoRA"),
        ("embedding", "tp: the embedding is a Embedding of peft; adapters on it are not supported"),
        ("saved head", "tp: the head is a ModulesToSaveWrapper"),
        ("tied head", "tp: an adapter on a head that shares its weight with the embedding is not supported"),
        ("no attention", "tp: layers.0 has no attention that transformers says how to cut"),
        ("nothing summed", "tp: layers.0.self_attn has not one projection whose results are summed"),
        ("a parameter", "tp: layers.2.self_attn has a parameter temperature of its own"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name_before_anything_is_cut(how: str, message: str) -> None:
    for said, as_it_was in run_ranks(refused, 2, how):
        assert message in said
        assert as_it_was
