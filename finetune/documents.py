"""Documents from files on this machine: the text that each row holds, or what is wrong with it.

Reading is `datasets` streaming through its own builders, called directly: ``load_dataset`` would
report every use to a server, and would take a file name with brackets for a glob. A position is
(file, row) with every row counted, fit or not, so that a stream can stop anywhere and go on from
two integers. A jsonl file is read as lines of text and parsed here, because only then can a broken
line be named by its number.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ringspan.finetune.files import File, Paths, find_files, one_of
from ringspan.parallel.faults import Fault

ON_BAD_LINE = ("stop", "skip")


class Row(NamedTuple):
    """One row of a file: its text, or the problem that makes it no document. Rows count from 0."""

    file: int
    row: int
    source: str
    text: str
    problem: str | None


class RowCounts(Protocol):
    """Where skipped rows are counted."""

    empty: int
    bad_lines: int


def documents(
    paths: Paths,
    *,
    root: str | Path | None = None,
    format: str = "auto",
    text_field: str = "text",
    on_bad_line: str = "stop",
    made_by: str | None = None,
    counts: RowCounts | None = None,
) -> Iterator[tuple[str, str]]:
    """Yield (text, source) of every document, once, in file order.

    source is "file:line", and "file" where the file is the document.

    Raises:
        Fault: a path is missing or outside the root, a line is broken, or there is no document at
            all.
    """
    files = find_files(paths, root=root, format=format, made_by=made_by)
    found = False
    for row in usable(read_rows(files, text_field=text_field), on_bad_line, counts):
        found = True
        yield row.text, row.source
    if not found:
        raise no_documents(files)


def no_documents(files: list[File]) -> Fault:
    """Return the fault for data without a document."""
    more = "" if len(files) == 1 else f" and {len(files) - 1} more"
    return Fault(f"no document with text in '{files[0].path}'{more}: every row is empty or was skipped")


def usable(rows: Iterable[Row], on_bad_line: str, counts: RowCounts | None = None) -> Iterator[Row]:
    """Yield the rows that are documents; count empty ones; stop at bad ones, or count them."""
    one_of("on_bad_line", on_bad_line, ON_BAD_LINE)
    for row in rows:
        if row.problem is not None:
            if on_bad_line == "stop":
                raise Fault(f"{row.source} {row.problem}; repair it, or set data.on_bad_line to skip")
            if counts is not None:
                counts.bad_lines += 1
        elif not row.text or row.text.isspace():
            if counts is not None:
                counts.empty += 1
        else:
            yield row


def read_rows(files: list[File], *, text_field: str = "text", start: tuple[int, int] = (0, 0)) -> Iterator[Row]:
    """Yield every row of the files in order, from position start = (file, row) on."""
    index, skip = start
    while index < len(files):
        stop = index + 1
        if files[index].format == "text":
            # Neighbouring text files, a document each, share one dataset: opening one for each
            # costs 20 times as much.
            while stop < len(files) and files[stop].format == "text":
                stop += 1
            yield from _text_rows(files, index + min(skip, 1), stop)
        elif files[index].format == "jsonl":
            yield from _jsonl_rows(files[index], index, skip, text_field)
        else:
            yield from _parquet_rows(files[index], index, skip, text_field)
        index, skip = stop, 0


def _text_rows(files: list[File], first: int, stop: int) -> Iterator[Row]:
    at = first
    while at < stop:
        try:
            for example in _stream("text", [file.path for file in files[at:stop]], sample_by="document"):
                yield Row(at, 0, str(files[at].path), example["text"], None)
                at += 1
        except UnicodeDecodeError as error:
            yield Row(at, 0, str(files[at].path), "", f"is not UTF-8 (byte {error.start})")
            at += 1
        except (OSError, EOFError) as error:
            raise _unreadable(files[at], error) from error


def _jsonl_rows(file: File, index: int, skip: int, text_field: str) -> Iterator[Row]:
    # A byte that is not UTF-8 arrives as \xNN, which JSON does not know: the line is found broken,
    # by its number.
    lines = _stream("text", [file.path], skip, encoding_errors="backslashreplace")
    try:
        for row, example in enumerate(lines, skip):
            text, problem = _parse(example["text"].removeprefix("\ufeff" if row == 0 else ""), text_field)
            yield Row(index, row, f"{file.path}:{row + 1}", text, problem)
    except (OSError, EOFError) as error:
        raise _unreadable(file, error) from error


def _parse(line: str, text_field: str) -> tuple[str, str | None]:
    """Return (text, None), ("", None) for a blank line, or ("", problem)."""
    if not line or line.isspace():
        return "", None
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        if re.match(r"\\x[0-9a-f]{2}", line[error.pos :]):
            return "", f"is not UTF-8 (character {error.pos + 1})"
        return "", f"is not JSON ({error.msg} at character {error.pos + 1})"
    except (ValueError, RecursionError) as error:
        return "", f"is not JSON that can be read ({error})"
    if not isinstance(record, dict):
        return (
            "",
            f"is JSON of type {type(record).__name__}, not an object with a field '{text_field}'",
        )
    if text_field not in record:
        return "", f"has no field '{text_field}'; its fields are {_names(record)}"
    text = record[text_field]
    if not isinstance(text, str):
        return "", f"field '{text_field}' is {type(text).__name__}, not a string"
    # JSON can spell half a surrogate pair, which no tokenizer takes.
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        return "", f"field '{text_field}' holds half a surrogate pair, which is not text"
    return text, None


def _parquet_rows(file: File, index: int, skip: int, text_field: str) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(file.path)
        if text_field not in schema.names:
            raise Fault(f"{file.path} has no column '{text_field}'; its columns are {_names(schema.names)}")
        kind = schema.field(text_field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise Fault(f"{file.path} column '{text_field}' is {kind}, not string")
        # An explicit batch size: the builder's own is that of the first row group, which may be 0
        # or gigabytes.
        table = _stream("parquet", [file.path], skip, columns=[text_field], batch_size=256)
        for row, example in enumerate(table, skip):
            text = example[text_field]
            problem = f"field '{text_field}' is null, not a string" if text is None else None
            yield Row(index, row, f"{file.path}:{row + 1}", text or "", problem)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _stream(kind: str, paths: list[Path], skip: int = 0, **options: Any) -> Iterable[dict[str, Any]]:
    from datasets.data_files import DataFilesDict, DataFilesList
    from datasets.packaged_modules.parquet.parquet import Parquet
    from datasets.packaged_modules.text.text import Text

    listed = DataFilesList([str(path.absolute()) for path in paths], origin_metadata=[])
    builder = (Text if kind == "text" else Parquet)(data_files=DataFilesDict({"train": listed}), **options)
    rows: Any = builder.as_streaming_dataset(split="train")
    return rows.skip(skip) if skip else rows


def _names(names: Iterable[str]) -> str:
    shown = [str(name)[:40] for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") if shown else "none"


def _unreadable(file: File, error: Exception) -> Fault:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return Fault(f"data file '{file.path}' cannot be read as {file.format}: {reason}")
