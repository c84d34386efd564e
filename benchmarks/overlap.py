"""How much of the exchange hides behind the computation, and how well its time is predicted; on shaped links.

Hosts are network namespaces with links of a given speed (Linux, root). Three arms take turns: attention with its
exchange (whole), the same without (silent), the exchange without computation (exchange). Exposed is what the exchange
adds, (whole - silent) / exchange, of medians; 0 is hidden. Two hosts compute really; four wait for as long as
their pairs would take, because this many do not fit the cores. Links and rates are measured in the same run, and the
prediction from them stands beside the measurement.

Run: ``python benchmarks/overlap.py --out benchmarks/results/overlap.json`` (as root)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
from pathlib import Path
from typing import Any

import hosts
import torch
from overlap_worker import ARMS, planned

from ringspan.dist_attn.cost import Costs

HERE = Path(__file__).parent
SHAPE = {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float32", "strategy": "ring"}


def cases(strategies: list[str]) -> dict[int, list[dict[str, Any]]]:
    """Return the cases by number of hosts; compute is a little longer than the bytes take at 400 Mbit/s."""
    real = {**SHAPE, "compute": "real", "hides": True, "mask": "causal", "layout": "ZigZag", "length": 8192}
    wait = {**SHAPE, "compute": "wait", "rate": 60e9, "hides": True}
    packed = "causal & documents(0, {})"
    four = [
        {**wait, "mask": "causal", "layout": "ZigZag", "length": 16384},
        {**wait, "mask": "full", "layout": "Contiguous", "length": 16384},
        {**wait, "mask": "causal & (window(3000) | sinks(4))", "layout": "Contiguous", "length": 16384},
        {**wait, "mask": packed.format("2474, 3688, 5042, 5220, 16384"), "layout": "Balanced", "length": 16384},
        {**wait, "mask": "causal", "layout": "ZigZag", "length": 8192, "rate": 200e9, "hides": False},
    ]
    eight = [
        {
            **wait,
            "mask": packed.format("5786, 15101, 20800, 21912, 32040, 32768"),
            "layout": "Balanced",
            "length": 32768,
        }
    ]
    for strategy in strategies:
        four.append({**four[0], "strategy": strategy, "hides": False})
        four.append({**four[2], "strategy": strategy, "hides": False})
    return {2: [real], 4: four, 8: eight}


def row(hosts_: int, entry: dict[str, Any], links: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one case's medians, exposed shares, and the prediction beside them."""
    case = entry["case"]
    forward, backward, call = entry["speeds"]
    costs = Costs.of({"links": links, "ranks_per_node": 1, "forward": forward, "backward": backward, "call": call})
    made = planned(case, hosts_)
    found: dict[str, Any] = {"hosts": hosts_, **case, "label": shown(case["mask"])}
    for index, name in enumerate(("forward", "backward")):
        median = {arm: statistics.median(each[index] for each in entry["times"][arm]) for arm in ARMS}
        predicted = made.seconds(costs, backward=bool(index))
        found[name] = {
            "seconds": median,
            "predicted": predicted.seconds,
            "predicted_over_measured": predicted.seconds / median["whole"],
            "predicted_exposed": predicted.exposed,
            "exposed": (median["whole"] - median["silent"]) / median["exchange"],
        }
    both = {arm: sum(found[name]["seconds"][arm] for name in ("forward", "backward")) for arm in ARMS}
    found["exposed"] = (both["whole"] - both["silent"]) / both["exchange"]
    found["predicted_over_measured"] = sum(found[n]["predicted"] for n in ("forward", "backward")) / both["whole"]
    return found


def measure(mbit: int, rounds: int, strategies: list[str]) -> dict[str, Any]:
    rows, links = [], {}
    for count, some in cases(strategies).items():
        print(f"{count} hosts at {mbit} Mbit/s: {len(some)} cases, {rounds} rounds", flush=True)
        with hosts.hosts(count, mbit) as names:
            # Real computation shares the cores with the transfers, and its times scatter more.
            many = 3 * rounds if count == 2 else rounds
            request = json.dumps({"cases": some, "rounds": many})
            results = hosts.run(HERE / "overlap_worker.py", [request], names, timeout=180 + 60.0 * len(some))
        links[str(count)] = results[0]["links"]
        rows += [row(count, entry, results[0]["links"]) for entry in results[0]["cases"]]
        for each in rows[-len(some) :]:
            print(
                f"  {each['strategy']:15} {each['label']:40} exposed {each['exposed']:5.2f}  "
                f"predicted / measured {each['predicted_over_measured']:.2f}",
                flush=True,
            )
    machine = f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores"
    return {
        "mbit": mbit,
        "rounds": rounds,
        "links": links,
        "rows": rows,
        "machine": machine,
        "torch": torch.__version__,
    }


def shown(mask: str) -> str:
    """Return a mask in a few words."""
    return re.sub(r"documents\([^)]*\)", lambda found: f"{found[0].count(',')} documents", mask)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw measured beside predicted seconds, and what of the measured ones is exposed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    figure, axes = plt.subplots(figsize=(10, 0.55 * len(rows) + 1.6), layout="constrained")
    for index, each in enumerate(rows):
        total = {arm: sum(each[name]["seconds"][arm] for name in ("forward", "backward")) for arm in ARMS}
        guess = sum(each[name]["predicted"] for name in ("forward", "backward"))
        axes.barh(index - 0.18, total["silent"], 0.34, color="#4477aa", label="computation" if not index else None)
        exposed = max(total["whole"] - total["silent"], 0)
        axes.barh(
            index - 0.18, exposed, 0.34, left=total["silent"], color="#ee6677", label="exposed" if not index else None
        )
        axes.barh(index + 0.18, guess, 0.34, color="#bbbbbb", label="predicted" if not index else None)
    names = [f"{r['hosts']} hosts, {r['strategy']}\n{r['label']}, {r['length'] // 1024}K" for r in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds, forward + backward of one layer")
    axes.set_title(f"Exchange behind computation, links of {result['mbit']} Mbit/s", fontsize=11)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mbit", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--strategies", nargs="*", default=["all_gather", "ulysses", "dist_attention"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path, help="picture (PNG)")
    chosen = parser.parse_args()
    if reason := hosts.missing():
        raise SystemExit(f"overlap: needs network namespaces: {reason}")
    result = measure(chosen.mbit, chosen.rounds, chosen.strategies)
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.draw:
        draw(result, chosen.draw)


if __name__ == "__main__":
    main()
