"""metrics.jsonl is the record: flushed, strict JSON, without doubles after a resume."""

import json
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ringspan.finetune.track import Tracker, read_metrics
from ringspan.parallel.faults import Fault
from ringspan.parallel.testing import run_ranks


def _tracker(folder: Path, resume_step: int = 0, wandb: str = "off") -> Tracker:
    config = {"train": {"learning_rate": 1e-3}, "data": {"path": ["a", "b"]}}
    return Tracker(folder, config, wandb=wandb, project="p", name="n", resume_step=resume_step)


def _without_time(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(path)]


def test_each_line_is_on_disk_when_log_returns(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    for step in (1, 2):
        tracker.log(step, {"train/loss": 3.0 / step, "train/tokens": 1024 * step})
        assert len(path.read_text().splitlines()) == step
    assert tracker.mode == "off"
    tracker.finish()
    tracker.finish()
    assert _without_time(path)[1] == {"step": 2, "train/loss": 1.5, "train/tokens": 2048}
    assert abs(read_metrics(path)[0]["time"] - time.time()) < 60


def test_nan_and_infinity_survive_strict_json(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    tracker.log(1, {"a": float("nan"), "b": float("-inf"), "c": 1.0})
    tracker.finish()

    def refuse(constant: str) -> None:
        raise AssertionError(f"not strict JSON: {constant}")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.0)
    assert line["nonfinite"] == {"a": "nan", "b": "-inf"}


def test_a_resumed_curve_has_no_doubles(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    for step in range(1, 6):
        tracker.log(step, {"loss": float("nan") if step == 2 else float(step)})
    tracker.finish()
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed here
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5]
    tracker = _tracker(tmp_path, resume_step=3)
    tracker.log(4, {"loss": 40.0})
    tracker.finish()
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [
        (1, 1.0),
        (2, None),
        (3, 3.0),
        (4, 40.0),
    ]
    assert read_metrics(path)[1]["nonfinite"] == {"loss": "nan"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_new_run_in_the_same_folder_sets_the_old_record_aside(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        tracker = _tracker(tmp_path)
        tracker.log(0, {"eval/loss": value})
        tracker.finish()
    assert _without_time(tmp_path / "metrics.jsonl") == [{"step": 0, "eval/loss": 2.0}]
    assert _without_time(tmp_path / "metrics.previous.jsonl") == [{"step": 0, "eval/loss": 1.0}]


@pytest.mark.parametrize("line", ["{broken", "[1]", '{"loss": 1}', '{"step": "x"}'])
def test_a_broken_line_is_named_by_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(Fault, match=r"metrics\.jsonl line 2"):
        read_metrics(path)


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    def attempt(_: object) -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        tracker = _tracker(tmp_path)
        try:
            for step in range(1000):
                tracker.log(step, {"train/loss": 1.0})
        except Fault as fault:
            return str(fault)
        return "no fault"

    [message] = run_ranks(attempt, 1)
    assert message.startswith("cannot append step ")
    assert "File too large" in message


def test_wandb_off_never_imports_it(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from ringspan.finetune.track import Tracker
        Tracker(Path(sys.argv[1]), {}, wandb="off", project="p", name=None).finish()
        sys.exit("wandb" in sys.modules)
    """
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=tmp_path, timeout=60)
    assert ran.returncode == 0


def test_wandb_that_is_not_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks a module that cannot be imported
    with pytest.raises(Fault, match=r"pip install 'ringspan\[wandb\]'"):
        _tracker(tmp_path / "run", wandb="offline")
    assert not (tmp_path / "run").exists()
    _tracker(tmp_path / "run", wandb="off").finish()


def test_an_unknown_mode_is_named(tmp_path: Path) -> None:
    with pytest.raises(Fault, match="'sometimes'"):
        _tracker(tmp_path, wandb="sometimes")
