"""torch.compile of the model around our attention: what eager gives, and other documents compile nothing anew."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
import torch.distributed as dist
from tiny_layers import build_model, context_of, sharded
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from ringspan.kernels.mask import parse
from ringspan.parallel.context import SequenceContext
from ringspan.parallel.testing import run_ranks

# Ten packings of one length: few and many documents, long and short ones, and none at all.
PACKINGS = [
    [0, 30, 45],
    [0, 5, 6, 7, 45],
    [0, 45],
    [0, 12, 45],
    [0, *range(10, 41, 3), 45],
    [0, 44, 45],
    [0, 1, 2, 45],
    list(range(40)) + [45],
    [0, 22, 23, 45],
    [0, 31, 45],
]


# Where a graph ends, the compiler looks whether the tensors it gets have a gradient; these are no leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, whole: bool, gradients: bool, fullgraph: bool) -> tuple[Any, list[int]]:
    """Compile the model, or each of its layers; return it and a list with an entry for each graph that was compiled.

    ``gradients``: compile the backward graphs too, which takes its time.
    """
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(len(inputs))
        return aot_eager(graph, inputs) if gradients else graph.forward

    if whole:
        return torch.compile(model, backend=backend, fullgraph=fullgraph), graphs
    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=fullgraph)
    return model, graphs


def ten_batches(group: dist.ProcessGroup | None, kind: str, whole: bool, recompute: bool | None) -> list[Any]:
    """Return the worst difference to the uncompiled model, graphs after each batch, and frames after two and ten.

    ``recompute``: activation checkpointing, reentrant or not; None: without.
    """
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        models = [build_model(kind, 9, torch.float32) for _ in range(2)]
        contexts = [context_of(group, "zigzag", keep_attention=recompute is not None) for _ in models]
        if recompute is not None:
            for model in models:
                model.activation_checkpointing_enable({"use_reentrant": recompute})
        one_graph = contexts[0].world == 1 and recompute is None
        models[0], graphs = compiled(models[0], whole, whole and recompute is None, one_graph)
        worst, after, frames = 0.0, [], []
        counters.clear()
        for edges in PACKINGS:
            found, truth = (sharded(*each, edges, None) for each in zip(models, contexts, strict=True))
            differences = [abs(found[0] - truth[0]) / abs(truth[0])]
            plain = {name.removeprefix("_orig_mod."): gradient for name, gradient in found[1].items()}
            differences += [float((plain[name] - g).norm() / (g.norm() + 1e-6)) for name, g in truth[1].items()]
            worst = max(worst, *differences)
            for model in models:
                model.zero_grad()
            after.append(len(graphs))
            frames.append(counters["frames"]["total"])
        assert contexts[0].traffic.received_payload == contexts[1].traffic.received_payload
    return [worst, after, [frames[1], frames[-1]]]


@pytest.mark.parametrize(
    ("world", "kind", "whole", "recompute"),
    [
        (1, "qwen2", True, None),
        (1, "gpt_oss", False, None),
        (2, "qwen2", True, None),
        (2, "gemma3", False, None),
        (2, "mistral", True, False),
        pytest.param(1, "mistral", True, True, marks=pytest.mark.full),
        pytest.param(2, "mistral", True, True, marks=pytest.mark.full),
    ],
)
def test_a_compiled_model_gives_what_eager_gives_and_new_documents_compile_nothing(
    world: int, kind: str, whole: bool, recompute: bool | None
) -> None:
    arguments = (kind, whole, recompute)
    results = [ten_batches(None, *arguments)] if world == 1 else run_ranks(ten_batches, world, *arguments, timeout=240)
    for difference, graphs, (frames_after_two, frames) in results:
        assert difference < 1e-5
        assert graphs[0] == 2 if (world, whole) == (1, False) else graphs[0] > 0  # a graph for a kind of layer
        # The first packing fixes the size of the boundaries, the first with another number of documents sets it free.
        assert graphs[-1] == graphs[1], graphs
        assert frames == frames_after_two


def generated_code(group: dist.ProcessGroup) -> list[float]:
    """The default backend, which writes C++; its compilers start no process that would outlive the test."""
    with torch._inductor.config.patch(compile_threads=1):
        models = [build_model("mistral", 9, torch.float32) for _ in range(2)]
        fast = torch.compile(models[0])
        worst = 0.0
        for edges in PACKINGS[:3]:
            found, truth = (sharded(each, context_of(group, "zigzag"), edges, None) for each in (fast, models[1]))
            worst = max(worst, abs(found[0] - truth[0]) / abs(truth[0]))
    return [worst]


@pytest.mark.full
@pytest.mark.needs("gxx")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_generated_code_around_the_ring_gives_what_eager_gives() -> None:
    assert all(worst < 1e-5 for (worst,) in run_ranks(generated_code, 2, timeout=300))


def refusal(whole: bool) -> str:
    model = build_model("mistral", 9, torch.float32)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model, _ = compiled(model, whole, False, False)
    try:
        sharded(model, SequenceContext(mask=parse("causal & (window(7) | sinks(2))")), [0, 45], None)
    except ValueError as error:
        return str(error)
    return "ran"


@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_model_is_refused_by_layer_name_too(whole: bool) -> None:
    assert refusal(whole).startswith("layer 0 (MistralAttention): attention_dropout 0.1 is not supported")
