"""Models whose layers differ give on several ranks the loss and every gradient of stock transformers on one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_layers import batch, build_model, config_of, context_of, sharded, stock
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, Gemma2Config, Llama4TextConfig
from transformers.masking_utils import causal_mask_function

from dense import relative_rms
from ringspan.dist_attn import Causal, ZigZag, plan
from ringspan.dist_attn.strategies import TABLE
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.hf_mask import declared, ringspan_mask
from ringspan.parallel.testing import run_ranks

# Some round inside, whatever their dtype: in their norms, or eager attention's weights, to fp32.
BOUND = {"gemma2": 1e-5, "gemma3": 1e-5, "gpt_oss": 1e-5}
PACKED, WHOLE = [0, 10, 11, 30, 45], [0, 45]
# A shard has 22 or 23 tokens of two ranks, 15 of three: windows shorter than one, and longer.
CASES = [
    ("mistral", 5, "zigzag", PACKED, None),
    ("mistral", 40, "contiguous", WHOLE, None),
    ("qwen2", 5, "contiguous", PACKED, 12),
    ("qwen2", 40, "zigzag", WHOLE, None),
    ("qwen3", 7, "zigzag", WHOLE, 12),
    ("qwen3", 31, "contiguous", PACKED, None),
    ("qwen3", 9, "balanced", PACKED, None),
    ("qwen2_moe", 6, "striped", PACKED, None),
    ("gemma2", 5, "contiguous", PACKED, None),
    ("gemma2", 40, "zigzag", WHOLE, 12),
    ("gemma3", 8, "zigzag", PACKED, None),
    ("gemma3", 9, "balanced", WHOLE, None),
    ("gpt_oss", 5, "zigzag", PACKED, None),
    ("gpt_oss", 40, "contiguous", PACKED, 12),
]


def compare(
    group: dist.ProcessGroup | None,
    kind: str,
    window: int,
    layout: str,
    edges: list[int],
    scored: int | None,
) -> list[Any]:
    """Return the errors of the loss and of the worst gradient, its name, and the masks the layers had."""
    context = context_of(group, layout)
    loss, grads = sharded(build_model(kind, window, torch.float64), context, edges, scored)
    masks = [str(context.layer_masks[index]) for index in range(3)]
    if context.rank:
        return [0.0, 0.0, "", masks]  # the sums are the same everywhere: one rank compares them
    loss_truth, grads_truth = stock(kind, window, torch.float64, edges, scored)
    errors = {name: relative_rms(grads[name], truth) for name, truth in grads_truth.items()}
    worst = max(errors, key=lambda name: errors[name])
    return [abs(loss - loss_truth) / loss_truth, errors[worst], worst, masks]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])))
def test_every_gradient_is_that_of_stock_transformers_on_one_rank(case: tuple[Any, ...], world: int) -> None:
    kind, window = case[:2]
    for loss, gradient, name, masks in [compare(None, *case)] if world == 1 else run_ranks(compare, world, *case):
        assert loss <= BOUND.get(kind, 1e-9)
        assert gradient <= BOUND.get(kind, 1e-9), name
        sliding = f"causal & window({window - 1})"
        first, second, third = ("causal", sliding, sliding) if kind == "qwen2" else (sliding, "causal", sliding)
        assert masks == [sliding] * 3 if kind == "mistral" else masks == [first, second, third]


def by_strategy(group: dist.ProcessGroup, strategy: str, keep: bool) -> list[Any]:
    """The model of most kinds of layers, through one strategy; with checkpointing, where attention is kept."""
    on_mesh = TABLE[strategy].refuses(PROBLEM) is not None
    world = dist.get_world_size(group)
    ranks = init_device_mesh("cpu", (2, world // 2)) if on_mesh else group
    model = build_model("gpt_oss", 7, torch.float64)
    if keep:
        model.activation_checkpointing_enable({"use_reentrant": False})
    context = context_of(ranks, "zigzag", strategy=strategy, keep_attention=keep)
    found = sharded(model, context, PACKED, None)
    if context.rank:
        return [0.0, context.decisions]
    truth = stock("gpt_oss", 7, torch.float64, PACKED, None)
    return [max(relative_rms(found[1][name], each) for name, each in truth[1].items()), context.decisions]


# A flat group; strategies that it does not serve run on a mesh.
PROBLEM = plan(Causal(), ZigZag(), world=4, length=64, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64).problem


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("strategy", TABLE)
def test_every_strategy_serves_windows_sinks_and_documents_in_one_model(strategy: str, keep: bool) -> None:
    for error, decisions in run_ranks(by_strategy, 4, strategy, keep):
        assert error <= BOUND["gpt_oss"]
        assert sorted(decisions) == ["causal", "causal & window(6)"]
        assert all(why.startswith(f"{strategy}:") for why in decisions.values())


def test_the_cases_would_notice_a_dropped_window_and_dropped_sinks() -> None:
    """Without them the loss is another one: so the comparison above means something."""
    for kind in ("mistral", "qwen2", "qwen3", "qwen2_moe", "gemma2", "gemma3", "gpt_oss"):
        losses = [stock(kind, window, torch.float32, WHOLE, None)[0] for window in (5, 45)]
        assert abs(losses[0] - losses[1]) > 1e-3 * losses[1], kind
    model = build_model("gpt_oss", 45, torch.float32)
    before, _ = sharded(model, SequenceContext(), WHOLE, None)
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.constant_(parameter, -torch.inf)
    assert abs(sharded(model, SequenceContext(), WHOLE, None)[0] - before) > 1e-4 * before


def refused(group: dist.ProcessGroup | None, config: Any) -> str:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="ringspan", dtype=torch.float32)
    context = SequenceContext(group)
    local = context.shard(batch(WHOLE))
    del local["shift_labels"]
    try:
        model(**local, **context.kwargs())
    except ValueError as error:
        return str(error)
    return "ran"


def test_soft_caps_are_refused_by_layer_name() -> None:
    sizes = {**config_of("gemma2", 5).to_dict(), "attn_logit_softcapping": 50.0}
    message = "layer 0 (Gemma2Attention): softcap is not supported"
    for said in [refused(None, Gemma2Config(**sizes)), *run_ranks(refused, 2, Gemma2Config(**sizes))]:
        assert message in said


def test_chunked_attention_is_refused_and_not_taken_for_causal() -> None:
    config = Llama4TextConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=16,
    )
    assert "attention_chunk_size 16" in refused(None, config)


def blockwise(*_: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_function": blockwise}, "the model's mask holds blockwise"),
        ({"use_vmap": True}, "composes its own attention mask function"),
        ({"attention_mask": torch.ones(1, 3, 3)}, r"attention_mask: shape \(1, 3, 3\); must be \[batch, tokens\]"),
    ],
)
def test_masks_that_no_expression_stands_for_are_refused(given: dict[str, Any], message: str) -> None:
    assert ringspan_mask(mask_function=causal_mask_function) is None
    with pytest.raises(ValueError, match=message):
        ringspan_mask(**{"mask_function": causal_mask_function, **given})


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_padding_and_window_pass_through_one_tensor(window: int | None, padded: bool) -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = not padded
    padding, found = declared(ringspan_mask(attention_mask=mask, local_size=window))
    assert found == window
    assert (padding is not None) == padded
    assert padding is None or bool((padding == mask).all())
