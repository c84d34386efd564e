"""Calls of attention over ranks and their dense truth, for any strategy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override
from virtual_ranks import apart, processes, threads

from dense import attention, pattern_table, relative_rms
from ringspan.dist_attn.exchange import Traffic
from ringspan.dist_attn.executor import Executor, ShardedAttention, Wiring
from ringspan.dist_attn.layout import Contiguous, Layout, ZigZag
from ringspan.dist_attn.moves import Moves
from ringspan.dist_attn.problem import Problem
from ringspan.kernels.attention import attend
from ringspan.kernels.mask import Documents, Mask, PerHead, Span, parse, union
from ringspan.kernels.parts import parts_of
from ringspan.kernels.select import Backend, select

BOUND = {torch.float64: 1e-12, torch.float32: 2e-6}
CAUSAL = ("causal",)
WINDOW = ("and", CAUSAL, ("or", ("window", 9, 0), ("sinks", 2)))
PATTERNS: dict[str, tuple[str, tuple]] = {  # masks as ringspan writes them, and as the truth does
    "causal": ("causal", CAUSAL),
    "full": ("full", ("full",)),
    "window": ("causal & (window(9) | sinks(2))", WINDOW),
    "both sides": ("window(9, 3)", ("window", 9, 3)),
    "groups": ("causal & groups(14, 5)", ("and", CAUSAL, ("groups", 14, 5, False))),
    "dilated": (
        "causal & (dilated(5, 7) | window(3) | sinks(1))",
        ("and", CAUSAL, ("or", ("dilated", 5, 7), ("window", 3, 0), ("sinks", 1))),
    ),
    "few": ("causal & window(2) & sinks(3)", ("and", CAUSAL, ("window", 2, 0), ("sinks", 3))),  # most rows see nothing
}


@dataclass(frozen=True)
class Uneven(Layout):
    """Contiguous shares by weight."""

    weights: tuple[int, ...]

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        assert world == len(self.weights)
        cuts = [sum(self.weights[:i]) * length // sum(self.weights) for i in (rank, rank + 1)]
        return union([Span(*cuts)])


@dataclass(frozen=True)
class Blocks(Layout):
    """Blocks of two tokens in turns: many spans."""

    @override
    def spans(self, rank: int, world: int, length: int) -> tuple[Span, ...]:
        starts = range(2 * rank, length, 2 * world)
        return union(Span(start, min(start + 2, length)) for start in starts)


LAYOUTS: dict[str, Layout] = {
    "zigzag": ZigZag(),
    "contiguous": Contiguous(),
    "blocks": Blocks(),
    "queries on rank 2": Uneven((0, 0, 1)),
    "mostly rank 1": Uneven((1, 6, 2)),
}


class Case(NamedTuple):
    """One call; ``mask`` names a pattern, perhaps with " documents" behind; "heads": the causal and the window one."""

    mask: str = "causal"
    mesh: tuple[int, ...] = (2,)
    heads: tuple[int, int] = (4, 2)
    length: int = 37
    layout: str = "zigzag"
    kv_weights: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64
    sinks: bool = True
    dlse: bool = True
    keep: bool = False
    wire: torch.dtype | None = None
    batch: int = 2
    dim: int = 8
    first_kv_head: int = 0
    total_kv_heads: int | None = None

    @property
    def name(self) -> str:
        """What differs from the defaults, for test ids."""
        default = Case()._asdict()
        return " ".join(str(x) for name, x in self._asdict().items() if x != default[name])

    @property
    def boundaries(self) -> list[list[int]] | None:
        """Another packing for each batch row."""
        if "documents" not in self.mask:
            return None
        edges = ([self.length // 3], [1, self.length // 2, self.length - 2])
        return [sorted({0, *edges[row % 2], self.length} - {-1, -2}) for row in range(self.batch)]

    @property
    def built(self) -> Mask:
        name = self.mask.removesuffix(" documents")
        if name == "heads":
            total = self.total_kv_heads or self.heads[1]
            masks = {(head, head + 1): parse(PATTERNS["window" if head % 2 else "causal"][0]) for head in range(total)}
            mask: Mask = PerHead(masks)
        else:
            mask = parse(PATTERNS[name][0])
        return mask if self.boundaries is None else mask & Documents(self.boundaries)

    def table(self, head: int) -> Tensor:
        """Return [B, L, L]: who sees whom, for one KV head of this call."""
        name = self.mask.removesuffix(" documents")
        if name == "heads":
            name = "window" if (head + self.first_kv_head) % 2 else "causal"
        rows = self.boundaries or [None] * self.batch
        return torch.stack([pattern_table(self.length, PATTERNS[name][1], row) for row in rows])

    @property
    def problem(self) -> Problem:
        heads, groups = self.heads
        layout = LAYOUTS[self.layout]
        return Problem(
            parts_of(self.built, self.batch, groups, self.first_kv_head, self.total_kv_heads),
            self.batch,
            self.length,
            layout,
            Uneven(self.kv_weights) if self.kv_weights else layout,
            self.mesh,
            heads,
            groups,
            self.dim,
            self.dtype,
            wire=self.wire,
            keep=self.keep,
            sinks=self.sinks,
            first_kv_head=self.first_kv_head,
            total_kv_heads=self.total_kv_heads,
        )

    @property
    def inputs(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(self.length)
        shapes = {"q": self.heads[0], "k": self.heads[1], "v": self.heads[1], "dout": self.heads[0]}
        made = {
            name: torch.randn(self.batch, self.length, heads, self.dim, generator=g, dtype=torch.float64).to(self.dtype)
            for name, heads in shapes.items()
        }
        made["dlse"] = torch.randn(self.batch, self.length, self.heads[0], generator=g, dtype=torch.float64)
        # Large and far from zero: a sink that is dropped or counted per rank must show.
        made["sinks"] = torch.randn(self.heads[0], generator=g, dtype=torch.float64) * 2 + 2
        return made


class Strategy(NamedTuple):
    """What is tested: a planner, and what makes an executor of a rank."""

    moves: Callable[[Problem], Moves]
    executor: Callable[[Problem, Wiring, Backend, float], Executor]


class Result(NamedTuple):
    """One rank's out, lse, dq, dk, dv, dsinks, and the bytes it received forward and in all."""

    tensors: list[Tensor]
    received: tuple[int, int]


def truth(case: Case, given: dict[str, Tensor]) -> list[Tensor]:
    """Return out, lse, dq, dk, dv, dsinks of the whole sequence in float64."""
    exact = [given[name].double().requires_grad_() for name in ("q", "k", "v", "sinks")]
    ratio = case.heads[0] // case.heads[1]
    found = []
    for head in range(case.heads[1]):
        mine, one = slice(ratio * head, ratio * (head + 1)), slice(head, head + 1)
        q, k, v = exact[0][:, :, mine], exact[1][:, :, one], exact[2][:, :, one]
        found.append(attention(q, k, v, case.table(head), sinks=exact[3][mine] if case.sinks else None))
    out, lse = (torch.cat(each, 2) for each in zip(*found, strict=True))
    loss = (out * given["dout"].double()).sum() + ((lse * given["dlse"]).sum() if case.dlse else 0)
    wanted = exact if case.sinks else exact[:3]
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, wanted)]


def one_rank(
    case: Case,
    strategy: Strategy,
    given: dict[str, Tensor],
    wiring: Wiring,
    traffic: Traffic,
    problem: Problem | None = None,
) -> Result:
    """Attend on one rank, forward and backward; threads are given ``problem``: Python 3.11 parses on one at a time."""
    problem, rank = problem or case.problem, wiring.rank
    take = lambda x, spans: torch.cat([x[:, :0], *(x[:, a:b] for a, b in spans)], 1)  # noqa: E731
    queries, keys = problem.spans(rank), problem.kv_spans(rank)
    local = [take(given["q"], queries), take(given["k"], keys), take(given["v"], keys)]
    inputs = [*local, given["sinks"]] if case.sinks else local
    inputs = [x.clone().requires_grad_() for x in inputs]
    sinks = inputs[3] if case.sinks else None
    kernel = select(torch.device("cpu"), case.dtype, case.dim)
    executor = strategy.executor(problem, wiring, kernel, case.dim**-0.5)
    out, lse = ShardedAttention.apply(*inputs[:3], sinks, executor, None)  # pyright: ignore[reportGeneralTypeIssues]
    forward = traffic.received_payload
    if case.keep:  # a recompute: nothing runs, and nothing of the forward is there
        kept = out.detach(), lse.detach()
        executor = strategy.executor(problem, wiring, kernel, case.dim**-0.5)
        out, lse = ShardedAttention.apply(*inputs[:3], sinks, executor, kept)  # pyright: ignore[reportGeneralTypeIssues]
    slopes = take(given["dout"], queries), take(given["dlse"], queries).to(lse.dtype)
    results, slopes = ((out, lse), slopes) if case.dlse else ((out,), slopes[:1])
    grads = torch.autograd.grad(results, inputs, slopes)
    received = traffic.received_payload
    return Result([x.detach() for x in (out, lse, *grads)], (forward, received))


def whole(case: Case, results: list[Result]) -> list[Tensor]:
    """Put the ranks' rows together; sinks' gradients are summed."""
    problem = case.problem
    found = []
    for index, first in enumerate(results[0].tensors):
        if index == 5:
            found.append(torch.stack([each.tensors[5] for each in results]).sum(0))
            continue
        spans = problem.kv_spans if index in (3, 4) else problem.spans
        order = [p for rank in range(problem.world) for a, b in spans(rank) for p in range(a, b)]
        total = torch.empty(first.shape[0], case.length, *first.shape[2:], dtype=first.dtype)
        total[:, order] = torch.cat([each.tensors[index] for each in results], 1)
        found.append(total)
    return found


def check(case: Case, strategy: Strategy, results: list[Result], given: dict[str, Tensor] | None = None) -> None:
    """Hold results against the truth, and received bytes against the plan."""
    exact = truth(case, given or case.inputs)
    names = ("out", "lse", "dq", "dk", "dv", "dsinks")
    for name, found, wanted in zip(names, whole(case, results), exact, strict=False):
        error = relative_rms(found, wanted)
        assert error <= BOUND[case.dtype], f"{name}: {error:.2e}"
    plan = strategy.moves(case.problem)
    forward, backward = (plan.transfers(backward=way) for way in (False, True))
    for rank, result in enumerate(results):
        planned = forward.received(rank), forward.received(rank) + backward.received(rank)
        assert result.received == planned, f"rank {rank} received {result.received}, planned {planned}"


def run_threads(case: Case, strategy: Strategy, given: dict[str, Tensor] | None = None) -> list[Result]:
    """Run a case with a thread per rank, in a process of its own."""
    mine, problem = given or case.inputs, case.problem

    def world() -> Any:
        run = lambda wiring, traffic: one_rank(case, strategy, mine, wiring, traffic, problem)  # noqa: E731
        return [packed(x) for x in threads(case.mesh, run)]

    return [unpacked(case, each) for each in apart(world)]


def run_processes(case: Case, strategy: Strategy) -> list[Result]:
    """Run a case with a gloo process per rank."""
    given = case.inputs
    found = processes(case.mesh, lambda *place: packed(one_rank(case, strategy, given, *place)))
    return [unpacked(case, each) for each in found]


def packed(result: Result) -> Any:
    """Return a result as JSON values; every float is a double."""
    return [[[list(x.shape), x.double().flatten().tolist()] for x in result.tensors], result.received]


def unpacked(case: Case, values: Any) -> Result:
    """Return a result from its JSON values."""
    made = [torch.tensor(x, dtype=torch.float64).reshape(shape) for shape, x in values[0]]
    kept = {1: case.problem.wide, 5: torch.float64}  # lse; the sinks' gradient
    return Result([x.to(kept.get(index, case.dtype)) for index, x in enumerate(made)], tuple(values[1]))


def error_over_one_rank(case: Case, strategy: Strategy) -> list[float]:
    """Return for out, lse and each gradient the error over that of one rank's operator with all tokens."""
    given = case.inputs
    inputs = [given[name].clone().requires_grad_() for name in ("q", "k", "v", "sinks")][: 4 if case.sinks else 3]
    sinks = inputs[3] if case.sinks else None
    out, lse = attend(*inputs[:3], mask=case.built, sinks=sinks, out_dtype=case.dtype)
    results = [(out, given["dout"]), (lse, given["dlse"].to(lse.dtype))][: 1 + case.dlse]
    one = [out, lse, *torch.autograd.grad([x for x, _ in results], inputs, [x for _, x in results])]
    exact = truth(case, given)
    mine, alone = (
        [relative_rms(a, b) for a, b in zip(x, exact, strict=True)]
        for x in (whole(case, run_threads(case, strategy)), one)
    )
    return [a / b for a, b in zip(mine, alone, strict=True)]
