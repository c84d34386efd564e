"""Killed at any moment, or out of disk: a whole checkpoint is there, and no rubbish stays."""

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import filled as _save
from checkpoints import load

from ringspan.parallel.faults import Fault


def _in_child(work: Callable[[], None], timeout: float = 30.0) -> int:
    """Run work in a forked child; return its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return _wait(pid, timeout)


def _wait(pid: int, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"child {pid} did not end within {timeout:.0f} s")


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("call", ["fsync", "rename", "replace"])
def test_killed_at_any_system_call_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The child kills itself, for real, before its n-th fsync or rename; for every n."""
    original = getattr(os, call)
    deaths = 0
    for n in range(50):
        folder = tmp_path / str(n)
        _save(folder, 1)

        def save(folder: Path = folder, left: int = n) -> None:
            def fatal(*args: object, **kwargs: object) -> object:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return original(*args, **kwargs)

            monkeypatch.setattr(os, call, fatal)
            _save(folder, 2, keep=1)

        code = _in_child(save)
        loaded = load(folder)
        if code == 0:
            assert loaded.step == 2
            break
        assert code == -signal.SIGKILL
        deaths += 1
        assert loaded.step in (1, 2)
        if loaded.step == 2:
            assert (folder / "latest").read_text() == "step-000002\n"
        _save(folder, 3, keep=1)
        assert _names(folder) == {"latest", "step-000003"}
    else:
        raise AssertionError("the child never survived")
    # Flushed: the rank's two files; all four files, their folder, the rename; the pointer, its rename.
    # Renamed: the new one, and the old one before it is deleted.
    assert deaths == {"fsync": 10, "rename": 2, "replace": 1}[call]


def test_killed_before_the_first_latest_the_whole_checkpoint_is_found(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    (tmp_path / "latest").unlink()
    assert load(tmp_path).step == 1


def test_kill_from_outside_in_the_middle_of_writing(tmp_path: Path) -> None:
    _save(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        try:
            for step in range(2, 10_000):
                _save(tmp_path, step, numel=2_000_000, value=float(step), keep=2)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 30
    # A save of 16 MB is under way while its hidden folder is there.
    while not (any(tmp_path.glob(".step-*.tmp/rank0000.safetensors")) and len(_names(tmp_path)) > 2):
        assert time.monotonic() < deadline
    os.kill(pid, signal.SIGKILL)
    assert _wait(pid, 10) == -signal.SIGKILL
    loaded = load(tmp_path)
    if loaded.step > 1:
        assert loaded.tensors["model/w"].eq(loaded.step).all()
    _save(tmp_path, 20_000, keep=1)
    assert _names(tmp_path) == {"latest", "step-020000"}


def test_disk_full_is_one_line_with_the_arithmetic_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    _save(folder, 1)

    def save() -> None:
        # The kernel refuses to let a file grow beyond this, as it would on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            _save(folder, 2, numel=1_000_000)
        except Fault as fault:
            (tmp_path / "message").write_text(str(fault))

    assert _in_child(save) == 0
    message = (tmp_path / "message").read_text()
    assert "step-000002" in message
    assert "File too large" in message
    assert re.search(r"needs 7\.[67] MiB and [\d.]+ .iB are free there", message)
    assert "\n" not in message
    assert _names(folder) == {"latest", "step-000001"}
    assert load(folder).step == 1
