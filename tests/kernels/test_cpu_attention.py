"""The CPU backend and its slow twin against the definition in float64: results, gradients, order and threads."""

from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense import attention, relative_rms
from ringspan.kernels import cpu, reference, tiles
from ringspan.kernels.mask import Causal, Dilated, Documents, Full, Groups, Mask, Sinks, Window
from ringspan.kernels.masks.span import Span
from ringspan.kernels.merge import join_sinks
from ringspan.kernels.state import Gradients, Running, Saved, accumulator
from ringspan.kernels.work import Work

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3}
SCALE = 0.2


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor | None


def inputs(
    each: Work, dtype: torch.dtype, heads: int, groups: int, dim: int, *, batch: int = 1, dlse: bool = False
) -> Inputs:
    g = torch.Generator().manual_seed(each.rows + each.columns + heads + dim)
    sizes = ((each.rows, heads), (each.columns, groups), (each.columns, groups), (each.rows, heads))
    q, k, v, dout = (
        torch.randn(batch, n, h, dim, generator=g, dtype=torch.float64).to(dtype).double() for n, h in sizes
    )
    extra = torch.randn(batch, each.rows, heads, generator=g, dtype=torch.float64) if dlse else None
    return Inputs(q, k, v, dout, extra)


def run(
    kernel: ModuleType, works: list[Work], given: Inputs, dtype: torch.dtype, sinks: Tensor | None = None
) -> list[Tensor]:
    """out, lse, dq, dk, dv by one kernel call per work: same queries, keys laid end to end."""
    q, k, v, dout = (x.to(dtype) for x in given[:4])
    total = Running.like(q)
    spans, start = [], 0
    for each in works:
        spans.append(slice(start, start := start + each.columns))
    for each, span in zip(works, spans, strict=True):
        kernel.forward(total, q, k[:, span], v[:, span], each, scale=SCALE)
    out, lse = total.out, total.lse
    if sinks is not None:
        out, lse = join_sinks(out, lse, sinks)
    dlse = None if given.dlse is None else given.dlse.to(lse.dtype)
    saved = Saved(q, out.to(dtype), lse, dout, dlse)
    grads = [torch.zeros(x.shape, dtype=accumulator(dtype)) for x in (q, k, v)]
    for each, span in zip(works, spans, strict=True):
        part = Gradients(grads[0], grads[1][:, span], grads[2][:, span])
        kernel.backward(part, saved, k[:, span], v[:, span], each, scale=SCALE)
    assert all(x.dtype == accumulator(dtype) for x in (out, lse, *grads))
    return [out, lse, *grads]


def truth(each: Work, given: Inputs, sinks: Tensor | None = None) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (given.q, given.k, given.v)]
    table = reference.table(each)
    out, lse = attention(leaves[0], leaves[1], leaves[2], table, scale=SCALE, sinks=sinks)
    loss = (out * given.dout).sum()
    if given.dlse is not None:
        loss = loss + torch.where(lse == -torch.inf, 0, lse * given.dlse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


def check(found: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    empty = exact[1] == -torch.inf
    assert torch.equal(found[1] == -torch.inf, empty)
    pairs = [(found[0], exact[0]), (found[1][~empty], exact[1][~empty]), *zip(found[2:], exact[2:], strict=True)]
    for name, (mine, other) in zip(("out", "lse", "dq", "dk", "dv"), pairs, strict=True):
        assert mine.isfinite().all(), name
        if other.numel() and other.abs().max() < 1e-12:  # over a single key the gradients of q and k vanish
            assert mine.abs().max() < 20 * tolerance, name
        elif other.numel():
            assert relative_rms(mine, other) <= tolerance, name


def whole(mask: Mask, length: int) -> Work:
    return Work(mask, (Span(0, length),), (Span(0, length),))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, steps and triangles small enough that a few hundred rows hold every kind of tile."""
    for name, value in (("BLOCK", 64), ("STEP", 16), ("TRIANGLE", 256)):
        monkeypatch.setattr(tiles, name, value)


ZIGZAG = (Span(0, 150), Span(450, 600))
CASES = [
    whole(Causal(), 500),
    whole(Full(), 130),
    whole(Causal() & (Window(200) | Sinks(4)), 500),
    whole(Causal() & Window(20), 130),
    whole(Causal() & Window(1000), 130),
    whole(Window(150, 100), 500),
    whole(Causal() & Groups(64), 500),
    whole(Causal() & (Groups(128, 64) | Sinks(30)), 500),
    whole(Causal() & Documents([0, 1, 2, 3, 50, 51, 301, 500]), 500),
    whole(Causal() & (Window(40) | Sinks(3)) & Documents([0, 90, 91, 500]), 500),
    whole(Causal() & Dilated(6, 5), 130),
    whole(Causal() & (Window(8) | Dilated(10, 9)), 500),
    Work(Causal(), ZIGZAG, ZIGZAG),
    Work(Causal() & (Window(120) | Sinks(4)), ZIGZAG, (Span(150, 450),)),
    Work(Causal() & Window(200), (Span(300, 500),), (Span(50, 290),)),
    Work(Causal(), (Span(0, 63),), (Span(40, 103),)),  # rows 0 to 39 see nothing
    Work(Full(), (Span(7, 8),), (Span(0, 1),)),
    Work(Causal(), (Span(3, 4),), (Span(0, 63),)),
]


@pytest.mark.parametrize("kernel", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize("each", CASES, ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_every_kind_of_tile_in_float64(kernel: ModuleType, each: Work) -> None:
    given = inputs(each, torch.float64, 4, 2, 32, dlse=True)
    check(run(kernel, [Work(each.mask, each.queries, each.keys)], given, torch.float64), truth(each, given), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 63, 130, 500])
@pytest.mark.parametrize("mask", [Causal(), Causal() & (Window(100) | Sinks(4))], ids=str)
def test_lengths_and_dtypes(dtype: torch.dtype, length: int, mask: Mask) -> None:
    each = whole(mask, length)
    given = inputs(each, dtype, 4, 2, 64)
    check(run(cpu, [each], given, dtype), truth(each, given), TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("heads", "groups", "dim"), [(4, 4, 32), (4, 2, 64), (4, 1, 128), (8, 1, 256), (3, 3, 33), (6, 2, 80)]
)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.usefixtures("small_tiles")
def test_heads_and_head_dims(heads: int, groups: int, dim: int, batch: int) -> None:
    each = whole(Causal() & (Window(150) | Sinks(5)), 300)
    for dtype in (torch.float64, torch.float32):
        given = inputs(each, dtype, heads, groups, dim, batch=batch, dlse=dim == 64)
        check(run(cpu, [each], given, dtype), truth(each, given), TOLERANCE[dtype])


@pytest.mark.usefixtures("small_tiles")
def test_tiles_at_their_real_sizes() -> None:
    each = whole(Causal() & (Window(600) | Sinks(4)), 1100)
    for found in cpu.plan(each.sweeps[0]):
        assert found.shape.rows <= 1100
    given = inputs(each, torch.float64, 2, 1, 32)
    check(run(cpu, [each], given, torch.float64), truth(each, given), 1e-12)


def test_learned_sinks_are_in_the_saved_rows() -> None:
    each = Work(Causal() & Window(100), (Span(0, 200),), (Span(50, 250),))  # rows without keys have a finite lse
    given = inputs(each, torch.float64, 4, 2, 32, dlse=True)
    sinks = torch.tensor([0.3, -20.0, 5.0, 1.0], dtype=torch.float64)
    check(run(cpu, [each], given, torch.float64, sinks), truth(each, given, sinks), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_several_calls_add_up_to_one(dtype: torch.dtype) -> None:
    mask = Causal() & (Window(130) | Sinks(4))
    each = Work(mask, ZIGZAG, (Span(0, 600),))
    given = inputs(each, dtype, 4, 2, 64)
    parts = [Work(mask, ZIGZAG, (Span(*edges),)) for edges in ((0, 140), (140, 460), (460, 600))]
    exact = truth(each, given)
    check(run(cpu, parts, given, dtype), exact, TOLERANCE[dtype])
    found, twin = (run(kernel, parts, given, dtype) for kernel in (cpu, reference))
    check(found, twin, TOLERANCE[dtype])


def test_bf16_is_no_worse_than_the_operator_unsharded() -> None:
    each = whole(Causal(), 500)
    given = inputs(each, torch.bfloat16, 4, 2, 64)
    q, k, v = leaves = [x.bfloat16().transpose(1, 2).requires_grad_() for x in given[:3]]
    out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
    grads = torch.autograd.grad(out, leaves, given.dout.bfloat16().transpose(1, 2))
    theirs = [x.transpose(1, 2) for x in (out, *grads)]
    exact = truth(each, given)
    del exact[1]
    parts = [Work(Causal(), each.queries, (Span(a, a + 125),)) for a in range(0, 500, 125)]
    found = run(cpu, parts, given, torch.bfloat16)
    del found[1]
    for mine, other, right in zip(found, theirs, exact, strict=True):
        assert relative_rms(mine.bfloat16(), right) <= 1.1 * relative_rms(other, right)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("count", [1, 2])
def test_the_same_bits_again(count: int) -> None:
    each = whole(Causal() & (Window(150) | Sinks(4)) & Documents([0, 50, 100, 500]), 500)
    given = inputs(each, torch.float32, 4, 2, 64, dlse=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        first, again = (run(cpu, [each], given, torch.float32) for _ in range(2))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    check(first, truth(each, given), 2e-6)


@pytest.mark.parametrize("mask", [Causal(), Full(), Causal() & Documents([0, 1, 130, 260, 300])], ids=str)
def test_bf16_rows_that_meet_one_tile_alone_are_as_exact_as_the_operator(mask: Mask) -> None:
    each = whole(mask, 300)
    assert cpu.single_tiles(each) is not None
    given = inputs(each, torch.bfloat16, 4, 2, 64)
    q, k, v = (x.bfloat16() for x in given[:3])
    total = Running.like(q, alone=True)
    cpu.forward(total, q, k, v, each, scale=SCALE)
    assert torch.equal(total.out, total.out.bfloat16().float())  # the operator's own result, rounded
    table = reference.table(each)[None, None]
    theirs = scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=table, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    out, lse = truth(each, given)[:2]
    assert relative_rms(total.out, out) <= 1.05 * relative_rms(theirs, out)
    assert relative_rms(total.lse, lse) <= 1e-5


def test_bf16_rows_that_meet_more_stay_wide() -> None:
    sinks = whole(Causal() & (Window(20) | Sinks(4)), 300)
    assert cpu.single_tiles(sinks) is None
    assert cpu.single_tiles(whole(Causal() & Dilated(4, 2), 300)) is None
    given = inputs(sinks, torch.bfloat16, 4, 2, 64)
    q, k, v = (x.bfloat16() for x in given[:3])
    totals = [Running.like(q), Running.like(q, alone=True)]
    for total in totals:
        cpu.forward(total, q, k, v, sinks, scale=SCALE)
    assert torch.equal(totals[0].out, totals[1].out)
    assert relative_rms(totals[0].out, truth(sinks, given)[0]) <= 2e-6
    each, half = whole(Causal(), 300), Work(Causal(), (Span(0, 300),), (Span(0, 100),))
    total = Running.like(q)
    cpu.forward(total, q, k[:, :100], v[:, :100], half, scale=SCALE)
    cpu.forward(total, q, k[:, 100:], v[:, 100:], Work(Causal(), each.queries, (Span(100, 300),)), scale=SCALE)
    assert relative_rms(total.out, truth(each, given)[0]) <= 2e-6


def test_no_key_of_another_document_or_of_the_future_counts() -> None:
    each = whole(Causal() & Documents([0, 70, 200]), 200)
    given = inputs(each, torch.float32, 2, 1, 32)
    before = run(cpu, [each], given, torch.float32)[0]
    given.k[:, 100] += 3
    given.v[:, 100] -= 2
    after = run(cpu, [each], given, torch.float32)[0]
    changed = (before != after).any(-1).any(-1).any(0).nonzero().flatten()
    assert changed.tolist() == list(range(100, 200))


def test_strided_operands_are_read_as_they_lie() -> None:
    each = whole(Causal() & Window(100), 300)
    given = inputs(each, torch.float64, 4, 2, 32)
    packed = torch.cat(given[:3], 2)
    q, k, v = packed.split([4, 2, 2], 2)
    views = Inputs(q, k, v, given.dout, None)
    for mine, other in zip(run(cpu, [each], views, torch.float64), run(cpu, [each], given, torch.float64), strict=True):
        assert torch.equal(mine, other)


def test_a_call_without_a_pair_changes_nothing() -> None:
    each = Work(Causal(), (Span(0, 10),), (Span(20, 30),))
    given = inputs(each, torch.float32, 2, 1, 32)
    out, lse, *grads = run(cpu, [each], given, torch.float32)
    assert lse.eq(-torch.inf).all()
    assert not any(x.any() for x in (out, *grads))


def test_refuses_by_name() -> None:
    assert cpu.refuses(torch.device("cpu"), torch.float32, 64) is None
    assert "int64" in str(cpu.refuses(torch.device("cpu"), torch.int64, 64))
    assert "meta" in str(cpu.refuses(torch.device("meta"), torch.float32, 64))
    assert reference.refuses(torch.device("meta"), torch.int64, 7) is None
