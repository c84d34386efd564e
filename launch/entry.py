"""Into a verb's work on ranks, and out of it: inputs checked before any rank starts, faults told once, exit codes."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from transformers.utils import logging as transformers_logging

from ringspan.configs.load import dump
from ringspan.configs.schema import Config
from ringspan.dist_attn import Disagreement
from ringspan.launch import build, engines, ranks
from ringspan.launch.ranks import Place
from ringspan.parallel import memory
from ringspan.parallel.faults import Fault, together

BAD_INPUT, FAILED = 2, 1  # exit codes


@dataclass
class Stage:
    """How far a verb has come: the exit code of a fault from now on."""

    code: int = BAD_INPUT


Work = Callable[[Config, Place, Stage], int]
"""What a verb does as one rank; returns the exit code."""


def launch(config: Config, config_path: str, overrides: list[str], *, module: str, work: Work) -> int:
    """Check all inputs, then work on as many ranks of this machine as ``parallel`` says; return the exit code.

    Args:
        module: what a rank runs, with the config's path and the overrides; it calls ``as_rank``.
    """
    try:
        sizes = engines.sizes(config, launched=False)
        build.check_inputs(config)
        count = ranks.started(sizes)
    except Fault as fault:
        print(f"ringspan: {fault}", file=sys.stderr)
        return BAD_INPUT
    if count > 1:
        # The ranks are launched, to which an unset dp_shard means another thing.
        unset = ["parallel.dp_shard=1"] if config.parallel.dp_shard is None else []
        return ranks.start(count, module, [config_path, *overrides, *unset])
    return as_rank(config, work, launched=False)


def as_rank(config: Config, work: Work, *, launched: bool = True) -> int:
    """Join the other ranks, check that all have the same config and inputs, and work; return the exit code.

    One rank says what is wrong, once.

    Args:
        launched: whether a launcher says how many ranks there are.
    """
    rank, stage = int(os.environ.get("RANK", "0")), Stage()
    transformers_logging.disable_progress_bar()  # ours is the one that counts steps
    try:
        with ranks.joined(engines.sizes(config, launched=launched), config.parallel.timeout_s) as place:
            digest = hashlib.sha256(dump(config).encode()).hexdigest()[:16]
            together(place.group, f"config {digest}", lambda: build.check_inputs(config))
            return work(config, place, stage)
    except (Fault, Disagreement) as fault:
        if rank == getattr(fault, "rank", 0):
            print(f"ringspan: {fault}", file=sys.stderr, flush=True)
        return stage.code
    except (RuntimeError, MemoryError) as error:
        in_use = memory.resident_bytes()
        told = memory.explain(error, rank=rank, settings=build.memory_settings(config), in_use=in_use)
        if told is None:
            raise
        print(f"ringspan: {told}", file=sys.stderr, flush=True)
        return FAILED
