"""Part ``test``: the kernel tests on the device, four virtual ranks in one process, and a memory check.

The tests are run for what they find; a failure is a row with the tests' names, and ends nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_record import Record

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STARTS_RANKS = ("run_ranks", "torchrun", "torch.distributed.run")  # words of tests that need several processes


def run(record: Record) -> None:
    """Run all checks, the most telling first."""
    small = [sys.executable, str(HERE / "gpu_small.py")]
    with record.row("small case", 120) as row:
        if row is not None:
            row.update(command(small, within(90, record)))
    with record.row("virtual ranks", 120) as row:
        if row is not None:
            path = ROOT / "tests" / "dist_attn" / "test_virtual.py"
            row.update(tests([path], 90, record) if path.exists() else {"skipped": f"no {path.name}"})
    with record.row("compute-sanitizer memcheck", 150) as row:
        if row is not None:
            row.update(sanitized(small, record))
    with record.row("kernel tests", 300) as row:
        if row is not None:
            row.update(tests(kernel_tests(record.dry), 270, record))
    with record.row("plan tests", 90) as row:
        if row is not None:
            row.update(tests(plan_tests(record.dry), 60, record))


def kernel_tests(dry: bool) -> list[Path]:
    """Return the kernel tests; in a dry run the first file alone."""
    files = sorted((ROOT / "tests" / "kernels").glob("test_*.py"))
    return [path for path in files if path.stem == "test_merge"] if dry else files


def plan_tests(dry: bool) -> list[Path]:
    """Return the tests of dist_attn that one process can run; in a dry run the layouts' alone."""
    files = sorted((ROOT / "tests" / "dist_attn").glob("test_*.py"))
    alone = [path for path in files if not any(word in path.read_text() for word in STARTS_RANKS)]
    alone = [path for path in alone if path.stem != "test_virtual"]  # a row of its own
    return [path for path in alone if path.stem == "test_layout"] if dry else alone


def sanitized(small: list[str], record: Record) -> dict[str, Any]:
    """Run the small case under compute-sanitizer, every allocation on its own, so that none hides in another's."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not on the PATH"}
    if record.dry:
        return {"skipped": "a dry run has no device to check"}
    checked = [tool, "--tool", "memcheck", "--error-exitcode", "9", *small]
    return command(checked, within(120, record), PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def within(seconds: float, record: Record) -> float:
    """Return what of the seconds is left for a command, so that it ends before its row does and its words are kept."""
    return min(seconds, max(record.left, 15) - 5)


def command(words: list[str], seconds: float, **environment: str) -> dict[str, Any]:
    """Run a command; return its exit code and last words."""
    try:
        done = subprocess.run(
            words,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        words_said = said.decode(errors="replace") if isinstance(said, bytes) else said
        return {"code": None, "said": words_said[-600:], "failed": f"not done after {seconds:.0f} s"}
    result: dict[str, Any] = {"code": done.returncode, "said": done.stdout.strip()[-600:]}
    return result | ({"failed": f"exit code {done.returncode}"} if done.returncode else {})


def tests(files: list[Path], seconds: float, record: Record) -> dict[str, Any]:
    """Run pytest on files; return counts, and the names and last words of what failed, known even if it is killed."""
    log = Path(tempfile.mkdtemp(prefix="ringspan-tests-")) / "log"
    log.touch()
    words = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_pytest", "-p", "no:cacheprovider", "-m", "not full"]
    words += ["-o", "filterwarnings=default"]  # other versions of libraries warn of other things
    if importlib.util.find_spec("xdist") and not record.dry:
        words += ["-n", "8"]  # compiling the kernels takes most of the time
    environment = {"GPU_PYTEST_LOG": str(log), "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ['PYTHONPATH']}"}
    if record.dry:
        environment["TRITON_INTERPRET"] = "1"
    ended = command([*words, *map(str, files)], within(seconds, record), **environment)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    counts = {name: sum(line["outcome"] == name for line in lines) for name in ("passed", "failed", "skipped")}
    broken = {line["test"]: line["why"] for line in lines if line["outcome"] == "failed"}
    slowest = sorted(lines, key=lambda line: -line["seconds"])[:5]
    reasons = sorted({line["why"] for line in lines if line["outcome"] == "skipped"})
    return {
        "files": [str(path.relative_to(ROOT)) for path in files],
        "counts": counts,
        "failures": broken,
        "skips": reasons,
        "slowest": {line["test"]: line["seconds"] for line in slowest},
        **ended,
    }
