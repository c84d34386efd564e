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
CONTROL_TIMEOUT_S = 2400  # of all the patches' tests together


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


def tests_of(patch: Path) -> list[str]:
    """Return the tests that must notice the patch."""
    first = patch.read_text().splitlines()[0]
    if not first.startswith("# tests: "):
        raise SystemExit(f"{patch.name}: its first line does not name the tests")
    return first[9:].split()


def run_tests(tests: list[str], patch: Path | None) -> tuple[int, str]:
    """Run tests in a patched copy of the tree; return pytest's code (-1: hung, -2: not applied) and its words."""
    with tempfile.TemporaryDirectory(prefix="ringspan-mutant-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        if patch is not None:
            applied = subprocess.run(["git", "apply", str(patch)], cwd=tree, capture_output=True, text=True)
            if applied.returncode:
                return -2, applied.stderr.strip().replace("\n", " ")
        (Path(folder) / "ringspan").symlink_to(tree)  # found before the installed package
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not full", *tests],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": folder, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=CONTROL_TIMEOUT_S if patch is None else TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.communicate()
            return -1, "hung"
    return process.returncode, said[-300:]


def verdict(patch: Path) -> str:
    """Return "" where the suite fails as it should, else what went wrong."""
    code, said = run_tests(tests_of(patch), patch)
    if code == 0:
        return "SURVIVED: the tests pass with it"
    if code == -2:
        return f"the patch does not apply: {said}"
    # Failed tests notice the mutant, and so does a suite that hangs or crashes; another code is no verdict.
    return "" if code in (1, -1, -11) else f"pytest ended with {code}: {said}"


def main() -> int:
    """Run all patches, or the named ones; return 1 if any survives."""
    wanted = sys.argv[1:]
    patches = sorted(p for p in HERE.glob("*.patch") if not wanted or p.stem in wanted)
    if not patches:
        print(f"no patch in {HERE} matches {wanted}")
        return 1
    # The control: without a patch the same tests pass in such a copy, or a failure would prove nothing.
    code, said = run_tests(sorted({test for patch in patches for test in tests_of(patch)}), None)
    if code != 0:
        print(f"the tests fail without any patch (pytest ended with {code}): {said}")
        return 1
    print("control: the tests pass without a patch", flush=True)
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
