"""What to do when memory ran out: one line that says who asked for how much, and which settings would help most."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "PiB": 1 << 50, "EiB": 1 << 60}
_SIZE = r"([\d.]+) (bytes|[KMGTPE]iB)"
_ASKED = (  # by torch's CUDA allocator, its CPU allocator, numpy
    re.compile(rf"Tried to allocate {_SIZE}"),
    re.compile(rf"you tried to allocate {_SIZE}"),
    re.compile(rf"Unable to allocate {_SIZE}"),
)
_USED = re.compile(rf"this process has {_SIZE} memory in use")
_TOTAL = re.compile(rf"total capacity of {_SIZE}")
_CPU = "DefaultCPUAllocator: "
_CUDA = ("CUDA out of memory", "CUDA error: out of memory")

Settings = Mapping[str, Any]


def explain(error: BaseException, *, rank: int, settings: Settings, in_use: int | None = None) -> str | None:
    """Return one line about an allocation that failed; None for any other error.

    Args:
        error: or one that it was raised from.
        settings: the current ones by their full names, as ``train.mlp_tile``; what is absent is not advised.
        in_use: bytes of this process, for the host's memory: see ``resident_bytes``. Torch tells a device's itself.
    """
    cause: BaseException | None = error
    while cause is not None:
        if (device := _device_of(cause)) is not None:
            return _told(str(cause), device, rank, settings, in_use)
        cause = cause.__cause__
    return None


def resident_bytes() -> int | None:
    """Return the bytes of memory that this process occupies; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(found[0]) * 1024 if found else None


def _device_of(error: BaseException) -> str | None:
    """Return whose memory it was, "cuda" or "cpu"; None if it was not that."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(x in text for x in _CUDA)):
        return "cuda"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _CPU in text):
        return "cpu"
    return None


def _told(text: str, device: str, rank: int, settings: Settings, in_use: int | None) -> str:
    asked = next((_bytes(found) for pattern in _ASKED if (found := pattern.search(text))), None)
    used, total = _USED.search(text), _TOTAL.search(text)
    if used is not None:
        in_use = _bytes(used)
    words = f"rank {rank}: out of {'GPU' if device == 'cuda' else 'host'} memory"
    words += f", {_size(asked)} asked for" if asked is not None else ""
    words += f" with {_size(in_use)} in use" if in_use is not None else ""
    words += f" of {_size(_bytes(total))}" if in_use is not None and total is not None else ""
    helps = advice(settings, device)[:3]
    return words + ("; what helps most: " + ", ".join(helps) if helps else "; take more ranks, or a smaller model")


def advice(settings: Settings, device: str) -> list[str]:
    """Return what would take less memory, as ``train.mlp_tile=2048``; what helps most, or costs least, comes first.

    Args:
        settings: as in ``explain``.
        device: "cuda" or "cpu".
    """
    found = []
    for name, better in _REMEDIES:
        if name in settings and (value := better(settings[name], settings, device)) is not None:
            found.append(f"{name}={value}")
    return found


def _checkpointed(value: str, settings: Settings, device: str) -> str | None:
    del settings, device
    return "selective" if value == "none" else None


def _kept_elsewhere(value: str, settings: Settings, device: str) -> str | None:
    del settings
    if device == "cuda":  # to host memory; in host memory there is nowhere else, but to compute again
        return "offload" if value in ("selective", "full") else None
    return "full" if value in ("selective", "offload") else None


def _tiled(value: int | None, settings: Settings, device: str) -> int | None:
    del settings, device
    return 2048 if value is None else None


def _smaller_tiles(value: int | None, settings: Settings, device: str) -> int | None:
    del settings, device
    return value // 4 if value is not None and value >= 2048 else None


def _halved(value: int, settings: Settings, device: str) -> int | None:
    del settings, device
    return value // 2 if value > 1 else None


def _large_chunks(value: int, settings: Settings, device: str) -> int | None:
    del settings, device
    return 1024 if value > 1024 else None


def _smaller_chunks(value: int, settings: Settings, device: str) -> int | None:
    del settings, device
    return value // 4 if 512 <= value <= 1024 else None


def _more_ranks(value: int, settings: Settings, device: str) -> int | None:
    del settings, device
    return 2 * value if value > 0 else None


def _sharded(value: int | None, settings: Settings, device: str) -> int | None:
    del settings, device
    return 2 * (value or 1) if value != -1 else None


def _offloaded(value: bool, settings: Settings, device: str) -> str | None:
    fsdp = settings.get("parallel.engine", "fsdp") == "fsdp"
    return "true" if device == "cuda" and fsdp and not value else None


def _narrower(value: str, settings: Settings, device: str) -> str | None:
    del settings
    return "bfloat16" if value == "float32" and device == "cuda" else None


# What each setting would better be, given its value, all settings and the device; None: it helps no further.
_REMEDIES: tuple[tuple[str, Callable[[Any, Settings, str], object]], ...] = (
    ("train.activation_checkpointing", _checkpointed),
    ("train.batch_size", _halved),
    ("train.loss_chunk", _large_chunks),
    ("train.mlp_tile", _tiled),
    ("model.dtype", _narrower),
    ("train.activation_checkpointing", _kept_elsewhere),
    ("parallel.cp", _more_ranks),
    ("parallel.dp_shard", _sharded),
    ("parallel.cpu_offload", _offloaded),
    ("train.mlp_tile", _smaller_tiles),
    ("train.loss_chunk", _smaller_chunks),
)


def _bytes(found: re.Match[str]) -> int:
    return int(float(found[1]) * _UNITS[found[2]])


def _size(count: int) -> str:
    """Return bytes as people read them."""
    unit = max((name for name in _UNITS if _UNITS[name] <= max(count, 1)), key=_UNITS.__getitem__)
    return f"{count} bytes" if unit == "bytes" else f"{count / _UNITS[unit]:.1f} {unit}"
