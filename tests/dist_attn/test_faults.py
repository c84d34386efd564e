"""Bad input stops every rank alike, in one line, before anything is sent; wrong messages and lost ranks are noticed."""

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_cases import Case, Strategy, one_rank

from ringspan.dist_attn import (
    Causal,
    Contiguous,
    Disagreement,
    Documents,
    Full,
    Traffic,
    ZigZag,
    attention,
    dist_attention,
    dist_attention_plan,
    gather,
    gather_plan,
    ring,
    ring_plan,
    unshard,
)
from ringspan.dist_attn.exchange import Exchange, PeerLost, agree
from ringspan.dist_attn.executor import Wiring
from ringspan.kernels.select import Backend
from ringspan.parallel.testing import run_ranks


def tensors(tokens: int = 8, heads: int = 4, groups: int = 2, dim: int = 8) -> list[torch.Tensor]:
    return [torch.zeros(1, tokens, h, dim) for h in (heads, groups, groups)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 4)},
            "k: shape .* does not fit q's",
        ),
        ({"v": torch.zeros(1, 7, 2, 8)}, "q, k, v: shapes"),
        (
            {"k": torch.zeros(1, 8, 3, 8), "v": torch.zeros(1, 8, 3, 8)},
            "3 KV heads for 4 query heads",
        ),
        ({"q": torch.zeros(1, 8, 4, 8, dtype=torch.float64)}, "q, k, v: dtypes"),
        ({"q": torch.zeros(8, 4, 8)}, "q, k, v: shapes"),
        ({"sinks": torch.zeros(2)}, r"sinks: shape \(2,\); must be \[4\]"),
        ({"strategy": "teleport"}, "strategy: 'teleport' is not one of"),
        ({"length": 9}, "length: 9, but the only rank holds 8"),
        ({"mask": Documents([0, 9])}, "ends at 9 but the sequence has 8"),
        ({"mask": [Causal(), Full()]}, "2 masks for 1 batch rows"),
        (
            {"first_kv_head": 3, "total_kv_heads": 4},
            r"first_kv_head: 3 \+ 2 KV heads here exceeds total_kv_heads 4",
        ),
    ],
)
def test_one_rank_refuses_by_name(change: dict[str, object], message: str) -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=message):
        attention(**{"q": q, "k": k, "v": v, **change})  # pyright: ignore[reportArgumentType]


def refused(group: dist.ProcessGroup, kind: str) -> list[str]:
    rank = dist.get_rank(group)
    q, k, v = tensors(8 if kind != "length" or rank == 0 else 7)
    if kind == "shape" and rank == 1:
        q = q[0]
    mask = Causal() if kind != "mask" or rank == 0 else Full()
    layout = None if kind == "layout" else ZigZag() if kind != "layouts" or rank == 0 else Contiguous()
    try:
        attention(q, k, v, mask=mask, group=group, layout=layout, length=16)
    except Disagreement as error:
        return [str(error), str(error.rank)]
    return ["no error", ""]


@pytest.mark.parametrize(
    ("kind", "message", "rank"),
    [
        ("length", "q: 7 tokens, but rank 1 of 2 holds 8 of 16", "1"),
        ("mask", "ranks disagree on their inputs: rank 0 has .*mask causal; rank 1 has .*mask full", "0"),
        ("layouts", "rank 0 has .*ZigZag.*rank 1 has .*Contiguous", "0"),
        ("layout", "layout: required with 2 ranks", "0"),
        ("shape", "q, k, v: shapes", "1"),
    ],
)
def test_every_rank_stops_for_the_same_reason(kind: str, message: str, rank: str) -> None:
    first, second = run_ranks(refused, 2, kind)
    assert first == second
    assert first[1] == rank
    with pytest.raises(ValueError, match=message):
        raise ValueError(first[0])


def wrong_message(group: dist.ProcessGroup, kind: str, debug: bool) -> str:
    """Rank 1 sends something else than rank 0 expects, in a way gloo does not notice."""
    rank, peer = dist.get_rank(group), 1 - dist.get_rank(group)
    odd = lambda this, usual, other: other if kind == this and rank == 1 else usual  # noqa: E731
    exchange = Exchange(group, odd("plan", "ab", "cd") * 32, odd("layer", 3, 4), Traffic(), debug=debug)
    dtype = odd("dtype", odd("same size", torch.float32, torch.int32), torch.bfloat16)
    shape = odd("turned", [1, odd("short", 4, 2), 2, 8], [1, 2, 4, 8])
    message = exchange.message([(shape, dtype)] * 2, torch.device("cpu"), note=odd("hops", 5, 6))
    for tensor in message.tensors:
        tensor.fill_(1)
    if rank == 0:
        try:
            exchange.post(7, [], [(peer, message)]).wait()
        except RuntimeError as error:
            return str(error)
        return "accepted"
    if kind == "contents":  # changed on the way, behind the back of ``post``
        message.label(exchange._header(7, rank, peer, message))
        message.tensors[1][0, 3, 1, 7] = 1.5
        dist.send(message.buffer, peer, group)
    else:
        exchange.post(odd("round", 7, 8), [(peer, message)], []).wait()
    return "sent"


@pytest.mark.parametrize("kind", ["plan", "layer", "round", "short", "dtype"])
@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_a_wrong_message_is_noticed(kind: str, debug: bool) -> None:
    found = run_ranks(wrong_message, 2, kind, debug)[0]
    place = r"rank 0 of 2, layer 3, step 7 \(round 0x7\): message from rank 1 is not the expected one: header \["
    assert re.match(place, found), found


@pytest.mark.parametrize(
    ("kind", "what"),
    [("same size", "dtypes"), ("turned", "shapes"), ("hops", "hops"), ("contents", "contents")],
)
def test_debug_mode_notices_what_headers_do_not_tell(kind: str, what: str) -> None:
    found = run_ranks(wrong_message, 2, kind, True)[0]
    assert found.startswith("rank 0 of 2, layer 3, step 7 (round 0x7): message from rank 1: its " + what), found
    assert "[1, 4, 2, 8] torch.float32, [1, 4, 2, 8] torch.float32" in found


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_the_right_message_is_accepted(debug: bool) -> None:
    assert run_ranks(wrong_message, 2, "none", debug) == ["accepted", "sent"]


def long_facts(group: dist.ProcessGroup) -> str:
    """Facts longer than a packet are still compared whole."""
    try:
        agree(group, "x" * 5000 + str(dist.get_rank(group)))
    except Disagreement as error:
        return str(error)[:40]
    return "agreed"


def test_agreement_compares_more_than_it_shows() -> None:
    assert set(run_ranks(long_facts, 2)) == {"ranks disagree on their inputs: rank 0 h"}


def test_unshard_names_a_wrong_share() -> None:
    with pytest.raises(ValueError, match="x: 5 tokens along dim 1, but rank 0 of 1 holds 6 of 6"):
        unshard(torch.zeros(1, 5, 2), ZigZag(), None, length=6)


WORLD, LOST = 3, 1  # rank 1 is the one that dies or stops
PATIENCE_S = 5.0  # the group's timeout
STRATEGIES = {
    "ring": Strategy(ring_plan.moves, ring.executor),
    "all_gather": Strategy(gather_plan.moves, gather.executor),
    "dist_attention": Strategy(dist_attention_plan.moves, dist_attention.executor),
}


def fatal(kernel: Backend, way: str, number: int) -> Backend:
    """Return a kernel at whose first call, ``way`` "forward" or "backward", this process gets a signal."""

    def call(name: str) -> Callable[..., None]:
        def run(*given: Any, **named: Any) -> None:
            if name == way:
                os.kill(os.getpid(), number)
            getattr(kernel, name)(*given, **named)

        return run

    module: Any = SimpleNamespace(forward=call("forward"), backward=call("backward"))
    return replace(kernel, module=module, again=None)


def rank_of_three(rank: int, folder: Path, strategy: Strategy, way: str, number: int) -> None:
    """Attend; write down what was raised."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE_S))
    assert dist.group.WORLD is not None
    dist.barrier()  # all are connected before one is lost
    traffic = Traffic()
    wiring = Wiring(rank, Exchange(dist.group.WORLD, "ab" * 32, 0, traffic))
    if rank == LOST:
        alive = strategy.executor
        strategy = strategy._replace(executor=lambda p, w, kernel, s: alive(p, w, fatal(kernel, way, number), s))
    case = Case("full", (WORLD,), (4, 2), 48, dtype=torch.float32)
    found = "nothing was raised"
    try:
        one_rank(case, strategy, case.inputs, wiring, traffic)
    except PeerLost as error:
        found = str(error)
    part = folder / f"part{rank}"
    part.write_text(found)
    part.rename(folder / f"found{rank}")
    time.sleep(60)  # a rank that leaves is one more that its peers lose; the parent ends this one


def survivors(folder: Path, strategy: Strategy, way: str, number: int) -> dict[int, str]:
    """Return the error of each rank but the lost one; end every rank by its pid."""
    pids: list[int] = []
    try:
        for rank in range(WORLD):
            pid = os.fork()
            if pid == 0:
                try:
                    rank_of_three(rank, folder, strategy, way, number)
                finally:
                    os._exit(1)
            pids.append(pid)
        files = {rank: folder / f"found{rank}" for rank in range(WORLD) if rank != LOST}
        deadline = time.monotonic() + 6 * PATIENCE_S
        while time.monotonic() < deadline and not all(file.exists() for file in files.values()):
            time.sleep(0.02)
        return {rank: file.read_text() for rank, file in files.items() if file.exists()}
    finally:
        for pid in pids:
            for each in (signal.SIGCONT, signal.SIGKILL):  # zombies take signals too; no pid is free before waitpid
                os.kill(pid, each)
            os.waitpid(pid, 0)


@pytest.mark.parametrize(
    ("number", "way"),
    [(signal.SIGKILL, "forward"), (signal.SIGKILL, "backward"), (signal.SIGSTOP, "forward")],
    ids=["killed", "killed in the backward", "stopped"],
)
@pytest.mark.parametrize("name", STRATEGIES)
def test_a_lost_rank_is_named_within_the_timeout(tmp_path: Path, name: str, number: int, way: str) -> None:
    found = survivors(tmp_path, STRATEGIES[name], way, number)
    assert sorted(found) == [0, 2]
    for rank, error in found.items():
        line = rf"rank {rank} of 3, layer 0, .+: waited (\d+\.\d) s for (.*rank 1.*|the other 2 ranks), then: .+"
        waited = re.fullmatch(line + "; see that rank's log for what ended or stopped it", error)
        assert waited, error
        assert float(waited[1]) < PATIENCE_S + 2, error
        if number == signal.SIGSTOP:
            assert float(waited[1]) > PATIENCE_S - 1, error
