"""Memory a rank and tokens a second for each axis and some combinations on CPU ranks, beside FSDP2 and DeepSpeed alone.

One model (six layers of 384, vocabulary 8,192), sequences of 4,096 tokens, activation checkpointing, AdamW. Two cores:
four ranks share them, so that only ranks of one number are to be compared in speed.

Run: ``python benchmarks/axes.py --out benchmarks/results/axes.json --draw docs/axes.png``
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from axes_worker import FIELDS, LENGTH

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from parity_cases import WORDS, train_tokenizer  # noqa: E402

WORKER = Path(__file__).with_name("axes_worker.py")
ZERO3 = {"parallel.engine": "deepspeed", "parallel.deepspeed": {"zero_optimization": {"stage": 3}}}
HYBRID = {"attention.strategy": "ulysses_ring"}
PEERS = ("alone", "DeepSpeed", "stock")  # in their titles
# (title, ranks, what runs, settings or arguments)
ARMS: list[tuple[str, int, str, Any]] = [
    ("one rank", 1, "ringspan", {}),
    ("stock transformers, one rank", 1, "fsdp2", None),
    ("dp 2", 2, "ringspan", {"parallel.dp_shard": 2}),
    ("cp 2", 2, "ringspan", {"parallel.cp": 2}),
    ("tp 2", 2, "ringspan", {"parallel.tp": 2}),
    ("pp 2", 2, "ringspan", {"parallel.pp": 2, "train.gradient_accumulation_steps": 2}),
    ("cp 2, ZeRO-3", 2, "ringspan", {"parallel.cp": 2, **ZERO3}),
    ("FSDP2 alone, dp 2", 2, "fsdp2", None),
    ("DeepSpeed Ulysses 2, ZeRO-3", 2, "ulysses", 3),
    ("dp 2 x cp 2", 4, "ringspan", {"parallel.dp_shard": 2, "parallel.cp": 2}),
    ("cp 4", 4, "ringspan", {"parallel.cp": 4}),
    ("cp 4 (ulysses 2)", 4, "ringspan", {"parallel.cp": 4, "parallel.ulysses": 2, **HYBRID}),
    ("cp 2 x tp 2", 4, "ringspan", {"parallel.cp": 2, "parallel.tp": 2}),
    ("pp 2 x cp 2", 4, "ringspan", {"parallel.pp": 2, "parallel.cp": 2, "train.gradient_accumulation_steps": 2}),
    ("FSDP2 alone, dp 4", 4, "fsdp2", None),
    ("DeepSpeed Ulysses 4, ZeRO-3", 4, "ulysses", 3),
]


def write_data(folder: Path) -> None:
    """Write documents longer than a sequence, so that attention is as dense as the others'."""
    documents = [" ".join(WORDS[(i * i + j * (i + 3)) % len(WORDS)] for i in range(40_000)) for j in range(2)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    train_tokenizer(documents, 257).save_pretrained(folder / "tokenizer")
    (folder / "empty.yaml").write_text("{}")


def run(title: str, ranks: int, arm: str, settings: Any, folder: Path) -> dict[str, Any]:
    words = [] if settings is None else [str(settings)]
    if isinstance(settings, dict):
        base = {
            "model.config": FIELDS,
            "model.tokenizer": str(folder / "tokenizer"),
            "data.path": str(folder / "train.jsonl"),
            "data.seq_length": LENGTH,
            "train.max_steps": 100,
            "train.activation_checkpointing": "selective",
            "train.output_dir": str(folder / "run"),
            "attention.strategy": "ring",
        }
        words = [f"{key}={json.dumps(value)}" for key, value in {**base, **settings}.items()]
    out = folder / "row.json"
    out.unlink(missing_ok=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = {
        **os.environ,
        "AXES_FOLDER": str(folder),
        "AXES_OUT": str(out),
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
        "DS_ACCELERATOR": "cpu",
        # Freed memory goes back at once, or the peak would be the allocator's habit.
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }
    done = subprocess.run(
        [*launcher, str(WORKER), arm, *words], env=environment, timeout=600, capture_output=True, text=True
    )
    if not out.exists():
        return {"title": title, "ranks": ranks, "failed": (done.stderr.strip().splitlines() or ["no word"])[-1][:300]}
    return {"title": title, "ranks": ranks, **json.loads(out.read_text())}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [row for row in rows if "failed" not in row][::-1]
    panels = [([max(row["peak_bytes"]) / 2**20 for row in shown], "MiB a rank, the fullest")]
    if all("tokens_per_second" in row for row in shown):
        panels.append(([row["tokens_per_second"] for row in shown], "tokens a second, all ranks (two cores)"))
    size = (5 * len(panels) + 1, 0.34 * len(shown) + 1)
    figure, grid = plt.subplots(1, len(panels), figsize=size, dpi=110, sharey=True, squeeze=False)
    colors = ["#9aa7b5" if any(peer in row["title"] for peer in PEERS) else "#1f5fa8" for row in shown]
    names = [f"{row['title']}  ({row['ranks']})" for row in shown]
    for axes, (values, title) in zip(grid[0], panels, strict=True):
        bars = axes.barh(names, values, color=colors)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.set_title(title, fontsize=10, loc="left")
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.set_xticks([])
        axes.tick_params(left=False, labelsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path)
    parser.add_argument("--only", default="", help="a part of the titles to run")
    parser.add_argument("--memory", action="store_true", help="leave speeds out: other work shares the machine")
    chosen = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="ringspan-axes-") as place:
        write_data(Path(place))
        for arm in ARMS:
            if chosen.only in arm[0]:
                rows.append(row := run(*arm, Path(place)))
                if chosen.memory:
                    row.pop("tokens_per_second", None)
                print(json.dumps(row), flush=True)
    if chosen.out:
        chosen.out.write_text(json.dumps({"length": LENGTH, "rows": rows}, indent=1) + "\n")
    if chosen.draw:
        draw(rows, chosen.draw)


if __name__ == "__main__":
    main()
