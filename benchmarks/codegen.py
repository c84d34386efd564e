"""The gate on generated GPU code: no GPU is needed, so it runs wherever the tests run.

Compiles the forward, dQ and dK/dV kernels with the tiles of the table for sm_80 and sm_90 and demands: no spilled
register (a variant that merges or loops over items: no more in its loops over tiles than is committed), shared memory
within the GPU's, tensor-core instructions, and instructions per full tile within 5 % of the committed figure of this
Triton version. A version without figures fails: look at them, then take them over by hand.

Run: ``python benchmarks/codegen.py`` (``--take-over`` writes this version's figures into
``benchmarks/results/codegen.json``; ``--draw`` makes ``docs/codegen.png`` from that file).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from codegen_compile import Case

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "codegen.json"
SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes that one block of an A100, of an H100, may have
TOLERANCE = 0.05
CHILD = [sys.executable, str(HERE / "codegen_compile.py")]
CASE_S = 60  # allowed per case, on a machine that does other things too

IN_LOOPS = ("full_tile_local_memory", "masked_tile_local_memory")
Figures = dict[str, Any]


def cases() -> list[Case]:
    """Return what is compiled, with the table's tiles and the loads that they name, as on the real devices."""
    plain = [
        Case(kernel, arch, dim) for arch in (80, 90) for dim in (64, 128) for kernel in ("forward", "query", "keys")
    ]
    merging = [Case("forward", arch, 128, "accumulate") for arch in (80, 90)]
    persistent = [Case(kernel, 90, 128, "persistent") for kernel in ("forward", "query", "keys")]
    return plain + merging + persistent


def measure(names: list[str], child: list[str] = CHILD) -> dict[str, Figures]:
    """Compile the named cases in child processes; one that dies costs the case it was at, and the rest go on."""
    found: dict[str, Figures] = {}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="ringspan-codegen-") as cache:
        environment["TRITON_CACHE_DIR"] = cache  # what is measured is compiled here and now
        while left := [name for name in names if name not in found]:
            begun, limit = left[0], CASE_S * len(left)
            try:
                done = subprocess.run(
                    [*child, *left], env=environment, capture_output=True, text=True, timeout=limit, check=False
                )
                said, end = done.stdout, f"the compiler ended its process with {done.returncode}: {done.stderr[-300:]}"
            except subprocess.TimeoutExpired as error:
                said, end = (error.stdout or b"").decode(), f"not done after {limit} s"
            for line in map(json.loads, filter(lambda line: line.startswith("{"), said.splitlines())):
                begun = line.get("begun", begun)
                if "done" in line:
                    found[line["done"]] = line["figures"]
            if begun not in found:
                found[begun] = {"failed": end}
    return found


def judge(measured: dict[str, Figures], committed: dict[str, Figures] | None) -> list[str]:
    """Return what is wrong, one line each; ``committed`` is None for a version without figures."""
    faults = []
    for name, found in measured.items():
        if "failed" in found:
            faults.append(f"{name}: {found['failed']}")
            continue
        limit = SHARED_LIMIT[Case.read(name).arch]
        before = (committed or {}).get(name)
        faults += _spilled(name, found, before)
        if found["shared_bytes"] > limit:
            faults.append(f"{name}: {found['shared_bytes']} bytes of shared memory, the GPU has {limit}")
        if not found["full_tile_tensor"] or (Case.read(name).arch >= 90 and not found["hgmma"]):
            faults.append(f"{name}: the full loop does not run on the tensor cores of this GPU")
        if found["loops"] != 2:
            faults.append(f"{name}: {found['loops']} loops over tiles; there is one for full and one for masked tiles")
        if committed is not None:
            faults += _grown(name, found, before)
    return faults


def _spilled(name: str, found: Figures, before: Figures | None) -> list[str]:
    """The table's tiles spill nothing as they are launched; a variant no more in its loops than is committed."""
    spilled = found["spill_store_bytes"] + found["spill_load_bytes"]
    touched, known = (0 if x is None else sum(x[key] for key in IN_LOOPS) for x in (found, before))
    allowed = (touched if before is None else known) if Case.read(name).variant else -1
    if not spilled or touched <= allowed:
        return []
    return [f"{name}: {found['tile']} spills {spilled} bytes of registers, {touched} accesses in its loops"]


def _grown(name: str, found: Figures, before: Figures | None) -> list[str]:
    key = "full_tile_instructions"
    if before is None:
        return [f"{name}: no committed figure; python benchmarks/codegen.py --take-over"]
    if found["tile"] != before["tile"]:
        return [
            f"{name}: tile {found['tile']} is not the committed {before['tile']}; benchmarks/codegen.py --take-over"
        ]
    if abs(found[key] - before[key]) > TOLERANCE * before[key]:
        return [f"{name}: {found[key]} instructions per full tile, committed {before[key]}, more than 5 % apart"]
    return []


def load() -> dict[str, dict[str, Figures]]:
    """Return the committed figures by Triton version, by case."""
    return json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take-over", action="store_true", help="commit to this version's figures")
    parser.add_argument("--draw", action="store_true", help="draw docs/codegen.png and compile nothing")
    chosen = parser.parse_args()
    if chosen.draw:
        from codegen_draw import draw

        print(f"wrote {draw(RESULTS)}")
        return 0
    compiler = version("triton")
    measured = measure([case.name for case in cases()])
    committed = load()
    for name, found in measured.items():
        print(f"{name}: {json.dumps(found)}")
    faults = judge(measured, None if chosen.take_over else committed.get(compiler, {}))
    if compiler not in committed and not chosen.take_over:
        faults = [fault for fault in faults if "no committed figure" not in fault] + [
            f"Triton {compiler} has no figures; look at these, then: python benchmarks/codegen.py --take-over"
        ]
    for fault in faults:
        print(f"FAULT {fault}")
    if chosen.take_over and not faults:
        RESULTS.write_text(json.dumps(dict(sorted({**committed, compiler: measured}.items())), indent=1) + "\n")
        print(f"wrote {RESULTS}; next: python benchmarks/codegen.py --draw")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
