"""Measure one CUDA device, in parts of at most six minutes: ``make gpu PART=test|dense|sparse|train|tune OUT=folder``.

The machine needs torch, triton, transformers and pytest; nothing of ours is installed and nothing is fetched. Every row
is written to ``OUT/gpu-<date>-<part>.json`` as soon as it is known, so a part that is cut short keeps what it has. A
row holds figures, or ``skipped`` or ``failed`` with the reason. No figure is asserted.

``--dry`` runs the same code on the CPU at tiny sizes, Triton interpreted, so that it will not fail on the day.

Run: ``python benchmarks/gpu.py dense --out folder``; then ``python benchmarks/gpu.py merge --out folder`` joins the
parts of a folder into ``benchmarks/results/gpu-<date>.json``, from which ``benchmarks/gpu_table.py`` makes a table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "test": "gpu_checks",
    "dense": "gpu_attention",
    "sparse": "gpu_attention",
    "train": "gpu_train",
    "tune": "gpu_tune",
}
SECONDS = 330  # of a part's six minutes; the rest is for starting Python and for the row in hand
RESTART = "RINGSPAN_GPU_RESTARTED"


def provide_package() -> None:
    """Make ``import ringspan`` find this tree, here and in child processes, whatever is installed."""
    folder = Path(tempfile.mkdtemp(prefix="ringspan-path-"))
    (folder / "ringspan").symlink_to(ROOT)
    sys.path.insert(0, str(folder))
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder) + (os.pathsep + inherited if inherited else "")


def merge(folder: Path) -> int:
    """Join the parts found in a folder into benchmarks/results/gpu-<date>.json; dry ones are no results."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("gpu-*.json"))]
    found = [part for part in found if not part["machine"]["dry"]]
    if not found:
        print(f"merge: no gpu-*.json of a real run in {folder}", file=sys.stderr)
        return 1
    date = max(part["date"] for part in found)
    target = ROOT / "benchmarks" / "results" / f"gpu-{date}.json"
    joined = {"date": date, "machine": found[-1]["machine"], "parts": {part["part"]: part for part in found}}
    target.write_text(json.dumps(joined, indent=1) + "\n")
    print(f"wrote {target}: {', '.join(joined['parts'])}")
    return 0


def run(part: str, folder: Path, dry: bool, seconds: float) -> int:
    if dry:  # read when Triton's kernels are imported
        os.environ["TRITON_INTERPRET"] = "1"
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    provide_package()
    from gpu_record import DeviceLost, Record

    begin = Record.resume if os.environ.get(RESTART) else Record.start
    record = begin(part, folder, dry, seconds)
    try:
        importlib.import_module(PARTS[part]).run(record)
    except DeviceLost as error:
        # After an illegal access every further call of this process fails: go on in a fresh one, after this row.
        print(f"{error}; restarting after this row", flush=True)
        os.environ[RESTART] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    record.finish()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "merge"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="on the CPU, interpreted, tiny")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no row is begun after this long")
    chosen = parser.parse_args()
    if chosen.part == "merge":
        return merge(chosen.out)
    return run(chosen.part, chosen.out, chosen.dry, chosen.seconds)


if __name__ == "__main__":
    sys.exit(main())
