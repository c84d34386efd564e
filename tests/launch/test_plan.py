"""``ringspan plan``: its numbers are the library's own, of the layers, documents and speeds that were asked for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from plan_cases import EDGES, LENGTH, MODEL, reckoned, told, write_config
from tiny_layers import build_model, config_of

from ringspan.dist_attn import Causal, Documents, Plan, Span, Window, parse_mask
from ringspan.dist_attn.cost import Costs, Link, typical
from ringspan.dist_attn.strategies import TABLE
from ringspan.launch import plan_inputs, plan_options, plan_report
from ringspan.parallel.context import SequenceContext


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "world"),
    [("1", 1), ("2", 2), ("8", 8), ("8x2", (8, 2)), ("2x4", (2, 4))],
    ids=["1", "2", "8", "8x2", "2x4"],
)
def test_the_numbers_are_those_of_dist_attn(config: Path, text: str, world: int | tuple[int, int]) -> None:
    found = told(config, "--world", text, "--documents", str(config.parent / "lengths.txt"))
    costs = typical("cuda")
    if isinstance(world, tuple):
        costs = Costs.of({**found["costs"], "ranks_per_node": world[1]})
    assert found["costs"]["ranks_per_node"] == costs.ranks_per_node
    ranks = range(found["world"])
    for kind, mask, layers in zip(
        found["kinds"], (Causal() & Window(99), Causal()), ([0, 1, 3, 4], [2, 5]), strict=True
    ):
        right = reckoned(mask & Documents(EDGES), world, costs=costs)
        assert (kind["mask"], kind["layers"]) == (str(mask), layers)
        assert (kind["strategy"], kind["why"]) == (right.strategy, right.why)
        assert kind["imbalance"] == right.imbalance()
        assert kind["area"]["mean"] == pytest.approx(sum(right.area(rank) for rank in ranks) / len(ranks))
        offers = {offer["strategy"]: offer for offer in kind["offers"]}
        assert list(offers) == list(TABLE)
        for name, offer in offers.items():
            assert offer["refuses"] == TABLE[name].refuses(right.problem)
            if offer["refuses"] is None:
                same_as(offer, reckoned(mask & Documents(EDGES), world, costs=costs, strategy=name), costs)


def same_as(offer: dict[str, Any], right: Plan, costs: Costs) -> None:
    """Hold a strategy's passes against the library's plan."""
    bound = sum(right.lower_bound_bytes(rank) for rank in range(right.problem.world)) / right.problem.world
    for name, backward in (("forward", False), ("backward", True)):
        received = [right.received_bytes(rank, backward=backward) for rank in range(right.problem.world)]
        spread = offer[name]["received_bytes"]
        assert (spread["min"], spread["max"]) == (min(received), max(received))
        assert spread["mean"] == pytest.approx(sum(received) / len(received))
        assert offer[name]["lower_bound_bytes"] == pytest.approx(
            bound * (2 if backward else 1)
        )  # fp32: dK, dV once more
        prediction = right.seconds(costs, backward=backward)
        assert offer[name]["seconds"] == prediction.seconds
        assert offer[name]["exposed_seconds"] == prediction.exposed
    assert offer["holds_bytes"] == TABLE[offer["strategy"]].holds(right.problem)


def test_the_ring_meets_its_bound_in_both_passes(config: Path) -> None:
    found = told(config, "--world", "4", "--documents", "even:3", "attention.strategy=ring", "model.dtype=bfloat16")
    for kind in found["kinds"]:
        assert kind["strategy"] == "ring"
        for offer in kind["offers"]:
            for each in (offer["forward"], offer["backward"]):
                if offer["strategy"] == "ring":
                    assert each["received_bytes"]["mean"] == pytest.approx(each["lower_bound_bytes"])
                    assert each["lower_bound_bytes"] > 0


def test_the_total_sums_over_layers_and_batch_rows(config: Path) -> None:
    one = told(config, "train.batch_size=1")
    both = told(config, "train.batch_size=2", "--documents", "even:1")
    for found, rows in ((one, 1), (both, 2)):
        total, seconds, received = found["total"], 0.0, 0.0
        for kind in found["kinds"]:
            taken = next(offer for offer in kind["offers"] if offer["strategy"] == kind["strategy"])
            for name in ("forward", "backward"):
                seconds += len(kind["layers"]) * taken[name]["seconds"]
                received += len(kind["layers"]) * taken[name]["received_bytes"]["mean"]
        assert total["forward_seconds"] + total["backward_seconds"] == pytest.approx(seconds)
        assert total["received_bytes"] == pytest.approx(received)
        assert total["tokens_per_second"] == pytest.approx(rows * LENGTH / seconds)
    assert [kind["area"]["mean"] * 2 for kind in one["kinds"]] == [kind["area"]["mean"] for kind in both["kinds"]]


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3", "qwen2_moe", "gemma2", "gemma3", "gpt_oss"])
def test_layers_have_the_masks_that_the_model_itself_asks_for(kind: str) -> None:
    context = SequenceContext()
    local = context.shard({"input_ids": torch.arange(12)[None]})
    build_model(kind, 5, torch.float32)(**local, **context.kwargs())
    masks = [str(context.layer_masks[layer]) for layer in sorted(context.layer_masks)]
    assert plan_inputs.layer_masks(config_of(kind, 5)) == masks
    assert "causal & window(4)" in masks


def test_layers_without_attention_are_counted_apart(config: Path) -> None:
    kinds = ["linear_attention", "linear_attention", "full_attention"] * 2
    fields = {**MODEL, "model_type": "qwen3_next", "layer_types": kinds}
    sections = yaml.safe_load(config.read_text()) | {"model": {"config": fields, "tokenizer": "nowhere"}}
    config.write_text(yaml.safe_dump(sections))
    found = told(config)
    assert [kind["layers"] for kind in found["kinds"]] == [[2, 5]]
    assert found["model"]["layers_without_attention"] == 4


def test_a_folder_with_nothing_but_a_config_is_enough(config: Path) -> None:
    folder = config.parent / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(MODEL))
    sections = yaml.safe_load(config.read_text()) | {"model": {"path": str(folder)}}
    with_fields = told(config)
    config.write_text(yaml.safe_dump(sections))
    assert told(config)["kinds"] == with_fields["kinds"]


def test_a_mask_of_the_config_serves_every_layer(config: Path) -> None:
    text = "causal & (window(64) | sinks(4))"
    found = told(config, f"attention.mask={text}", "attention.layout=contiguous", "--length", "4k")
    (kind,) = found["kinds"]
    assert (kind["mask"], kind["layers"], found["length"]) == (text, [0, 1, 2, 3, 4, 5], 4096)
    assert kind["area"]["mean"] * 4 == parse_mask(text).area(*[Span(0, 4096)] * 2)


@pytest.mark.parametrize("layout", ["striped", "balanced"])
def test_other_layouts(config: Path, layout: str) -> None:
    found = told(config, f"attention.layout={layout}", "--documents", "lognormal:128,1", "--world", "2")
    assert found["layout"].lower().startswith(layout)
    assert all(kind["imbalance"] < 1.1 for kind in found["kinds"])


def test_documents_of_each_kind() -> None:
    def edges(text: str, length: int, rows: int = 1) -> list[list[int]]:
        asked = plan_options.take(["--documents", text])[0].documents
        found = plan_inputs._documents(asked, length, rows)
        assert found is not None
        return [list(row) for row in found.rows or (found.edges,)]

    assert edges("even:3", 10) == [[0, 3, 6, 10]]
    assert edges("even:2", 4, rows=2) == [[0, 2, 4]] * 2
    drawn, again, other = (edges(f"lognormal:50,{seed}", 10_000, rows=2) for seed in (3, 3, 4))
    assert drawn == again
    assert drawn != other
    assert drawn[0] != drawn[1]  # the rows go on drawing
    assert 100 < len(drawn[0]) < 400  # 50 tokens on average


def test_a_file_of_lengths_goes_on_from_row_to_row(tmp_path: Path) -> None:
    file = tmp_path / "lengths"
    file.write_text("3\n4\n")
    asked = plan_options.Documents("file", str(file))
    assert plan_inputs._documents(asked, 10, 2) == Documents([[0, 3, 7, 10], [0, 4, 7, 10]])


def test_measured_speeds_are_taken(config: Path) -> None:
    file = config.parent / "links.json"
    Costs((Link(1e-3, 1e9, duplex=False),), 4, forward=1e10, backward=5e9, call=1e-3, source="a test").save(file)
    found = told(config, "--costs", str(file))
    assert found["costs"] == json.loads(file.read_text())
    right = reckoned(Causal(), 4, costs=Costs.load(file))
    kind = found["kinds"][1]
    taken = next(offer for offer in kind["offers"] if offer["strategy"] == kind["strategy"])
    assert taken["forward"]["seconds"] == right.seconds(Costs.load(file)).seconds
    assert told(config, "--costs", "cpu")["costs"]["source"] == typical("cpu").source


def test_what_is_printed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(config, "--world", "8x2", "--documents", "even:4")
    out = capsys.readouterr().out
    assert "gemma3_text: 6 layers, 8 heads, 4 for keys, of 16; float32" in out
    assert "1,024 tokens, 4 documents; 1 a micro-batch" in out
    assert "16 ranks (8 nodes of 2), zigzag layout" in out
    assert "4 layers (0, 1, 3, 4): causal & window(99)" in out
    assert "2 layers (2-5 by 3): causal" in out
    for kind in found["kinds"]:
        assert kind["why"] in out
    assert f"imbalance {found['kinds'][1]['imbalance']:.3f}" in out
    assert f"{plan_report.si(found['total']['tokens_per_second'])} tokens/s" in out


def test_units() -> None:
    assert [plan_report.size(n) for n in (0, 1023, 1536, 3 << 30, 5 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3 GiB",
        "5 TiB",
    ]
    times = (0, 2e-7, 1.5e-5, 0.25, 90.0, 5000.0)
    assert [plan_report.seconds(t) for t in times] == ["0 s", "0.2 us", "15 us", "250 ms", "90 s", "5,000 s"]
    assert [plan_report.percent(x) for x in (0.0, 1e-5, 0.25)] == ["0.0%", "<0.1%", "25.0%"]
    assert [plan_report.numbered(x) for x in ((3,), (0, 1, 2), (1, 3))] == [
        "Layer 3",
        "3 layers (0-2)",
        "2 layers (1-3 by 2)",
    ]


def test_a_thousand_ranks_and_ten_million_tokens(config: Path) -> None:
    began = time.monotonic()
    mask = "causal & (window(4096) | sinks(4))"
    out = config.parent / "plan.png"
    found = told(
        config, "--world", "128x8", "--length", "10M", f"attention.mask={mask}", "attention.layout=contiguous",
        "attention.strategy=ring", "--documents", "lognormal:512k,0", "--out", str(out),
    )  # fmt: skip
    assert found["world"] == 1024
    (kind,) = found["kinds"]
    ring = kind["offers"][0]
    assert ring["forward"]["received_bytes"]["mean"] == pytest.approx(ring["forward"]["lower_bound_bytes"])
    assert ring["forward"]["received_bytes"]["max"] <= (4096 + 4) * 2 * 4 * 16 * 4  # a halo and the sinks: K, V, fp32
    assert out.stat().st_size > 10_000
    assert time.monotonic() - began < 60
