"""The rows of one part, on disk as they come, within a budget of time."""

from __future__ import annotations

import datetime
import json
import os
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DEVICE_LOST = ("illegal memory access", "unspecified launch failure", "misaligned address", "device-side assert")


class DeviceLost(RuntimeError):
    """The CUDA context is broken: nothing more can be computed in this process."""


class RowTimeout(Exception):
    """A row took longer than it may."""


@dataclass
class Record:
    """What is known of one part so far; each change is written at once.

    Args:
        path: the JSON file; dry: on the CPU, tiny; ends: unix time after which no row is begun.
    """

    path: Path
    dry: bool
    ends: float
    data: dict[str, Any]
    keys: set[str] = field(default_factory=set)

    @classmethod
    def start(cls, part: str, folder: Path, dry: bool, seconds: float) -> Record:
        """Begin a part: a file with the machine's facts and no rows."""
        folder.mkdir(parents=True, exist_ok=True)
        date = datetime.date.today().isoformat()
        data = {"part": part, "date": date, "began": time.time(), "complete": False, "machine": machine(dry)}
        record = cls(folder / f"gpu-{date}-{part}.json", dry, time.time() + seconds, {**data, "rows": []})
        record._write()
        return record

    @classmethod
    def resume(cls, part: str, folder: Path, dry: bool, seconds: float) -> Record:
        """Go on with the part's latest file, within the time that began with it."""
        path = max(folder.glob(f"gpu-*-{part}.json"))
        data = json.loads(path.read_text())
        keys = {row["key"] for row in data["rows"]}
        return cls(path, dry, data["began"] + seconds, data, keys)

    @property
    def part(self) -> str:
        """The part's name."""
        return self.data["part"]

    @property
    def left(self) -> float:
        """Seconds until no row is begun any more."""
        return self.ends - time.time()

    def add(self, key: str, **row: Any) -> None:
        """Write a row down and say it."""
        self.keys.add(key)
        self.data["rows"].append({"key": key, **row})
        self._write()
        told = [f"{name} {_short(value)}" for name, value in row.items() if not isinstance(value, dict | list)]
        print(f"[{self.left:4.0f} s left] {key}: {', '.join(told)}", flush=True)

    @contextmanager
    def row(self, key: str, seconds: float, **facts: Any) -> Iterator[dict[str, Any] | None]:
        """Give a dict to fill, or None for a row that is there already or that time does not allow.

        Whatever goes wrong becomes the row's ``failed``: one library's fault must not end the part. A device that can
        compute no more is raised on.
        """
        if key in self.keys:
            yield None
            return
        if self.left < min(seconds, 15):
            self.add(key, **facts, skipped=f"{self.left:.0f} s left of the part")
            yield None
            return
        row: dict[str, Any] = {}
        began = time.time()
        try:
            with deadline(min(seconds, max(self.left, 15))):
                yield row
        except Exception as error:  # noqa: BLE001
            words = f"{type(error).__name__}: {str(error).strip() or 'no words'}"
            row["failed"] = words[:600]
            self.add(key, **facts, **row, took_s=time.time() - began)
            if any(sign in words for sign in DEVICE_LOST):
                raise DeviceLost(words[:200]) from error
            return
        self.add(key, **facts, **row, took_s=time.time() - began)

    def finish(self) -> None:
        """Note that the part came to its end."""
        self.data["complete"] = True
        self.data["took_s"] = time.time() - self.data["began"]
        self._write()
        print(f"wrote {self.path}: {len(self.data['rows'])} rows", flush=True)

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(partial, self.path)


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise RowTimeout in the block once it has run this long (checked whenever Python runs)."""

    def late(*_: object) -> None:
        raise RowTimeout(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(dry: bool) -> dict[str, Any]:
    """Return what a reader must know to judge the figures."""
    facts: dict[str, Any] = {"dry": dry, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            facts[name] = __import__(name).__version__
        except ImportError:
            facts[name] = None
    if dry:
        return facts | {"device": "CPU, Triton interpreted"}
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device is visible to torch; --dry runs without one")
    properties = torch.cuda.get_device_properties(0)
    return facts | {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": properties.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:160]
