"""A folder that appears whole or not at all.

Everything is written under a temporary name beside its place, flushed to the disk, then renamed.
Whoever is killed in between leaves a hidden ``.NAME.PID.tmp`` that no reader looks at and the next
writer removes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ringspan.parallel.faults import Fault


@contextmanager
def new_folder(target: Path, *, needed: int, leftovers: str, remedy: str) -> Iterator[Path]:
    """Yield a temporary folder; when the block ends well, flush it and rename it to ``target``.

    One writer at a time.

    Args:
        target: a folder that stands there is replaced.
        needed: bytes about to be written; compared with the free space first.
        leftovers: glob in target's parent of what a killed writer may have left; removed.
        remedy: what the user can change so that less is needed, for the message.

    Raises:
        Fault: too little space, or the system refuses to write; nothing visible has changed.
    """
    parent = target.parent
    temporary = parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in parent.glob(leftovers):
            remove(leftover)
        check_space(needed, shutil.disk_usage(parent).free, target, remedy)
        temporary.mkdir()
        yield temporary
        sync_tree(temporary)
        put(temporary, target)
    except (OSError, SafetensorError) as error:
        # safetensors has one exception for everything: only its I/O errors are the machine's.
        if isinstance(error, SafetensorError) and "I/O error" not in str(error):
            raise
        raise Fault(failure(error, target, needed, remedy)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, content: str) -> None:
    """Replace a small file in one step, durable when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(content, encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)


def check_space(needed: int, free: int, target: Path, remedy: str) -> None:
    """Raise Fault, with the arithmetic, if ``needed`` bytes do not fit into ``free``."""
    if needed > free:
        raise Fault(
            f"no room for {target}: it needs {size(needed)} and {size(free)} are free there, "
            f"{size(needed - free)} too few: free some space, or {remedy}"
        )


def size(count: int) -> str:
    """Return a byte count for people: 1536 -> '1.5 KiB'."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def remove(leftover: Path) -> None:
    """Remove a file or a folder."""
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


def put(temporary: Path, target: Path) -> None:
    """Rename onto target; an older one steps aside first, a rename cannot replace it."""
    aside = target.parent / f".{target.name}.{os.getpid()}.old.tmp"
    replaces = target.exists()
    if replaces:
        os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        if replaces:
            os.rename(aside, target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def failure(error: Exception, target: Path, needed: int, remedy: str) -> str:
    """Return one line that says what could not be written, why, and what would help."""
    reason = " ".join(str(error).split())
    free = shutil.disk_usage(target.parent).free if target.parent.exists() else 0
    return (
        f"cannot write {target}: {reason}; it needs {size(needed)} and {size(free)} are free "
        f"there: free some space (or lift a quota), or {remedy}; nothing was changed"
    )


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder and all below it, to the disk."""
    for below in sorted(path.rglob("*")) if path.is_dir() else ():
        _sync(below)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
