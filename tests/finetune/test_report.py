"""The picture says what the files say: read back from the figure's own objects."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text

from ringspan.finetune.report import Data, draw, report
from ringspan.parallel.faults import Fault

METRICS = [
    {
        "step": step,
        "train/loss": 4.0 - step / 10,
        "train/tokens": 8192 * step,
        "perf/tokens_per_second": 3000.0 + step,
        "memory/peak_gib_rank0": 1.0 + step / 100,
        "memory/peak_gib_rank1": 2.0 - step / 100,
        **({"eval/loss": 3.5 - step / 10} if step % 5 == 0 else {}),
    }
    for step in range(1, 11)
]
EVALUATION: dict[str, Any] = {
    "title": "llama $4 M, 1024 tokens over 2 ranks, causal & documents, ring",
    "by_position": {
        "edges": [0, 256, 512, 1024],
        "before": [2.8, 2.76, 3.2],
        "after": [2.7, None, 2.44],
        "tokens": [10, 0, 5],
    },
    "passkey": {
        "lengths": [512, 1024],
        "depths": [0.0, 0.5, 1.0],
        "before": [[0.25, 0.0], [0.5, 0.0], [1.0, 0.75]],
        "after": [[1.0, 0.5], [1.0, 0.75], [1.0, 1.0]],
    },
    "bytes": {
        "received_per_step": [3 * 2**20, 5 * 2**20],
        "lower_bound_per_step": [3 * 2**20, 4 * 2**20],
        "unit": "bytes",
    },
    "memory": {"peak_gib": [1.5, 1.75]},
    "throughput": {"tokens_per_second": 3000.0, "ranks": 2},
}


def _panel(figure: Figure, title: str) -> Axes:
    [ax] = [ax for ax in figure.axes if ax.get_title(loc="left").startswith(title)]
    return ax


def _texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def _legend(ax: Axes) -> list[str]:
    legend = ax.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def _x(line: Line2D) -> list[float]:
    return np.asarray(line.get_xdata()).tolist()


def _y(line: Line2D) -> list[float]:
    return np.asarray(line.get_ydata()).tolist()


def _levels(steps: StepPatch) -> list[float]:
    return np.asarray(steps.get_data()[0]).tolist()


def _heights(ax: Axes) -> list[float]:
    return [bar.get_height() for bar in ax.patches if isinstance(bar, Rectangle)]


def _tick_labels(ax: Axes, which: str) -> list[str]:
    return [label.get_text() for label in getattr(ax, f"get_{which}ticklabels")()]


def test_loss_by_position_shows_both_models_and_the_gap() -> None:
    ax = _panel(draw(Data(evaluation=EVALUATION)), "Held-out loss")
    steps = {p.get_label(): p for p in ax.patches if isinstance(p, StepPatch)}
    assert _levels(steps["before training"]) == [2.8, 2.76, 3.2]
    after = _levels(steps["after training"])
    assert after[0] == 2.7
    assert np.isnan(after[1])
    assert after[2] == 2.44
    assert _tick_labels(ax, "x") == ["0", "256", "512", "1k"]
    assert ax.get_ylabel() == "nats per token"
    assert set(_texts(ax)) == {"3.20", "2.44"}
    assert steps["before training"].get_linestyle() != steps["after training"].get_linestyle()


def test_a_model_judged_only_after_training_has_one_line() -> None:
    part = {**EVALUATION["by_position"], "before": None}
    ax = _panel(draw(Data(evaluation={"by_position": part})), "Held-out loss")
    assert _legend(ax) == ["after training"]


def test_many_buckets_keep_their_labels_apart() -> None:
    edges = [0, *(64 * 2**i for i in range(15))]
    part = {"edges": edges, "after": [2.0] * 15}
    ax = _panel(draw(Data(evaluation={"by_position": part})), "Held-out loss")
    assert _tick_labels(ax, "x")[-1] == "1M"
    assert len(_tick_labels(ax, "x")) <= 9


def test_training_and_held_out_loss_over_tokens() -> None:
    ax = _panel(draw(Data(metrics=METRICS)), "Loss while training")
    lines = {line.get_label(): line for line in ax.lines}
    assert _x(lines["training"]) == [8192 * step for step in range(1, 11)]
    assert _y(lines["training"])[9] == pytest.approx(3.0)
    assert _x(lines["held out"]) == [8192 * 5, 8192 * 10]
    assert _y(lines["held out"]) == [3.0, 2.5]


def test_a_long_run_is_smoothed_and_the_raw_curve_stays() -> None:
    metrics = [{"step": s, "train/tokens": s, "train/loss": float(s % 2)} for s in range(1, 201)]
    ax = _panel(draw(Data(metrics=metrics)), "Loss while training")
    raw, smooth = ax.lines
    assert len(_x(raw)) == 200
    assert set(np.round(_y(smooth), 9)) == {0.5}
    assert _x(smooth)[-1] == 200
    assert _legend(ax) == ["training (mean of 10 points)"]


def test_steps_that_are_not_finite_are_counted() -> None:
    bad = {
        "step": 11,
        "train/loss": None,
        "nonfinite": {"train/loss": "nan"},
        "train/tokens": 90112,
    }
    ax = _panel(draw(Data(metrics=[*METRICS, bad])), "Loss while training")
    assert "1 steps not finite, left out" in _legend(ax)
    assert len(_x(ax.lines[0])) == 10


def test_pass_keys_are_a_map_before_and_a_map_after() -> None:
    figure = draw(Data(evaluation=EVALUATION))
    maps = {ax.get_xlabel(): ax for ax in figure.axes if ax.images}
    assert set(maps) == {"length, before", "length, after"}
    for name in ("before", "after"):
        ax = maps[f"length, {name}"]
        assert np.array_equal(np.asarray(ax.images[0].get_array()), EVALUATION["passkey"][name])
        assert ax.images[0].get_clim() == (0, 1)
        assert _tick_labels(ax, "x") == ["512", "1k"]
    assert _tick_labels(maps["length, before"], "y") == ["0%", "50%", "100%"]
    assert _texts(maps["length, after"]) == ["100", "50", "100", "75", "100", "100"]


def test_throughput_starts_at_zero() -> None:
    ax = _panel(draw(Data(metrics=METRICS)), "Throughput")
    assert ax.get_ylim()[0] == 0
    assert _y(ax.lines[0]) == [3000.0 + step for step in range(1, 11)]
    assert "median 3,006" in _legend(ax)


def test_memory_has_a_bar_per_rank_from_the_evaluation_or_the_log() -> None:
    ax = _panel(draw(Data(METRICS, EVALUATION)), "Peak memory")
    assert _heights(ax) == [1.5, 1.75]
    assert ax.get_ylim()[0] == 0
    logged = _panel(draw(Data(METRICS)), "Peak memory")
    assert _heights(logged) == [1.10, 1.99]


def test_received_bytes_stand_beside_their_bound() -> None:
    ax = _panel(draw(Data(evaluation=EVALUATION)), "Received")
    assert ax.get_ylabel() == "MiB"
    assert _heights(ax) == [3.0, 5.0]
    [lines] = ax.collections
    assert [float(np.asarray(path.vertices)[0, 1]) for path in lines.get_paths()] == [3.0, 4.0]
    assert any("1.143 x the bound" in text for text in _legend(ax))


def test_one_rank_says_that_nothing_is_sent() -> None:
    part = {"received_per_step": [0.0], "lower_bound_per_step": [0.0]}
    ax = _panel(draw(Data(evaluation={"bytes": part})), "Received")
    assert _texts(ax) == ["One rank: nothing is sent."]


def test_ranks_that_share_nothing_are_drawn_as_zero() -> None:
    part = {"received_per_step": [0.0, 0.0], "lower_bound_per_step": [0.0, 0.0]}
    ax = _panel(draw(Data(evaluation={"bytes": part})), "Received")
    assert _heights(ax) == [0.0, 0.0]


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    figure = draw(Data())
    assert len(figure.axes) == 6
    assert all(ax.texts for ax in figure.axes)
    assert "eval.path" in _texts(_panel(figure, "Held-out loss"))[0].replace("\n", " ")
    assert report(tmp_path).exists()


@pytest.mark.parametrize("part", ["by_position", "passkey", "bytes", "memory", "throughput", "title"])
def test_each_part_may_be_absent(part: str) -> None:
    figure = draw(Data(METRICS, {k: v for k, v in EVALUATION.items() if k != part}))
    assert len(figure.axes) >= 6


def test_the_title_is_the_evaluations_or_made_of_the_config() -> None:
    assert draw(Data(evaluation=EVALUATION)).get_suptitle() == EVALUATION["title"]
    config = {
        "model": {"path": None, "config": {"model_type": "llama"}},
        "data": {"seq_length": 8192, "packing": True},
        "parallel": {"cp": 2},
        "attention": {"strategy": "ring"},
    }
    title = draw(Data(config=config)).get_suptitle()
    assert title == "llama, 8192 tokens over 2 ranks, causal, documents apart, ring"


def test_no_text_of_the_figure_overlaps_another_panels_or_leaves_the_picture() -> None:
    lengths, table = [512 * 2**i for i in range(5)], [[1.0] * 5] * 5
    depths = [i / 4 for i in range(5)]
    keys = {"lengths": lengths, "depths": depths, "before": table, "after": table}
    figure = draw(Data(METRICS, {**EVALUATION, "passkey": keys}))
    width, height = figure.canvas.get_width_height()
    boxes = []
    for ax in figure.axes:
        # Texts among the children are the three titles and what was written into the panel.
        titles = [child for child in ax.get_children() if isinstance(child, Text)]
        texts = [*titles, ax.xaxis.label, ax.yaxis.label]
        boxes += [(t.get_text(), t.get_window_extent()) for t in texts if t.get_text()]
    for number, (text, box) in enumerate(boxes):
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= width, text
        assert box.y1 <= height, text
        for other, second in boxes[number + 1 :]:
            assert not box.overlaps(second), (text, other)


def test_the_file_is_a_wide_png_and_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATION))
    (tmp_path / "config.yaml").write_text("model: {path: x}\n")
    before = {path.name for path in tmp_path.iterdir()}
    path = report(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == before | {"report.png"}
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    assert width >= 1600
    assert height >= 1000


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("evaluation.json", "{broken"),
        ("config.yaml", "a: [1"),
        ("config.yaml", "- a list"),
        ("metrics.jsonl", "x\n"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(Fault, match=name.replace(".", r"\.")) as caught:
        report(tmp_path)
    assert "\n" not in str(caught.value)
