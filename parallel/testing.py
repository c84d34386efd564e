"""Run a function on several ranks inside a test: forked gloo processes, a hard timeout, every child reaped by its pid.

Forking after torch is imported makes four ranks start in a tenth of a second. It is safe only while torch runs one
thread, so ``run_ranks`` sets that in the children and the test suite sets it in the parent.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(fn: Callable[..., Any], world: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``fn(group, *args)`` on ``world`` forked ranks and return what each returned (JSON values).

    Args:
        fn: gets the default process group (gloo).
        timeout: seconds after which every rank is killed and AssertionError raised.

    Raises:
        AssertionError: with the traceback of the lowest failing rank, or naming the ranks that hung.
    """
    folder = Path(tempfile.mkdtemp(prefix="ringspan-ranks-"))
    children: dict[int, int] = {}
    try:
        for rank in range(world):
            pid = os.fork()
            if pid == 0:
                _child(fn, rank, world, folder, timeout, args)
            children[pid] = rank
        hung = _reap(children, time.monotonic() + timeout)
        failures = [(rank, path.read_text()) for rank in range(world) if (path := folder / f"error{rank}").exists()]
        if failures:
            # A rank that only lost its peer says less than the rank that failed first.
            failures.sort(key=lambda item: ("Connection" in item[1] or "gloo" in item[1].lower(), item[0]))
            raise AssertionError(f"rank {failures[0][0]} of {world} failed:\n{failures[0][1]}")
        if hung:
            raise AssertionError(f"ranks {sorted(hung)} of {world} did not end within {timeout:.0f} s")
        return [_result(folder / f"result{rank}", rank) for rank in range(world)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    folder: Path,
    timeout: float,
    args: tuple[Any, ...],
) -> None:
    code = 1
    try:
        torch.set_num_threads(1)
        store = dist.FileStore(str(folder / "store"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
        assert dist.group.WORLD is not None
        value = fn(dist.group.WORLD, *args)
        (folder / f"result{rank}").write_text(json.dumps(value))
        dist.barrier()  # nobody leaves while a peer may still be reading from it
        code = 0
    except BaseException:  # the parent reports it
        (folder / f"error{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _reap(children: dict[int, int], deadline: float) -> list[int]:
    """Wait for the children; kill by pid those that outlive the deadline, or a failed peer by five seconds."""
    left = dict(children)
    while left and time.monotonic() < deadline:
        pid, status = _poll(left)
        if pid == 0:
            time.sleep(0.005)
            continue
        del left[pid]
        if status != 0:
            deadline = min(deadline, time.monotonic() + 5.0)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return list(left.values())


def _poll(children: dict[int, int]) -> tuple[int, int]:
    for pid in children:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return pid, status
    return 0, 0


def _result(path: Path, rank: int) -> Any:
    if not path.exists():
        raise AssertionError(f"rank {rank} ended without a result (killed?)")
    return json.loads(path.read_text())
