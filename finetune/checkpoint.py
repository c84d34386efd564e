"""Checkpoints that are whole or not there: tensors as safetensors, the rest as JSON, no pickle.

    checkpoints/latest         the name of the newest durable one
    checkpoints/step-000100/   rank0000.safetensors, rank0000.json, ... (every rank's pieces), state.json, manifest.json

All ranks write into one hidden folder, in the background; when all files are durable it is renamed, and only then
``latest`` is moved and old ones are deleted. The manifest holds the size and the sha256 of every file, so that a
flipped bit, a truncated file or a mixed-up folder is named instead of trained on. Pieces fit together on any mesh.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from ringspan.finetune import manifest, shards
from ringspan.finetune.publish import check_space, failure, put, remove, sync_tree, write_text
from ringspan.parallel.faults import Fault

REMEDY = "lower checkpoint.keep, or move train.output_dir to a larger disk"


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole; its tensors are read by ``shards.Reader(path)``."""

    step: int
    state: dict[str, Any]
    path: Path


class Saver:
    """Writes a run's checkpoints, this rank's part of them; one at a time.

    The caller lets the ranks agree in between: ``prepare`` on one of them, then ``begin`` on all; when ``done`` on all,
    ``publish`` on one and ``published`` on the others. A fault is told each time one asks, until ``abandon``.

    Args:
        folder: the run's ``checkpoints``, which all ranks see; made if need be.
        rank: whose part this is.
        world: of how many ranks; then nothing is published without the parts of all.
        keep: how many to leave, a new one included; those written last stay.
    """

    def __init__(self, folder: Path, *, rank: int = 0, world: int | None = None, keep: int) -> None:
        if keep < 1:
            raise Fault(f"keep={keep} would delete the checkpoint just written: give 1 or more")
        self._folder, self._rank, self._world, self._keep = folder, rank, world, keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.step: int | None = None  # of the one that is being written

    def prepare(self, step: int) -> None:
        """Make the hidden folder, and remove what killed writers left; on one rank, before any begins.

        Raises:
            Fault: the disk refuses.
        """
        target = self._hidden(step)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".*.tmp"):
                remove(leftover)
            target.mkdir()
        except OSError as error:
            raise Fault(failure(error, target, 0, REMEDY)) from error

    def begin(self, step: int, tensors: Mapping[str, Tensor], *, write: Callable[[Path], None] | None = None) -> None:
        """Copy this rank's pieces of tensors, and write them in the background.

        Args:
            step: optimizer steps done.
            tensors: what this rank is to write, by name; sharded in whatever way.
            write: writes more files into the folder it is given, now; where another library has a format of its own.

        Raises:
            Fault: no room, or the disk refuses; the older checkpoints and ``latest`` are as before.
        """
        assert self.step is None, "the one before is not published"
        target, pieces = self._hidden(step), shards.pieces_of(tensors)
        # Payload, plus the headers and tables (name, dtype, shape, offsets), generously.
        needed = sum(tensor.nbytes for _, tensor in pieces) + 1024 * len(pieces) + 16384
        check_space(needed, shutil.disk_usage(self._folder).free, self._shown(step), REMEDY)
        if write is not None:
            write(target)
        self.step = step
        self._writing = self._thread.submit(self._write, step, pieces, needed)

    def done(self) -> bool:
        """Whether this rank's files are durable.

        Raises:
            Fault: they could not be written.
        """
        if self._writing is not None and not self._writing.done():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Wait until this rank's files are durable; raises as ``done`` does."""
        if self._writing is not None:
            self._writing.result()

    def publish(self, facts: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Make the checkpoint visible, point ``latest`` at it, delete older ones; return its folder.

        On one rank, once all are done; the others call ``published``.

        Args:
            facts: for the manifest: mesh, versions.
            state: JSON-able: schedule, data position, counters, fingerprint.

        Raises:
            Fault: the disk refuses; the older checkpoints and ``latest`` are as before.
        """
        step = self.step
        assert step is not None, "nothing was begun"
        hidden, target = self._hidden(step), self._shown(step)
        text = json.dumps({"step": step, "state": dict(state)}, indent=1)
        try:
            (hidden / "state.json").write_text(text, encoding="utf-8")
            tables = [path for path in hidden.iterdir() if shards.TABLE.fullmatch(path.name)]
            if self._world is not None and len(tables) != self._world:
                raise OSError(f"of {self._world} ranks, the parts of {len(tables)} are there")
            known = {path.with_suffix(".safetensors").name: shards.file_of(path) for path in tables}
            manifest.write(hidden, {"step": step, **facts}, known)
            sync_tree(hidden)
            put(hidden, target)
        except OSError as error:
            fault = Fault(failure(error, target, len(text), REMEDY))
            self.abandon()
            raise fault from error
        _write_latest(self._folder, target.name)
        _delete_old(self._folder, target, self._keep)
        self.published()
        return target

    def published(self) -> None:
        """Forget what was written: another rank has made it visible."""
        self.step, self._writing = None, None

    def abandon(self) -> None:
        """Remove what all ranks have written; on one of them, once none writes any more."""
        if self.step is not None:
            shutil.rmtree(self._hidden(self.step), ignore_errors=True)
        self.published()

    def _write(self, step: int, pieces: Sequence[tuple[shards.Piece, Tensor]], needed: int) -> None:
        """Runs in the thread: no collective here."""
        target = self._hidden(step)
        try:
            shards.write(target, self._rank, pieces)
            for name in shards.files(self._rank):
                sync_tree(target / name)
        except (OSError, SafetensorError) as error:
            fault = Fault(failure(error, self._shown(step), needed, REMEDY))
            # Room on the disk; what others have written stays, or their fault would be that it is gone.
            for name in shards.files(self._rank):
                (target / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                target.rmdir()
            raise fault from error

    def _hidden(self, step: int) -> Path:
        return self._folder / f".step-{step:06d}.tmp"

    def _shown(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"


def find(path: Path) -> Found:
    """Return a checkpoint that was verified.

    Raises:
        Fault: its state cannot be read.
    """
    try:
        read = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return Found(int(read["step"]), dict(read["state"]), path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Fault(f"checkpoint {path} is damaged: state.json: {error}") from error


def verify(path: Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check every file of a checkpoint, or where several ranks check together, a share of them.

    Raises:
        Fault: it is damaged; names the file and the newest one that is whole.
    """
    if damage := manifest.damage(path, share):
        raise Fault(f"checkpoint {path} is damaged: {damage}; {_way_out(path.parent)}")


def by_age(folder: Path, *, fallback: bool = False) -> list[Path]:
    """Return the checkpoints of a run: the one that ``latest`` names, then the others, last written first.

    Raises:
        Fault: ``latest`` names a folder that is not there; unless ``fallback``, then it says nothing.
    """
    try:
        first = latest(folder)
    except Fault:
        if not fallback:
            raise
        return _steps(folder)
    return [] if first is None else [first, *(path for path in _steps(folder) if path != first)]


def latest(folder: Path) -> Path | None:
    """Return the folder that ``latest`` names, or None if nothing was ever saved.

    A run killed between the first rename and the first ``latest`` has no pointer: the newest whole one is returned.

    Raises:
        Fault: ``latest`` names a folder that is not there.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return newest_whole(folder)
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step-\d{6,}", name) or not (folder / name).is_dir():
        raise Fault(f"{pointer} names {name!r}, which is not a checkpoint here; {_way_out(folder)}")
    return folder / name


def _write_latest(folder: Path, name: str) -> None:
    """Point ``latest`` at a checkpoint of this folder, or raise Fault where the disk refuses."""
    try:
        write_text(folder / "latest", name + "\n")
    except OSError as error:
        raise Fault(f"cannot point {folder / 'latest'} at {name}: {error}; it is as before") from error


def check_same_model(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise Fault naming the first field or parameter in which two fingerprints differ."""
    difference = _difference("", saved, json.loads(json.dumps(now)))
    if difference:
        raise Fault(
            f"checkpoint of another model: {difference}; resume with the model and settings it "
            "was made with, or choose another train.output_dir to start anew"
        )


def _difference(path: str, saved: Any, now: Any) -> str | None:
    if not (isinstance(saved, Mapping) and isinstance(now, Mapping)):
        return None if saved == now else f"{path} is {saved!r} in the checkpoint and {now!r} now"
    # In the saved order, so that the first layer that differs is named.
    for key in [*saved, *(k for k in now if k not in saved)]:
        inner = f"{path}.{key}" if path else str(key)
        if key not in now:
            return f"{inner} is in the checkpoint and not in the model now"
        if key not in saved:
            return f"{inner} is not in the checkpoint"
        if found := _difference(inner, saved[key], now[key]):
            return found
    return None


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoint folders, last written first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """Return the checkpoint written last of those whose every byte is as written; reads them."""
    return next((path for path in _steps(folder) if manifest.damage(path) is None), None)


def _way_out(folder: Path) -> str:
    whole = newest_whole(folder)
    if whole is None:
        return "no whole checkpoint is left here: delete the folder, or choose another train.output_dir, to start anew"
    return (
        f"the newest whole one is {whole.name}: write that name into {folder / 'latest'} to resume from it, "
        "or set checkpoint.resume=fallback"
    )


def _delete_old(folder: Path, newest: Path, keep: int) -> None:
    """Delete by age of writing: after a resume from an older step, later steps are the past."""
    others = [path for path in _steps(folder) if path != newest]
    for path in others[keep - 1 :]:
        # Renamed first: deleted halfway, it must not look like a checkpoint. Another save removes what cannot be now.
        doomed = folder / f".{path.name}.{os.getpid()}.tmp"
        with contextlib.suppress(OSError):
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
