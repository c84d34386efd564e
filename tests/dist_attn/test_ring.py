"""Ring attention on real ranks (gloo) against dense attention in float64: out, lse and every gradient."""

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from dense import attention as dense_attention
from dense import mask_table, pattern_table, relative_rms
from ringspan.dist_attn import (
    Causal,
    Contiguous,
    Documents,
    Mask,
    Traffic,
    ZigZag,
    attention,
    attention_with_lse,
    parse_mask,
    plan,
    shard,
    unshard,
)
from ringspan.dist_attn.layout import Layout
from ringspan.parallel.testing import run_ranks

BOUND = {torch.float64: 1e-12, torch.float32: 2e-6}
LAYOUTS: dict[str, Layout] = {"zigzag": ZigZag(), "contiguous": Contiguous()}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


CAUSAL = ("causal",)
PATTERNS: dict[str, tuple[str, tuple]] = {  # masks as ringspan writes them, and as the truth does
    "causal": ("causal", CAUSAL),
    "full": ("full", ("full",)),
    "window": ("causal & (window(20) | sinks(4))", ("and", CAUSAL, ("or", ("window", 20, 0), ("sinks", 4)))),
    "both sides": ("window(9, 3)", ("window", 9, 3)),
    "groups": ("causal & groups(24, 12)", ("and", CAUSAL, ("groups", 24, 12, False))),
    "dilated": (
        "causal & (dilated(5, 7) | window(3) | sinks(1))",
        ("and", CAUSAL, ("or", ("dilated", 5, 7), ("window", 3, 0), ("sinks", 1))),
    ),
}


class Case(NamedTuple):
    """One point of the product; strings, so that it names itself in test ids."""

    world: int
    layout: str
    mask: str
    dtype: str
    length: int
    heads: tuple[int, int]
    dim: int
    sinks: bool
    dlse: bool

    @property
    def boundaries(self) -> list[int] | None:
        return sorted({0, 1, self.length // 4, self.length // 3, self.length}) if "documents" in self.mask else None

    def build(self) -> tuple[Mask, torch.Tensor]:
        text, words = PATTERNS[self.mask.removesuffix(" documents")]
        mask = parse_mask(text)
        if self.boundaries is not None:
            mask = mask & Documents(self.boundaries)
        return mask, pattern_table(self.length, words, self.boundaries)


def covering() -> list[Case]:
    """A covering array: every pair of values of two parameters meets in some case."""
    table = [
        (1, "zigzag", "causal", "float64", 63, (4, 4), 16, True, True),
        (1, "contiguous", "causal documents", "float32", 130, (8, 2), 32, False, False),
        (2, "zigzag", "causal", "float32", 130, (8, 2), 64, True, False),
        (2, "contiguous", "full documents", "float64", 37, (4, 1), 16, True, True),
        (2, "zigzag", "full", "float64", 64, (2, 2), 32, False, True),
        (2, "contiguous", "causal", "float32", 61, (4, 1), 33, False, True),
        (4, "zigzag", "causal documents", "float64", 101, (4, 2), 16, True, True),
        (4, "contiguous", "causal", "float64", 130, (8, 1), 32, False, False),
        (4, "zigzag", "full documents", "float32", 63, (8, 8), 16, False, True),
        (4, "contiguous", "full", "float32", 37, (4, 2), 64, True, False),
        (4, "zigzag", "causal", "float64", 500, (6, 2), 33, True, False),
        (4, "zigzag", "causal", "float32", 3, (2, 1), 16, True, True),  # a rank without tokens
        (4, "contiguous", "causal documents", "float32", 130, (2, 2), 16, True, True),
        (3, "zigzag", "causal documents", "float32", 7, (4, 4), 32, False, True),
        (3, "contiguous", "full", "float64", 130, (6, 3), 16, True, True),
        (1, "contiguous", "window documents", "float64", 130, (4, 2), 16, True, True),
        (2, "contiguous", "window", "float32", 130, (8, 2), 32, True, True),
        (4, "zigzag", "window documents", "float64", 101, (4, 1), 16, True, False),
        (4, "contiguous", "window documents", "float32", 257, (4, 4), 33, False, True),
        (3, "zigzag", "both sides", "float64", 61, (4, 2), 16, False, True),
        (4, "contiguous", "groups", "float64", 130, (4, 2), 32, True, False),
        (3, "zigzag", "groups documents", "float32", 101, (2, 1), 16, False, True),
        (2, "zigzag", "dilated", "float32", 130, (4, 2), 16, True, True),
        (4, "contiguous", "dilated documents", "float64", 101, (4, 4), 16, False, False),
    ]
    return [Case(*row) for row in table]


def full_product() -> list[Case]:
    masks = [f"{name}{end}" for name in PATTERNS for end in ("", " documents")]
    values = product(
        (1, 2, 3, 4), LAYOUTS, masks, ("float64", "float32"),
        (5, 130), ((4, 4), (8, 2), (4, 1)), (32,), (False, True), (False, True),
    )  # fmt: skip
    return [Case(*row) for row in values]


def inputs(case: Case) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(case.length)
    heads, groups = case.heads
    dtype = DTYPES[case.dtype]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    batch = 2
    return {
        "q": random(batch, case.length, heads, case.dim).to(dtype),
        "k": random(batch, case.length, groups, case.dim).to(dtype),
        "v": random(batch, case.length, groups, case.dim).to(dtype),
        "dout": random(batch, case.length, heads, case.dim).to(dtype),
        "dlse": random(batch, case.length, heads),
        # Large and far from zero: a sink that is dropped or counted per rank must show.
        "sinks": random(heads) * 2 + 2,
    }


def truth(case: Case, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    _, table = case.build()
    exact = {name: given[name].double().requires_grad_() for name in ("q", "k", "v", "sinks")}
    out, lse = dense_attention(exact["q"], exact["k"], exact["v"], table, sinks=exact["sinks"] if case.sinks else None)
    loss = (out * given["dout"].double()).sum() + ((lse * given["dlse"]).sum() if case.dlse else 0)
    loss.backward()
    grads = {f"d{name}": x.grad for name, x in exact.items() if x.grad is not None}
    return {"out": out.detach(), "lse": lse.detach(), **grads}


def compute(
    group: dist.ProcessGroup | None, case: Case, given: dict[str, torch.Tensor], traffic: Traffic
) -> dict[str, torch.Tensor]:
    """Run the operator on this rank's shard and put the global results together."""
    layout = LAYOUTS[case.layout]
    mask, _ = case.build()
    local = {name: shard(given[name], layout, group).detach().requires_grad_() for name in ("q", "k", "v")}
    sinks = given["sinks"].clone().requires_grad_() if case.sinks else None
    out, lse = attention_with_lse(
        local["q"],
        local["k"],
        local["v"],
        mask=mask,
        group=group,
        layout=layout,
        sinks=sinks,
        length=case.length,
        strategy="ring",
        traffic=traffic,
    )
    assert out.dtype == DTYPES[case.dtype]
    loss = (out.double() * shard(given["dout"], layout, group).double()).sum()
    if case.dlse:
        loss = loss + (lse.double() * shard(given["dlse"], layout, group)).sum()
    loss.backward()
    parts = {
        "out": out.detach(),
        "lse": lse.detach(),
        **{f"d{name}": x.grad for name, x in local.items() if x.grad is not None},
    }
    whole = {name: unshard(x, layout, group, length=case.length) for name, x in parts.items()}
    if sinks is not None and sinks.grad is not None:
        whole["dsinks"] = sinks.grad
        if group is not None:
            dist.all_reduce(whole["dsinks"], group=group)
    return whole


def errors(group: dist.ProcessGroup | None, case: Case) -> dict[str, Any]:
    given, traffic = inputs(case), Traffic()
    found = compute(group, case, given, traffic)
    wanted = truth(case, given)
    assert found.keys() == wanted.keys()
    made = plan(
        case.build()[0],
        LAYOUTS[case.layout],
        world=case.world,
        length=case.length,
        heads=case.heads[0],
        kv_heads=case.heads[1],
        head_dim=case.dim,
        dtype=DTYPES[case.dtype],
    )
    rank = 0 if group is None else dist.get_rank(group)
    planned = 2 * (made.received_bytes(rank) + made.received_bytes(rank, backward=True))  # two batch rows
    assert made.received_bytes(rank) == made.lower_bound_bytes(rank)
    assert traffic.received_payload == planned
    return {name: relative_rms(found[name], wanted[name]) for name in wanted}


def check(case: Case) -> None:
    results = [errors(None, case)] if case.world == 1 else run_ranks(errors, case.world, case)
    for result in results:
        assert max(result.values()) <= BOUND[DTYPES[case.dtype]], result


@pytest.mark.parametrize("case", covering(), ids=str)
def test_ranks_compute_what_dense_attention_computes(case: Case) -> None:
    check(case)


@pytest.mark.full
@pytest.mark.parametrize("case", full_product(), ids=str)
def test_full_product(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("mask", ["causal", "causal documents", "full", "window"])
def test_bf16_is_no_worse_than_one_rank(mask: str) -> None:
    one = Case(1, "zigzag", mask, "bfloat16", 510, (8, 2), 64, True, False)
    alone = errors(None, one)
    for world in (2, 4):
        result = run_ranks(errors, world, one._replace(world=world))[0]
        # Eight sink gradients are one draw of rounding noise, too few to compare closely.
        assert result.pop("dsinks") <= 3 * alone["dsinks"]
        for name, error in result.items():
            assert error <= 1.1 * alone[name] + 1e-6, (world, name, error, alone[name])


def repeat(group: dist.ProcessGroup, case: Case) -> bool:
    given = inputs(case)
    first, second = (compute(group, case, given, Traffic()) for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def test_repeats_bit_for_bit() -> None:
    assert all(run_ranks(repeat, 4, Case(4, "zigzag", "causal documents", "float32", 101, (4, 2), 32, True, True)))


def per_row(group: dist.ProcessGroup) -> list[float]:
    """Batch rows with documents of their own, two of them alike."""
    rows = [[0, 11, 30], [0, 11, 30], [0, 30], [0, 1, 29, 30]]
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(4, 30, h, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2, 4))
    exact = [x.clone().requires_grad_() for x in (q, k, v)]
    table = torch.stack([mask_table(30, causal=True, boundaries=row) for row in rows])
    out, _ = dense_attention(exact[0], exact[1], exact[2], table)
    out.backward(dout)
    worst = 0.0
    for mask in (Causal() & Documents(rows), [Causal() & Documents(row) for row in rows]):
        local = [shard(x, ZigZag(), group).detach().requires_grad_() for x in (q, k, v)]
        found = attention(*local, mask=mask, group=group, layout=ZigZag())
        found.backward(shard(dout, ZigZag(), group))
        whole = [unshard(x, ZigZag(), group) for x in (found.detach(), *(x.grad for x in local if x.grad is not None))]
        wanted = [out.detach(), *(x.grad for x in exact if x.grad is not None)]
        worst = max(worst, *(relative_rms(a, b) for a, b in zip(whole, wanted, strict=True)))
    return [worst]


def test_batch_rows_may_have_masks_of_their_own() -> None:
    assert max(worst for (worst,) in run_ranks(per_row, 2)) < 1e-12


def perturb(group: dist.ProcessGroup, changed: int) -> list[int]:
    """Return the positions whose output changes when one token's q, k and v change."""
    g = torch.Generator().manual_seed(0)
    base = [torch.randn(1, 40, h, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2)]
    other = [x.clone() for x in base]
    for x in other:
        x[:, changed] += 1.0
    mask = Causal() & Documents([0, 12, 25, 40])
    outs = []
    for tensors in (base, other):
        local = [shard(x, ZigZag(), group) for x in tensors]
        outs.append(unshard(attention(*local, mask=mask, group=group, layout=ZigZag()), ZigZag(), group))
    return torch.nonzero((outs[0] != outs[1]).any(-1).any(-1)[0]).flatten().tolist()


@pytest.mark.parametrize(("changed", "document_end"), [(0, 12), (12, 25), (20, 25), (39, 40)])
def test_one_token_changes_only_later_outputs_of_its_document(changed: int, document_end: int) -> None:
    for moved in run_ranks(perturb, 2, changed):
        assert moved == list(range(changed, document_end))
