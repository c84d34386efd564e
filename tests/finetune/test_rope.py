"""RoPE scaling: the factor from the target, the config that carries it, the live module that uses it."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ringspan.finetune import rope
from ringspan.parallel.faults import Fault


def config(**more: object) -> LlamaConfig:
    sizes = {
        "vocab_size": 11,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaConfig(
        **{
            **sizes,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            **more,
        }
    )


@pytest.mark.parametrize("kind", rope.TYPES)
def test_the_live_module_uses_the_scaling(kind: str) -> None:
    scaled = config()
    made = rope.work_out(scaled, kind, target_length=8192)
    assert made.factor == 16
    rope.apply(scaled, made)
    model = AutoModelForCausalLM.from_config(scaled, attn_implementation="sdpa")
    rope.check(model, made)
    assert scaled.max_position_embeddings == 8192
    # Angles of the far positions differ from the unscaled model's: the scaling is no name only.
    plain = AutoModelForCausalLM.from_config(config(), attn_implementation="sdpa")
    with pytest.raises(Fault, match="the live model.rotary_emb does not use"):
        rope.check(plain, made)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_formulas_agree_with_transformers(kind: str) -> None:
    scaled = config()
    made = rope.work_out(scaled, kind, target_length=4096)
    rope.apply(scaled, made)
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](scaled, torch.device("cpu"))
    assert torch.allclose(inv_freq.double(), made.inv_freq, rtol=1e-6)
    assert scaling == pytest.approx(made.attention_scaling)


def test_dynamic_is_resolved_at_the_target_length() -> None:
    """transformers' own dynamic formula at that length, and the same at every length afterwards."""
    theirs = config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0})
    inv_freq, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, torch.device("cpu"), seq_len=4096)
    ours = config()
    made = rope.work_out(ours, "dynamic", target_length=4096)
    assert torch.allclose(inv_freq.double(), made.inv_freq, rtol=1e-6)
    rope.apply(ours, made)
    assert dict(ours.rope_parameters or {})["rope_type"] == "default"
    model = AutoModelForCausalLM.from_config(ours, attn_implementation="sdpa")
    model(input_ids=torch.zeros(1, 600, dtype=torch.long))  # a longer input than the original window changes nothing
    rope.check(model, made)


def test_a_factor_may_be_given() -> None:
    made = rope.work_out(config(), "linear", target_length=600, factor=4.0)
    assert made.factor == 4.0
    assert str(made) == "linear x4 (512 -> 600 tokens)"


@pytest.mark.parametrize(
    ("given", "kind", "target", "message"),
    [
        ({}, "linear", 512, "target length 512 is within the model's 512 positions"),
        ({}, "longer", 1024, "rope.type: 'longer' is not one of linear, dynamic, yarn, llama3"),
        (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "yarn",
            4096,
            "already scaled",
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 0.5,
                }
            },
            "yarn",
            4096,
            "partial",
        ),
    ],
)
def test_what_cannot_be_scaled_is_refused(given: dict[str, object], kind: str, target: int, message: str) -> None:
    with pytest.raises(Fault, match=message):
        rope.work_out(config(**given), kind, target_length=target)
