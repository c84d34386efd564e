"""The command line: exit codes, what is printed where, and that help comes before torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest

from ringspan.launch.cli import main, parse_train

BAD = "model: {path: m}\ndata: {path: d, seq_length: 0}\ntrain: {max_steps: 0, output_dir: o}\n"


def ringspan(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "ringspan.launch.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, **environment},
    )


def bad_config(folder: Path) -> Path:
    file = folder / "c.yaml"
    file.write_text(BAD)
    return file


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_answers_at_once_and_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys, atexit; from ringspan.launch.cli import main\n"
        "atexit.register(lambda: print({'torch', 'transformers'} & set(sys.modules)))\n"
        f"sys.exit(main({arguments}))"
    )
    seconds = []
    for _ in range(2):  # the first run may have to compile and to read from disk
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        seconds.append(time.monotonic() - began)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "set()"
    assert min(seconds) < 2  # half a second on an idle machine


def test_version() -> None:
    done = ringspan("--version")
    assert (done.returncode, done.stdout) == (0, f"ringspan {version('ringspan')}\n")


def test_help_names_the_verbs_and_train_help_the_settings() -> None:
    assert "train" in ringspan("--help").stdout
    told = ringspan("train", "--help").stdout
    assert "--train.max_steps (needed)" in told
    assert "--data.packing (true)" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "ringspan: trian: no such verb; did you mean train?\n"),
        (["quux"], "ringspan: quux: no such verb; there is train, verify, plan\n"),
        (["--verison"], "ringspan: --verison: no such option; did you mean --version?\n"),
        (["train", "-x", "c.yaml"], "ringspan: -x: no such option; "),
        (["train"], "ringspan: no config given; usage: ringspan train CONFIG.yaml ["),
        (["train", "train.max_steps=3"], "ringspan: no config given; usage: "),
        (["train", "a.yaml", "b.yaml"], "ringspan: b.yaml: a second config, after a.yaml; "),
        (["train", "a.yaml", "--train.seed"], "ringspan: --train.seed: no value follows; "),
        (["train", "a.yaml", "--train.seed", "--x.y=1"], "ringspan: --train.seed: no value"),
        (["train", "nowhere.yaml"], "ringspan: nowhere.yaml: no such file\n"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(told)
    assert err.count("\n") == 1


def test_no_argument_is_helped() -> None:
    done = ringspan()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: ringspan" in done.stderr


def test_config_faults_end_with_code_2_a_line_each(tmp_path) -> None:
    file = bad_config(tmp_path)
    done = ringspan("train", file, "--train.max_step", "3", "parallel.cp=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"ringspan: data.seq_length: 0 must be a positive whole number of tokens, as 4096, 128k or 1.5M ({file}:2)",
        f"ringspan: train.max_steps: 0 must be >= 1 ({file}:3)",
        "ringspan: train.max_step: unknown key; did you mean train.max_steps? (override train.max_step=3)",
        "ringspan: parallel.cp: 0 must be a number of ranks, or -1 for what the world leaves (override parallel.cp=0)",
    ]


def test_only_the_first_rank_tells(tmp_path) -> None:
    file = bad_config(tmp_path)
    assert "max_steps" in ringspan("train", file, RANK="0").stderr
    done = ringspan("train", file, RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    done = ringspan("train", RANK="1")
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["c.yaml", "--train.seed", "3", "data.path=[a, b]", "--lora.r=4", "--track.name", "-x"],
        ["--train.seed", "3", "data.path=[a, b]", "--lora.r=4", "c.yaml", "track.name=-x"],
    ],
)
def test_both_forms_of_override_in_any_order(arguments: list[str]) -> None:
    path, overrides = parse_train(arguments)
    assert path == "c.yaml"
    assert overrides == ["train.seed=3", "data.path=[a, b]", "lora.r=4", "track.name=-x"]


def test_a_value_may_hold_anything() -> None:
    assert parse_train(["./a=b.yaml", "--model.made_by", "x --y=z\nw", "track.name="]) == (
        "./a=b.yaml",
        ["model.made_by=x --y=z\nw", "track.name="],
    )


def test_what_train_needs_is_named_where_it_is_missing() -> None:
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name: None if name == 'peft' else find(name)\n"
        "from ringspan.launch.cli import main; sys.exit(main(['train', 'c.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr == ("ringspan: train needs peft; install: pip install 'ringspan[train]'\n")
