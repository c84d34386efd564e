"""The README keeps its word: its table is the results', its files exist, its library example runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_results_table_is_made_from_the_results() -> None:
    done = subprocess.run([sys.executable, "benchmarks/table.py", "--check"], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0, "run: python benchmarks/table.py"


def test_every_path_it_names_exists() -> None:
    named = re.findall(r"`((?:tests|kernels|dist_attn|parallel|launch|configs|docs|benchmarks)/[\w./]+)`", README)
    named += re.findall(r"\]\(([\w./]+)\)", README)
    missing = [path for path in named if not (ROOT / path).exists()]
    assert len(named) > 10
    assert not missing


def test_the_library_example_runs(tmp_path: Path) -> None:
    """The example's lines as they stand, under torchrun as it says; the tensors it leaves open come before."""
    block = README.split("```python\n")[1].split("```")[0]
    before = (
        "import torch\n"
        "torch.manual_seed(0)\n"
        "q, k, v = (torch.randn(1, 8192, heads, 8) for heads in (2, 1, 1))\n"
        "sinks = torch.tensor([2.0, 3.0])\n"
    )
    (tmp_path / "this_file.py").write_text(before + block)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "this_file.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    # torchrun's ranks write unbuffered: two lines may stand in each other's.
    found = re.findall(r"rank (\d): largest difference from one rank ([\d.]+e[+-]\d+)", done.stdout)
    assert sorted(rank for rank, _ in found) == ["0", "1"]
    assert all(float(error) < 2e-6 for _, error in found)
