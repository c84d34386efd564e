"""The library backend: which works it takes, what it hands to an operator, and what it makes of the answer.

Operators are values, so a dense stand-in with their signature and their rounding serves here; the real ones are held to
their schemas by tensors without data.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dense import attention, relative_rms
from ringspan.kernels import library, library_ops
from ringspan.kernels.library_ops import Operators
from ringspan.kernels.mask import Causal, Dilated, Documents, Full, Groups, Mask, Sinks, Span, Window
from ringspan.kernels.masks.heads import s2_attention
from ringspan.kernels.state import Gradients, Running, Saved
from ringspan.kernels.work import Work, work

SERVED: dict[str, tuple[Mask, tuple[Span, ...], tuple[Span, ...]]] = {
    "full": (Full(), (Span(3, 40),), (Span(0, 33),)),
    "causal": (Causal(), (Span(0, 63),), (Span(0, 63),)),
    "later rows": (Causal(), (Span(20, 63),), (Span(0, 63),)),
    "keys in two spans": (Causal(), (Span(20, 63),), (Span(0, 11), Span(15, 63))),
    "keys before the rows": (Causal(), (Span(50, 63),), (Span(0, 11), Span(20, 40))),
    "rows without keys": (Causal(), (Span(0, 63),), (Span(30, 63),)),
    "nothing seen": (Causal(), (Span(0, 20),), (Span(30, 63),)),
    "documents": (Causal() & Documents((0, 1, 20, 63)), (Span(0, 63),), (Span(0, 63),)),
    "groups": (Groups(16), (Span(0, 63),), (Span(0, 63),)),
    "a window that covers all": (Causal() & Window(62), (Span(0, 63),), (Span(0, 63),)),
}
REFUSED: dict[str, tuple[Mask, tuple[Span, ...], tuple[Span, ...], str]] = {
    "window": (Causal() & Window(5), (Span(0, 63),), (Span(0, 63),), "too far back"),
    "window and sinks": (Causal() & (Window(5) | Sinks(2)), (Span(0, 63),), (Span(0, 63),), "too far back"),
    "dilated": (Dilated(4, 3), (Span(0, 63),), (Span(0, 63),), "another order"),
    "zigzag": (Causal(), (Span(0, 8), Span(50, 58)), (Span(0, 8), Span(50, 58)), "keys of causal meet two"),
    "rows below the keys": (Causal(), (Span(0, 63),), (Span(10, 40),), "keys of causal meet two"),
}


def rounding(*results: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(like.dtype) for x in results)


def dense_operators() -> Operators:
    """What a library computes: whole rectangles, delta from dout and out, results in the inputs' dtype."""

    def forward(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        table = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        table = table.tril(k.shape[1] - q.shape[1]) if causal else table
        out, lse = attention(q.double(), k.double(), v.double(), table, scale=scale)
        return rounding(out, like=q)[0], lse.float()

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert not causal or q.shape[1] <= k.shape[1]
        share, given = q.shape[2] // k.shape[2], dout.dtype
        dout, q, k, v, out = (x.double() for x in (dout, q, k, v, out))
        keys, values = (x.repeat_interleave(share, 2) for x in (k, v))
        logits = torch.einsum("bmhd,bnhd->bhmn", q, keys) * scale
        weights = (logits - lse.double().transpose(1, 2)[..., None]).exp()
        if causal:
            weights = weights.tril(k.shape[1] - q.shape[1])
        slopes = torch.einsum("bmhd,bnhd->bhmn", dout, values) - (dout * out).sum(-1).transpose(1, 2)[..., None]
        slopes = weights * slopes * scale
        dq = torch.einsum("bhmn,bnhd->bmhd", slopes, keys)
        dk = torch.einsum("bhmn,bmhd->bnhd", slopes, q).unflatten(2, (-1, share)).sum(3)
        dv = torch.einsum("bhmn,bmhd->bnhd", weights, dout).unflatten(2, (-1, share)).sum(3)
        return dq.to(given), dk.to(given), dv.to(given)

    return Operators("dense", forward, backward)


def table_of(each: Work) -> Tensor:
    rows, columns = (torch.cat([torch.arange(*span) for span in side]) for side in (each.queries, each.keys))
    return each.mask.allowed(rows[:, None], columns[None, :])


@pytest.mark.parametrize("name", SERVED)
def test_rectangles_cover_each_live_pair_once(name: str) -> None:
    each = work(*SERVED[name])
    found = library.rectangles(each)
    assert not isinstance(found, str)
    count = torch.zeros(each.rows, each.columns, dtype=torch.int64)
    for rows, keys, causal in found:
        part = torch.ones(rows.size, keys.size, dtype=torch.int64)
        count[rows.start : rows.stop, keys.start : keys.stop] += part.tril(keys.size - rows.size) if causal else part
    assert torch.equal(count, table_of(each).long())


def test_only_what_lies_before_a_rectangle_joins_it() -> None:
    """A full part after a causal one leaves the diagonal where it is: two calls."""
    rows = Span(0, 5)
    full, causal = library.Rectangle(rows, Span(0, 3), False), library.Rectangle(rows, Span(3, 8), True)
    assert library._joined([causal, full]) == [library.Rectangle(rows, Span(0, 8), True)]
    after = [library.Rectangle(rows, Span(0, 5), True), library.Rectangle(rows, Span(5, 8), False)]
    assert library._joined(after) == after


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_rounded_twice_or_is_no_rectangle_is_not_served(name: str) -> None:
    mask, queries, keys, why = REFUSED[name]
    each = work(mask, queries, keys)
    assert why in (library.serves(each, torch.bfloat16) or "served")
    x = torch.zeros(1, 63, 1, 8)
    with pytest.raises(ValueError, match=why):
        library.forward(Running.like(x), x, x, x, each, scale=1.0, taken=dense_operators())


def test_only_half_precision_and_worthwhile_calls_are_served() -> None:
    whole = (Span(0, 8192),)
    assert library.serves(work(Causal(), whole, whole), torch.bfloat16) is None
    assert "float32" in (library.serves(work(Causal(), whole, whole), torch.float32) or "")
    long = Causal() & Documents((0, 2048, 4096, 8192))
    assert library.serves(work(long, whole, whole), torch.float16) is None
    short = Causal() & Documents(range(0, 8193, 128))
    assert "64 calls" in (library.serves(work(short, whole, whole), torch.float16) or "")


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("with_dlse", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_results_and_gradients_match_float64(name: str, with_dlse: bool, dtype: torch.dtype) -> None:
    each = work(*SERVED[name])
    generator = torch.Generator().manual_seed(7)

    def random(rows: int, heads: int) -> Tensor:
        return torch.randn(2, rows, heads, 16, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v, dout = random(each.rows, 4), random(each.columns, 2), random(each.columns, 2), random(each.rows, 4)
    dlse = torch.randn(2, each.rows, 4, generator=generator, dtype=torch.float64)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out_truth, lse_truth = attention(exact[0], exact[1], exact[2], table_of(each), scale=0.3)
    live = lse_truth > -torch.inf
    dlse = torch.where(live, dlse, 0) if with_dlse else None
    objective = (out_truth * dout.double()).sum()
    if dlse is not None:
        objective = objective + (torch.where(live, lse_truth, 0) * dlse).sum()
    truth = torch.autograd.grad(objective, exact, allow_unused=True)

    total = Running.like(q)
    library.forward(total, q, k, v, each, scale=0.3, taken=dense_operators())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    saved = Saved(q, total.out, total.lse, dout, None if dlse is None else dlse.to(wide))
    grads = Gradients(*(torch.zeros(x.shape, dtype=wide) for x in (q, k, v)))
    library.backward(grads, saved, k, v, each, scale=0.3, taken=dense_operators())
    assert torch.equal(total.lse == -torch.inf, ~live)
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6  # the operators' lse is fp32 whatever the inputs
    assert relative_rms(total.out, out_truth) <= bound
    assert relative_rms(torch.where(live, total.lse, 0), torch.where(live, lse_truth, 0)) <= 1e-6
    for found, wanted in zip(grads, truth, strict=True):
        assert relative_rms(found, torch.zeros_like(found) if wanted is None else wanted) <= bound


def test_the_gradient_of_lse_keeps_its_bits_beside_a_large_out() -> None:
    """bf16 alone would lose a hundredth of dlse; three features carry it."""
    dlse = torch.full((1, 2, 1), 1 + 2.0**-9 + 2.0**-15)
    dout, q, k, v = (torch.zeros(1, n, 1, 8, dtype=torch.bfloat16) for n in (2, 2, 3, 3))
    wide = library._with_features([dout, q, k, v, torch.zeros_like(q)], dlse)
    delta = (wide[0].float() * wide[4].float()).sum(-1)
    assert torch.equal(delta, -dlse)
    assert all(not x[..., 8:].any() for x in wide[1:4])


class Calls(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [40, 64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("forward", [library_ops.flash_forward, library_ops.cudnn_forward])
def test_real_operators_take_these_arguments(rows: int, causal: bool, forward: library_ops.Forward) -> None:
    q, dout = (torch.empty(2, rows, 8, 64, device="meta", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.empty(2, 64, 2, 64, device="meta", dtype=torch.bfloat16) for _ in range(2))
    with Calls() as calls:
        out, lse = forward(q, k, v, scale=0.1, causal=causal)
    asked = [name for name in calls.names if "scaled_dot_product" in name]
    # cuDNN's causal mask is the upper left one, which is ours only for a square
    square = "cudnn" if forward is library_ops.cudnn_forward and (rows == 64 or not causal) else "flash"
    assert [name.split("_")[4] for name in asked] == [square]
    assert (out.shape, out.dtype) == ((2, rows, 8, 64), torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, rows, 8), torch.float32)
    grads = library_ops.flash_backward(dout, q, k, v, out, lse, scale=0.1, causal=causal)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, x.dtype) for x in (q, k, v)]


def test_the_backward_asks_for_the_repeatable_algorithm_and_leaves_no_trace() -> None:
    seen = []

    class Watch(Calls):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            if "flash_attention_backward" in str(func):
                seen.append(
                    (
                        torch.are_deterministic_algorithms_enabled(),
                        torch.is_deterministic_algorithms_warn_only_enabled(),
                        args[10:12],
                    )
                )
            return func(*args, **(kwargs or {}))

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with Watch():
            x = torch.empty(1, 16, 2, 64, device="meta", dtype=torch.bfloat16)
            lse = torch.empty(1, 16, 2, device="meta")
            library_ops.flash_backward(x, x, x, x, x, lse, scale=0.1, causal=True)
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(True, False, (0.0, True))]


@pytest.mark.parametrize("part", ["forward", "lse", "backward", "raises"])
def test_an_operator_that_comes_out_wrong_is_not_taken(part: str) -> None:
    """What a check on the device is for: another alignment of the diagonal, another base of lse, no GQA."""
    right = dense_operators()
    assert library_ops.check(right, torch.device("cpu"), torch.bfloat16, 16) is None

    def upper_left(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        rows = q.shape[1] if causal else k.shape[1]
        return right.forward(q, k[:, :rows], v[:, :rows], scale=scale, causal=causal)

    def base_2(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse = right.forward(q, k, v, scale=scale, causal=causal)
        return out, lse * 1.4427

    def first_heads(*args: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = right.backward(*args, scale=scale, causal=causal)
        return dq, dk * 0.5, dv

    def raises(*args: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        raise RuntimeError("No available kernel.\nmore")

    wrong, said = {
        "forward": (replace(right, forward=upper_left), "out of a small case"),
        "lse": (replace(right, forward=base_2), "lse of a small case"),
        "backward": (replace(right, backward=first_heads), "dk of a small case"),
        "raises": (replace(right, forward=raises), "RuntimeError: No available kernel."),
    }[part]
    assert said in (library_ops.check(wrong, torch.device("cpu"), torch.bfloat16, 16) or "taken")


def test_the_check_needs_no_autograd() -> None:
    """It runs within a custom operator, where nothing is recorded."""
    with torch._C._AutoDispatchBelowAutograd():
        assert library_ops.check(dense_operators(), torch.device("cpu"), torch.bfloat16, 16) is None


def test_refusals_name_the_reason_and_the_remedy() -> None:
    cuda = torch.device("cuda")
    for device, dtype, dim, words in [
        (torch.device("cpu"), torch.bfloat16, 64, ("CUDA", "backend='auto'")),
        (cuda, torch.float32, 64, ("float32", "backend='triton'")),
        (cuda, torch.bfloat16, 60, ("60", "backend='triton'")),
        (cuda, torch.bfloat16, 256, ("256", "backend='triton'")),
    ]:
        reason = library.refuses(device, dtype, dim) or ""
        assert reason.startswith("library: ")
        assert all(word in reason for word in words)


def test_heads_with_different_groups_come_as_works_without_heads() -> None:
    """The backend never sees a mask by head; a mask that is one is an error of the caller's, not a wrong result."""
    with pytest.raises(ValueError, match="head"):
        library.serves(work(s2_attention(16), (Span(0, 64),), (Span(0, 64),)), torch.bfloat16)
