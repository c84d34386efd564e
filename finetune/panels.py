"""The six panels of a run's picture: each draws into the axes given, or says what is missing.

Colours are told apart by colour-blind readers (Okabe and Ito), and by line style or label too.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FuncFormatter, MaxNLocator

BEFORE, AFTER, SECOND, QUIET = "#D55E00", "#0072B2", "#009E73", "#6b6b6b"


def loss_by_position(ax: Axes, part: dict[str, Any]) -> None:
    """Draw held-out loss per bucket of positions; buckets double, so the axis is a log2 one."""
    ax.set_title("Held-out loss by position")
    edges = part.get("edges") or []
    drawn = []
    for name, color, style in (("before", BEFORE, (0, (4, 2))), ("after", AFTER, "solid")):
        values = [math.nan if v is None else v for v in part.get(name) or []]
        if all(math.isnan(v) for v in values):
            continue
        ax.stairs(
            values,
            range(len(edges)),
            baseline=None,
            color=color,
            linewidth=2.2,
            linestyle=style,
            label=f"{name} training",
        )
        drawn.append((values, color))
    if not drawn:
        _absent(ax, "Not recorded: measured at the end of a run that has eval.path.")
        return
    _label_ends(ax, drawn)
    # At most nine labels, the last edge always among them.
    every = math.ceil((len(edges) - 1) / 8)
    shown = [i for i in range(len(edges)) if (len(edges) - 1 - i) % every == 0]
    ax.set_xticks(shown, [_length(edges[i]) for i in shown])
    ax.set_xlabel("position in the document (tokens, doubling)")
    ax.set_ylabel("nats per token")
    ax.margins(x=0.03, y=0.14)
    ax.legend(loc="best")


def loss_over_tokens(ax: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    """Draw training and held-out loss over the tokens trained on."""
    ax.set_title("Loss while training")
    training = _over_tokens(metrics, "train/loss")
    held_out = _over_tokens(metrics, "eval/loss")
    if not training and not held_out:
        _absent(ax, "No step has been logged.")
        return
    if training:
        window = max(1, len(training) // 20)
        label = "training" if window == 1 else f"training (mean of {window} points)"
        if window > 1:
            ax.plot(*_columns(training), color=AFTER, alpha=0.25, linewidth=1)
        ax.plot(*_columns(_smooth(training, window)), color=AFTER, linewidth=1.8, label=label)
    if held_out:
        ax.plot(
            *_columns(held_out),
            color=BEFORE,
            marker="o",
            markersize=5,
            linestyle="--",
            label="held out",
        )
    strange = sum("train/loss" in line.get("nonfinite", {}) for line in metrics)
    if strange:
        ax.plot([], [], " ", label=f"{strange} steps not finite, left out")
    ax.set_xlabel("tokens trained on")
    ax.set_ylabel("nats per token")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    ax.xaxis.set_major_locator(MaxNLocator(5))
    low, high = ax.get_ylim()
    ax.set_ylim(low, high + 0.25 * (high - low))  # room for the legend above the curves
    ax.legend(loc="upper right")


def passkey(figure: Figure, place: SubplotSpec, part: dict[str, Any]) -> None:
    """Draw the share of pass keys found, by depth and length: a map before, a map after."""
    lengths, depths = part.get("lengths") or [], part.get("depths") or []
    tables = [(name, part[name]) for name in ("before", "after") if part.get(name)]
    if not (lengths and depths and tables):
        ax = figure.add_subplot(place)
        ax.set_title("Pass keys found (%)")
        _absent(ax, "Not recorded: measured at the end of a run that has eval.passkey_lengths.")
        return
    inner = place.subgridspec(1, len(tables), wspace=0.03)
    for column, (name, table) in enumerate(tables):
        ax = figure.add_subplot(inner[0, column])
        ax.imshow(table, vmin=0, vmax=1, cmap="Blues", aspect="auto")
        ax.grid(visible=False)
        ax.set_xticks(range(len(lengths)), [_length(n) for n in lengths], fontsize=9)
        ax.set_xlabel(f"length, {name}", color={"before": BEFORE, "after": AFTER}[name], fontweight="bold")
        ax.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths] if column == 0 else [])
        if column == 0:
            # Over both maps, if there are two.
            ax.set_title("Pass keys found (%)")
            ax.set_ylabel("depth of the key")
        _write_cells(ax, table, len(lengths) * len(tables))


def throughput(ax: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    """Draw tokens per second over steps, from zero."""
    ax.set_title("Throughput, all ranks")
    points = [(line["step"], v) for line in metrics if (v := line.get("perf/tokens_per_second")) is not None]
    if not points:
        _absent(ax, "No step has been logged.")
        return
    typical = median(v for _, v in points)
    ax.plot(*_columns(points), color=AFTER, linewidth=1.5, marker="." if len(points) < 30 else None)
    ax.axhline(typical, color=QUIET, linestyle=":", linewidth=1.5, label=f"median {_thousands(typical)}")
    ax.set_ylim(0, 1.25 * max(v for _, v in points))
    ax.set_xlabel("step")
    ax.set_ylabel("tokens per second")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _thousands(y)))
    ax.legend(loc="upper right")


def memory(ax: Axes, part: dict[str, Any], metrics: Sequence[dict[str, Any]]) -> None:
    """Draw the peak memory of each rank; from the metrics where the run did not come to its end."""
    ax.set_title("Peak memory per rank")
    peaks = part.get("peak_gib") or _logged_peaks(metrics)
    if not peaks:
        _absent(ax, "No memory was measured.")
        return
    # A handful of bars should not be as wide as the panel.
    bars = ax.bar(range(len(peaks)), peaks, width=0.7, color=AFTER)
    if len(peaks) <= 8:
        ax.bar_label(bars, [f"{p:.2f}" for p in peaks], padding=2)
    ax.set_ylim(0, 1.2 * max(peaks))
    ax.set_ylabel("GiB")
    _rank_axis(ax, len(peaks))


def traffic(ax: Axes, part: dict[str, Any]) -> None:
    """Draw the bytes each rank received in a step, and the least that its queries need."""
    ax.set_title("Received per rank and step")
    received, bound = part.get("received_per_step") or [], part.get("lower_bound_per_step") or []
    if not received:
        _absent(ax, "No bytes were counted.")
        return
    if len(received) == 1:
        _absent(ax, "One rank: nothing is sent.")
        return
    unit, scale = _byte_unit(max([*received, *bound]))
    times = f", {sum(received) / sum(bound):.3f} x the bound" if sum(bound) else ""
    bars = ax.bar(
        range(len(received)),
        [b / scale for b in received],
        0.7,
        color=AFTER,
        label=f"received{times}",
    )
    if len(received) <= 8:
        ax.bar_label(bars, fmt="%.3g", padding=3)
    if bound:
        starts = [rank - 0.4 for rank in range(len(bound))]
        stops = [rank + 0.4 for rank in range(len(bound))]
        lines = [b / scale for b in bound]
        ax.hlines(lines, starts, stops, color="black", linewidth=2.5, label="lower bound")
    ax.set_ylim(0, 1.4 * max([*received, *bound, 1]) / scale)
    ax.set_ylabel(unit)
    _rank_axis(ax, len(received))
    ax.legend(loc="upper left")


def _absent(ax: Axes, words: str) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set(visible=True, color="#d0d0d0")
    lines = textwrap.fill(words, 34)
    ax.text(0.5, 0.5, lines, ha="center", va="center", transform=ax.transAxes, color=QUIET)


def _label_ends(ax: Axes, drawn: list[tuple[list[float], str]]) -> None:
    """Write the last bucket's values at their lines, the higher above and the lower below."""
    ends = [(i, v[i], color) for v, color in drawn for i in [max(j for j, x in enumerate(v) if not math.isnan(x))]]
    ends.sort(key=lambda end: end[1])
    for number, (bucket, value, color) in enumerate(ends):
        below = number == 0 and len(ends) > 1
        ax.annotate(
            f"{value:.2f}",
            (bucket + 0.5, value),
            xytext=(0, -4 if below else 4),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            color=color,
            fontweight="bold",
        )


def _write_cells(ax: Axes, table: list[list[float]], columns: int) -> None:
    size = 9 if columns < 10 else 8
    if columns > 20:
        return  # too narrow for figures: the colours alone
    for y, row in enumerate(table):
        for x, value in enumerate(row):
            color = "white" if value > 0.55 else "black"
            ax.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=size, color=color)


def _over_tokens(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """Return (tokens trained on so far, value) wherever the value is finite."""
    out, tokens = [], 0.0
    for line in metrics:
        tokens = line.get("train/tokens") or tokens
        if line.get(name) is not None:
            out.append((tokens, line[name]))
    return out


def _smooth(points: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Return means over the last ``window`` points, drawn at their last one."""
    values = [v for _, v in points]
    return [(points[i][0], sum(values[i + 1 - window : i + 1]) / window) for i in range(window - 1, len(points))]


def _logged_peaks(metrics: Sequence[dict[str, Any]]) -> list[float]:
    peaks: dict[int, float] = {}
    for line in metrics:
        for name, value in line.items():
            if name.startswith("memory/peak_gib_rank") and value is not None:
                rank = int(name.removeprefix("memory/peak_gib_rank"))
                peaks[rank] = max(value, peaks.get(rank, 0.0))
    return [peaks[rank] for rank in sorted(peaks)]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _rank_axis(ax: Axes, ranks: int) -> None:
    ax.set_xlabel("rank")
    ax.set_xlim(min(-0.6, ranks / 2 - 2.5), max(ranks - 0.4, ranks / 2 + 1.5))
    if ranks <= 16:
        ax.set_xticks(range(ranks))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    ax.grid(visible=False, axis="x")


def _byte_unit(largest: float) -> tuple[str, float]:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if largest >= 1024**power:
            return unit, 1024.0**power
    return "bytes", 1.0


def _length(tokens: int) -> str:
    """8192 -> 8k, 1048576 -> 1M, 6000 -> 6000: the sizes that a config takes."""
    for unit, letter in ((1024**2, "M"), (1024, "k")):
        if tokens and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)


def _count(tokens: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{letter}"
    return f"{tokens:.0f}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
