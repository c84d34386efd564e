"""The demo's steps: what is made, what is kept, how a failure ends; `make demo` runs the whole."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringspan.configs.load import load
from ringspan.launch import demo

ROOT = Path(demo.__file__).resolve().parents[1]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_data_only_makes_the_text_once(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--data-only"]) == 0
    said = capsys.readouterr().out
    assert "standard library" in said
    assert "recall 20" in said
    assert "demo: done after" in said
    folder = empty / demo.DATA
    assert {path.name for path in folder.iterdir()} == {
        "train.jsonl",
        "heldout.jsonl",
        "tokenizer",
        "corpus.json",
    }
    before = (folder / "train.jsonl").stat().st_mtime_ns
    assert demo.main(["--data-only"]) == 0
    assert (folder / "train.jsonl").stat().st_mtime_ns == before
    assert "text of an earlier run" in capsys.readouterr().out


def test_outside_the_repository_one_line_says_so(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main([]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "run the demo in the repository's root" in message
    assert list(empty.iterdir()) == []


def test_what_is_older_than_its_inputs_is_made_again(empty: Path) -> None:
    made, source = empty / "made", empty / "source"
    source.write_text("")
    assert demo.is_older(made, source)
    made.write_text("")
    os.utime(source, (1000, 1000))
    assert not demo.is_older(made, source)
    os.utime(made, (999, 999))
    assert demo.is_older(made, source)


def test_a_failed_command_ends_the_demo_with_its_code(empty: Path) -> None:
    (empty / "bad.yaml").write_text("no_such_key: 1\n")
    (empty / "out").mkdir()
    program = (
        "from pathlib import Path; from ringspan.launch.demo import train; "
        "raise SystemExit(train(Path('bad.yaml'), Path('out'), [], False))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert "no_such_key" in done.stderr
    assert "demo: deleting out, which is older than what it is made from" in done.stdout
    assert "ringspan train bad.yaml" in done.stdout
    assert not (empty / "out").exists()


def test_the_two_configs_fit_together() -> None:
    base, long = load(ROOT / demo.BASE), load(ROOT / demo.LONG)
    assert long.model.path == str(Path(base.train.output_dir) / "export")
    assert long.model.made_by == f"ringspan train {demo.BASE}"
    assert base.data.path == long.data.path == str(demo.DATA / "train.jsonl")
    assert base.data.made_by == long.data.made_by == "python -m ringspan.launch.demo --data-only"
    assert base.model.config is not None
    assert base.model.tokenizer == str(demo.DATA / "tokenizer")
    assert base.model.config["max_position_embeddings"] == base.data.seq_length == 512
    assert (long.data.seq_length, long.parallel.cp) == (8192, 2)
    assert long.rope is not None
    assert max(long.eval.passkey_lengths) <= long.data.seq_length
