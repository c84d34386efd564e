"""Other projects, each installed into a folder of its own: never into our environment, never a dependency of ours.

Torch, transformers and numpy are those of the running Python; a peer's own further needs go into its folder. A peer
that cannot be installed is a row of the table, not a crash.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "peers"
PIP = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
# --no-deps: a peer's own requirements would fetch a CUDA build of torch. Without isolation: setup scripts import torch.
OPTIONS = ["--no-deps", "--no-build-isolation", "--no-compile"]


@dataclass(frozen=True)
class Package:
    """One project: what is installed, at which versions, and the module whose import shows that it runs."""

    version: str
    module: str
    needs: tuple[str, ...] = ()


PACKAGES = {
    "axolotl-ringmaster": Package("0.2.7", "ringmaster"),
    "deepspeed": Package(
        "0.19.8",
        "deepspeed",
        ("einops==0.8.2", "hjson==3.1.0", "msgpack==1.2.4", "ninja==1.13.2", "psutil==7.2.2", "py-cpuinfo==9.0.0"),
    ),
    "ring-attention-pytorch": Package(
        "0.5.20",
        "ring_attention_pytorch",
        ("einops==0.8.2", "beartype==0.23.1", "jaxtyping==0.3.11", "wadler-lindig==0.1.8"),
    ),
    "ring-flash-attn": Package("0.1.8", "ring_flash_attn"),
    "yunchang": Package("0.6.4", "yunchang"),
}


def folder_of(name: str) -> Path:
    """Return where a peer of PACKAGES is, or would be, installed."""
    return FOLDER / f"{name}-{PACKAGES[name].version}"


def environment() -> dict[str, str]:
    """Return the variables that peers want on a machine without a GPU; what they compile stays under their folder."""
    paths = [str(ROOT / name) for name in ("benchmarks", "tests")]
    # Never the user's own cache of extensions: a killed build leaves a lock there that hangs the next one.
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
        "TORCH_EXTENSIONS_DIR": str(FOLDER / "extensions"),
        "TORCHINDUCTOR_CACHE_DIR": str(FOLDER / "inductor"),
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def install(name: str) -> str | None:
    """Install a peer, where it is not yet; return None, or the first line of why it does not run."""
    package, folder = PACKAGES[name], folder_of(name)
    done = folder / ".complete"
    if not done.exists():
        wanted = [f"{name}=={package.version}", *package.needs]
        made = _run([*PIP, *OPTIONS, "--target", str(folder), "--upgrade", *wanted], 600)
        if made is not None:
            return f"pip: {made}"
        done.touch()
    code = f"import sys; sys.path.append({str(folder)!r}); import {package.module}"
    return _run([sys.executable, "-c", code], 120)


def _run(command: list[str], seconds: float) -> str | None:
    try:
        run = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no end within {seconds:.0f} s"
    if run.returncode == 0:
        return None
    lines = [line for line in run.stderr.splitlines() if "Error" in line or line.startswith("ERROR")]
    return (lines or run.stderr.splitlines() or ["no message"])[-1].strip()[:200]
