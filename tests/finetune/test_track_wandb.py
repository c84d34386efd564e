"""W&B offline keeps the same numbers, and no failure of W&B stops a run.

W&B starts threads and a service process, so each of these tests has a forked child for it.
"""

import json
import os
import signal
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from ringspan.finetune.track import Tracker, has_api_key, read_metrics
from ringspan.parallel.faults import Fault
from ringspan.parallel.testing import run_ranks


def _tracker(folder: Path, resume_step: int = 0, wandb: str = "off") -> Tracker:
    config = {"train": {"learning_rate": 1e-3}, "data": {"path": ["a", "b"]}}
    return Tracker(folder, config, wandb=wandb, project="p", name="n", resume_step=resume_step)


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give W&B a home and a working folder of this test's, without any key; return the latter."""
    pytest.importorskip("wandb")
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir()
    cwd.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("NETRC", str(home / ".netrc"))
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "WANDB_DIR",
        "WANDB_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(cwd)
    return cwd


def _with_wandb(work: Any) -> Any:
    """Run work() in a child and take W&B's service process down there."""

    def child(_: object) -> Any:
        import wandb

        try:
            return work()
        finally:
            wandb.teardown()

    return run_ranks(child, 1, timeout=60)[0]


def test_offline_keeps_config_history_summary_and_exit_code(tmp_path: Path, no_key: Path) -> None:
    run = tmp_path / "run"

    def work() -> list[Any]:
        tracker = _tracker(run, wandb="auto")
        tracker.log(10, {"train/loss": 2.5})
        tracker.log(20, {"train/loss": float("nan"), "eval/loss": 2.25})
        tracker.finish(exit_code=3)
        return [tracker.mode, tracker.notes]

    # auto without a key is offline.
    assert _with_wandb(work) == ["offline", []]
    assert list(no_key.iterdir()) == []
    records = _records(run)
    config = {item["key"]: json.loads(item["value"]) for item in records["run"][0]["config"]}
    assert config["train"] == {"learning_rate": 1e-3}
    names = [{i.get("key") or "/".join(i["nested"]): i["value"] for i in r} for r in records["history"]]
    assert [(n["step"], n["train/loss"]) for n in names] == [("10", "2.5"), ("20", "NaN")]
    assert names[1]["eval/loss"] == "2.25"
    assert records["exit"] == [3]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [10, 20]


def _records(folder: Path) -> dict[str, list[Any]]:
    """Read an offline run back: 7 bytes, then LevelDB log blocks (32 KiB) of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    [path] = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole = path.read_bytes(), 7, b""
    out: dict[str, list[Any]] = {"run": [], "history": [], "exit": []}
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind not in (1, 4):  # full, last
            continue
        record, whole = Record.FromString(whole), b""
        if record.HasField("run"):
            items = [{"key": i.key, "value": i.value_json} for i in record.run.config.update]
            out["run"].append({"config": items})
        elif record.HasField("history"):
            items = record.history.item
            out["history"].append([{"key": i.key, "nested": i.nested_key, "value": i.value_json} for i in items])
        elif record.HasField("exit"):
            out["exit"].append(record.exit.exit_code)
    return out


def test_online_without_a_key_is_refused_before_anything_is_made(tmp_path: Path, no_key: Path) -> None:
    def work() -> str:
        try:
            _tracker(tmp_path / "run", wandb="online")
        except Fault as fault:
            return str(fault)
        return "no fault"

    assert "wandb login" in _with_wandb(work)
    assert not (tmp_path / "run").exists()


def test_an_unreachable_server_falls_back_to_offline(
    tmp_path: Path, no_key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")

    def work() -> list[Any]:
        tracker = _tracker(tmp_path / "run", wandb="auto")
        tracker.log(1, {"loss": 1.0})
        tracker.finish()
        return [tracker.mode, tracker.notes]

    mode, notes = _with_wandb(work)
    assert mode == "offline"
    assert len(notes) == 1
    assert "wandb sync" in notes[0]
    assert "\n" not in notes[0]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


def test_the_death_of_wandb_in_the_middle_does_not_stop_the_run(tmp_path: Path, no_key: Path) -> None:
    def work() -> list[Any]:
        tracker = _tracker(tmp_path / "run", wandb="offline")
        tracker.log(1, {"loss": 1.0})
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 20
        step = 1
        while tracker.mode == "offline" and time.monotonic() < deadline:
            step += 1
            tracker.log(step, {"loss": 1.0})
            time.sleep(0.05)
        tracker.finish()
        # Its service is gone, so there is nothing to take down: leave as a rank does.
        lines = len(read_metrics(tmp_path / "run" / "metrics.jsonl"))
        return [tracker.mode, tracker.notes, lines == step]

    mode, notes, complete = run_ranks(lambda _: work(), 1, timeout=60)[0]
    assert mode == "off"
    assert len(notes) == 1
    assert complete


def _children() -> list[int]:
    """Return the child processes of this one, from /proc."""
    listing = Path(f"/proc/{os.getpid()}/task")
    return [int(pid) for task in listing.iterdir() for pid in (task / "children").read_text().split()]


def test_a_resumed_run_keeps_its_id(tmp_path: Path, no_key: Path) -> None:
    run = tmp_path / "run"

    def work() -> list[str]:
        seen = []
        for resume_step in (0, 5, 0):
            tracker = _tracker(run, resume_step=resume_step, wandb="offline")
            tracker.finish()
            seen.append((run / "wandb" / "run_id").read_text())
        return seen

    first, resumed, new = _with_wandb(work)
    assert first == resumed != new


@pytest.mark.parametrize("source", ["none", "environment", "netrc", "netrc of another host"])
def test_where_a_key_is_found(tmp_path: Path, no_key: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    if source == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    elif source.startswith("netrc"):
        host = "wandb.example" if source == "netrc" else "other.example"
        netrc = tmp_path / "home" / ".netrc"
        netrc.write_text(f"machine {host} login user password {'0' * 40}\n")
        netrc.chmod(0o600)
    assert _with_wandb(has_api_key) is (source in ("environment", "netrc"))
