"""Ranks as threads of one process, or as gloo processes, wired up for any strategy.

Threads run the real executors; only the wire is replaced, by a mailbox for each pair of ranks and for each collective.
"""

import faulthandler
import json
import os
import signal
import tempfile
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from ringspan.dist_attn.exchange import Exchange, Pending, Traffic
from ringspan.dist_attn.executor import Wiring
from ringspan.parallel.testing import run_ranks

TIMEOUT_S = 60
APART_S = 50  # shorter than a mailbox waits, so that a hang shows where it hangs


@dataclass
class Post:
    """The wires of one world of threads."""

    boxes: dict[Any, "Queue[Tensor]"] = field(default_factory=lambda: defaultdict(Queue))
    lock: threading.Lock = field(default_factory=threading.Lock)
    failed: threading.Event = field(default_factory=threading.Event)  # a rank has; the others need not wait

    def box(self, *address: Any) -> "Queue[Tensor]":
        with self.lock:
            return self.boxes[address]


class Mail(Exchange):
    """An exchange of some of the threads."""

    def __init__(self, post: Post, name: str, rank: int, world: int, traffic: Traffic) -> None:
        self.letters, self.name = post, name
        self.rank, self.world, self.traffic, self.debug = rank, world, traffic, True
        self._digest, self._label, self.collectives = (1, 2), 0, 0
        self.posted: Counter[tuple[int, int]] = Counter()  # transfers are matched in the order of posting

    @override
    def post(self, round_id: int, sends: Any, receives: Any) -> Pending:
        for peer, message in sends:
            message.label(self._header(round_id, self.rank, peer, message))
            self._box(self.rank, peer).put(message.buffer.clone())
        expected = [(peer, message, self._header(round_id, peer, self.rank, message)) for peer, message in receives]
        self.traffic.received_payload += sum(message.payload_bytes for _, message in receives)
        works: Any = [
            (Letter(self.letters, self._box(peer, self.rank), message.buffer), f"rank {peer}")
            for peer, message in receives
        ]
        return Pending(works, expected, f"rank {self.rank}")

    def _box(self, source: int, target: int) -> "Queue[Tensor]":
        self.posted[source, target] += 1
        return self.letters.box(self.name, "message", source, target, self.posted[source, target])

    @override
    def all_gather(self, local: Tensor, step: str) -> tuple[Tensor, Pending]:
        self.collectives += 1
        gathered = local.new_empty((self.world, *local.shape))
        boxes = [
            [self.letters.box(self.name, "gather", self.collectives, a, b) for b in range(self.world)]
            for a in range(self.world)
        ]
        for box in boxes[self.rank]:
            box.put(local.clone())
        self.traffic.received_payload += (self.world - 1) * local.nbytes
        works: Any = [(Letter(self.letters, boxes[a][self.rank], gathered[a]), f"rank {a}") for a in range(self.world)]
        return gathered, Pending(works, [], step)


class Letter:
    """Something on its way, with the one method of a ``dist.Work`` that is used."""

    def __init__(self, post: Post, box: "Queue[Tensor]", buffer: Tensor) -> None:
        self.post, self.box, self.buffer = post, box, buffer

    def wait(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            try:
                self.buffer.copy_(self.box.get(timeout=0.1))
                return
            except Empty:
                if self.post.failed.is_set() or time.monotonic() > deadline:
                    raise


def apart(fn: Callable[..., Any], *args: Any) -> Any:
    """Call in a process of its own and return JSON values: one that has had threads in torch cannot be forked safely.

    With a GPU in the house the call stays here: CUDA does not outlive a fork, and no rank is forked there.
    """
    if torch.cuda.is_available():
        return fn(*args)
    with tempfile.TemporaryDirectory(prefix="ringspan-apart-") as folder:
        pid = os.fork()
        if pid == 0:
            _apart(fn, args, Path(folder))
        if not _ended(pid, time.monotonic() + APART_S):
            raise AssertionError(f"did not end within {APART_S} s:\n{(Path(folder) / 'stack').read_text()}")
        if (error := Path(folder) / "error").exists():
            raise AssertionError(error.read_text())
        return json.loads((Path(folder) / "result").read_text())


def _apart(fn: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> None:
    try:
        with (folder / "stack").open("w") as stack:
            faulthandler.dump_traceback_later(APART_S - 5, file=stack)
            (folder / "result").write_text(json.dumps(fn(*args)))
    except BaseException:  # the parent reports it
        (folder / "error").write_text(traceback.format_exc())
    finally:
        os._exit(0)


def _ended(pid: int, deadline: float) -> bool:
    """Wait for a child until the deadline, then kill it."""
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def threads(mesh: tuple[int, ...], fn: Callable[[Wiring, Traffic], Any]) -> list[Any]:
    """Call ``fn`` on a thread per rank, and return what each returned."""
    post, world = Post(), prod(mesh)

    def rank(number: int) -> Any:
        traffic = Traffic()
        mail = lambda name, at, size: Mail(post, name, at, size, traffic) if size > 1 else None  # noqa: E731
        outer = inner = None
        if len(mesh) == 2:
            node, place = divmod(number, mesh[1])
            outer, inner = mail(f"outer {place}", node, mesh[0]), mail(f"inner {node}", place, mesh[1])
        try:
            return fn(Wiring(number, mail("flat", number, world), outer, inner), traffic)
        except BaseException:
            post.failed.set()
            raise

    # Each thread starts out with torch's default number of its own.
    with ThreadPoolExecutor(world, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        started = [pool.submit(rank, number) for number in range(world)]
        wait(started, TIMEOUT_S, FIRST_EXCEPTION)
        errors = [error for each in started if each.done() and (error := each.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, Empty)):
            raise error  # the first cause; a rank that waited for another says less
        return [each.result(TIMEOUT_S) for each in started]


def processes(mesh: tuple[int, ...], fn: Callable[[Wiring, Traffic], Any]) -> list[Any]:
    """Call ``fn`` on a gloo process per rank, and return what each returned (JSON values); messages are sealed."""

    def rank(group: dist.ProcessGroup) -> Any:
        number, traffic = dist.get_rank(group), Traffic()
        exchange = lambda one: Exchange(one, "a" * 32, 0, traffic, debug=True)  # noqa: E731
        outer = inner = None
        if len(mesh) == 2:
            nodes, places = mesh
            inside = [dist.new_group([node * places + place for place in range(places)]) for node in range(nodes)]
            across = [dist.new_group([node * places + place for node in range(nodes)]) for place in range(places)]
            inner, outer = exchange(inside[number // places]), exchange(across[number % places])
        return fn(Wiring(number, exchange(group), outer, inner), traffic)

    return run_ranks(rank, prod(mesh), timeout=TIMEOUT_S)
