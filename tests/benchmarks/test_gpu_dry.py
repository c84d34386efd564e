"""``make gpu`` without a GPU: each part's code runs in the interpreter, and what it cannot do is said by name.

Modules that a machine with a GPU may lack are made unimportable.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_record
import gpu_table
import pytest

ROOT = Path(__file__).parents[2]
MISSING_THERE = ("pydantic", "datasets", "torchdata", "wandb")
# What only a device or an installed library can do: (operator or key, words of the reason).
MAY_BE_SKIPPED = {
    "ringspan library": "CUDA alone",
    "varlen": "CUDA alone",
    "flash_attn 2": "not installed",
    "flash_attn 3": "not installed",
    "fla": "not installed",
    "compute-sanitizer memcheck": "",
}


def dry(part: str, folder: Path) -> dict[str, Any]:
    """Run a part as make does, on Python alone."""
    without = folder / "without"
    without.mkdir()
    block = "import sys\n" + "".join(f"sys.modules[{name!r}] = None\n" for name in MISSING_THERE)
    (without / "sitecustomize.py").write_text(block)
    done = subprocess.run(
        ["make", "gpu", f"PART={part}", f"OUT={folder}", "DRY=1", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(without), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (path,) = folder.glob(f"gpu-*-{part}.json")
    result = json.loads(path.read_text())
    assert result["complete"]
    assert result["machine"]["dry"]
    assert not any("failed" in row for row in result["rows"]), done.stdout
    for row in result["rows"]:
        if "skipped" in row:
            assert MAY_BE_SKIPPED[row.get("operator", row["key"])] in row["skipped"]
    return result


@pytest.mark.parametrize("part", ["dense", "sparse"])
def test_operators_run_and_agree(part: str, tmp_path: Path) -> None:
    rows = {row["key"]: row for row in dry(part, tmp_path)["rows"]}
    measured = {key: row for key, row in rows.items() if "forward" in row}
    ours = {key for key in measured if key.endswith("ringspan triton")}
    cases = {key.rsplit(":", 1)[0] for key in rows if ":" in key and "case" in rows[key]}
    assert {key.rsplit(":", 1)[0] for key in ours} == cases
    assert all("backward" in rows[key] for key in ours)
    for key, row in measured.items():  # flex's own predicates and torch's SDPA say what our masks say
        assert row["difference"] < 1e-5, key
        if "backward" in row:
            assert max(row["difference_dq"], row["difference_dk"], row["difference_dv"]) < 1e-5, key
    assert sum(key.endswith(": flex") for key in measured) == len(cases)


def test_training_runs_and_both_attentions_lose_alike(tmp_path: Path) -> None:
    rows = [row for row in dry("train", tmp_path)["rows"] if "losses" in row]
    by_kind = {(row["attention"], row["mask"]): row for row in rows}
    ours, theirs = by_kind["ringspan", "causal"], by_kind["sdpa", "causal"]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    windowed = next(row for (_, mask), row in by_kind.items() if "window" in mask)
    assert windowed["losses"][0] != pytest.approx(ours["losses"][0], rel=1e-6)
    assert windowed["model_flops"] < ours["model_flops"]
    assert all(row["losses"][-1] < row["losses"][0] for row in rows)


def test_tiles_are_timed_and_one_is_named(tmp_path: Path) -> None:
    rows = {row["key"]: row for row in dry("tune", tmp_path)["rows"]}
    for kernel in ("forward", "keys", "query"):
        best = rows[f"{kernel}, hd 16: best"]
        timed = {key: row["ms"] for key, row in rows.items() if key.startswith(f"{kernel}, hd 16: (")}
        assert best["tried"] == len(timed) == 3
        assert best["ms"] == min(timed.values())


def test_checks_run(tmp_path: Path) -> None:
    rows = {row["key"]: row for row in dry("test", tmp_path)["rows"]}
    assert "largest relative difference" in rows["small case"]["said"]
    for key in ("virtual ranks", "kernel tests", "plan tests"):
        assert rows[key]["counts"]["passed"] > 0
        assert rows[key]["counts"]["failed"] == 0


def record(folder: Path, seconds: float = 100) -> gpu_record.Record:
    return gpu_record.Record.start("dense", folder, True, seconds)


def test_a_row_is_on_disk_before_the_next_begins_and_a_fault_is_a_row(tmp_path: Path) -> None:
    mine = record(tmp_path)
    with mine.row("one", 5) as row:
        assert row is not None
        row["ms"] = 1.0
    assert [row["key"] for row in json.loads(mine.path.read_text())["rows"]] == ["one"]
    with mine.row("two", 5, case="x"):
        raise ValueError("no kernel")
    with mine.row("three", 0.05):
        while True:
            pass
    with mine.row("four", 5) as row:
        assert row is not None
    rows = {row["key"]: row for row in json.loads(mine.path.read_text())["rows"]}
    assert rows["two"]["failed"] == "ValueError: no kernel"
    assert rows["two"]["case"] == "x"
    assert rows["three"]["failed"].startswith("RowTimeout")
    assert "failed" not in rows["four"]
    assert not json.loads(mine.path.read_text())["complete"]


def test_no_row_is_begun_when_time_is_up(tmp_path: Path) -> None:
    mine = record(tmp_path, seconds=-1)
    with mine.row("late", 5) as row:
        assert row is None
    assert "left of the part" in mine.data["rows"][0]["skipped"]


def test_a_lost_device_ends_the_process_after_its_row_and_the_next_goes_on(tmp_path: Path) -> None:
    mine = record(tmp_path)
    with pytest.raises(gpu_record.DeviceLost), mine.row("bad", 5):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    again = gpu_record.Record.resume("dense", tmp_path, True, 100)
    with again.row("bad", 5) as row:
        assert row is None
    with again.row("next", 5) as row:
        assert row is not None
    assert [row["key"] for row in again.data["rows"]] == ["bad", "next"]
    assert again.left < 100


def merged() -> dict[str, Any]:
    figures = {"ms": 1.0, "tflops": 391.4, "share": 0.494}
    dense = [
        {"key": "matmul", "tflops": 790.2, "side": 8192},
        {"key": "causal, 32K, hd 128: ringspan triton", "operator": "ringspan triton", "forward": figures},
        {"key": "causal, 32K, hd 128: fla", "operator": "fla", "skipped": "not installed: fla"},
    ]
    checks = [{"key": "kernel tests", "counts": {"passed": 3, "failed": 1}, "failures": {"a::b": "x | y"}}]
    step = {"step_s": 1.0, "length": 32768, "mask": "causal", "attention": "ringspan", "tokens_per_second": 32768.0}
    train = [
        {"key": "a", **step, "mfu_of_matmul": 0.5, "peak_gib": 20.0},
        {"key": "b", "attention": "sdpa", "failed": "OOM"},
    ]
    best = {"tile": "Tile(1)", "ms": 1.5, "table": "Tile(2)", "table_ms": None, "tried": 4}
    parts = {"tune": [{"key": "forward, hd 128: best", **best}], "dense": dense, "test": checks, "train": train}
    return {
        "date": "2026-01-02",
        "machine": {"device": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "transformers": None},
        "parts": {name: {"rows": rows, "complete": name != "dense"} for name, rows in parts.items()},
    }


def test_the_page_is_made_from_the_figures() -> None:
    page = gpu_table.page(merged())
    for words in (
        "NVIDIA H200, 2026-01-02; torch 2.11.0, triton 3.6.0.",
        "| causal, 32K, hd 128 | ringspan triton | 391 | 0.49 | - | - |",
        "- causal, 32K, hd 128: fla: not installed: fla",
        "The part was cut short",
        "| kernel tests | 3 passed, 1 failed |",
        "Failed: `a::b`",
        "| 32,768 | `causal` | ringspan | 32,768 | 0.50 | 20.0 |",
        "- b: OOM",
        "| forward, hd 128 | `Tile(1)` | 1.500 | `Tile(2)` | - | 4 |",
    ):
        assert words in page
    assert "No GPU has been measured" in gpu_table.page(None)


def test_the_committed_page_is_the_results() -> None:
    done = subprocess.run([sys.executable, "benchmarks/gpu_table.py", "--check"], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, "run: python benchmarks/gpu_table.py"


def test_dry_results_are_not_merged(tmp_path: Path) -> None:
    record(tmp_path).finish()
    words = [sys.executable, "benchmarks/gpu.py", "merge", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no gpu-*.json of a real run" in done.stderr
