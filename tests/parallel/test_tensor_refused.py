"""What tensor parallelism cannot cut is refused in one line, by name, before anything is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tensor_cases import ATTENTION, MLP, Case, build
from tiny import SIZES
from tiny_layers import config_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, Phi3Config

from ringspan.parallel.parts import parts_of
from ringspan.parallel.tensor import check_tensor, shard_layers
from ringspan.parallel.testing import run_ranks

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
        block: Any = parts.layers[2].self_attn
        block.temperature = nn.Parameter(torch.ones(4))
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
