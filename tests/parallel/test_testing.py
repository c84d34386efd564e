"""run_ranks itself: it reports, it times out, and it leaves no process behind."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ringspan.parallel.faults import Fault, together
from ringspan.parallel.testing import run_ranks


def add(group: dist.ProcessGroup, more: int) -> int:
    x = torch.tensor(dist.get_rank(group) + more)
    dist.all_reduce(x, group=group)
    return int(x)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(add, 3, 1) == [6, 6, 6]


def fail_on_one(group: dist.ProcessGroup) -> None:
    if dist.get_rank(group) == 1:
        raise KeyError("the reason")
    dist.barrier(group)


def test_the_failing_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2 failed.*the reason"):
        run_ranks(fail_on_one, 2)


def hang(group: dist.ProcessGroup, folder: str) -> None:
    (Path(folder) / str(dist.get_rank(group))).write_text(str(os.getpid()))
    time.sleep(600)


def test_hung_ranks_are_killed_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] of 2 did not end within 2 s"):
        run_ranks(hang, 2, str(tmp_path), timeout=2.0)
    assert time.monotonic() - began < 20
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def faulty(group: dist.ProcessGroup) -> str:
    def do() -> int:
        if dist.get_rank(group) == 1:
            raise Fault("disk full")
        return 5

    try:
        together(group, "stage", do)
    except ValueError as error:
        return str(error)
    return "went on"


def test_a_fault_on_one_rank_stops_all() -> None:
    assert run_ranks(faulty, 2) == ["disk full", "disk full"]
    assert together(None, "stage", lambda: 5) == 5
    with pytest.raises(ValueError, match="disk full"):
        together(None, "stage", lambda: (_ for _ in ()).throw(Fault("disk full")))
