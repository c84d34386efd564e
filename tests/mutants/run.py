"""Keep the tests sharp: apply each patch in this folder to a copy of the tree and expect the suite to fail.

A patch's first line names the tests that must notice it: ``# tests: tests/dist_attn tests/kernels``. A patch that no
longer applies, or that the tests let pass, fails the run.

Run: ``python tests/mutants/run.py [name ...]``
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TIMEOUT_S = 600


def copy_tree(target: Path) -> None:
    """Copy what git knows or would add; the copy is its own package root."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = ROOT / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(source.read_bytes())


def verdict(patch: Path) -> str:
    """Return "" where the suite fails as it should, else what went wrong."""
    first = patch.read_text().splitlines()[0]
    if not first.startswith("# tests: "):
        return "the first line does not name the tests"
    with tempfile.TemporaryDirectory(prefix="ringspan-mutant-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        applied = subprocess.run(
            ["git", "apply", str(patch)],
            cwd=tree,
            capture_output=True,
            text=True,
        )
        if applied.returncode:
            return "the patch does not apply: " + applied.stderr.strip().replace("\n", " ")
        (Path(folder) / "ringspan").symlink_to(tree)
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not full", *first[9:].split()],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return ""  # a mutant that hangs the suite is noticed
    if process.returncode == 0:
        return "SURVIVED: the tests pass with it"
    if process.returncode != 1:
        return f"pytest ended with {process.returncode}, not with failed tests: {said[-300:]}"
    return ""


def main() -> int:
    """Run all patches, or the named ones; return 1 if any survives."""
    wanted = sys.argv[1:]
    patches = sorted(p for p in HERE.glob("*.patch") if not wanted or p.stem in wanted)
    if not patches:
        print(f"no patch in {HERE} matches {wanted}")
        return 1
    bad = 0
    for number, patch in enumerate(patches, 1):
        began = time.monotonic()
        wrong = verdict(patch)
        bad += bool(wrong)
        print(
            f"{number}/{len(patches)} {patch.stem}: {wrong or 'killed'} ({time.monotonic() - began:.0f} s)", flush=True
        )
    print(f"{len(patches) - bad} of {len(patches)} mutants killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
