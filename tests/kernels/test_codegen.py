"""The code our kernels compile to for GPUs that are not there, and the gate that judges it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import codegen
import codegen_compile
import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "codegen.json"
GOOD: dict[str, Any] = {
    "tile": "128x64, 8 warps, 2 stages",
    "registers": 153,
    "spill_store_bytes": 0,
    "spill_load_bytes": 0,
    "shared_bytes": 96 << 10,
    "hgmma": 12,
    "loops": 2,
    "full_tile_tensor": 6,
    "full_tile_instructions": 340,
    "full_tile_local_memory": 0,
    "masked_tile_local_memory": 0,
}
NAME = "forward sm_90 hd128"


def test_the_kernels_compile_as_committed() -> None:
    """Every kernel, sm_80 and sm_90: no spills, shared memory, tensor cores, instructions per full tile."""
    done = subprocess.run(
        [sys.executable, "benchmarks/codegen.py"],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "FAULT" in line) + done.stderr


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, None),
        ({"full_tile_instructions": 356}, None),
        ({"full_tile_instructions": 358}, "358 instructions per full tile, committed 340"),
        ({"full_tile_instructions": 320}, "more than 5 % apart"),
        ({"spill_load_bytes": 4}, "spills 4 bytes"),
        ({"spill_store_bytes": 4, "masked_tile_local_memory": 1}, "1 accesses in its loops"),
        ({"shared_bytes": (227 << 10) + 1}, "shared memory"),
        ({"hgmma": 0}, "tensor cores"),
        ({"full_tile_tensor": 0}, "tensor cores"),
        ({"loops": 1}, "1 loops"),
        ({"tile": "64x64, 4 warps, 2 stages"}, "not the committed"),
    ],
)
def test_the_gate_notices(changed: dict[str, Any], words: str | None) -> None:
    faults = codegen.judge({NAME: {**GOOD, **changed}}, {NAME: GOOD})
    assert [words in fault for fault in faults] == ([] if words is None else [True])  # pyright: ignore[reportOperatorIssue]


def test_the_smaller_gpu_has_a_smaller_limit_and_no_hgmma() -> None:
    found = {**GOOD, "shared_bytes": 200 << 10, "hgmma": 0}
    faults = codegen.judge({"forward sm_80 hd128": found}, None)
    assert ["shared memory" in fault for fault in faults] == [True]


def test_a_variant_may_spill_outside_of_its_loops_and_no_more_in_them_than_before() -> None:
    name, spilling = f"{NAME} persistent", {**GOOD, "spill_load_bytes": 4}
    assert codegen.judge({name: spilling}, {name: GOOD}) == []
    worse = {**spilling, "full_tile_local_memory": 2}
    assert codegen.judge({name: worse}, {name: worse}) == []
    faults = codegen.judge({name: {**spilling, "full_tile_local_memory": 3}}, {name: worse})
    assert ["3 accesses in its loops" in fault for fault in faults] == [True]


def test_a_case_without_a_committed_figure_is_a_fault() -> None:
    assert ["--take-over" in fault for fault in codegen.judge({NAME: GOOD}, {})] == [True]


@pytest.fixture
def child(tmp_path: Path) -> list[str]:
    """A compiler that aborts its process at the second case."""
    script = tmp_path / "child.py"
    script.write_text(
        "import json, os, sys\n"
        "for name in sys.argv[1:]:\n"
        "    print(json.dumps({'begun': name}), flush=True)\n"
        "    if name == 'second':\n"
        "        os.abort()\n"
        "    print(json.dumps({'done': name, 'figures': {'fine': name}}), flush=True)\n"
    )
    return [sys.executable, str(script)]


def test_a_compiler_that_aborts_costs_one_case(child: list[str]) -> None:
    found = codegen.measure(["first", "second", "third"], child)
    assert found["first"] == {"fine": "first"}
    assert found["third"] == {"fine": "third"}
    assert "ended its process with -6" in found["second"]["failed"]
    assert "second" in codegen.judge({"second": found["second"]}, {})[0]


def test_loops_are_the_innermost_with_products() -> None:
    code = [
        ".L_x_0:", "IADD3 R1", ".L_x_1:", "HGMMA.64x64x16.F32.BF16 R24", "MUFU.EX2 R1", "@P0 BRA `(.L_x_1)",
        "LDL R3", "@!P1 BRA `(.L_x_0)", ".L_x_2:", "HMMA.16816.F32.BF16 R2", "STL [R1]", "ISETP R1",
        "@P0 BRA `(.L_x_2)",
        ".L_x_3:", "IADD3 R1", "BRA `(.L_x_3)", "BRA `(.L_x_9)", ".L_x_9:", "EXIT",
    ]  # fmt: skip
    first, second = codegen_compile.tile_loops(code)
    assert (len(first.body), len(second.body)) == (3, 4)
    assert second.count(r"\b(STL|LDL)\b") == 1


def test_figures_of_both_compilers_are_committed_and_hold() -> None:
    committed = json.loads(RESULTS.read_text())
    assert {"3.6.0", "3.7.1"} <= set(committed)
    names = {case.name for case in codegen.cases()}
    for version, figures in committed.items():
        assert set(figures) == names, version
        assert codegen.judge(figures, figures) == [], version


def test_the_drawing_is_of_these_figures() -> None:
    """The picture carries the digest of the file it was drawn from."""
    digest = hashlib.sha256(RESULTS.read_bytes()).hexdigest()
    assert digest.encode() in (ROOT / "docs" / "codegen.png").read_bytes(), "run: python benchmarks/codegen.py --draw"


def test_a_case_is_read_as_it_is_written() -> None:
    for case in codegen.cases():
        assert codegen_compile.Case.read(case.name) == case
