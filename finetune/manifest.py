"""The manifest of a folder: size and sha256 of every file, and of itself, so that damage is named.

It guards against accidents (a flipped bit, a truncated copy, files of two saves mixed up), not
against an attacker, who would write a new manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NAME = "manifest.json"


def write(folder: Path, names: Sequence[str], step: int) -> None:
    """Write the manifest of these files of a folder."""
    text = _text(step, {name: _measure(folder / name) for name in names})
    (folder / NAME).write_text(text, encoding="utf-8")


def damage(folder: Path, names: Sequence[str]) -> str | None:
    """Return what is wrong with a folder, None if every byte of these files is as written."""
    if not (folder / NAME).is_file():
        return f"{NAME} is missing"
    try:
        text = (folder / NAME).read_bytes().decode()
        read = json.loads(text)
        files = {name: read["files"][name] for name in names}
        whole = text == _text(read["step"], files)
    except (ValueError, KeyError, TypeError):
        whole, files = False, {}
    if not whole:
        return f"{NAME} is not as it was written"
    for name, expected in files.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        found = (folder / name).stat().st_size
        if found != expected["bytes"]:
            return f"{name} has {found} bytes instead of {expected['bytes']}"
        if _measure(folder / name) != expected:
            return f"{name} has the right size and a wrong sha256"
    return None


def _measure(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _text(step: int, files: Mapping[str, Any]) -> str:
    body = {"format": 1, "step": step, "files": files}
    # With its own checksum, a manifest is whole only if writing it anew gives the same text.
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, indent=1) + "\n"
