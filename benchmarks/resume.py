"""A run on four ranks is killed, and goes on on two with another mesh: its curve beside one that was never stopped.

Run: ``python benchmarks/resume.py --out benchmarks/results/resume.json --draw docs/resume.png``
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from parity_cases import KINDS, write_text  # noqa: E402

STEPS, EVERY, KILL_AFTER = 40, 8, 16
FOUR, TWO = {"dp_shard": 2, "cp": 2}, {"tp": 2}


def command(folder: Path, text: Path, name: str, parallel: dict[str, int]) -> list[str]:
    groups = parallel.get("dp_shard", 1)
    settings = {
        "model.config": KINDS["llama"],
        "model.tokenizer": str(text / "tokenizer"),
        "data.path": str(text / "train.jsonl"),
        "data.seq_length": 512,
        "data.shuffle_block": 5,
        "train.learning_rate": 3e-3,
        "train.max_steps": STEPS,
        "train.warmup_steps": 5,
        "train.gradient_accumulation_steps": 4 // groups,
        "train.output_dir": str(folder / name),
        "attention.strategy": "ring",
        "checkpoint.every": EVERY,
        **{f"parallel.{axis}": size for axis, size in parallel.items()},
    }
    empty = folder / "empty.yaml"
    empty.write_text("{}")
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return [sys.executable, "-m", "ringspan.launch.cli", "train", str(empty), *words]


def losses(folder: Path, name: str) -> list[float]:
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


def killed(words: list[str], checkpoint: Path) -> int:
    """Start a run, kill all its ranks once a checkpoint is there, and return how many steps it had logged."""
    child = subprocess.Popen(words, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while not checkpoint.exists():
            if child.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{checkpoint} did not appear")
            time.sleep(0.02)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return len((checkpoint.parents[1] / "metrics.jsonl").read_text().splitlines())


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ringspan-resume-") as place:
        folder = Path(place)
        text = write_text(folder / "text")
        quiet: dict[str, Any] = {"check": True, "timeout": 600, "stdout": subprocess.DEVNULL}
        subprocess.run(command(folder, text, "straight", FOUR), **quiet)
        broken = command(folder, text, "broken", FOUR)
        logged = killed(broken, folder / "broken" / "checkpoints" / f"step-{KILL_AFTER:06d}")
        subprocess.run(command(folder, text, "broken", TWO), **quiet)
        straight, found = losses(folder, "straight"), losses(folder, "broken")
    apart = [abs(a - b) / a for a, b in zip(straight, found, strict=True)]
    return {
        "four": FOUR,
        "two": TWO,
        "killed_after": logged,
        "resumed_from": logged // EVERY * EVERY if logged % EVERY else logged,
        "straight": straight,
        "resumed": found,
        "largest_relative_difference_before": max(apart[:KILL_AFTER]),
        "largest_relative_difference_after": max(apart[KILL_AFTER:]),
    }


def draw(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6), dpi=120, constrained_layout=True)
    steps = range(1, STEPS + 1)
    axes.plot(steps, found["straight"], color="#c8c8c8", linewidth=5, label="4 ranks, dp 2 x cp 2, never stopped")
    start = KILL_AFTER
    axes.plot(steps[:start], found["resumed"][:start], color="#1f5fa8", label="4 ranks, dp 2 x cp 2, killed")
    axes.plot(steps[start:], found["resumed"][start:], color="#c2461f", label="goes on on 2 ranks, tp 2")
    axes.axvline(start + 0.5, color="#555555", linewidth=0.8, linestyle=":")
    axes.set_xlabel("step")
    axes.set_ylabel("training loss, nats a token")
    worst = found["largest_relative_difference_after"]
    axes.set_title(f"largest relative difference after the resume: {worst:.0e}", fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--draw", type=Path)
    chosen = parser.parse_args()
    found = measure()
    print(json.dumps({key: value for key, value in found.items() if "relative" in key or "from" in key}, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(found, indent=1) + "\n")
    if chosen.draw:
        draw(found, chosen.draw)


if __name__ == "__main__":
    main()
