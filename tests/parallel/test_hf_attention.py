"""What a model's layers declare is honoured or refused by name: padding, packing, sinks, windows, caches."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import EDGES, SIZES, build, tokens
from transformers import AutoModelForCausalLM, GptOssConfig, MistralConfig, Qwen2Config

from dense import relative_rms
from ringspan.dist_attn import Causal, parse_mask, shard
from ringspan.parallel.context import IGNORE, SequenceContext
from ringspan.parallel.hf_attention import ringspan_attention
from ringspan.parallel.testing import run_ranks


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_dropped(side: str) -> None:
    """Without a context, transformers' attention_mask is honoured: real tokens never see padding."""
    ids, mask = tokens(), torch.ones(2, 45, dtype=torch.long)
    mask[1, slice(0, 9) if side == "left" else slice(36, 45)] = 0
    truth = build("llama", torch.float64, "sdpa").eval()(input_ids=ids, attention_mask=mask, use_cache=False).logits
    model = build("llama", torch.float64).eval()
    found = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert relative_rms(found[mask.bool()], truth[mask.bool()]) < 1e-9
    context = SequenceContext()
    local = context.shard(
        {
            "input_ids": ids,
            "labels": ids,
            "attention_mask": mask,
            "position_ids": torch.arange(45).expand(2, -1),
        }
    )
    assert bool((local.pop("shift_labels")[mask == 0] == IGNORE).all())
    found = model(**local, **context.kwargs()).logits
    assert relative_rms(found[mask.bool()], truth[mask.bool()]) < 1e-9


def test_packed_position_ids_keep_documents_apart_without_a_context() -> None:
    positions = torch.cat([torch.arange(b - a) for a, b in zip(EDGES, EDGES[1:], strict=False)])[None]
    truth = (
        build("llama", torch.float64, "sdpa")
        .eval()(input_ids=tokens(1), position_ids=positions, use_cache=False)
        .logits
    )
    found = build("llama", torch.float64).eval()(input_ids=tokens(1), position_ids=positions, use_cache=False).logits
    assert relative_rms(found, truth) < 1e-9


def test_learned_sinks_of_the_model_are_honoured() -> None:
    config = GptOssConfig(
        **{**SIZES, "num_hidden_layers": 2},
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=64,
    )
    models = []
    for implementation in ("eager", "ringspan"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                torch.nn.init.constant_(parameter, 2.0)
        models.append(model)
    context = SequenceContext()
    truth = models[0](input_ids=tokens(), use_cache=False).logits
    found = models[1](**context.shard({"input_ids": tokens()}), **context.kwargs()).logits
    assert relative_rms(found, truth) < 1e-5
    torch.nn.init.constant_(models[1].model.layers[0].self_attn.sinks, -2.0)
    other = models[1](**context.shard({"input_ids": tokens()}), **context.kwargs()).logits
    assert relative_rms(other, truth) > 1e-3  # they do act


class Layer(torch.nn.Module):
    layer_idx = 3
    is_causal = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout": 0.1}, r"layer 3 \(Layer\): attention_dropout 0.1"),
        ({"sliding_window": 5, "is_causal": False}, r"layer 3 \(Layer\): sliding_window 5 without a causal mask"),
        ({"softcap": 30.0}, "softcap is not supported"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"cu_seq_lens_q": torch.tensor([0, 6])}, "cu_seq_lens_q is not supported"),
        ({"key": torch.zeros(1, 2, 9, 8)}, "9 keys for 6 queries: a KV cache"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "attention_mask of 4 dimensions"),
        ({"value": torch.zeros(1, 2, 6, 4)}, r"layer 3 \(Layer\): q, k, v: shapes"),
    ],
)
def test_what_is_not_built_is_refused_by_layer_name(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "query": torch.zeros(1, 4, 6, 8),
        "key": torch.zeros(1, 2, 6, 8),
        "value": torch.zeros(1, 2, 6, 8),
        "attention_mask": None,
    }
    ringspan_attention(Layer(), **given)
    with pytest.raises(ValueError, match=message):
        ringspan_attention(Layer(), **{**given, **change})


def windowed(kind: str, implementation: str) -> Any:
    """A window of 16: Mistral has it in every layer, Qwen2 in all but the first, gpt-oss in every other."""
    config = {
        "mistral": lambda: MistralConfig(**SIZES, sliding_window=16),
        "qwen2": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1),
        "gpt_oss": lambda: GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=16),
    }[kind]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32).eval()


def windows(group: dist.ProcessGroup | None, kind: str) -> list[float]:
    """Return the error of the logits, how far they are from those without windows, and how many masks there are."""
    context = SequenceContext(group)
    model = windowed(kind, "ringspan")
    found = model(**context.shard({"input_ids": tokens()}), **context.kwargs()).logits
    truth = windowed(kind, "eager")(input_ids=tokens(), use_cache=False).logits
    wide = SequenceContext(group, mask=Causal())
    other = model(**wide.shard({"input_ids": tokens()}), **wide.kwargs()).logits
    mine = shard(truth, context.layout, group) if group is not None else truth
    return [relative_rms(found, mine), relative_rms(other, mine), len(set(context.layer_masks.values()))]


@pytest.mark.parametrize(("kind", "kinds"), [("mistral", 1), ("qwen2", 2), ("gpt_oss", 2)])
@pytest.mark.parametrize("world", [1, 2])
def test_sliding_windows_that_a_model_declares_are_honoured(kind: str, kinds: int, world: int) -> None:
    results = [windows(None, kind)] if world == 1 else run_ranks(windows, world, kind)
    for error, without, masks in results:
        assert error < 1e-5
        assert without > 1e-3  # they do act
        assert masks == kinds


def test_a_mask_of_the_context_takes_the_place_of_the_layers_own() -> None:
    mask = parse_mask("causal & (window(7) | sinks(2))")
    model = build("llama", torch.float64).eval()
    context = SequenceContext(mask=mask)
    found = model(**context.shard({"input_ids": tokens()}), **context.kwargs()).logits
    position = torch.arange(45)
    distance = position[:, None] - position
    table = (distance >= 0) & ((distance <= 7) | (position < 2))
    stock = build("llama", torch.float64, "sdpa").eval()
    truth = stock(input_ids=tokens(), attention_mask=table[None, None].expand(2, 1, -1, -1), use_cache=False).logits
    assert relative_rms(found, truth) < 1e-9


def no_context(group: dist.ProcessGroup) -> str:
    del group
    try:
        build("llama", torch.float32)(input_ids=tokens(), use_cache=False)
    except ValueError as error:
        return str(error)
    return "ran"


def test_ranks_without_a_context_raise() -> None:
    assert all("layer 0 (LlamaAttention): 2 ranks and no context" in said for said in run_ranks(no_context, 2))


def half_a_context(group: dist.ProcessGroup) -> str:
    context = SequenceContext(group)
    local = context.shard({"input_ids": tokens()})
    del local["document_boundaries"]
    try:
        build("llama", torch.float32)(**local, **context.kwargs())
    except ValueError as error:
        return str(error)
    return "ran"


def test_a_shard_without_its_boundaries_is_refused() -> None:
    assert all("document_boundaries is missing" in said for said in run_ranks(half_a_context, 2))
