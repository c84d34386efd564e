"""The marker `needs`: a missing system tool skips a test by name, or fails it where required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CASE = "import pytest\n\n@pytest.mark.needs('gxx')\ndef test_compiles():\n    pass\n"


@pytest.mark.parametrize(
    ("there", "require", "code", "told"),
    [
        (False, "", 0, "needs gxx: no g++; apt-get install g++"),
        (False, "netns", 0, "1 skipped"),
        (False, "netns,gxx", 1, "ERROR test_case.py::test_compiles"),
        (True, "gxx", 0, "1 passed"),
        (True, "gcc", 4, "--require: no such tool: gcc; there is gxx, slurm, netns"),
    ],
)
def test_missing_tool(tmp_path: Path, there: bool, require: str, code: int, told: str) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_case.py").write_text(CASE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    needs(tool): system tool\n")
    (tmp_path / "bin").mkdir()
    if there:
        (tmp_path / "bin" / "g++").touch(mode=0o755)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rsE", "-p", "no:cacheprovider", f"--require={require}"],
        cwd=tmp_path, env={**os.environ, "PATH": str(tmp_path / "bin")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    assert told in done.stdout + done.stderr
