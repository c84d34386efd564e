"""Which files a data path names: files, folders and globs, none outside the root.

Imports neither torch nor datasets, so a launcher can ask before it starts anything.
"""

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ringspan.parallel.faults import Fault

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
FORMATS = ("auto", "jsonl", "parquet", "text")

Paths = str | Path | Sequence[str | Path]


class File(NamedTuple):
    """A file to read and how: jsonl, parquet or text."""

    path: Path
    format: str


def find_files(
    paths: Paths,
    *,
    root: str | Path | None = None,
    format: str = "auto",
    made_by: str | None = None,
) -> list[File]:
    """Return the files that paths (a file, folder, glob, or several) name, sorted, none twice.

    Relative paths stand under root (under the working folder without one), and with a root nothing
    outside it is taken, wherever ``..``, an absolute path or a symlink may lead. In a folder,
    hidden files are left out, and under format "auto" those with an unknown ending too.

    Raises:
        Fault: nothing there (made_by, the command that makes it, is named), outside the root,
            unknown ending.
    """
    one_of("format", format, FORMATS)
    base = None if root is None else Path(root).expanduser()
    if base is not None and not base.is_dir():
        raise Fault(f"data root '{root}' is not a folder; make it, or change data.root")
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    if not given:
        raise Fault("data path is an empty list; name at least one file, folder or glob")
    found: dict[Path, File] = {}
    for path in given:
        for one in _expand(Path(path).expanduser(), base, format, made_by):
            found.setdefault(one.resolve(), File(one, _format_of(one, format)))
    return list(found.values())


def _expand(path: Path, base: Path | None, format: str, made_by: str | None) -> list[Path]:
    """Return the files one given path stands for, each checked to be readable and inside base."""
    path = path if base is None else base / path
    _confine(path, base)
    if path.is_dir():
        below = sorted(one for one in path.rglob("*") if one.is_file())
        visible = [one for one in below if not any(p.startswith(".") for p in one.relative_to(path).parts)]
        found = [one for one in visible if format != "auto" or _ending(one) in ENDINGS]
        wanted = "" if format != "auto" else f" that ends with {', '.join(ENDINGS)}"
        missing = f"folder '{path}' holds no file{wanted}"
    elif path.is_file():
        found, missing = [path], ""
    else:
        found = sorted(Path(one) for one in glob.glob(str(path), recursive=True) if os.path.isfile(one))
        missing = f"data path '{path}' does not exist"
    if not found:
        raise Fault(missing + (f"; make it with: {made_by}" if made_by else ""))
    for one in found:
        _confine(one, base)
        if not os.access(one, os.R_OK):
            raise Fault(f"data file '{one}' may not be read by this user")
        if "::" in str(one):
            raise Fault(f"data file '{one}' has '::' in its path, which datasets takes for a link; rename it")
    return found


def _confine(path: Path, base: Path | None) -> None:
    if base is not None and not path.resolve().is_relative_to(base.resolve()):
        raise Fault(f"data path '{path}' leads to {path.resolve()}, outside the data root {base.resolve()}")


def _ending(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _format_of(path: Path, format: str) -> str:
    if format != "auto":
        return format
    if _ending(path) not in ENDINGS:
        known = ", ".join(ENDINGS)
        raise Fault(f"data file '{path}' has an unknown ending (known: {known}); set data.format to say what it is")
    return ENDINGS[_ending(path)]


def one_of(name: str, value: str, options: Iterable[str]) -> None:
    """Raise a Fault unless value is among the options."""
    if value not in options:
        raise Fault(f"{name} is '{value}'; it must be one of {', '.join(options)}")
