"""A tiny run: text, tokenizer and config that train in seconds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from parity_cases import write_text


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve documents of about 600 characters, four held out, and a byte tokenizer."""
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def extensions(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where DeepSpeed puts what it compiles: a killed build leaves a lock, and a folder of this session has none."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.getbasetemp() / "extensions"))


class TinyRun:
    """Writes a config and runs ``ringspan train`` on it in a child process with a hard timeout."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.folder, self.text = folder, text

    def config(self, name: str = "run", **sections: dict[str, Any]) -> Path:
        """Write a config; keyword sections are merged into the default ones."""
        config: dict[str, Any] = {
            "model": {
                "config": {
                    "model_type": "llama",
                    "vocab_size": 257,
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "max_position_embeddings": 128,
                    "tie_word_embeddings": True,
                    "bos_token_id": None,
                    "eos_token_id": 0,
                },
                "tokenizer": str(self.text / "tokenizer"),
            },
            "data": {"path": str(self.text / "train.jsonl"), "seq_length": 131},
            "attention": {"strategy": "ring"},
            "train": {
                "learning_rate": 3.0e-3,
                "max_steps": 10,
                "warmup_steps": 2,
                "output_dir": str(self.folder / name),
                "loss_chunk": 50,
            },
        }
        for section, values in sections.items():
            config.setdefault(section, {})
            config[section] |= values
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def train(self, path: Path, *overrides: str, launcher: list[str] | None = None, timeout: float = 180) -> Any:
        """Run to the end and return the finished process."""
        child = self.start(path, *overrides, launcher=launcher)
        try:
            out, err = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            raise
        return subprocess.CompletedProcess(child.args, child.returncode, out, err)

    def start(self, path: Path, *overrides: str, launcher: list[str] | None = None) -> subprocess.Popen[str]:
        """Start the run in a process group of its own and return at once."""
        command = launcher or [sys.executable, "-m", "ringspan.launch.cli", "train"]
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "WANDB_API_KEY")
        return subprocess.Popen(
            [*command, str(path), *overrides],
            cwd=self.folder,
            env={key: value for key, value in os.environ.items() if key not in hidden},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def metrics(self, name: str = "run") -> list[dict[str, Any]]:
        """Return the lines of the run's metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str = "run") -> list[float]:
        """Return the training loss of each step."""
        return [row["train/loss"] for row in self.metrics(name)]


@pytest.fixture
def tiny(tmp_path: Path, text_folder: Path) -> TinyRun:
    return TinyRun(tmp_path, text_folder)
