"""Processes and their groups: start the ranks of one machine, or join the ones a launcher has started."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ringspan.parallel.faults import Fault


@dataclass(frozen=True)
class Place:
    """Where this process stands: its rank among ``world``, its device, and the group of all (None for one process)."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None

    def gather(self, mine: Tensor) -> list[Tensor]:
        """Return every rank's tensor of one shape, by rank, on every rank."""
        if self.group is None:
            return [mine]
        gathered = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(gathered, mine, group=self.group)
        return gathered


def launched() -> bool:
    """Whether a launcher (torchrun, deepspeed, srun with its variables) has started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(count: int, arguments: list[str]) -> int:
    """Run ``ringspan.launch.train`` with ``arguments`` on ``count`` ranks of this machine; return the exit code.

    torchrun's own agent underneath, told to be silent: a rank that stops has said why in one line.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(_threads(count)))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "ringspan.launch.train", *arguments)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException as error:  # Ctrl-C or a scheduler: the agent has ended the ranks
        return 128 + int(error.sigval)
    return 0


@contextmanager
def joined(cp: int, timeout_s: int) -> Iterator[Place]:
    """Join the process group the launcher's environment describes, for the time of the block.

    Raises:
        Fault: if the number of ranks is not what the config says.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local, local_world = (
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", str(world))),
    )
    if world != cp:
        raise Fault(
            f"parallel.cp: the config wants {cp} ranks, but {world} were started; "
            f"start {cp}, or pass --parallel.cp {world}"
        )
    torch.set_num_threads(_threads(local_world))
    # Attention weights far from the peak underflow to denormals, on which a CPU computes up to six times slower. Set
    # before the first parallel region: threads inherit it when they start.
    torch.set_flush_denormal(True)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield Place(0, 1, device, None)
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield Place(rank, world, device, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def _threads(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)
