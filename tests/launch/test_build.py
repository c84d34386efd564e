"""What a config's names stand for in the library, and the layout that a model's layers ask for."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tiny_layers import batch, build_model, config_of

from ringspan.configs.load import load
from ringspan.configs.schema import Attention, Config
from ringspan.dist_attn import Causal, Window
from ringspan.dist_attn.balanced import Balanced
from ringspan.dist_attn.cost import typical
from ringspan.dist_attn.strategies import NAMES
from ringspan.launch import build
from ringspan.launch.plan_inputs import layer_masks
from ringspan.launch.ranks import Place
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.faults import Fault

KINDS = ("mistral", "qwen2", "qwen3", "qwen2_moe", "gemma2", "gemma3", "gpt_oss")


def config(layout: str, mask: str | None = None, strategy: str = "auto", cp: int = 1) -> Config:
    return Config.model_validate(
        {
            "model": {"config": {"model_type": "llama"}, "tokenizer": "t"},
            "data": {"path": "d", "seq_length": 64},
            "train": {"max_steps": 1, "output_dir": "o"},
            "attention": {"layout": layout, "strategy": strategy} | ({} if mask is None else {"mask": mask}),
            "parallel": {"cp": cp},
        }
    )


def test_the_config_names_every_strategy() -> None:
    assert sorted(get_args(Attention.model_fields["strategy"].annotation)) == sorted(NAMES)


@pytest.mark.parametrize("layout", get_args(Attention.model_fields["layout"].annotation))
def test_every_layout_of_the_config_is_built(layout: str) -> None:
    made = build.make_layout(config(layout), config_of("gemma3", 9))
    assert type(made).__name__.lower() == layout
    assert sum(made.share(rank, 3, 45) for rank in range(3)) == 45


def test_balanced_counts_the_layers_of_each_kind() -> None:
    made = build.make_layout(config("balanced"), config_of("gemma3", 9))
    assert isinstance(made, Balanced)
    assert sorted(made.layers, key=lambda each: each[1]) == [(Causal(), 1), (Causal() & Window(8), 2)]
    made = build.make_layout(config("balanced", "s2_attention(16)"), config_of("gemma3", 9))
    assert isinstance(made, Balanced)
    assert [(str(mask), layers) for mask, layers in made.layers] == [("s2_attention(16)", 3)]
    assert made.kv_heads == 2


def test_a_layer_that_cannot_be_computed_is_refused_before_the_layout() -> None:
    hf_config = config_of("gemma3", 9)
    hf_config.layer_types = ["sliding_attention", "chunked_attention", "full_attention"]
    with pytest.raises(Fault, match="layer 1 of gemma3_text is of type 'chunked_attention'"):
        build.make_layout(config("balanced"), hf_config)


def test_a_strategy_that_cannot_serve_so_many_ranks_is_refused_before_they_start() -> None:
    build._check_strategy(config("zigzag", strategy="ulysses", cp=4), config_of("gemma3", 9))
    with pytest.raises(Fault, match=r"^attention.strategy: 'ulysses' .*4 query heads"):
        build._check_strategy(config("zigzag", strategy="ulysses", cp=5), config_of("gemma3", 9))


@pytest.mark.parametrize("kind", KINDS)
def test_the_masks_read_from_a_config_are_those_its_layers_have(kind: str) -> None:
    model, context = build_model(kind, 9, torch.float32), SequenceContext()
    local = context.shard(batch([0, 45]))
    del local["shift_labels"]
    model(**local, **context.kwargs())
    assert layer_masks(model.config) == [str(context.layer_masks[index]) for index in range(3)]


def test_measured_speeds_and_a_narrow_wire_reach_the_context(tiny: Any, tmp_path: Path) -> None:
    typical("cpu").save(tmp_path / "links.json")
    sections = {"attention": {"costs": str(tmp_path / "links.json"), "gradient_dtype": "bfloat16"}}
    config = load(tiny.config("run", **sections))
    context = build.make_context(config, Place(0, 1, torch.device("cpu"), None))
    assert context.costs == typical("cpu")
    assert context.gradient_dtype == torch.bfloat16
    (tmp_path / "links.json").write_text("{}")
    with pytest.raises(Fault, match=r"attention.costs: .*links.json.*benchmarks/links.py"):
        build.check_inputs(config)
