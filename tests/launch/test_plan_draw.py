"""The picture of a plan: tiles, time lines, and that nothing runs into anything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from plan_cases import EDGES, reckoned, write_config

from ringspan.configs.load import load
from ringspan.dist_attn import Causal, Contiguous, Documents, Sinks, Window, parse_mask
from ringspan.dist_attn import plan as planned
from ringspan.dist_attn.cost import Costs, Link
from ringspan.launch import plan_draw, plan_figures, plan_inputs, plan_report, plan_tiles
from ringspan.launch.cli import main
from ringspan.launch.plan_options import Options

MASKS = ["causal", "causal & (window(9) | sinks(2))", "causal & documents([0, 20, 45])", "s2_attention(8)", "full"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.mark.parametrize("text", [*MASKS, "causal & dilated(4, 3)"])
def test_tiles_hold_the_share_of_live_pairs(text: str) -> None:
    mask, grid = parse_mask(text), 7
    problem = planned(
        mask, Contiguous(), world=3, length=45, heads=4, kv_heads=2, head_dim=8, dtype=torch.float32
    ).problem
    positions, edges = torch.arange(45), plan_tiles.cuts(45, grid)
    tables = [part.mask.allowed(positions[:, None], positions[None, :]).double() for part in problem.parts]
    truth = torch.stack(tables).mean(0)
    found = plan_tiles.live_share(problem, grid)
    for row in range(grid):
        for column in range(grid):
            tile = truth[edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
            assert found[row, column] == pytest.approx(float(tile.mean()))
    holders = [rank for rank in range(3) for _ in range(15)]
    assert plan_tiles.holders(problem.layout, 3, 45, grid).tolist() == [
        holders[(a + b) // 2] for a, b in zip(edges, edges[1:], strict=False)
    ]


@pytest.mark.parametrize("strategy", ["ring", "double_ring", "all_gather", "ulysses"])
@pytest.mark.parametrize("backward", [False, True])
def test_the_time_line_is_the_prediction(strategy: str, backward: bool) -> None:
    costs = Costs((Link(1e-6, 1e9), Link(1e-5, 1e8)), 2, forward=1e11, backward=1e11)
    made = reckoned(Causal() & Documents(EDGES), (2, 2), costs=costs, strategy=strategy)
    prediction, transfers = made.seconds(costs, backward=backward), made.backward if backward else made.forward
    for rank in range(4):
        line = plan_tiles.line(rank, transfers, prediction, costs)
        computed = sum(end - begin for begin, end in line.computing)
        waited = sum(end - begin for begin, end in line.waiting)
        assert computed == pytest.approx((prediction.ends - prediction.starts)[:, rank].sum())
        assert computed + waited == pytest.approx(prediction.ends[-1, rank])
        moving = [bar for level in line.moving for bar in level]
        for begin, end in line.waiting:  # whoever waits, waits for something that is on its way, or for another rank
            assert any(first < end and last >= end - 1e-12 for first, last in moving), (begin, end)
        assert all(first < last <= prediction.seconds + 1e-9 for first, last in moving)
    exposed = prediction.seconds - max((prediction.ends - prediction.starts).sum(0))
    assert exposed > 0  # the links are slow: there is something to see


def test_covered() -> None:
    edges = np.array([0.0, 1.0, 2.0, 4.0])
    assert plan_tiles.covered([(0.5, 1.5), (1.0, 1.25), (3.0, 4.0)], edges).tolist() == [0.5, 0.5, 0.5]
    assert plan_tiles.covered([], edges).tolist() == [0, 0, 0]


def test_ranks_that_are_shown() -> None:
    assert plan_tiles.shown_ranks(np.ones(3)) == ([0, 1, 2], None)
    ends = np.ones(1024)
    assert plan_tiles.shown_ranks(ends)[0][:: plan_tiles.SHOWN - 1] == [0, 1023]
    ends[500] = 2
    ranks, slowest = plan_tiles.shown_ranks(ends)
    assert slowest == 500
    assert {0, 500, 1023} <= set(ranks)


def test_the_sinks_are_part_of_the_mask_the_picture_shows() -> None:
    mask = Causal() & (Window(8) | Sinks(2))
    problem = planned(
        mask, Contiguous(), world=2, length=4096, heads=1, kv_heads=1, head_dim=8, dtype=torch.float32
    ).problem
    live = plan_tiles.live_share(problem)
    assert (live[:, 0] > 0).all()
    assert live[200, 100] == 0


def test_the_picture(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = config.parent / "plan.png"
    assert main(["plan", str(config), "--world", "2x4", "--documents", "even:4", "--out", str(out)]) == 0
    content = out.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert (width, height) == (2250, 1545)  # two kinds of layer
    assert capsys.readouterr().out.endswith(f"wrote {out}\n")
    assert [file.name for file in config.parent.glob("*.tmp")] == []


def test_the_panels_say_what_was_planned(config: Path) -> None:
    inputs = plan_inputs.read(load(config), Options(world=(16,), length=4096))
    drawn = plan_figures.work_out(inputs)
    total = plan_figures.Total.of([each.kind for each in drawn], inputs.length)
    figure = plan_draw.draw(inputs, drawn, total)
    told = [ax.get_title(loc="left") for ax in figure.axes]
    for each in drawn:
        for name, one in (("forward", each.kind.taken.forward), ("backward", each.kind.taken.backward)):
            assert one is not None
            assert any(title.startswith(f"One layer, {name}: {plan_report.seconds(one.seconds)}, ") for title in told)
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert "4 layers (0, 1, 3, 4): causal & window(99), by ring" in texts
    box = figure.bbox
    for ax in figure.axes:  # nothing runs out of the picture, and no title into the next panel
        drawn_in = ax.get_tightbbox()
        assert drawn_in is not None
        assert box.x0 <= drawn_in.x0
        assert drawn_in.x1 <= box.x1 + 1
    lines = [ax for ax in figure.axes if ax.get_title(loc="left").startswith(("One", "\n"))]
    for left, right in zip(lines, lines[1:], strict=False):
        if left.get_position().x0 < right.get_position().x0:
            assert left._left_title.get_window_extent().x1 < right._left_title.get_window_extent().x0  # pyright: ignore
