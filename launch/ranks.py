"""Processes and their groups: start the ranks of one machine, or join the ones a launcher has started."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
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

from ringspan.dist_attn.groups import Group
from ringspan.parallel.faults import Fault
from ringspan.parallel.mesh import Mesh, Sizes, mesh_of

FREE = -1  # a size that is left to the world


@dataclass(frozen=True)
class Place:
    """Where this process stands: rank among ``world``, device, the group of all and the mesh (one process: None)."""

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None
    mesh: Mesh | None = None

    @property
    def sizes(self) -> Sizes:
        """Ranks along each axis."""
        return self.mesh.sizes if self.mesh is not None else Sizes()

    def at(self, name: str) -> int:
        """Return where this process stands along an axis, or several together."""
        return self.mesh.place[name] if self.mesh is not None else 0

    @property
    def context(self) -> Group:
        """The ranks that share a sequence; None where this one holds it all."""
        return self.mesh.context if self.mesh is not None and self.sizes.cp > 1 else None

    @property
    def cp_group(self) -> dist.ProcessGroup | None:
        """The same as one group."""
        return self.mesh.group("cp") if self.mesh is not None else None

    @property
    def dp(self) -> int:
        """How many groups of ranks have sequences of their own."""
        return self.sizes.dp_replicate * self.sizes.dp_shard

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


def start(count: int, module: str, arguments: list[str]) -> int:
    """Run a module with ``arguments`` on ``count`` ranks of this machine; return the exit code.

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
        elastic_launch(settings, sys.executable)("-m", module, *arguments)
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    except SignalException as error:  # Ctrl-C or a scheduler: the agent has ended the ranks
        return 128 + int(error.sigval)
    return 0


def started(sizes: Sizes) -> int:
    """Return how many ranks ``ringspan train`` starts on this machine; a free size is what its GPUs leave.

    Raises:
        Fault: if a size is free and there is no GPU to count.
    """
    if FREE not in (sizes.pp, sizes.dp_replicate, sizes.dp_shard, sizes.cp, sizes.tp):
        return sizes.world
    count = torch.cuda.device_count()
    if not count:
        raise Fault(
            "parallel: a size of -1 takes what the world leaves, and without a GPU nothing says how many ranks to "
            "start; give a number, or start with torchrun --nproc-per-node N"
        )
    return _resolved(sizes, count).world


@contextmanager
def joined(sizes: Sizes, timeout_s: int) -> Iterator[Place]:
    """Join the process group the launcher's environment describes, for the time of the block.

    Args:
        sizes: of the mesh; a free one takes up the world.
        timeout_s: seconds after which a silent rank counts as lost.

    Raises:
        Fault: if the number of ranks is not what the sizes make up.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local, local_world = (
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("LOCAL_WORLD_SIZE", str(world))),
    )
    sizes = _resolved(sizes, world)
    try:
        sizes.check_node(local_world)
    except ValueError as error:
        raise Fault(f"parallel.{error}") from error
    if world > 1:
        _end_with_the_launcher()
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
        yield Place(rank, world, device, dist.group.WORLD, mesh_of(sizes, device.type))
    finally:
        dist.destroy_process_group()


def _end_with_the_launcher() -> None:
    """Let the kernel end this rank when the process that started it is gone: a killed launcher tells nobody."""
    if sys.platform == "linux":
        end_when_parent_ends = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(end_when_parent_ends, int(signal.SIGTERM))


def _resolved(sizes: Sizes, world: int) -> Sizes:
    try:
        return sizes.resolved(world)
    except ValueError as error:
        raise Fault(f"parallel: {error}") from error


def _threads(ranks: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // ranks)
