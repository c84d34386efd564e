"""Four virtual ranks in one process through the real executor, plan and messages; on a GPU where there is one.

Each rank is a thread; only the wire is replaced, by mailboxes. So that a machine with a single accelerator can run a
ring on it.
"""

import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from dense import attention as dense_attention
from dense import relative_rms
from ringspan.dist_attn import Causal, Contiguous, Documents, PerHead, Sinks, Window, ZigZag, s2_attention
from ringspan.dist_attn.exchange import Exchange, Pending, Traffic
from ringspan.dist_attn.executor import Wiring
from ringspan.dist_attn.layout import Layout
from ringspan.dist_attn.planner import plan
from ringspan.dist_attn.strategies import TABLE
from ringspan.kernels.mask import Mask, by_head
from ringspan.kernels.merge import join_sinks
from ringspan.kernels.select import select
from ringspan.kernels.state import Saved

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORLD = 4
TIMEOUT_S = 60


class Mail(Exchange):
    """An exchange whose wire is a mailbox per pair of ranks; ``name`` tells groups apart."""

    def __init__(self, rank: int, world: int, name: object, boxes: dict[Any, Queue[Tensor]], traffic: Traffic) -> None:
        self.rank, self.world, self.name, self.boxes, self.traffic = rank, world, name, boxes, traffic
        self.debug, self._digest, self._label = False, (1, 2), 0

    def post(self, round_id: int, sends: Any, receives: Any) -> Pending:
        for peer, message in sends:
            message.label(self._header(round_id, self.rank, peer, message))
            self.boxes[self.name, self.rank, peer].put(message.buffer.clone())
        expected = [(peer, message, self._header(round_id, peer, self.rank, message)) for peer, message in receives]
        self.traffic.received_payload += sum(message.payload_bytes for _, message in receives)
        letters = [(Letter(self.boxes[self.name, peer, self.rank], m.buffer), f"rank {peer}") for peer, m in receives]
        return Pending(letters, expected)  # pyright: ignore[reportArgumentType]

    def all_gather(self, local: Tensor, step: str) -> tuple[Tensor, Pending]:
        for peer in range(self.world):
            self.boxes[self.name, "gather", self.rank, peer].put(local.clone())
        whole = local.new_empty((self.world, *local.shape))
        letters = [(Letter(self.boxes[self.name, "gather", r, self.rank], whole[r]), step) for r in range(self.world)]
        self.traffic.received_payload += (self.world - 1) * local.nbytes
        return whole, Pending(letters, [])  # pyright: ignore[reportArgumentType]

    def reduce_scatter(self, parts: Tensor, step: str) -> tuple[Tensor, Pending]:
        for peer in range(self.world):
            self.boxes[self.name, "scatter", self.rank, peer].put(parts[peer].clone())
        mine = torch.zeros_like(parts[self.rank])
        letters = [
            (Letter(self.boxes[self.name, "scatter", r, self.rank], mine, add=True), step) for r in range(self.world)
        ]
        self.traffic.received_payload += (self.world - 1) * mine.nbytes
        return mine, Pending(letters, [])  # pyright: ignore[reportArgumentType]


class Letter:
    """One message on its way, with the one method of a ``dist.Work`` that is used."""

    def __init__(self, box: Queue[Tensor], target: Tensor, *, add: bool = False) -> None:
        self.box, self.target, self.add = box, target, add

    def wait(self) -> None:
        came = self.box.get(timeout=TIMEOUT_S)
        if self.add:
            self.target.add_(came)
        else:
            self.target.copy_(came)


MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window and sinks": Causal() & (Window(20) | Sinks(3)),
    "documents": Causal() & (Window(20) | Sinks(2)) & Documents([0, 31, 90, 91, 150]),
    "heads": PerHead({(0, 1): Causal(), (1, 2): Causal() & Window(7)}),
    "s2": s2_attention(48),
}
LENGTH = 150


@pytest.mark.parametrize("strategy", TABLE)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("layout", [ZigZag(), Contiguous()], ids=["zigzag", "contiguous"])
def test_four_virtual_ranks_compute_what_dense_attention_does(name: str, layout: Layout, strategy: str) -> None:
    mask, dtype = MASKS[name], torch.float32
    g = torch.Generator().manual_seed(3)
    q, k, v, dout = (torch.randn(1, LENGTH, h, 16, generator=g).to(DEVICE) for h in (4, 2, 2, 4))
    sinks = torch.tensor([2.0, -1.0, 3.0, 0.5], device=DEVICE)
    kernel = select(DEVICE, dtype, 16)
    mesh = (2, 2) if strategy in ("double_ring", "ulysses_ring") else WORLD
    shape = {"length": LENGTH, "heads": 4, "kv_heads": 2, "head_dim": 16, "dtype": dtype}
    planned = plan(mask, layout, world=mesh, strategy=strategy, **shape)
    boxes: dict[Any, Queue[Tensor]] = defaultdict(Queue)
    lock = threading.Lock()
    started = threading.Barrier(WORLD, timeout=TIMEOUT_S)

    def rank(number: int) -> tuple[list[Tensor], int, int]:
        own = lambda x: torch.cat([x[:, a:b] for a, b in layout.spans(number, WORLD, LENGTH)], 1)  # noqa: E731
        with lock:  # a defaultdict makes boxes on first use
            for a in range(WORLD):
                for b in range(WORLD):
                    for group in ("flat", ("outer", number % 2), ("inner", number // 2)):
                        for kind in ((), ("gather",), ("scatter",)):
                            _ = boxes[(group, *kind, a, b)]
        traffic = Traffic()
        flat = Mail(number, WORLD, "flat", boxes, traffic)
        outer = Mail(number // 2, 2, ("outer", number % 2), boxes, traffic)
        inner = Mail(number % 2, 2, ("inner", number // 2), boxes, traffic)
        wiring = Wiring(number, flat, *((outer, inner) if mesh != WORLD else ()))
        executor = TABLE[strategy].executor(planned.problem, wiring, kernel, 0.25)
        started.wait()
        out, lse, rest = executor.forward(own(q), own(k), own(v))
        out, lse = join_sinks(out, lse, sinks)
        received = traffic.received_payload
        saved = Saved(own(q), out.to(dtype), lse, own(dout))
        grads = executor.backward(saved, own(k), own(v), rest)
        return [out, lse, *grads], received, traffic.received_payload - received

    with ThreadPoolExecutor(WORLD) as pool:
        results = [each.result(TIMEOUT_S) for each in [pool.submit(rank, number) for number in range(WORLD)]]

    position = torch.arange(LENGTH)
    exact = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    heads = [(head, plain) for heads, plain in by_head(mask, 0, 2, 2) for head in heads]
    truth = [torch.empty(1, LENGTH, 4, 16, dtype=torch.float64), torch.empty(1, LENGTH, 4, dtype=torch.float64)]
    for head, plain in heads:
        table = plain.allowed(position[:, None], position[None, :])
        mine = slice(2 * head, 2 * head + 2)
        each = dense_attention(
            exact[0][:, :, mine],
            exact[1][:, :, head : head + 1],
            exact[2][:, :, head : head + 1],
            table,
            0.25,
            sinks.double().cpu()[mine],
        )
        truth[0][:, :, mine], truth[1][:, :, mine] = each
    truth += torch.autograd.grad(truth[0], exact, dout.double().cpu())
    order = [p for number in range(WORLD) for a, b in layout.spans(number, WORLD, LENGTH) for p in range(a, b)]
    for index, expected in enumerate(truth):
        found = torch.cat([result[0][index] for result in results], 1).cpu()
        whole = torch.empty_like(found)
        whole[:, order] = found
        assert relative_rms(whole, expected.detach()) <= 2e-6
    for number in range(WORLD):
        assert results[number][1] == planned.received_bytes(number)
        assert results[number][2] == planned.received_bytes(number, backward=True)
        if "ring" in strategy and strategy != "ulysses_ring":
            assert planned.received_bytes(number) == planned.lower_bound_bytes(number)
