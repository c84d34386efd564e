"""An MLP on tiles of tokens: the same results and gradients, and never more than a tile at once."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiled_cases import EDGES, mlps, rows_seen, run, worst_of
from tiny_layers import LENGTH, batch, build_model, context_of, gradients
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from transformers import MixtralConfig, MixtralForCausalLM

from dense import relative_rms
from ringspan.parallel.parts import parts_of
from ringspan.parallel.recompute import checkpoint_layers, keeps_attention
from ringspan.parallel.tiled import tile_mlps


@pytest.mark.parametrize("tokens", [1, 7, 45, 89, 90, 1000])
@pytest.mark.parametrize("kind", ["mistral", "gpt_oss", "qwen2_moe"])
def test_tiles_of_any_size_change_nothing_but_the_order_of_sums(kind: str, tokens: int) -> None:
    truth = run(build_model(kind, 9, torch.float64))
    model = build_model(kind, 9, torch.float64)
    before = [(name, type(module)) for name, module in model.named_modules()]
    tile_mlps(parts_of(model).layers, tokens)
    assert worst_of(run(model), truth) <= 1e-12
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("mode", ["none", "full", "selective", "offload"])
@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_no_more_than_a_tile_goes_through_at_once_and_a_recomputed_layer_stops_before_its_mlp(
    kind: str, mode: str
) -> None:
    model = build_model(kind, 9, torch.float64)
    tile_mlps(parts_of(model).layers, 20)
    seen = rows_seen(model)
    run(model, mode=mode)
    tiles = [20, 20, 20, 20, 10]
    # Gemma 2 has a norm after its MLP, which needs the MLP's result once more.
    times = 3 if kind == "gemma2" and mode != "none" else 2
    assert sorted(seen) == sorted(3 * times * tiles)


def test_nothing_of_a_tile_is_kept_for_the_backward_pass() -> None:
    kept: list[tuple[int, ...]] = []

    def note(x: Tensor) -> Tensor:
        kept.append(tuple(x.shape))
        return x

    for tokens, wide in ((None, True), (20, False)):
        model = build_model("mistral", 9, torch.float64)
        if tokens is not None:
            tile_mlps(parts_of(model).layers, tokens)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            logits = model(**inputs(model)).logits
        assert (max(shape[-1] for shape in kept if len(shape) == 3 and shape[-1] != 97) == 64) == wide
        logits.sum().backward()


def inputs(model: Any, group: Any = None) -> dict[str, Any]:
    context = context_of(group, "zigzag")
    local = context.shard(batch(EDGES))
    del local["shift_labels"], model
    return {**local, **context.kwargs()}


def test_without_gradients_tiles_give_the_same() -> None:
    model = build_model("gpt_oss", 9, torch.float64).eval()
    with torch.no_grad():
        truth = model(**inputs(model)).logits
        tile_mlps(parts_of(model).layers, 7)
        assert relative_rms(model(**inputs(model)).logits, truth) <= 1e-13


def looped(model: Any, tokens: int) -> None:
    """The slow twin: a tile after another in the graph of the forward pass, which keeps them all."""

    def tiles(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.cat(
            [forward(part) for part in x.reshape(1, -1, x.shape[-1]).split(tokens, 1)], 1
        ).view_as(x)

    for mlp in mlps(model):
        mlp.forward = tiles(mlp.forward)


def adapted(dropout: float, targets: Any = "all-linear") -> Any:
    torch.manual_seed(3)
    settings = LoraConfig(
        r=2, lora_dropout=dropout, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(build_model("qwen2", 9, torch.float64), settings).double().train()


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_adapters_drop_the_same_when_a_tile_runs_again(mode: str) -> None:
    models = [adapted(0.3), adapted(0.3)]
    looped(models[0], 20)
    tile_mlps(parts_of(models[1]).layers, 20)
    found = []
    for model in models:
        torch.manual_seed(5)
        found.append(run(model, mode=mode))
        found[-1]["next"] = torch.rand(3)  # the random state goes on as if nothing had run again
    assert worst_of(found[1], found[0]) <= 1e-12


def test_an_input_without_a_gradient_is_no_hindrance() -> None:
    models = [adapted(0.0, ["gate_proj", "up_proj", "down_proj"]) for _ in range(2)]
    truth = run(models[0])
    tile_mlps(parts_of(models[1]).layers, 20)
    assert worst_of(run(models[1]), truth) <= 1e-12


def truth_of(dtype: torch.dtype) -> dict[str, Tensor]:
    """Gradients in float64 of weights that were rounded to ``dtype``."""
    return run(build_model("mistral", 9, dtype).double())


def test_gradients_of_bf16_weights_are_rounded_once_and_not_at_every_tile() -> None:
    truth = truth_of(torch.bfloat16)
    model, tiled = build_model("mistral", 9, torch.bfloat16), build_model("mistral", 9, torch.bfloat16)
    tile_mlps(parts_of(tiled).layers, 1)
    plain, found = run(model), run(tiled)
    for name in truth:
        if ".mlp." in name:
            assert relative_rms(found[name], truth[name]) <= 1.15 * relative_rms(plain[name], truth[name]), name


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("inside", [False, True])
def test_under_autocast_tiles_err_no_more(inside: bool, mode: Any) -> None:
    truth, errors = truth_of(torch.float32), []
    for tokens in (None, 20):
        model = build_model("mistral", 9, torch.float32)
        if tokens is not None:
            tile_mlps(parts_of(model).layers, tokens)
        checkpoint_layers(parts_of(model).layers, mode)
        context = context_of(None, "zigzag", keep_attention=keeps_attention(mode))
        local = context.shard(batch(EDGES))
        labels = local.pop("shift_labels").flatten()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**local, **context.kwargs()).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels)
            if inside:  # weights that the forward has cast may be at hand still
                loss.backward()
        if not inside:
            loss.backward()
        errors.append({name: relative_rms(grad, truth[name]) for name, grad in gradients(model).items()})
    assert all(errors[1][name] <= 1.15 * errors[0][name] for name in errors[0]), errors


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("mode", ["none", "selective", "offload"])
def test_compiled_layers_run_tiles_between_their_graphs(mode: Any) -> None:
    torch._dynamo.reset()
    truth, model = run(build_model("mistral", 9, torch.float32)), build_model("mistral", 9, torch.float32)
    tile_mlps(parts_of(model).layers, 20)
    checkpoint_layers(parts_of(model).layers, mode)
    for layer in parts_of(model).layers:
        layer.forward = torch.compile(layer.forward, backend=aot_eager)
    assert worst_of(run(model, mode=mode), truth) <= 1e-5
    torch._dynamo.reset()


def test_a_copied_model_runs_and_trains_its_own_weights() -> None:
    model = build_model("mistral", 9, torch.float64)
    tile_mlps(parts_of(model).layers, 20)
    twin = copy.deepcopy(model)
    truth = run(twin)
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert worst_of(run(model), truth) == 0.0


class Shifted(nn.Module):
    """Mixes tokens, and says so by what it returns."""

    def __init__(self, out: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor) -> Any:
        return self.out(x)


def test_what_cannot_be_tiled_is_refused_by_name() -> None:
    model = build_model("mistral", 9, torch.float64)
    layers = parts_of(model).layers
    with pytest.raises(ValueError, match="mlp_tile: 0 tokens are no tile; give at least 1"):
        tile_mlps(layers, 0)
    with pytest.raises(ValueError, match=r"mlp_tile: layer 1 \(Linear\) has none of mlp, feed_forward, block_sparse"):
        tile_mlps([layers[0], nn.Linear(2, 2)], 4)
    assert "forward" not in vars(mlps(model)[0])
    for out, said in (
        (lambda x: (x, x.sum()), r"returns a tensor of shape \(\) for 20 tokens, not a row for each"),
        (lambda x: (x, None), "returns a NoneType for 20 tokens"),
        (lambda x: x[:, ::2], r"returns a tensor of shape \(1, 10, 32\) for 20 tokens"),
    ):
        layer = nn.Module()
        layer.mlp = Shifted(out)
        tile_mlps([layer], 20)
        with pytest.raises(ValueError, match=r"mlp_tile: the MLP of layer 0 \(Module\) " + said):
            layer.mlp(torch.randn(2, LENGTH, 32))
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, output_router_logits=True)
    with pytest.raises(ValueError, match=r"mlp_tile: layer 0 \(MixtralDecoderLayer\) is asked for its router's logits"):
        tile_mlps(parts_of(MixtralForCausalLM(config)).layers, 4)


def test_a_rank_without_tokens_runs_its_mlp_on_none() -> None:
    model = build_model("mistral", 9, torch.float64)
    tile_mlps(parts_of(model).layers, 4)
    mlp = mlps(model)[0]
    out = mlp(torch.randn(2, 0, 32, dtype=torch.float64, requires_grad=True))
    assert out.shape == (2, 0, 32)
    out.sum().backward()
    assert not mlp.down_proj.weight.grad.any()
