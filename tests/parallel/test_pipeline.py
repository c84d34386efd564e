"""Pipelines refuse what they cannot run; stages name their weights as the whole model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from tiny import SIZES
from transformers import AutoModelForCausalLM, GraniteConfig, LlamaConfig, Starcoder2Config

import ringspan.parallel.context  # noqa: F401 - registers "ringspan" with transformers
from ringspan.finetune.loss import ChunkedLoss
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.mesh import Sizes, mesh_of
from ringspan.parallel.parts import parts_of
from ringspan.parallel.pipeline import Pipeline, check_pipeline
from ringspan.parallel.pipeline_stage import Stage, check_decoder
from ringspan.parallel.scorer import Direct, Scorer
from ringspan.parallel.testing import run_ranks

EDGES = ([0, 10, 11, 30, 45], [0, 45], [0, 7, 45], [0, 44, 45])


def model(tied: bool, lora: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 5, "tie_word_embeddings": tied, "initializer_range": 0.2})
    made = AutoModelForCausalLM.from_config(config, attn_implementation="ringspan", dtype=torch.float64)
    return get_peft_model(made, LoraConfig(r=2, target_modules="all-linear")) if lora else made


def batches(context: SequenceContext, lengths: tuple[list[int], ...] = EDGES) -> list[dict[str, Any]]:
    made = []
    for number, edges in enumerate(lengths):
        ids = torch.randint(0, 97, (2, edges[-1]), generator=torch.Generator().manual_seed(number))
        made.append(context.shard({"input_ids": ids, "labels": ids, "document_boundaries": edges}) | context.kwargs())
    return made


def piped(group: dist.ProcessGroup, schedule: str, tied: bool, lora: bool) -> list[Any]:
    mesh, context = mesh_of(Sizes(pp=dist.get_world_size(group)), "cpu"), SequenceContext()
    whole = model(tied, lora)
    names = {name for name, _ in whole.named_parameters()}
    truth = model(tied, lora)
    plain = Direct(Scorer(truth, ChunkedLoss(7)))
    right = plain.backward(batches(context), 0.1)
    judged = plain.losses(batches(context)[1])
    assert judged is not None
    pipeline = Pipeline(
        whole, mesh["pp"], schedule=schedule, micro_batches=len(EDGES), loss=ChunkedLoss(7),
        batch=2, tokens=45, length=45,
    )  # fmt: skip
    found = pipeline.losses(batches(context)[1])  # before the schedule knows its sizes, and after
    loss = pipeline.backward(batches(context), 0.1)
    again = pipeline.losses(batches(context)[1])
    pipeline.sum_tied()
    held = dict(pipeline.named_parameters())
    assert set(held) <= names
    assert pipeline.copies <= set(held)
    stock = dict(truth.named_parameters())
    worst = 0.0
    for name, parameter in held.items():
        grad = stock[name].grad
        if grad is not None:
            assert parameter.grad is not None, name
            worst = max(worst, float((parameter.grad - grad).abs().max() / grad.abs().max()))
    same = [None if each is None else [bool(torch.allclose(a, b)) for a, b in zip(each, judged, strict=True)]
            for each in (found, again)]  # fmt: skip
    parts = sorted(name for name, _ in pipeline.named_modules() if name.endswith("self_attn"))
    return [float(loss), float(right), worst, same, sorted(held), sorted(pipeline.copies), parts]


@pytest.mark.parametrize(
    ("schedule", "world", "tied", "lora"),
    [
        ("gpipe", 2, False, False),
        ("1f1b", 3, True, False),
        ("1f1b", 2, True, True),
        ("interleaved", 2, True, False),
        ("zero_bubble", 2, False, False),
    ],
)
def test_stages_together_are_the_model(schedule: str, world: int, tied: bool, lora: bool) -> None:
    ranks = run_ranks(piped, world, schedule, tied, lora)
    assert sum(found[0] for found in ranks) == pytest.approx(ranks[0][1], rel=1e-12)
    assert [found[0] != 0 for found in ranks] == [False] * (world - 1) + [True]
    for rank, (_, _, worst, same, names, copies, _) in enumerate(ranks):
        assert worst <= 1e-9
        assert same == ([[True, True]] * 2 if rank == world - 1 else [None, None])
        assert bool(copies) == (tied and rank == world - 1)
        assert len(names) == len(set(names))
    held = [name for found in ranks for name in found[4] if name not in found[5]]
    assert sorted(held) == sorted(name for name, _ in model(tied, lora).named_parameters())
    attention = [name for found in ranks for name in found[6]]
    assert sorted(attention) == [name for name, _ in model(tied, lora).named_modules() if name.endswith("self_attn")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, 8, "1f1b", 8), r"pp: 1f1b makes 8 stages, and 4 layers are too few for them; lower pp"),
        ((4, 4, "interleaved", 8), r"8 stages \(2 on each of 4 ranks\), and 4 layers are too few.*schedule=1f1b"),
        ((8, 2, "interleaved", 5), r"2 rounds \(5 micro-batches / pp 2\), which do not divide 5; make gradient_acc"),
        ((8, 2, "dance", 5), "schedule: 'dance' is not one of gpipe, 1f1b, interleaved, zero_bubble"),
    ],
)
def test_what_cannot_run_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_pipeline(*arguments)


def scaled(factor: float, **settings: Any) -> Any:
    """A decoder that multiplies whatever it is given by ``factor``, an embedding or not."""
    sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
    return from_config(GraniteConfig(**sizes, embedding_multiplier=factor, **settings))


def from_config(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config, attn_implementation="ringspan", dtype=torch.float32).eval()


def test_a_decoder_that_changes_hidden_states_outside_of_its_layers_is_refused() -> None:
    dropping = from_config(Starcoder2Config(**SIZES, embedding_dropout=0.1))
    for made, name in ((scaled(12.0), "GraniteForCausalLM"), (dropping, "Starcoder2ForCausalLM")):
        with pytest.raises(ValueError, match=f"{name}'s decoder changes hidden states outside of its .* set pp to 1"):
            check_decoder(made)
        assert not made.training
        assert not parts_of(made).decoder.training


def test_a_decoder_that_needs_token_ids_in_every_stage_is_refused_in_one_line() -> None:
    made = from_config(LlamaConfig(**SIZES))

    def forward(**given: Any) -> Any:
        return given["input_ids"] + 1

    parts_of(made).decoder.forward = forward
    with pytest.raises(ValueError, match=r"does not run on hidden states alone.*KeyError: 'input_ids'\); set pp to 1$"):
        check_decoder(made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_decoders_are_let_through_and_stay_as_they_are(dtype: torch.dtype) -> None:
    for made in (scaled(1.0), from_config(Starcoder2Config(**SIZES, embedding_dropout=0.0)), model(True, True)):
        parts = parts_of(made.to(dtype))
        check_decoder(made)
        assert (len(parts.layers), parts.norm, parts.config.num_hidden_layers) == (
            parts.config.num_hidden_layers, parts_of(made).norm, len(parts.layers),
        )  # fmt: skip


def test_a_stage_has_its_own_part_of_every_list_by_layer() -> None:
    whole = model(False, False)
    config: Any = parts_of(whole).decoder.config
    kinds, thetas = ["full_attention"] * 4 + ["sliding_attention"], [1e4, 1e3, 1e2, 10.0, 1.0]
    config.layer_types, config.layer_rope_theta, config.eos_token_id = kinds, thetas, [1, 2, 3, 4, 5]
    stage = Stage(whole, range(2, 5), ChunkedLoss(7), tokens=45, share=lambda count: count, dtype=torch.float64)
    own: Any = stage.decoder.config
    assert (own.num_hidden_layers, own.layer_types, own.layer_rope_theta) == (3, kinds[2:], thetas[2:])
    assert own.eos_token_id == [1, 2, 3, 4, 5]
    assert (config.num_hidden_layers, config.layer_types, config.layer_rope_theta) == (5, kinds, thetas)


def wrong_sizes(group: dist.ProcessGroup) -> list[Any]:
    """What is said of wrong batches, and whether a shorter batch is judged as one rank does."""
    context, whole = SequenceContext(), model(False, False)
    shorter = batches(context, ([0, 5, 31],))[0]
    truth = Direct(Scorer(model(False, False), ChunkedLoss(7))).losses(shorter)
    pipeline = Pipeline(
        whole, mesh_of(Sizes(pp=2), "cpu")["pp"], schedule="1f1b", micro_batches=4, loss=ChunkedLoss(7),
        batch=2, tokens=40, length=45,
    )  # fmt: skip
    said = []
    for given in (batches(context)[:3], batches(context), [{**shorter, "input_ids": torch.zeros(3, 31)}] * 4):
        try:
            pipeline.backward(given, 1.0)
        except ValueError as error:
            said.append(str(error))
    found = pipeline.losses(shorter)
    assert truth is not None
    return [said, None if found is None else [bool(torch.allclose(a, b)) for a, b in zip(found, truth, strict=True)]]


def test_batches_that_do_not_fit_are_refused_before_anything_is_sent() -> None:
    ranks = run_ranks(wrong_sizes, 2)
    for said, _ in ranks:
        assert said == [
            "batches: 3, but the schedule is of micro_batches=4",
            "batches: number 0 has 2 x 45 tokens, and what travels between stages holds 2 x 40; "
            "give the pipeline batch=2 and tokens of at least 45",
            "batches: number 0 has 3 x 31 tokens, and what travels between stages holds 2 x 40; "
            "give the pipeline batch=3 and tokens of at least 31",
        ]
    assert [same for _, same in ranks] == [None, [True, True]]
