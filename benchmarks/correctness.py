"""Which library computes which attention right over a sharded sequence: ours and others', cell by cell, on the CPU.

Every cell is a process group of its own with a hard timeout, fp32, gloo. Rows at the level of the operator get q, k, v
and a random upstream gradient, and are compared tensor by tensor with dense attention in float64 (tests/dense.py). Rows
at the level of a model get a tiny Llama (Mistral with a window, gpt-oss with learned sinks), and are compared by loss
and by every parameter's gradient with one process in float64.

Run: ``python benchmarks/correctness.py --out benchmarks/results/correctness.json``, then
``python benchmarks/correctness_table.py``. ``--only TEXT`` (rows whose title has it), ``--cases`` and
``--ranks`` measure some cells and keep the others.
Other libraries are installed under build/peers, at the versions in benchmarks/peers/install.py; about half an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))  # dense.py, which the cases are written in

from peers import install, models  # noqa: E402
from peers.arm import Arm  # noqa: E402
from peers.cases import Case, cases  # noqa: E402
from peers.cell import arms, run  # noqa: E402
from peers.of_ringspan import NAMES  # noqa: E402

WORLDS = (2, 4)
SECONDS = 150.0
ABORTED = "process aborted by gloo"
# fp32: what an exact algorithm reaches on these cases is 5e-7 (operator) and 3e-6 (model).
RIGHT = {"operator": 2e-6, "model": 1e-5}


def ask(title: str, case: str, world: int, mode: str) -> dict[str, Any]:
    """Run one cell in a process group of its own; whatever it started is gone when this returns.

    It is forked: torch and transformers are imported once, and a library that changes them changes its own cell only.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, errors = Path(folder) / "cell.json", Path(folder) / "stderr"
        pid = os.fork()
        if pid == 0:
            child(file, errors, title, case, world, mode)
        try:
            wait(pid, time.monotonic() + SECONDS + 30)
        finally:
            end(pid)
        said = errors.read_text(errors="replace") if errors.exists() else ""
        found = json.loads(file.read_text()) if file.exists() else {"said": (said.splitlines() or ["killed"])[-1]}
    if "said" in found and (aborted := re.search(r"what\(\):\s*(?:\[[^]]*\] )?(.*)", said)):
        # A peer that only lost its connection says less than the rank that was aborted.
        found["said"] = f"{ABORTED}: {aborted.group(1)[:200]}"
    if "hung" in found:
        # A build that was killed leaves a lock on which the next one would wait for ever.
        for lock in install.FOLDER.glob("extensions/*/lock"):
            lock.unlink()
    return found


def child(file: Path, errors: Path, title: str, case: str, world: int, mode: str) -> None:
    """Be the cell's process, and end; its result goes to ``file``, what it and its ranks print to ``errors``."""
    code = 1
    try:
        os.setsid()
        to = os.open(errors, os.O_WRONLY | os.O_CREAT)
        os.dup2(to, 1)
        os.dup2(to, 2)
        file.write_text(json.dumps(run(title, case, world, mode == "train", SECONDS)))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, deadline: float) -> None:
    """Wait until a child has ended, without taking its status, or until the deadline."""
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and time.monotonic() < deadline:
        time.sleep(0.02)


def end(pid: int) -> None:
    """Kill what is left of a child's process group, and take its status."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def judge(arm: Arm, case: Case, world: int) -> dict[str, Any]:
    """Return one cell: status, errors by tensor, and what the library said."""
    if missing := arm.missing(case):
        return {"status": "missing", "said": missing}
    found = ask(arm.title, case.name, world, "train")
    if "errors" in found:
        return {"status": verdict(arm, found["errors"]), **found}
    if "hung" in found:
        return {"status": "hangs", **found}
    if arm.level == "operator":
        forward = ask(arm.title, case.name, world, "forward")
        if "errors" in forward:
            return {"status": f"forward {verdict(arm, forward['errors'])}", **forward, **found}
    return {"status": "aborts" if found["said"].startswith(ABORTED) else "refuses", **found}


def verdict(arm: Arm, errors: dict[str, float]) -> str:
    """Return "right" or "wrong"; a NaN is wrong."""
    return "right" if all(error <= RIGHT[arm.level] for error in errors.values()) else "wrong"


def row(arm: Arm, worlds: list[int], names: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a row's head and its cells of the cases named; no cells for a library that does not run."""
    head = {"title": arm.title, "level": arm.level, "package": arm.package, "called": arm.called}
    head["does_not_run"] = install.install(arm.package) if arm.package else None
    cells = []
    if head["does_not_run"] is not None:
        return head, cells
    for world in worlds:
        for case in (cases(world)[name] for name in names):
            began = time.perf_counter()
            cell = {"arm": arm.title, "case": case.name, "ranks": world, **judge(arm, case, world)}
            print(f"{time.perf_counter() - began:5.1f} s  {json.dumps(cell)}", flush=True)
            cells.append(cell)
    return head, cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="*", default=list(NAMES), help="ours, by name")
    parser.add_argument("--ranks", nargs="*", type=int, default=list(WORLDS))
    parser.add_argument("--only", default="", help="part of a row's title")
    parser.add_argument("--cases", nargs="*", default=list(cases(2)), help="columns, by name")
    parser.add_argument("--fresh", action="store_true", help="install the other libraries anew")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.fresh:
        shutil.rmtree(install.FOLDER, ignore_errors=True)
    torch.set_num_threads(1)  # the cells and their ranks are forked
    os.environ.update(install.environment())
    for case in cases(2).values():
        models.build(case, "eager")  # so that no cell has to import transformers
    rows = arms(tuple(chosen.strategies))
    old: dict[str, Any] = {"arms": [], "cells": []}
    if chosen.out and chosen.out.is_file():
        old = json.loads(chosen.out.read_text())
    heads = {head["title"]: head for head in old["arms"] if head["title"] in rows}
    made = {(cell["arm"], cell["ranks"], cell["case"]): cell for cell in old["cells"] if cell["arm"] in rows}
    for arm in rows.values():
        if chosen.only in arm.title:
            heads[arm.title], cells = row(arm, chosen.ranks, chosen.cases)
            made |= {(cell["arm"], cell["ranks"], cell["case"]): cell for cell in cells}
    result = {
        "torch": version("torch"),
        "transformers": version("transformers"),
        "packages": {name: package.version for name, package in install.PACKAGES.items()},
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "right_up_to": RIGHT,
        "arms": [heads[title] for title in rows if title in heads],
        "cells": [
            made[title, world, case]
            for title in rows
            for world in WORLDS
            for case in cases(world)
            if (title, world, case) in made
        ],
    }
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
