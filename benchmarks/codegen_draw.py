"""Draw docs/codegen.png from benchmarks/results/codegen.json: what a kernel's inner loop costs, what it holds."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from codegen_compile import Case
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

TARGET = Path(__file__).resolve().parent.parent / "docs" / "codegen.png"
TITLES = {"forward": "forward", "query": "dQ", "keys": "dK and dV"}
FULL, MASKED, HELD = "#2f6db3", "#c9d8ea", "#4f9d69"
REGISTERS = 255
LIMITS = {80: 163, 90: 227}  # KiB of shared memory
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
}


def digest(results: Path) -> str:
    """Return what ties a picture to its figures."""
    return hashlib.sha256(results.read_bytes()).hexdigest()


def draw(results: Path, target: Path = TARGET) -> Path:
    """Draw the latest Triton version's figures; the results' digest goes into the picture's description."""
    committed = json.loads(results.read_text())
    version = max(committed, key=lambda name: [int(part) for part in name.split(".")])
    rows = [(Case.read(name), found) for name, found in committed[version].items() if not Case.read(name).variant]
    rows.sort(key=lambda row: (-row[0].arch, row[0].head_dim, list(TITLES).index(row[0].kernel)))
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 5.8), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"Code generated for one tile, bf16, Triton {version}: no GPU needed to know it", fontweight="bold"
        )
        left, middle, right = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1, 1])
        _instructions(left, rows)
        _bar(middle, "registers per thread", [found["registers"] for _, found in rows], REGISTERS)
        shares = [found["shared_bytes"] / 1024 for _, found in rows]
        _bar(right, "shared memory, KiB", shares, max(LIMITS.values()))
        for place, (case, _) in enumerate(rows):
            for axes, limit in ((middle, REGISTERS), (right, LIMITS[case.arch])):
                axes.plot([limit, limit], [place - 0.42, place + 0.42], color="#b03a2e", lw=2)
        middle.set_xlabel("red: what a thread may have")
        right.set_xlabel("red: what a block may have")
        left.set_yticks(range(len(rows)), [_label(case, found) for case, found in rows])
        left.invert_yaxis()
        figure.savefig(target, dpi=150, metadata={"Description": digest(results)})
    return target


def _label(case: Case, found: dict[str, Any]) -> str:
    tile = found["tile"].split(",")[0]
    return f"{TITLES[case.kernel]}, head dim {case.head_dim}, sm_{case.arch}, tile {tile}"


def _instructions(axes: Axes, rows: list[tuple[Case, dict[str, Any]]]) -> None:
    places = range(len(rows))
    full = [found["full_tile_instructions"] for _, found in rows]
    masked = [found["masked_tile_instructions"] for _, found in rows]
    axes.barh([p - 0.2 for p in places], full, 0.38, color=FULL, label="full tile: no mask is looked at")
    axes.barh([p + 0.2 for p in places], masked, 0.38, color=MASKED, label="boundary tile")
    for place, (a, b) in enumerate(zip(full, masked, strict=True)):
        axes.text(a, place - 0.2, f" {a}", va="center", fontsize=8.5)
        axes.text(b, place + 0.2, f" {b}", va="center", fontsize=8.5)
    axes.set_title("instructions per warp and tile")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, -0.2), ncols=2)


def _bar(axes: Axes, title: str, values: list[float], limit: int) -> None:
    axes.barh(range(len(values)), values, 0.6, color=HELD)
    for place, value in enumerate(values):
        axes.text(limit * 0.02, place, f"{value:.0f}", va="center", fontsize=8.5, color="white", fontweight="bold")
    axes.set_xlim(0, limit * 1.05)
    axes.set_title(title)
