"""Every strategy x mask x layout x dtype x world x heads against dense attention in float64, and bytes against plans.

Ranks are threads here, with the real executors, plans and messages (``virtual_ranks``); a few cases run on gloo
processes through the public call. Cases in CI are a covering array: every pair of values meets in one. ``make
test-all`` runs the product.
"""

from itertools import combinations, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_cases import LAYOUTS, PATTERNS, Case, check, error_over_one_rank, run_threads, truth, whole
from torch.distributed.device_mesh import DeviceMesh
from virtual_ranks import Mail

from dense import relative_rms
from ringspan.dist_attn import Traffic, attention_with_lse, plan, shard, unshard
from ringspan.dist_attn.strategies import TABLE
from ringspan.parallel.testing import run_ranks

ON_MESHES = ("double_ring", "ulysses_ring")
MASKS = [name + end for name in (*PATTERNS, "heads") for end in ("", " documents")]
VALUES: dict[str, list[Any]] = {
    "strategy": list(TABLE),
    "mesh": [(1,), (2,), (3,), (4,), (8,), (2, 2), (3, 2), (2, 4), (1, 3)],
    "mask": MASKS,
    "layout": ["zigzag", "contiguous", "blocks"],
    "dtype": [torch.float64, torch.float32],
    "heads": [(4, 4), (8, 2), (4, 1), (6, 3), (8, 8)],
    "length": [3, 37, 130, 300],
    "sinks": [True, False],
    "dlse": [True, False],
    "keep": [False, True],
    "kv": [False, True],
}


def fits(row: dict[str, Any]) -> bool:
    """Whether the values of a (partial) row may meet: hybrids need a mesh, the others a flat group."""
    strategy, mesh = row.get("strategy"), row.get("mesh")
    if strategy and mesh and (len(mesh) == 2) != (strategy in ON_MESHES):
        return False
    if strategy and mesh and "heads" in row and "ulysses" in strategy:
        return row["heads"][0] >= mesh[-1]
    return True


def covering() -> list[dict[str, Any]]:
    """Return rows in which every allowed pair of values of two parameters meets; greedy, the same in every run."""
    left = {
        frozenset({(a, i), (b, j)})
        for a, b in combinations(VALUES, 2)
        for i, j in product(range(len(VALUES[a])), range(len(VALUES[b])))
        if fits({a: VALUES[a][i], b: VALUES[b][j]})
    }
    rows = []
    while left:
        row = dict(sorted(min(left, key=sorted)))
        for name in VALUES:
            if name not in row:
                row[name] = max(
                    (i for i in range(len(VALUES[name])) if fits(named({**row, name: i}))),
                    key=lambda i: sum(frozenset({(name, i), other}) in left for other in row.items()),
                )
        left -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        rows.append(named(row))
    return rows


def named(row: dict[str, int]) -> dict[str, Any]:
    return {name: values[row[name]] for name, values in VALUES.items() if name in row}


def case_of(row: dict[str, Any]) -> Case:
    world = row["mesh"][0] * row["mesh"][-1] if len(row["mesh"]) == 2 else row["mesh"][0]
    weights = tuple((3 * rank + 1) % 5 for rank in range(world)) if row["kv"] else None  # some ranks hold no keys
    mine = {name: value for name, value in row.items() if name not in ("strategy", "kv")}
    return Case(**mine, kv_weights=weights)


def label(row: dict[str, Any]) -> str:
    return " ".join(str(value).removeprefix("torch.") for value in row.values())


@pytest.mark.parametrize("row", covering(), ids=label)
def test_ranks_compute_what_dense_attention_does(row: dict[str, Any]) -> None:
    case, strategy = case_of(row), TABLE[row["strategy"]]
    check(case, strategy, run_threads(case, strategy))  # pyright: ignore[reportArgumentType]


def full_product() -> list[dict[str, Any]]:
    kept = {**VALUES, "heads": [(8, 2), (6, 3), (8, 8)], "mesh": [(2,), (3,), (4,), (8,), (2, 2), (2, 4)]}
    kept |= {"length": [130], "sinks": [True], "dlse": [True], "keep": [False], "kv": [False]}
    rows = (dict(zip(kept, values, strict=True)) for values in product(*kept.values()))
    return [row for row in rows if fits(row)]


@pytest.mark.full
@pytest.mark.parametrize("row", full_product(), ids=label)
def test_full_product(row: dict[str, Any]) -> None:
    case, strategy = case_of(row), TABLE[row["strategy"]]
    check(case, strategy, run_threads(case, strategy))  # pyright: ignore[reportArgumentType]


def called(group: dist.ProcessGroup, strategy: str, case: Case) -> dict[str, float]:
    """Run the public call on gloo ranks and return each result's error; counted bytes are the plan's."""
    layout, given, world = LAYOUTS[case.layout], case.inputs, dist.get_world_size(group)
    mesh = DeviceMesh("cpu", torch.arange(world).view(case.mesh)) if len(case.mesh) == 2 else group
    local = {name: shard(given[name], layout, group).detach().requires_grad_() for name in ("q", "k", "v")}
    sinks, traffic = given["sinks"].clone().requires_grad_(), Traffic()
    options: dict[str, Any] = {"length": case.length, "strategy": strategy, "sinks": sinks, "traffic": traffic}
    out, lse = attention_with_lse(**local, mask=case.built, group=mesh, layout=layout, debug=True, **options)
    forward = traffic.received_payload
    loss = (out * shard(given["dout"], layout, group)).sum() + (lse * shard(given["dlse"], layout, group)).sum()
    loss.backward()
    shape: dict[str, Any] = {"length": case.length, "heads": case.heads[0], "kv_heads": case.heads[1]}
    shape["head_dim"] = case.dim
    planned = plan(
        case.built, layout, world=case.mesh if len(case.mesh) == 2 else world, strategy=strategy, dtype=case.dtype,
        sinks=True, **shape,
    )  # fmt: skip
    rank = dist.get_rank(group)
    batch = 1 if "documents" in case.mask else case.batch  # documents differ by row, so their plan has all rows
    assert forward == batch * planned.received_bytes(rank)
    assert traffic.received_payload - forward == batch * planned.received_bytes(rank, backward=True)
    grads = [x.grad for x in local.values() if x.grad is not None]
    found = [unshard(x, layout, group, length=case.length) for x in (out.detach(), lse.detach(), *grads)]
    assert sinks.grad is not None
    dist.all_reduce(sinks.grad, group=group)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    return {
        name: relative_rms(a, b) for name, a, b in zip(names, [*found, sinks.grad], truth(case, given), strict=True)
    }


GLOO = [
    ("ring", Case("causal", (2,), (8, 2), 130, dim=16)),
    ("ring", Case("window documents", (8,), (8, 2), 300, "contiguous", dim=16)),
    ("double_ring", Case("full", (2, 2), (4, 2), 400, "contiguous")),
    ("double_ring", Case("window documents", (2, 2), (4, 1), 130)),
    ("all_gather", Case("groups", (3,), (6, 3), 61, "blocks")),
    ("ulysses", Case("heads", (4,), (8, 2), 130)),
    ("ulysses_ring", Case("causal documents", (2, 2), (4, 1), 61)),
    ("dist_attention", Case("window", (4,), (4, 1), 130, "contiguous")),
    ("dist_attention", Case("dilated documents", (3,), (4, 2), 61, "blocks")),
    ("auto", Case("causal", (2, 2), (8, 2), 130)),
]


@pytest.mark.parametrize(("strategy", "case"), GLOO, ids=lambda x: x if isinstance(x, str) else x.name)
def test_the_public_call_on_gloo_ranks(strategy: str, case: Case) -> None:
    if strategy == "auto":
        strategy_errors = run_ranks(errors_of_auto, 4, case)
    else:
        world = case.mesh[0] * (case.mesh[1] if len(case.mesh) == 2 else 1)
        strategy_errors = run_ranks(called, world, strategy, case)
    for errors in strategy_errors:
        assert max(errors.values()) <= 1e-12, errors


def errors_of_auto(group: dist.ProcessGroup, case: Case) -> dict[str, float]:
    """The plan of "auto" with the device's typical costs is what the call takes."""
    from ringspan.dist_attn.cost import typical

    chosen = plan(
        case.built, LAYOUTS[case.layout], world=case.mesh, length=case.length, heads=case.heads[0],  # pyright: ignore[reportArgumentType]
        kv_heads=case.heads[1], head_dim=case.dim, dtype=case.dtype, strategy="auto", costs=typical("cpu"), sinks=True,
    ).strategy  # fmt: skip
    found = called(group, chosen, case)
    local = {name: shard(case.inputs[name], LAYOUTS[case.layout], group) for name in ("q", "k", "v")}
    mesh = DeviceMesh("cpu", torch.arange(4).view(case.mesh))
    options: dict[str, Any] = {"mask": case.built, "group": mesh, "layout": LAYOUTS[case.layout], "length": case.length}
    first, second = (attention_with_lse(**local, **options, strategy=each)[0] for each in ("auto", chosen))
    assert torch.equal(first, second)
    return found


@pytest.mark.parametrize("strategy", ["ring", "all_gather", "dist_attention"])
def test_the_error_does_not_grow_with_the_world(strategy: str) -> None:
    """Partial results stay in fp32 up to 64 ranks: as exact in bf16 as one rank's operator with all tokens."""
    case = Case("causal", (64,), (4, 2), 512, dtype=torch.bfloat16, dim=32, batch=1, sinks=False)
    assert max(error_over_one_rank(case, TABLE[strategy])) <= 1.1  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("strategy", TABLE)
def test_a_perturbed_key_changes_the_rows_that_see_it_and_no_other(strategy: str) -> None:
    mesh = (2, 2) if strategy in ON_MESHES else (4,)
    case = Case("window documents", mesh, (4, 2), 61, batch=1, sinks=False, dlse=False)
    given = case.inputs
    other = {name: x.clone() for name, x in given.items()}
    for name in ("k", "v"):
        other[name][:, 27] += 1
    chosen: Any = TABLE[strategy]
    before, after = (whole(case, run_threads(case, chosen, each))[0] for each in (given, other))
    changed = (before != after).any(-1).any(-1)[0]
    assert torch.equal(changed, case.table(0)[0, :, 27])


@pytest.mark.parametrize("strategy", TABLE)
def test_a_run_repeats_bit_for_bit(strategy: str) -> None:
    mesh = (2, 2) if strategy in ON_MESHES else (4,)
    case = Case("window documents", mesh, (4, 2), 61, dtype=torch.float32)
    chosen: Any = TABLE[strategy]
    first, second = (run_threads(case, chosen) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


@pytest.mark.parametrize("strategy", ["ring", "double_ring", "all_gather", "ulysses"])
def test_gradients_on_a_narrow_wire(strategy: str) -> None:
    """bf16 dK and dV on the wire: a few roundings of bf16 in error, half the bytes of fp32 ones."""
    mesh = (2, 2) if strategy in ON_MESHES else (4,)
    case = Case("causal", mesh, (4, 1), 160, dtype=torch.float32, wire=torch.bfloat16)
    chosen: Any = TABLE[strategy]
    exact, found = truth(case, case.inputs), whole(case, run_threads(case, chosen))
    for index, wanted in enumerate(exact):
        error = relative_rms(found[index], wanted)
        assert (1e-5 < error < 6e-3) if index in (3, 4) else error <= 2e-6
    sizes = [
        chosen.moves(each.problem).transfers(backward=True).bytes.sum() for each in (case, case._replace(wire=None))
    ]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("strategy", ["ring", "double_ring"])
def test_a_buffer_is_sent_once(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes on to two ranks is copied: its header would change while the first is on its way."""
    post, sent = Mail.post, []

    def once(self: Mail, round_id: int, sends: Any, receives: Any) -> Any:
        for _, message in sends:
            assert not any(message.buffer is each for each in sent)
            sent.append(message.buffer)
        return post(self, round_id, sends, receives)

    monkeypatch.setattr(Mail, "post", once)
    case = Case("window", (4, 4) if strategy in ON_MESHES else (16,), (8, 2), 199, "contiguous")
    run_threads(case, TABLE[strategy])  # pyright: ignore[reportArgumentType]
