"""Every mesh gives the loss, each gradient and the training curve of one rank on the same sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity_cases import CASES, STEPS, Case, on_mesh, product, truth

from ringspan.parallel.testing import run_ranks


@pytest.fixture(autouse=True)
def _as_in_training(extensions: None) -> Any:
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(False)


def marks(case: Case) -> list[Any]:
    found = [pytest.mark.full] if case.full else []
    return found + ([pytest.mark.needs(case.needs)] if case.needs else [])


@pytest.mark.parametrize("case", [pytest.param(case, marks=marks(case), id=case.name) for case in (*CASES, *product())])
def test_a_mesh_learns_what_one_rank_learns(case: Case, tmp_path: Path, text_folder: Path) -> None:
    config = case.config(tmp_path, text_folder)
    found = run_ranks(on_mesh, case.world, config, timeout=150)
    dp = case.parallel.get("dp_shard", 1) * case.parallel.get("dp_replicate", 1)
    right = truth(config, dp)
    for rank in found:
        assert rank["faults"] == []
        assert rank["gradients"] > 10
        assert rank["scored"][0] == rank["scored"][1] > 100 * dp
        assert rank["worst"][1] <= 1e-5, rank["worst"]
        assert len(rank["losses"]) == STEPS
        assert rank["losses"] == pytest.approx(right, rel=1e-5)
        assert rank["losses"] == found[0]["losses"]
    assert right[-1] < right[0]
