"""Write README's results table from benchmarks/results/*.json; no figure is typed by hand.

Run: ``python benchmarks/table.py`` (``--check`` only compares, and fails where the table is not the results').
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
START, END = "<!-- results: made by benchmarks/table.py -->", "<!-- end of results -->"


def load(name: str) -> dict | None:
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def rows() -> list[tuple[str, str, str]]:
    """Return (what, figure, command) of every result that is there."""
    found: list[tuple[str, str, str]] = []
    if ring := load("ring_cpu"):
        command = "`python benchmarks/ring_cpu.py`"
        what = f"{ring['length'] // 1024}K causal, {ring['heads']} heads, {ring['dtype']}, forward + backward, "
        silent, flash = ring["ring_over_silent"], ring["ring_over_flash"]
        found += [
            (what + "ring of 2 CPU ranks / the same work without exchange", f"{silent:.2f}", command),
            (what + "ring of 2 CPU ranks / torch's flash operator, equal area", f"{flash:.2f}", command),
            ("bytes received / lower bound, the same", f"{ring['received_over_bound']:.3f}", command),
        ]
    found += exchange_rows()
    found += mesh_rows()
    if ranges := load("block_ranges"):
        figure = ", ".join(f"{arm['milliseconds']:.0f}" for arm in ranges["documents"].values())
        counts = ", ".join(ranges["documents"])
        what = f"block runs of {ranges['length'] >> 20}M tokens, window and sinks, {counts} documents, ms"
        found.append((what, figure, "`python benchmarks/block_ranges.py`"))
    if sparse := load("cpu_attention"):
        command = "`python benchmarks/cpu_attention.py`"
        for name, arm in sparse["sparse_float32"].items():
            if name != "causal":
                length = sparse["length"] // 1024
                what = f"CPU, {name} at {length}K, forward + backward: time over live area / dense causal's"
                found.append((what, f"{arm['time_over_area']:.2f}", command))
        bf16, error = sparse["bf16_forward"], sparse["bf16_error"]
        what = f"CPU, bf16 causal forward at {sparse['bf16_length'] // 1024}K, torch's SDPA / ours"
        found += [
            (f"{what}, rows that meet one tile (torch's operator itself)", f"{bf16['torch_over_alone']:.2f}", command),
            (f"{what}, summed in fp32 (windows, rings)", f"{bf16['torch_over_partial']:.2f}", command),
            ("the same, error of the result over SDPA's", f"{error['partial_cast'] / error['torch']:.2f}", command),
        ]
    if demo := load("demo_ranks"):
        command = "`python benchmarks/demo_ranks.py`"
        speeds, memory = demo["tokens_per_second"], demo["peak_gib"]
        two, torchrun = demo["largest_relative_difference_two_ranks"], demo["torchrun_equals_ringspan"]
        found += [
            ("demo, ten losses on 2 ranks: largest relative difference from 1 rank", f"{two:.1e}", command),
            ("demo, ten losses under torchrun equal `ringspan train`'s", "yes" if torchrun else "NO", command),
            ("demo, tokens/s on 1 rank (2 threads), on 2 ranks", f"{speeds['1']:,.0f}, {speeds['2']:,.0f}", command),
            ("demo, peak GiB per rank, 1 rank, 2 ranks", f"{memory['1']:.2f}, {memory['2']:.2f}", command),
            ("demo, bytes moved / lower bound", f"{demo['bytes_over_bound']:.3f}", command),
        ]
    if tuned := load("demo"):
        edges = tuned["by_position"]["edges"]
        at = {f"{a}-{b}": i for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False))}
        before, after = tuned["by_position"]["before"], tuned["by_position"]["after"]
        for name in ("256-512", "4096-8192"):
            figure = f"{before[at[name]]:.2f} -> {after[at[name]]:.2f}"
            found.append((f"demo, held-out nats/byte at positions {name}, before -> after", figure, "`make demo`"))
    return found


def exchange_rows() -> list[tuple[str, str, str]]:
    """Return the rows of many ranks: bytes, planning, overlap, balance, other libraries' speed."""
    found: list[tuple[str, str, str]] = []
    if moved := load("exchange"):
        command = "`python benchmarks/exchange.py`"
        for name, arms in moved["counted"].items():
            over = "; ".join(
                f"{strategy} {each['over_full_ring']:.2f}" for strategy, each in arms.items() if isinstance(each, dict)
            )
            found.append((f"{moved['ranks']} ranks, {name}: bytes received / a full ring's, forward", over, command))
        large = moved["large"]
        slowest = max(each["plan_milliseconds"] for each in large["cases"].values())
        bound = max(each["over_bound"] for each in large["cases"].values())
        what = (
            f"ring planned for {large['length'] >> 20}M tokens, {large['ranks']} ranks, {large['documents']} documents"
        )
        found.append((f"{what}: ms a rank, worst of four masks", f"{slowest:.0f}", command))
        found.append(("the same: bytes received / lower bound, worst", f"{bound:.3f}", command))
    if overlap := load("overlap"):
        command = "`python benchmarks/overlap.py` (root)"
        hides = [row for row in overlap["rows"] if row["hides"]]
        for row in hides:
            label = row["label"].replace("|", "/")
            what = f"{row['hosts']} hosts, {overlap['mbit']} Mbit/s, ring, {label}: exposed share"
            found.append((what, f"{max(row['exposed'], 0):.2f}", command))
        ratios = sorted(row["predicted_over_measured"] for row in overlap["rows"])
        what = f"seconds predicted / measured on shaped links, {len(ratios)} cases"
        found.append((what, f"{ratios[0]:.2f} to {ratios[-1]:.2f}", command))
    if balance := load("balance"):
        for layout in ("ZigZag", "Balanced"):
            each = "; ".join(f"{name} {case['imbalance'][layout]:.2f}" for name, case in balance["cases"].items())
            what = f"work of the busiest of {balance['ranks']} ranks / mean, {layout}"
            found.append((what, each, "`python benchmarks/balance.py`"))
    if peers := load("ring_peers"):
        for case in peers["cases"]:
            times = "; ".join(f"{title} {over:.2f}" for title, over in case["their_time_over_ours"].items())
            what = f"2 CPU ranks, {case['case']} at {case['length'] // 1024}K, {peers['heads']}: time / our ring's"
            found.append((what, times, "`python benchmarks/ring_peers.py`"))
    return found


def mesh_rows() -> list[tuple[str, str, str]]:
    """Return the rows of meshes: against one rank, resumed, their memory and speed."""
    found: list[tuple[str, str, str]] = []
    if parity := load("parity"):
        command, rows_ = "`python benchmarks/parity.py`", parity["rows"]
        what = f"{len(rows_)} meshes and engines against one rank, fp32: "
        found.append(
            (what + "worst relative error of any gradient", f"{max(r['gradient'] for r in rows_):.0e}", command)
        )
        found.append((what + "of ten losses", f"{max(r['curve'] for r in rows_):.0e}", command))
    if resume := load("resume"):
        worst = resume["largest_relative_difference_after"]
        what = "killed on 4 ranks (dp 2 x cp 2), resumed on 2 (tp 2): losses' largest relative difference"
        found.append((what, f"{worst:.0e}", "`python benchmarks/resume.py`"))
    if axes := load("axes"):
        rows_ = {row["title"]: row for row in axes["rows"] if "failed" not in row}
        pairs = [("cp 2", "DeepSpeed Ulysses 2, ZeRO-3"), ("dp 2", "FSDP2 alone, dp 2")]
        for mine, theirs in (pair for pair in pairs if set(pair) <= set(rows_)):
            ours, peer = rows_[mine], rows_[theirs]
            figure = f"{max(ours['peak_bytes']) / max(peer['peak_bytes']):.2f}"
            what = f"2 CPU ranks, {mine} / {theirs}: memory of a rank"
            if "tokens_per_second" in ours:
                what += "; tokens/s"
                figure += f"; {ours['tokens_per_second'] / peer['tokens_per_second']:.2f}"
            found.append((what, figure, "`python benchmarks/axes.py`"))
    if fits := load("fits"):
        command, flat = "`python benchmarks/fits.py`", [row["bytes"] for row in fits["flat"]]
        what = "memory of a rank on 1, 2, 4 ranks with 8K tokens each, over that of 1"
        found.append((what, ", ".join(f"{size / flat[0]:.2f}" for size in flat), command))
    if fits and "ours" in fits:
        ours, limit = fits["ours"], fits["limit_bytes"]
        what = f"tokens on 2 ranks of at most {limit >> 30} GiB / on one with HF Trainer ({fits['trainer_tokens']:,})"
        fit = f"at least {fits['times']}" if fits["ours_fits"] else f"not {fits['times']}"
        found.append((what, f"{fit} ({ours['bytes'] / 2**30:.1f} GiB)", "`python benchmarks/fits.py`"))
    return found


def table() -> str:
    lines = ["| what | measured | command |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {figure} | {command} |" for what, figure, command in rows()])


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    made = f"{before}{START}\n{table()}\n{END}{after}"
    if "--check" in sys.argv:
        return 0 if made == text else 1
    readme.write_text(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
