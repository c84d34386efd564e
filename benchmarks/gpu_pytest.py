"""A pytest plugin, ``-p gpu_pytest``: note each test's outcome as it is known, a JSON line in $GPU_PYTEST_LOG."""

from __future__ import annotations

import json
import os

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write a line per test: what its call gave, or a setup or teardown that did not pass."""
    if report.when != "call" and report.outcome == "passed":
        return
    line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.outcome != "passed":
        line["why"] = str(report.longrepr)[-400:]
    with open(os.environ["GPU_PYTEST_LOG"], "a") as log:
        log.write(json.dumps(line) + "\n")
