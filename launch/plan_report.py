"""What ``ringspan plan`` prints: the numbers in units that people know."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from ringspan.launch.plan_figures import Kind, Offer, Pass, Total
from ringspan.launch.plan_inputs import Inputs

WIDTH = 110  # where no terminal says how wide it is


def show(inputs: Inputs, kinds: list[Kind], total: Total) -> None:
    """Print the plan."""
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console = Console(file=sys.stdout, highlight=False, width=WIDTH)
    for name, text in facts(inputs).items():
        console.print(f"{name:<10} {text}", markup=False, soft_wrap=True)
    for kind in kinds:
        console.print()
        console.print(f"{numbered(kind.layers)}: {kind.mask}", style="bold", markup=False, soft_wrap=True)
        console.print(f"  {kind.why}", markup=False, soft_wrap=True)
        console.print(
            f"  live pairs a rank, of each head: {si(kind.area.mean)} mean, {si(kind.area.max)} most; "
            f"imbalance {kind.imbalance:.3f} (most / mean)",
            markup=False,
            soft_wrap=True,
        )
        console.print(_passes(kind))
        console.print(_offers(kind))
        for offer in kind.offers:
            if offer.refuses is not None:
                console.print(f"  {offer.strategy} {offer.refuses}", markup=False, soft_wrap=True, style="dim")
    console.print()
    console.print("All layers, one micro-batch, attention alone", style="bold")
    for name, text in summary(inputs, total).items():
        console.print(f"  {name:<10} {text}", markup=False, soft_wrap=True)


def facts(inputs: Inputs) -> dict[str, str]:
    """Return what is planned for, a line each."""
    shape, documents, costs = inputs.shape, inputs.documents, inputs.costs
    layers = sum(map(len, shape.layers.values()))
    without = f", {shape.other_layers} layers without attention" if shape.other_layers else ""
    rows = [] if documents is None else documents.rows or (documents.edges,)
    counts = sorted({len(edges) - 1 for edges in rows} or {1})
    packed = " to ".join(str(count) for count in sorted({counts[0], counts[-1]}))
    nodes = f" ({inputs.mesh[0]} nodes of {inputs.mesh[1]})" if len(inputs.mesh) == 2 else ""
    levels = zip(costs.links, ("in a node", "between nodes") if len(costs.links) > 1 else ("everywhere",), strict=False)
    layout = type(inputs.layout).__name__.lower()
    links = ", ".join(f"{si(link.bandwidth)}B/s {where} after {seconds(link.latency)}" for link, where in levels)
    return {
        "model": f"{shape.model}: {layers} layers{without}, {shape.heads} heads, {shape.kv_heads} for keys, "
        f"of {shape.head_dim}; {str(inputs.dtype).removeprefix('torch.')}",
        "sequence": f"{inputs.length:,} tokens, {packed} document{'s' * (counts[-1] > 1)}; "
        f"{inputs.batch} a micro-batch",
        "ranks": f"{inputs.world:,} rank{'s' * (inputs.world > 1)}{nodes}, {layout} layout",
        "costs": f"{costs.source}: links {links}; kernel {si(costs.forward)}FLOP/s forward, "
        f"{si(costs.backward)}FLOP/s backward",
    }


def summary(inputs: Inputs, total: Total) -> dict[str, str]:
    """Return the sum over all layers, a line each."""
    both = total.forward_seconds + total.backward_seconds
    exposed = percent(total.exposed_seconds / both if both else 0.0)
    return {
        "seconds": f"{seconds(both)} ({seconds(total.forward_seconds)} forward, {seconds(total.backward_seconds)} "
        f"backward), {exposed} of it exposed exchange",
        "received": f"{size(total.received_bytes)} a rank",
        "tokens": f"{si(total.tokens_per_second)} tokens/s over {inputs.world:,} "
        f"rank{'s' * (inputs.world > 1)}, attention alone: what a model computes besides comes on top",
    }


def _passes(kind: Kind) -> Table:
    table = _table("", "received a rank: min", "mean", "max", "lower bound", "ratio", "time a layer", "exposed")
    for name, each in (("forward", kind.taken.forward), ("backward", kind.taken.backward)):
        assert each is not None, "the strategy taken refuses nothing"
        ratio = "-" if each.ratio is None else f"{each.ratio:.3f}"
        bytes_ = each.received_bytes
        table.add_row(
            f"  {name}",
            *(size(value) for value in (bytes_.min, bytes_.mean, bytes_.max, each.lower_bound_bytes)),
            ratio,
            seconds(each.seconds),
            share(each),
        )
    return table


def _offers(kind: Kind) -> Table:
    table = _table(
        "strategy", "forward", "backward", "exposed", "received a rank, both", "holds of others", last="note"
    )
    for offer in kind.offers:
        if offer.forward is None or offer.backward is None:
            continue
        both = offer.forward, offer.backward
        table.add_row(
            f"  {offer.strategy}",
            *(seconds(each.seconds) for each in both),
            share(*both),
            size(sum(each.received_bytes.mean for each in both)),
            size(offer.holds_bytes),
            _note(offer, kind),
        )
    return table


def _note(offer: Offer, kind: Kind) -> str:
    if offer.strategy == kind.strategy:
        return "taken"
    if offer.too_large:
        return "holds more than auto admits"
    return f"{offer.seconds / kind.taken.seconds:.2f} x the time" if kind.taken.seconds else ""


def _table(*columns: str, last: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), show_edge=False, header_style="dim")
    for index, column in enumerate(columns):
        table.add_column(f"  {column}" if index == 0 else column, justify="right" if index else "left")
    if last is not None:
        table.add_column(last)
    return table


def share(*passes: Pass) -> str:
    """Return the part of the time that is exposed exchange."""
    total = sum(each.seconds for each in passes)
    return percent(sum(each.exposed_seconds for each in passes) / total if total else 0.0)


def percent(value: float) -> str:
    """Return a share in per cent; what is less than a thousandth, but something, says so."""
    return "<0.1%" if 0 < value < 0.0005 else f"{value:.1%}"


def numbered(layers: tuple[int, ...]) -> str:
    """Return "Layer 3", or "16 layers (0-14 by 2)", or as many numbers as fit a line."""
    if len(layers) == 1:
        return f"Layer {layers[0]}"
    steps = {b - a for a, b in zip(layers, layers[1:], strict=False)}
    if len(steps) == 1:
        (step,) = steps
        return f"{len(layers)} layers ({layers[0]}-{layers[-1]}{f' by {step}' if step > 1 else ''})"
    shown = ", ".join(map(str, layers[:12])) + (", ..." if len(layers) > 12 else "")
    return f"{len(layers)} layers ({shown})"


def size(count: float) -> str:
    """Return bytes in the largest unit of which there is one."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.3g} TiB" if count < 1000 else f"{count:,.0f} TiB"


def seconds(value: float) -> str:
    """Return a time in the largest unit of which there is one."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:,.0f} {unit}" if value >= 1000 * scale else f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.2g} us" if value else "0 s"


def si(value: float) -> str:
    """Return a number with a decimal prefix: 45 G, 1.2 T."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {prefix}"
    return f"{value:.3g} "
