"""Checkpoints that are whole or not there: tensors as safetensors, the rest as JSON, no pickle.

    checkpoints/latest         the name of the newest durable one
    checkpoints/step-000100/   model.safetensors, optimizer.safetensors, rng.safetensors,
                               state.json, manifest.json

A save writes a hidden folder, flushes it, renames it, flushes the rename, and only then moves
``latest`` and deletes the old ones. The manifest holds the size and the sha256 of every file, so
that a flipped bit, a truncated file or a mixed-up folder is named instead of trained on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ringspan.finetune import manifest
from ringspan.finetune.publish import new_folder, write_text
from ringspan.parallel.faults import Fault

FILES = ("model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


@dataclass(frozen=True)
class Checkpoint:
    """What ``save`` was given, read back; path: its folder."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    rng: dict[str, Tensor]
    path: Path


def save(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    rng: Mapping[str, Tensor],
    keep: int,
) -> Path:
    """Write folder/step-NNNNNN, point ``latest`` at it, delete older ones; return its path.

    Call it on one rank; others wait at a barrier of the caller's.

    Args:
        folder: the run's ``checkpoints``; made if need be.
        step: optimizer steps done.
        model: tensors by name, on any device; tied ones once. So are optimizer and rng.
        optimizer: what ``optimizer_tensors`` returns.
        state: JSON-able: schedule, data position, counters, fingerprint.
        rng: generator states of every rank.
        keep: how many to leave, this one included; those written last stay.

    Raises:
        Fault: no room, or the disk refuses; the older checkpoints and ``latest`` are as before.
    """
    if keep < 1:
        raise Fault(f"keep={keep} would delete the checkpoint just written: give 1 or more")
    target = folder / f"step-{step:06d}"
    tensors = {"model": _packed(model), "optimizer": _packed(optimizer), "rng": _packed(rng)}
    text = json.dumps({"step": step, "state": dict(state)}, indent=1)
    everything = [t for group in tensors.values() for t in group.values()]
    # Payload, plus the headers (name, dtype, shape, offsets) and the manifest, generously.
    needed = sum(t.nbytes for t in everything) + 512 * len(everything) + len(text) + 16384
    remedy = "lower checkpoint.keep, or move train.output_dir to a larger disk"
    with new_folder(target, needed=needed, leftovers=".*.tmp", remedy=remedy) as temporary:
        for name, group in tensors.items():
            save_file(group, temporary / f"{name}.safetensors")
        (temporary / "state.json").write_text(text, encoding="utf-8")
        manifest.write(temporary, FILES, step)
    _write_latest(folder, target.name)
    _delete_old(folder, target, keep)
    return target


def load(folder: Path) -> Checkpoint:
    """Return the checkpoint that ``latest`` names, every file verified; any rank may call this.

    Raises:
        Fault: there is none, or it is damaged; names the file and the newest one that is whole.
    """
    path = latest(folder)
    if path is None:
        raise Fault(f"no checkpoint in {folder}: nothing to resume from")
    if damage := manifest.damage(path, FILES):
        raise Fault(f"checkpoint {path} is damaged: {damage}; {_way_out(folder)}")
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    model, optimizer, rng = (load_file(path / name) for name in FILES[:3])
    return Checkpoint(state["step"], model, optimizer, state["state"], rng, path)


def latest(folder: Path) -> Path | None:
    """Return the folder that ``latest`` names, or None if nothing was ever saved.

    A run killed between the first rename and the first ``latest`` has a whole checkpoint and no
    pointer: the newest whole one is returned then.

    Raises:
        Fault: ``latest`` names a folder that is not there.
    """
    pointer = folder / "latest"
    if not pointer.exists():
        return _newest_whole(folder)
    name = pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"step-\d{6,}", name) or not (folder / name).is_dir():
        raise Fault(f"{pointer} names {name!r}, which is not a checkpoint here; {_way_out(folder)}")
    return folder / name


def _write_latest(folder: Path, name: str) -> None:
    """Point ``latest`` at a checkpoint of this folder.

    Raises:
        Fault: the disk refuses; the pointer is as before.
    """
    try:
        write_text(folder / "latest", name + "\n")
    except OSError as error:
        raise Fault(f"cannot point {folder / 'latest'} at {name}: {error}; it is as before") from error


def optimizer_tensors(optimizer: Optimizer, named_params: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter: NAME.exp_avg, NAME.exp_avg_sq, NAME.step.

    Learning rates and other settings are not state: the schedule and the config bring them back.
    """
    out = {}
    for name, parameter in named_params:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor):
                raise TypeError(f"optimizer state {key!r} of {name} is no tensor: {type(value)}")
            out[f"{name}.{key}"] = value
    return out


def restore_optimizer(
    optimizer: Optimizer,
    named_params: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what ``optimizer_tensors`` returned, bit for bit; param groups stay as they are now.

    Raises:
        Fault: the tensors belong to other parameters.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        # A copy: a loaded tensor is a view of its file, and the file may be deleted.
        states.setdefault(name, {})[key] = tensor.clone()
    packed = optimizer.state_dict()
    names = {id(parameter): name for name, parameter in named_params}
    packed["state"] = {}
    # torch numbers parameters in the order of the groups.
    for number, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        state = states.pop(names[id(parameter)], None)
        if state is None:
            continue  # never had a gradient
        for key, tensor in state.items():
            if tensor.dim() and tensor.shape != parameter.shape:
                raise Fault(
                    f"checkpoint of another model: optimizer state {names[id(parameter)]}.{key} "
                    f"has shape {list(tensor.shape)}, the parameter {list(parameter.shape)}"
                )
        packed["state"][number] = state
    if states:
        raise Fault(
            f"checkpoint of another model: it has optimizer state for {min(states)}, which is no trained parameter now"
        )
    optimizer.load_state_dict(packed)


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


def _packed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors of which no two share a storage, as safetensors demands."""
    seen: set[int] = set()
    out = {}
    for name, value in tensors.items():
        tensor = value.detach()
        storage = tensor.untyped_storage()
        if not tensor.is_contiguous() or storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        out[name] = tensor
    return out


def _steps(folder: Path) -> list[Path]:
    """Return the checkpoint folders, last written first."""
    found = [p for p in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", p.name) and p.is_dir()]
    return sorted(found, key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)


def _newest_whole(folder: Path) -> Path | None:
    return next((path for path in _steps(folder) if manifest.damage(path, FILES) is None), None)


def _way_out(folder: Path) -> str:
    whole = _newest_whole(folder)
    if whole is None:
        return "no whole checkpoint is left here: delete the folder, or choose another train.output_dir, to start anew"
    return f"the newest whole one is {whole.name}: write that name into {folder / 'latest'} to resume from it"


def _delete_old(folder: Path, newest: Path, keep: int) -> None:
    """Delete by age of writing: after a resume from an older step, later steps are the past."""
    others = [path for path in _steps(folder) if path != newest]
    for path in others[keep - 1 :]:
        # Renamed first, so that one deleted halfway never looks like a checkpoint. What cannot be
        # deleted is left for the next save to try: the one just written is good either way.
        doomed = folder / f".{path.name}.{os.getpid()}.tmp"
        with contextlib.suppress(OSError):
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
