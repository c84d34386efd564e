"""The picture of a plan: the mask tiled by the rank that computes, and the time line of transfers over computing.

Colours are told apart by colour-blind readers (Okabe and Ito; viridis for many ranks).
"""

from __future__ import annotations

import io
import math
import textwrap

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from ringspan.dist_attn.cost import Prediction
from ringspan.dist_attn.moves import Transfers
from ringspan.finetune.report import DPI, STYLE
from ringspan.launch import plan_tiles
from ringspan.launch.plan_figures import Drawn, Pass, Total
from ringspan.launch.plan_inputs import Inputs
from ringspan.launch.plan_report import facts, numbered, seconds, share, size, summary

KINDS = 4  # rows of the picture: the kinds of layer that take longest
FEW = 8  # ranks with a colour each
RANKS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555")
COMPUTING, WAITING = "#0072B2", "#D55E00"
MOVING, LEVELS = ("#009E73", "#CC79A7"), ("inside a node", "between nodes")
FAINTEST = 0.5  # of a tile with a single live pair: windows and sinks are thin
ROUNDS = 40  # up to so many rounds are told apart
STRETCHES = 250  # of the time shown, where they cannot
HAIRLINE = 0.15  # of a lane: what is seldom on its way is still seen
# What a tile's colour means; where queries travel to the keys, or heads are dealt to ranks, it is not the usual.
USUAL = "rank that holds the queries and computes"
BY_KEYS = {"dist_attention": "rank that holds the keys and computes"}
BY_HEADS = {"ulysses": "query holder; every rank computes heads", "ulysses_ring": "query holder; its node computes"}


def png(inputs: Inputs, drawn: list[Drawn], total: Total) -> bytes:
    """Return the picture as a PNG."""
    buffer = io.BytesIO()
    draw(inputs, drawn, total).savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def draw(inputs: Inputs, drawn: list[Drawn], total: Total) -> Figure:
    """Return the figure: for each kind of layer its mask, its forward and its backward pass."""
    rows = sorted(drawn, key=lambda each: -each.kind.taken.seconds * len(each.kind.layers))[:KINDS]
    with rc_context(STYLE):
        engine = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.12)
        figure = Figure(figsize=(15, 1.5 + 4.4 * len(rows)), layout=engine)
        FigureCanvasAgg(figure)
        told, time = facts(inputs), summary(inputs, total)["seconds"]
        left_out = f"; {len(rows)} of {len(drawn)} kinds of layer are drawn" if len(drawn) > KINDS else ""
        heading = (
            f"{told['model']}\n{told['sequence']}; {told['ranks']}\n"
            f"attention of a micro-batch, all layers: {time}{left_out}"
        )
        figure.suptitle(heading, fontsize=12, x=0.01, ha="left", parse_math=False)
        grid = figure.add_gridspec(len(rows), 3, width_ratios=(1.15, 1.3, 1.3))
        for number, each in enumerate(rows):
            places = [figure.add_subplot(grid[number, column]) for column in range(3)]
            _kind(figure, places, inputs, each)
        _legend(figure, inputs)
        figure.canvas.draw()  # laid out now, while the style holds
    return figure


def _kind(figure: Figure, places: list[Axes], inputs: Inputs, drawn: Drawn) -> None:
    kind, plan = drawn.kind, drawn.plan
    heading = textwrap.shorten(f"{numbered(kind.layers)}: {kind.mask}, by {kind.strategy}", 130, placeholder=" ...")
    _tiles(figure, places[0], drawn, heading)
    rows = plan_tiles.shown_ranks(drawn.forward.ends.max(0) + drawn.backward.ends.max(0))
    _time_line(places[1], inputs, rows, plan.forward, drawn.forward)
    _time_line(places[2], inputs, rows, plan.backward, drawn.backward)
    for ax, name, each in zip(
        places[1:], ("forward", "backward"), (kind.taken.forward, kind.taken.backward), strict=True
    ):
        assert isinstance(each, Pass), "the strategy taken refuses nothing"
        told = f"{seconds(each.seconds)}, {share(each)} exposed"
        ax.set_title(f"One layer, {name}: {told}\n{size(each.received_bytes.mean)} received a rank", fontsize=10.5)


def _tiles(figure: Figure, ax: Axes, drawn: Drawn, heading: str) -> None:
    """The mask: rows are queries, columns keys; colour is a rank, pale where few pairs of a tile are live."""
    problem, strategy = drawn.plan.problem, drawn.kind.strategy
    world, length = problem.world, problem.length
    layout = problem.kv_layout if strategy in BY_KEYS else problem.layout
    colors = np.array([_color(rank, world) for rank in range(world)])[plan_tiles.holders(layout, world, length)]
    by_tile = colors[None, :, :] if strategy in BY_KEYS else colors[:, None, :]
    live = plan_tiles.live_share(problem)
    strength = np.where(live > 0, FAINTEST + (1 - FAINTEST) * np.minimum(live, 1), 0)[:, :, None]
    picture = 1 - strength * (1 - by_tile)
    ax.imshow(picture, extent=(0, length, length, 0), interpolation="nearest", aspect="auto")
    meaning = {**BY_KEYS, **BY_HEADS}.get(strategy, USUAL)
    ax.set_title(f"\n\nThe mask in tiles, colour by rank:\n{meaning}", fontsize=10.5)
    # Over all three panels; not laid out, or it would squeeze the first.
    over = ax.annotate(heading, (0, 1), xytext=(0, 46), xycoords="axes fraction", textcoords="offset points")
    over.set(fontsize=12.5, fontweight="bold", in_layout=False, parse_math=False)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)  # a column of sink tokens is as thin
    ax.plot((0, 0, length), (0, length, length), color="black", linewidth=0.5, clip_on=False, zorder=0)
    for axis, label in ((ax.xaxis, "key"), (ax.yaxis, "query")):
        axis.set_label_text(f"{label} (position in the sequence)")
        axis.set_major_locator(FixedLocator([i * length / 4 for i in range(5)]))
        axis.set_major_formatter(FuncFormatter(lambda x, _: _tokens(x)))
    _ranks(figure, ax, world)


def _ranks(figure: Figure, ax: Axes, world: int) -> None:
    """Say which colour is which rank."""
    if world > FEW:
        scale = ScalarMappable(Normalize(0, world - 1), "viridis")
        figure.colorbar(scale, ax=ax, label="rank", pad=0.02, ticks=MaxNLocator(6, integer=True))
        return
    patches = [Patch(color=_color(rank, world), label=str(rank)) for rank in range(world)]
    ax.legend(handles=patches, title="rank", loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)


def _color(rank: int, world: int) -> tuple[float, float, float]:
    if world <= FEW:
        return to_rgb(RANKS[rank])
    return colormaps["viridis"](rank / (world - 1))[:3]


def _time_line(
    ax: Axes, inputs: Inputs, rows: tuple[list[int], int | None], transfers: Transfers, prediction: Prediction
) -> None:
    """Draw a row per rank: computing and waiting above, what is on its way below.

    Where rounds are too many to be told apart, a stretch of time is filled as high as its share.
    """
    (ranks, slowest), (unit, scale) = rows, _unit(prediction.seconds)
    lines = [plan_tiles.line(rank, transfers, prediction, inputs.costs) for rank in ranks]
    many = max(len(line.computing) for line in lines) > ROUNDS
    for row, line in enumerate(lines):
        lanes = [(row + 0.09 + 0.15 * level, 0.13) for level in range(len(line.moving))]
        colors = [MOVING[level % len(MOVING)] for level in range(len(line.moving))]
        if many:
            _shares(ax, [line.computing, line.waiting], prediction, (row - 0.38, 0.44), [COMPUTING, WAITING])
            for bars, lane, color in zip(line.moving, lanes, colors, strict=True):
                _shares(ax, [bars], prediction, lane, [color], least=HAIRLINE)
        else:
            _bars(ax, line.computing, scale, (row - 0.38, 0.44), COMPUTING, edge=0.5)
            _bars(ax, line.waiting, scale, (row - 0.38, 0.44), WAITING)
            for bars, lane, color in zip(line.moving, lanes, colors, strict=True):
                _bars(ax, bars, scale, lane, color)
    ax.set_ylim(len(ranks) - 0.45, -0.55)
    ax.set_xlim(0, (prediction.seconds or 1.0) / scale * 1.01)
    ax.set_yticks(range(len(ranks)), [f"{rank}\nslowest" if rank == slowest else str(rank) for rank in ranks])
    ax.set_ylabel("rank")
    ax.set_xlabel(f"{unit} (heights: share of the time)" if many else f"{unit} since the pass began")
    ax.grid(visible=False, axis="y")


def _bars(
    ax: Axes, bars: plan_tiles.Bars, scale: float, lane: tuple[float, float], color: str, edge: float = 0.0
) -> None:
    ranges = [(begin / scale, (end - begin) / scale) for begin, end in bars]
    ax.broken_barh(ranges, lane, facecolor=color, edgecolor="white", linewidth=edge)


def _shares(
    ax: Axes,
    stacked: list[plan_tiles.Bars],
    prediction: Prediction,
    lane: tuple[float, float],
    colors: list[str],
    least: float = 0.0,
) -> None:
    """Fill a lane (top, height; the axis points down) from its lower edge, one kind of bars upon the other.

    Args:
        least: of the lane, where there is anything at all.
    """
    edges = np.linspace(0, prediction.seconds, STRETCHES + 1)
    below = np.full(STRETCHES, lane[0] + lane[1])
    for bars, color in zip(stacked, colors, strict=True):
        filled = plan_tiles.covered(bars, edges)
        above = below - lane[1] * np.where(filled > 0, np.maximum(filled, least), 0)
        ax.stairs(above, edges / _unit(prediction.seconds)[1], baseline=below, fill=True, color=color, linewidth=0)
        below = above


def _legend(figure: Figure, inputs: Inputs) -> None:
    names = LEVELS if len(inputs.costs.links) > 1 else ("",)
    moving = [
        Patch(color=MOVING[level % len(MOVING)], label=f"data on its way to or from the rank {name}".rstrip())
        for level, name in enumerate(names)
    ]
    handles = [
        Patch(color=COMPUTING, label="computing"),
        Patch(color=WAITING, label="waiting for data or another rank"),
        *moving,
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=10)


def _unit(total: float) -> tuple[str, float]:
    return ("seconds", 1.0) if total >= 10 else ("milliseconds", 1e-3) if total >= 1e-3 else ("microseconds", 1e-6)


def _tokens(count: float) -> str:
    for unit, scale in (("M", 1 << 20), ("K", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.3g}{unit}"
    return f"{math.floor(count)}"
