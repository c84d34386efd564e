"""The manifest of a folder: size and sha256 of every file, and of itself, so that damage is named.

It guards against accidents (a flipped bit, a truncated copy, files of two saves mixed up), not
against an attacker, who would write a new manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 2


def write(folder: Path, facts: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the manifest of all files of a folder and those below it.

    Args:
        facts: what else it says: the step, the mesh, versions.
        known: by name, what ``measure`` returned where the file was written; the others are measured here.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: known.get(name) or measure(folder / name) for name in names if name != NAME}
    (folder / NAME).write_text(_text({"format": FORMAT, **facts, "files": files}), encoding="utf-8")


def read(folder: Path) -> dict[str, Any]:
    """Return what the manifest says.

    Raises:
        ValueError: it is missing, not as it was written, or of another version.
    """
    if not (folder / NAME).is_file():
        raise ValueError(f"{NAME} is missing")
    try:
        text = (folder / NAME).read_bytes().decode()
        body = json.loads(text)
        if not isinstance(body["files"], dict):
            raise TypeError
        del body["sha256"]
        whole = text == _text(body)
    except (ValueError, KeyError, TypeError):
        whole, body = False, {}
    if not whole:
        raise ValueError(f"{NAME} is not as it was written")
    if body.get("format") != FORMAT:
        raise ValueError(f"{NAME} has format {body.get('format')}, and this version of ringspan reads {FORMAT}")
    return body


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return what is wrong with a folder, None if every byte is as written.

    Args:
        share: (which, of how many) parts of the files to look at, where several ranks look together.
    """
    try:
        files = read(folder)["files"]
    except ValueError as error:
        return str(error)
    for number, (name, expected) in enumerate(sorted(files.items())):
        if number % share[1] != share[0]:
            continue
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            return f"{NAME} names {name!r}, outside the folder"
        if not path.is_file():
            return f"{name} is missing"
        if not isinstance(expected, dict) or set(expected) != {"bytes", "sha256"}:
            return f"{NAME} does not say what {name} is"
        try:
            if (found := path.stat().st_size) != expected["bytes"]:
                return f"{name} has {found} bytes instead of {expected['bytes']}"
            if measure(path) != expected:
                return f"{name} has the right size and a wrong sha256"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def measure(path: Path) -> dict[str, Any]:
    """Return the size and sha256 of a file."""
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _text(body: Mapping[str, Any]) -> str:
    # With its own checksum, a manifest is whole only if writing it anew gives the same text.
    own = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return json.dumps({**body, "sha256": own}, indent=1) + "\n"
