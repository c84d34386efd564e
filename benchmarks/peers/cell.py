"""One cell: an arm on a case, on forked ranks; and every row there is."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist
from peers import of_deepspeed, of_others, of_ringmaster, of_ringspan, of_torch
from peers.arm import Arm
from peers.cases import cases
from peers.install import folder_of
from peers.measure import measure

from ringspan.parallel.testing import run_ranks

SAID = "the arm said: "


def arms(strategies: tuple[str, ...] = of_ringspan.NAMES) -> dict[str, Arm]:
    """Return every row by its title, ours first."""
    ours = [*(of_ringspan.operator(name) for name in strategies), of_ringspan.MODEL]
    rows = [*ours, *of_torch.ARMS, *of_deepspeed.ARMS, *of_ringmaster.ARMS, *of_others.ARMS]
    return {arm.title: arm for arm in rows}


def rank(group: dist.ProcessGroup, title: str, case: str, backward: bool, strategy: str | None) -> dict[str, float]:
    arm = of_ringspan.operator(strategy) if strategy else arms()[title]
    try:
        return measure(group, arm, cases(dist.get_world_size(group))[case], backward)
    except Exception as error:
        raise RuntimeError(f"{SAID}{type(error).__name__}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or where one without a message was raised."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    last = traceback.extract_tb(error.__traceback__)[-1]
    return said or f"no message, in {Path(last.filename).stem}.{last.name}"


def run(title: str, case: str, world: int, backward: bool, seconds: float) -> dict[str, Any]:
    """Return {"errors": ...}, or {"said": first line of what was raised}, or {"hung": seconds}."""
    # Any of our strategies may be asked for by name, also one that is not among the rows by default.
    strategy = title.removeprefix("ringspan, ") if title.startswith("ringspan, ") and title not in arms() else None
    package = None if strategy else arms()[title].package
    if package is not None:
        sys.path.append(str(folder_of(package)))  # last: torch and transformers stay ours
    try:
        errors = run_ranks(rank, world, title, case, backward, strategy, timeout=seconds)[0]
    except AssertionError as error:
        said = re.findall(rf"{SAID}(.*)", str(error))
        if said:
            return {"said": said[-1][:300]}
        if "did not end" in str(error):
            return {"hung": seconds}
        return {"said": str(error).strip().splitlines()[-1][:300]}
    return {"errors": errors}
