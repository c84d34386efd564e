"""One picture of a run, from its folder alone: metrics.jsonl, evaluation.json and config.yaml.

What is not there is said in words in its panel: a run that died early still has a picture.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from ringspan.finetune import panels
from ringspan.finetune.track import FILE, read_metrics
from ringspan.parallel.faults import Fault

DPI = 150
STYLE: Any = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Data:
    """What a run folder holds; each may be empty. metrics: the lines of metrics.jsonl."""

    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def report(folder: Path) -> Path:
    """Draw folder/report.png and return its path.

    Raises:
        Fault: a file of the folder is not what it should be; names it.
    """
    figure = draw(read(folder))
    temporary = folder / f".report.{os.getpid()}.tmp"
    try:
        figure.savefig(temporary, format="png", dpi=DPI)
        os.replace(temporary, folder / "report.png")
    finally:
        temporary.unlink(missing_ok=True)
    return folder / "report.png"


def read(folder: Path) -> Data:
    """Read what is there of a run folder.

    Raises:
        Fault: a file is broken; names it.
    """
    metrics = read_metrics(folder / FILE) if (folder / FILE).exists() else []
    return Data(metrics, _mapping(folder / "evaluation.json"), _mapping(folder / "config.yaml"))


def draw(data: Data) -> Figure:
    """Return the figure: six panels under a title line, 1800 x 1125 pixels when saved at DPI."""
    with rc_context(STYLE):
        figure = Figure(figsize=(12, 7.5), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
        FigureCanvasAgg(figure)
        # Names of models and folders are not mathematics, whatever signs they hold.
        figure.suptitle(_title(data), fontsize=13, fontweight="bold", parse_math=False)
        grid = figure.add_gridspec(2, 3)
        evaluation, metrics = data.evaluation, data.metrics
        panels.loss_by_position(figure.add_subplot(grid[0, 0]), evaluation.get("by_position") or {})
        panels.loss_over_tokens(figure.add_subplot(grid[0, 1]), metrics)
        panels.passkey(figure, grid[0, 2], evaluation.get("passkey") or {})
        panels.throughput(figure.add_subplot(grid[1, 0]), metrics)
        panels.memory(figure.add_subplot(grid[1, 1]), evaluation.get("memory") or {}, metrics)
        panels.traffic(figure.add_subplot(grid[1, 2]), evaluation.get("bytes") or {})
        # Laid out now, while the style holds.
        figure.canvas.draw()
    return figure


def _title(data: Data) -> str:
    if title := data.evaluation.get("title"):
        return str(title)
    parts = {name: data.config.get(name) or {} for name in ("model", "data", "parallel", "attention")}
    if not any(parts.values()):
        return "Run without evaluation.json and config.yaml"
    name = parts["model"].get("path") or (parts["model"].get("config") or {}).get("model_type", "model")
    length, ranks = parts["data"].get("seq_length", "?"), parts["parallel"].get("cp", 1)
    mask = "causal, documents apart" if parts["data"].get("packing", True) else "causal"
    strategy = parts["attention"].get("strategy", "auto")
    return f"{name}, {length} tokens over {ranks} rank{'s' * (ranks != 1)}, {mask}, {strategy}"


def _mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file, {} if there is no file."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise Fault(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise Fault(f"{path} holds a {type(value).__name__}, not a mapping")
    return value
