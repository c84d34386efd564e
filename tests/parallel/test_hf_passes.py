"""A pass through a model: recomputed without a second exchange, beside other models, and after an exception."""

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_layers import batch, build_model, context_of, sharded

from dense import relative_rms
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.hf_attention import NAME, Forward
from ringspan.parallel.testing import run_ranks

EDGES = [0, 10, 11, 30, 45]


def difference(found: tuple[float, dict[str, Any]], truth: tuple[float, dict[str, Any]]) -> float:
    gradients = max(relative_rms(found[1][name], each) for name, each in truth[1].items())
    return max(abs(found[0] - truth[0]) / abs(truth[0]), gradients)


def recomputed(group: dist.ProcessGroup, kind: str, reentrant: bool) -> list[float]:
    """Return the difference that checkpointing makes, and the bytes: without it, with kept attention, without."""
    plain = context_of(group, "zigzag")
    truth = sharded(build_model(kind, 9, torch.float64), plain, EDGES, None)
    worst, received = 0.0, [plain.traffic.received_payload]
    for keep in (True, False):
        model = build_model(kind, 9, torch.float64)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        context = context_of(group, "zigzag", keep_attention=keep)
        worst = max(worst, difference(sharded(model, context, EDGES, None), truth))
        received.append(context.traffic.received_payload)
    return [worst, *received]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["mistral", "gpt_oss"])
def test_a_recompute_gives_the_same_and_moves_nothing_again(kind: str, reentrant: bool) -> None:
    results = run_ranks(recomputed, 2, kind, reentrant)
    for worst, without, kept, _ in results:
        assert worst == 0.0  # what was kept is what was computed
        assert kept == without
    assert sum(result[3] for result in results) > sum(result[1] for result in results)  # the layers are recomputed


def passes(context: SequenceContext, model: Any, local: dict[str, Any]) -> tuple[Forward, torch.Tensor]:
    keywords = context.kwargs()
    return keywords[NAME], model(**local, **keywords).logits


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_kept_goes_with_the_backward_pass(reentrant: bool) -> None:
    model = build_model("mistral", 9, torch.float32)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    context = SequenceContext(keep_attention=True)
    local = context.shard(batch(EDGES))
    del local["shift_labels"]
    forward, logits = passes(context, model, local)
    assert sorted(forward.kept) == [0, 1, 2]
    logits.sum().backward()
    assert forward.kept == {}
    with torch.no_grad():
        forward, _ = passes(context, model.eval(), local)
    assert forward.kept == {}  # nobody would come for it


def test_keywords_of_one_batch_do_not_serve_another() -> None:
    model = build_model("mistral", 9, torch.float32)
    context = SequenceContext(keep_attention=True)
    keywords = context.kwargs()
    for step, edges in enumerate((EDGES, [0, 45])):
        local = context.shard(batch(edges))
        del local["shift_labels"]
        if step:
            with pytest.raises(
                ValueError, match=r"layer 0 \(MistralAttention\): one context.kwargs\(\) for two batches"
            ):
                model(**local, **keywords)
        else:
            model(**local, **keywords)


def two_models(group: dist.ProcessGroup) -> list[float]:
    """Two models with contexts of their own, their passes in turns, their backwards in the order of neither."""
    kinds, layouts, keeps = ("qwen2", "gemma3"), ("zigzag", "contiguous"), (False, True)
    alone = [
        sharded(build_model(kind, 9, torch.float64), context_of(group, layout), EDGES, None)
        for kind, layout in zip(kinds, layouts, strict=True)
    ]
    models = [build_model(kind, 9, torch.float64) for kind in kinds]
    contexts = [context_of(group, layout, keep_attention=keep) for layout, keep in zip(layouts, keeps, strict=True)]
    losses, given = [], batch(EDGES)
    count = int(SequenceContext().shard(given)["shift_labels"].ne(-100).sum())
    for model, context in zip(models, contexts, strict=True):
        local = context.shard(given)
        labels = local.pop("shift_labels").flatten()
        logits = model(**local, **context.kwargs()).logits.flatten(0, 1)
        losses.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count)
    worst = 0.0
    for model, loss, (_, truth) in zip(models, losses, alone, strict=True):
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=group)
            worst = max(worst, relative_rms(parameter.grad, truth[name]))
    return [worst]


def test_two_models_with_contexts_of_their_own_do_not_meet() -> None:
    assert all(worst <= 1e-12 for (worst,) in run_ranks(two_models, 2))


class Poison(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"poisoned at {tuple(x.shape)[-1]} features")


def poisoned(group: dist.ProcessGroup | None, recompute: bool) -> list[Any]:
    """A layer raises in the middle of a forward pass, on all ranks; then the model is healed and runs again."""
    model = build_model("qwen2", 9, torch.float64)
    truth = sharded(build_model("qwen2", 9, torch.float64), context_of(group, "zigzag"), EDGES, None)
    context = context_of(group, "zigzag", keep_attention=recompute)
    if recompute:
        model.activation_checkpointing_enable({"use_reentrant": False})
    good, model.model.layers[1].mlp = model.model.layers[1].mlp, Poison()
    local = context.shard(batch(EDGES))
    del local["shift_labels"]
    keywords = context.kwargs()
    left, said = weakref.ref(keywords[NAME]), ""
    try:
        model(**local, **keywords)
    except RuntimeError as error:
        said = str(error)
    del keywords
    gc.collect()
    model.model.layers[1].mlp = good
    return [said, left() is None, difference(sharded(model, context, EDGES, None), truth)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("world", [1, 2])
def test_after_an_exception_the_model_works_and_nothing_is_left(world: int, recompute: bool) -> None:
    results = [poisoned(None, recompute)] if world == 1 else run_ranks(poisoned, world, recompute)
    for said, gone, worst in results:
        assert said == "poisoned at 32 features"
        assert gone
        assert worst == 0.0
