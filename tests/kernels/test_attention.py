"""The operator: values, gradients, and its manners under torch.compile and selective checkpointing."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dense import attention as dense_attention
from dense import relative_rms
from ringspan.kernels.attention import attend
from ringspan.kernels.mask import Causal, Documents, Full, Mask, PerHead, Sinks, Span, Window

SINKS = torch.tensor([2.0, -1.5, 3.0, 0.7], dtype=torch.float64)


def tensors(rows: int, columns: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(rows)
    shapes = [(rows, 4), (columns, 2), (columns, 2)]
    return [
        torch.randn(batch, n, h, 16, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for n, h in shapes
    ]


def gradients(out: Tensor, lse: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Through both results, each with a gradient of its own."""
    g = torch.Generator().manual_seed(9)
    dout = torch.randn(out.shape, generator=g, dtype=torch.float64)
    dlse = torch.randn(lse.shape, generator=g, dtype=torch.float64)
    return list(torch.autograd.grad((out.double() * dout).sum() + (lse.double() * dlse).sum(), wanted))


def close(found: list[Tensor], truth: list[Tensor], bound: float) -> None:
    for a, b in zip(found, truth, strict=True):
        assert relative_rms(a, b.detach()) <= bound


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_queries_and_keys_may_hold_different_spans(backend: str, dtype: torch.dtype) -> None:
    q_spans, k_spans = [Span(3, 20), Span(40, 60)], [Span(0, 5), Span(8, 30), Span(58, 61)]
    position = [torch.cat([torch.arange(*span) for span in spans]) for spans in (q_spans, k_spans)]
    distance = position[0][:, None] - position[1]
    table = (distance >= 0) & ((distance <= 9) | (position[1] < 2))
    q, k, v = tensors(37, 30, dtype)
    sinks = SINKS.clone().requires_grad_()
    mask = Causal() & (Window(9) | Sinks(2))
    out, lse = attend(q, k, v, mask=mask, q_spans=q_spans, k_spans=k_spans, sinks=sinks, backend=backend)
    assert out.dtype == lse.dtype == dtype
    exact = [x.detach().double().requires_grad_() for x in (q, k, v, SINKS)]
    truth = dense_attention(exact[0], exact[1], exact[2], table, sinks=exact[3])
    bound = 1e-12 if dtype == torch.float64 else 2e-6
    close([out, lse], list(truth), bound)
    close(gradients(out, lse, [q, k, v, sinks]), gradients(*truth, exact), bound)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_without_keys_give_nothing(backend: str) -> None:
    q, k, v = tensors(6, 8)
    out, lse = attend(q, k, v, mask=Causal(), q_spans=[Span(0, 6)], k_spans=[Span(4, 12)], backend=backend)
    assert torch.equal(out[:, :4], torch.zeros_like(out[:, :4]))
    assert bool((lse[:, :4] == -torch.inf).all())
    dq, dk, dv = torch.autograd.grad(out.sum() + lse[:, 4:].sum(), [q, k, v])
    assert torch.equal(dq[:, :4], torch.zeros_like(dq[:, :4]))
    assert bool(torch.isfinite(dk).all())
    assert torch.equal(dv[:, 2:], torch.zeros_like(dv[:, 2:]))


def test_heads_and_batch_rows_may_have_masks_of_their_own() -> None:
    edges = [[0, 7, 24], [0, 1, 20, 24]]
    mask = PerHead({(0, 3): Causal() & Window(3), (3, 4): Causal()}) & Documents(edges)
    q, k, v = tensors(24, 24)
    out, lse = attend(q, k, v, mask=mask, first_kv_head=2, total_kv_heads=4)
    position = torch.arange(24)
    distance = position[:, None] - position
    exact = [x.detach().requires_grad_() for x in (q, k, v)]
    truth = [torch.empty_like(out), torch.empty_like(lse)]
    for row, inner in enumerate(edges):
        document = torch.bucketize(position, torch.tensor(inner[1:]), right=True)
        live = (document[:, None] == document) & (distance >= 0)
        for head, table in enumerate([live & (distance <= 3), live]):
            mine = slice(2 * head, 2 * head + 2)
            one, own = slice(row, row + 1), slice(head, head + 1)
            part = dense_attention(exact[0][one, :, mine], exact[1][one, :, own], exact[2][one, :, own], table)
            truth[0][one, :, mine], truth[1][one, :, mine] = part
    close([out, lse], truth, 1e-12)
    close(gradients(out, lse, [q, k, v]), gradients(truth[0], truth[1], exact), 1e-12)


def operator(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.ringspan.attend(
        q, k, v, sinks, boundaries, "causal & (window(9) | sinks(2))", [0, 24], [0, 24], [0, 2], 0.25, "auto",
        torch.float32,
    )  # fmt: skip


def test_opcheck() -> None:
    q, k, v = tensors(24, 24, torch.float32)
    sinks = SINKS.float().requires_grad_()
    arguments = (
        q, k, v, sinks, torch.tensor([0, 5, 24]), "causal & (window(9) | sinks(2))", [0, 24], [0, 24], [0, 2], 0.25,
        "auto", torch.float32,
    )  # fmt: skip
    results = torch.library.opcheck(torch.ops.ringspan.attend.default, arguments)
    assert set(results.values()) == {"SUCCESS"}, results
    bare = (*arguments[:3], None, None, *arguments[5:])
    assert set(torch.library.opcheck(torch.ops.ringspan.attend.default, bare).values()) == {"SUCCESS"}


def test_compiles_as_one_graph_and_another_packing_compiles_nothing() -> None:
    compiled: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    q, k, v = tensors(24, 24, torch.float32)
    sinks = SINKS.float().requires_grad_()
    fast = torch.compile(operator, fullgraph=True, backend=count)
    for edges in ([0, 5, 24], [0, 9, 24]):
        plain = operator(q, k, v, sinks, torch.tensor(edges))
        found = fast(q, k, v, sinks, torch.tensor(edges))
        for a, b in zip(found, plain, strict=True):
            assert torch.equal(a, b)
        close(gradients(*found, [q, k, v, sinks]), gradients(*plain, [q, k, v, sinks]), 0.0)
    assert len(compiled) == 1


@pytest.mark.parametrize("mask", [Causal() & Window(3), "causal & window(3)"], ids=["value", "text"])
def test_the_python_call_compiles_as_one_graph_too(mask: Mask | str) -> None:
    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask=mask)[0].sin()

    given = tensors(24, 24, torch.float32)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(*given)
    assert torch.equal(found, layer(*given))


def test_aot_autograd_traces_forward_and_backward() -> None:
    q, k, v = tensors(24, 24, torch.float32)
    sinks = SINKS.float().requires_grad_()
    edges = torch.tensor([0, 5, 24])
    fast = torch.compile(operator, fullgraph=True, backend="aot_eager")
    found, plain = fast(q, k, v, sinks, edges), operator(q, k, v, sinks, edges)
    close(gradients(*found, [q, k, v, sinks]), gradients(*plain, [q, k, v, sinks]), 0.0)


def test_selective_checkpointing_runs_the_kernel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from ringspan.kernels import cpu

    calls: list[int] = []
    plain = cpu.forward

    def counted(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        plain(*args, **kwargs)

    monkeypatch.setattr(cpu, "forward", counted)
    q, k, v = tensors(24, 24, torch.float32)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        del context, args, kwargs
        mine = op is torch.ops.ringspan.attend.default
        return CheckpointPolicy.MUST_SAVE if mine else CheckpointPolicy.PREFER_RECOMPUTE

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q * 2, k, v)[0].sin()

    out = checkpoint(
        layer, q, k, v, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, policy)
    )
    assert isinstance(out, Tensor)
    found = torch.autograd.grad(out.sum(), [q, k, v])
    assert len(calls) == 1
    truth = torch.autograd.grad(layer(q, k, v).sum(), [q, k, v])
    close(list(found), list(truth), 0.0)


def test_out_may_leave_in_another_dtype() -> None:
    q, k, v = tensors(24, 24, torch.bfloat16)
    assert attend(q, k, v)[0].dtype == torch.float32
    out, lse = attend(q, k, v, out_dtype=torch.bfloat16)
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 8, 3, 16)}, "shapes"),
        ({"sinks": torch.zeros(3)}, r"sinks: shape \(3,\); must be \[4\]"),
        ({"q_spans": [Span(0, 7)]}, r"q_spans: \[0, 7\] hold 7 tokens of 8"),
        ({"k_spans": [Span(4, 8), Span(0, 4)]}, "k_spans: .* must be ascending"),
        ({"backend": "magic"}, "backend: 'magic' is not one of auto, cpu, triton, library, reference"),
        ({"backend": "library"}, "backend: library refuses"),
        ({"mask": "casual"}, "causal"),
        ({"mask": Full() & Documents([0, 8]), "boundaries": torch.tensor([0, 8])}, "boundaries: given twice"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "q": torch.zeros(2, 8, 4, 16),
        "k": torch.zeros(2, 8, 2, 16),
        "v": torch.zeros(2, 8, 2, 16),
    }
    attend(**given)
    with pytest.raises(ValueError, match=message):
        attend(**{**given, **change})


def test_a_mask_is_a_value_or_its_text() -> None:
    q, k, v = tensors(24, 24)
    mask: Mask = Causal() & (Window(4) | Sinks(1))
    assert torch.equal(attend(q, k, v, mask=mask)[0], attend(q, k, v, mask="causal & (window(4) | sinks(1))")[0])
