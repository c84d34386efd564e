"""The correctness table is its results', our rows are right, and the harness notices what is wrong, raises or hangs."""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import correctness
import correctness_table
import pytest
import torch
import torch.distributed as dist
from peers import cell, install, of_ringspan
from peers.arm import Arm, Operator
from peers.cases import EDGES, Case, cases
from peers.measure import measure

from ringspan.parallel.testing import run_ranks

correctness_end = correctness.end
RESULTS = json.loads(correctness_table.RESULTS.read_text())


def test_the_page_is_made_from_the_results() -> None:
    current = correctness_table.PAGE.read_text()
    assert correctness_table.renewed(current) == current, "run: python benchmarks/correctness_table.py"


def test_the_results_are_of_the_pinned_versions_and_of_every_row() -> None:
    assert RESULTS["packages"] == {name: package.version for name, package in install.PACKAGES.items()}
    rows = {arm["title"]: arm for arm in RESULTS["arms"]}
    assert {title for title in cell.arms() if not title.startswith("ringspan, ")} <= set(rows)
    asked = {(made["arm"], made["case"], made["ranks"]) for made in RESULTS["cells"]}
    running = [title for title, arm in rows.items() if arm["does_not_run"] is None]
    assert asked == {(title, case, world) for title in running for world in (2, 4) for case in cases(world)}


def test_all_of_our_cells_are_right() -> None:
    ours = [made for made in RESULTS["cells"] if made["arm"].startswith("ringspan, ")]
    assert len(ours) >= 32
    assert [made for made in ours if made["status"] != "right"] == []


def test_a_window_counts_its_keys_as_hugging_face_does() -> None:
    table = Case("window", window=50).table()
    assert int(table[100].sum()) == 50
    assert bool(table[100, 51])
    assert not bool(table[100, 101])
    both = Case("both", window=50, boundaries=EDGES)
    assert both.table()[205].nonzero().flatten().tolist() == list(range(200, 206))
    assert both.positions()[[0, 199, 200, 210, 211, 511]].tolist() == [0, 199, 0, 10, 0, 122]


SMALL = Case("small", length=45, kv_heads=4, window=7, sinks=True, boundaries=(0, 10, 11, 45))


def forgetful(case: Case, group: dist.ProcessGroup) -> Operator:
    """Ours, asked for a window of one key less."""
    assert case.window is not None
    make = of_ringspan.operator("ring").operator
    assert make is not None
    return make(dataclasses.replace(case, window=case.window - 1), group)


def errors_of(group: dist.ProcessGroup, arms: dict[str, Arm]) -> dict[str, dict[str, float]]:
    return {name: measure(group, arm, SMALL, True) for name, arm in arms.items()}


def test_right_and_wrong_are_told_apart() -> None:
    arms = {"ours": of_ringspan.operator("ring"), "wrong": Arm("wrong", None, "", operator=forgetful)}
    first, *others = run_ranks(errors_of, 2, arms)
    assert set(first["ours"]) == {"out", "dq", "dk", "dv", "dsinks"}
    assert correctness.verdict(arms["ours"], first["ours"]) == "right"
    assert correctness.verdict(arms["wrong"], first["wrong"]) == "wrong"
    assert min(first["wrong"].values()) > 1e-3
    assert others == [first]


def model_errors(group: dist.ProcessGroup, window: int) -> dict[str, float]:
    return measure(group, of_ringspan.MODEL, Case("model", length=64, window=window, sinks=True), True)


def test_a_model_is_judged_by_its_loss_and_gradients() -> None:
    found = run_ranks(model_errors, 2, 9)[0]
    assert set(found) == {"loss", "gradients"}
    assert correctness.verdict(of_ringspan.MODEL, found) == "right"


def failing(case: Case, group: dist.ProcessGroup) -> Operator:
    if dist.get_rank(group) == 1:
        raise ValueError("no such thing\nand more")
    time.sleep(60)
    raise AssertionError


def sleeping(case: Case, group: dist.ProcessGroup) -> Operator:
    time.sleep(60)
    raise AssertionError


def forward_only(case: Case, group: dist.ProcessGroup) -> Operator:
    make = of_ringspan.operator("ring").operator
    assert make is not None
    bound = make(case, group)

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
        if q.requires_grad:
            raise NotImplementedError("no backward")
        return bound.call(q, k, v, sinks)

    return Operator(bound.rows, call)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Arm]:
    """Three rows that misbehave, in the place of the real ones."""
    makers = {"failing": failing, "sleeping": sleeping, "forward only": forward_only}
    arms = {title: Arm(title, None, "", operator=make, lacks={"sinks": "no sinks"}) for title, make in makers.items()}
    monkeypatch.setattr(cell, "arms", lambda: arms)
    monkeypatch.setattr(cell, "cases", lambda world: {"case": Case("case", length=40)})
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    return arms


def test_a_cell_that_raises_says_its_first_line(small: dict[str, Arm]) -> None:
    found = correctness.judge(small["failing"], Case("case", length=40), 2)
    assert found == {"status": "refuses", "said": "ValueError: no such thing"}


def test_a_cell_that_hangs_is_ended(small: dict[str, Arm], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correctness, "SECONDS", 1.0)
    groups: list[int] = []
    monkeypatch.setattr(correctness, "end", lambda pid: (groups.append(pid), correctness_end(pid)))
    began = time.monotonic()
    assert correctness.judge(small["sleeping"], Case("case", length=40), 2) == {"status": "hangs", "hung": 1.0}
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.killpg(groups[0], 0)  # nobody is left


def test_a_library_without_a_backward_is_judged_by_its_forward(small: dict[str, Arm]) -> None:
    found = correctness.judge(small["forward only"], Case("case", length=40), 2)
    assert (found["status"], found["said"]) == ("forward right", "NotImplementedError: no backward")
    assert set(found["errors"]) == {"out"}


def test_what_an_interface_has_no_word_for_is_not_run(small: dict[str, Arm]) -> None:
    found = correctness.judge(small["sleeping"], Case("case", sinks=True), 2)
    assert found == {"status": "missing", "said": "no sinks"}


def test_a_library_that_cannot_be_installed_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(install, "FOLDER", tmp_path)
    monkeypatch.setattr(install, "PIP", [sys.executable, "-c", "raise SystemExit('ERROR: no matching version')"])
    arm = Arm("absent", "yunchang", "", operator=sleeping)
    head, made = correctness.row(arm, [2, 4], ["documents"])
    assert (head["does_not_run"], made) == ("pip: ERROR: no matching version", [])
    assert not (install.folder_of("yunchang") / ".complete").exists()


def test_every_kind_of_cell_is_printed() -> None:
    notes = correctness_table.Notes()
    made = {
        "right": {"errors": {"out": 3.1e-07, "dv": 4.6e-07}},
        "wrong": {"errors": {"out": 3.1e-07, "dv": 2.05}},
        "refuses": {"said": "ValueError: no. Long story"},
        "aborts": {"said": "process aborted by gloo: sizes"},
        "missing": {"said": "no sinks"},
        "hangs": {"hung": 150.0},
        "forward right": {"errors": {"out": 3.1e-07}, "said": "no sinks"},
        "forward wrong": {"errors": {"out": 0.31}, "said": "no backward"},
    }
    shown = [correctness_table.text({"status": status, **rest}, notes) for status, rest in made.items()]
    assert shown == [
        "5e-07",
        "**WRONG**: dv 2.05",
        "refuses<sup>1</sup>",
        "aborts<sup>2</sup>",
        "–<sup>3</sup>",
        "hangs (150 s)",
        "forward 3e-07, no backward<sup>3</sup>",
        "**WRONG**: out 0.31, no backward<sup>4</sup>",
    ]
    assert notes.lines() == [
        "1. ValueError: no",
        "2. process aborted by gloo: sizes",
        "3. no sinks",
        "4. no backward",
    ]
