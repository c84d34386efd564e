"""Reading documents: every format, any position to start from, one clear line for bad input."""

import gzip
import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ringspan.finetune.documents import documents, read_rows
from ringspan.finetune.files import find_files
from ringspan.finetune.packing import Counts
from ringspan.parallel.faults import Fault


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def fault(paths, **options) -> str:
    """Return the one line that reading paths to the end is refused with."""
    with pytest.raises(Fault) as caught:
        list(documents(paths, **options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_lines_come_in_order_with_their_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    # A line separator inside a string ends no line; a missing last newline loses none.
    path.write_bytes('\ufeff{"text": "one\u2028two"}\r\n\n{"text": "\\u00e9", "n": 1}'.encode())
    counts = Counts()
    assert list(documents(path, counts=counts)) == [
        ("one\u2028two", f"{path}:1"),
        ("é", f"{path}:3"),
    ]
    assert counts.empty == 1


def test_parquet_and_text_and_gzip(tmp_path: Path) -> None:
    table = pa.table({"body": ["p", "", "q"], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    pq.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    assert [text for text, _ in documents(tmp_path / "a.parquet", text_field="body")] == ["p", "q"]
    assert "no document" in fault(tmp_path / "none.parquet", text_field="body")
    (tmp_path / "a.txt").write_text("whole\nfile\n")
    assert list(documents(tmp_path / "a.txt")) == [("whole\nfile\n", str(tmp_path / "a.txt"))]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    assert list(documents(tmp_path / "a.jsonl.gz")) == [("zipped", f"{tmp_path / 'a.jsonl.gz'}:1")]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "zipped"}\n' * 9)[:-9])
    assert "cut.jsonl.gz' cannot be read as jsonl" in fault(tmp_path / "cut.jsonl.gz")


def test_any_row_can_be_the_first(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    write_jsonl(tmp_path / "c.jsonl", ["c0", "c1", "c2"])
    pq.write_table(pa.table({"text": ["d0", "d1"]}), tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("e")
    files = find_files(tmp_path)
    everything = list(read_rows(files))
    assert [row.text for row in everything] == ["a", "b", "c0", "c1", "c2", "d0", "d1", "e"]
    for at, row in enumerate(everything):
        assert list(read_rows(files, start=(row.file, row.row))) == everything[at:]
        assert list(read_rows(files, start=(row.file, row.row + 1))) == everything[at + 1 :]


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    one = write_jsonl(tmp_path / "b[1].jsonl", ["b"])
    two = write_jsonl(tmp_path / "sub" / "a.jsonl", ["a"])
    (tmp_path / "LICENSE").write_text("not data")
    write_jsonl(tmp_path / ".hidden.jsonl", ["hidden"])
    assert [file.path for file in find_files(tmp_path)] == [one, two]
    assert [file.path for file in find_files([str(one), tmp_path])] == [one, two]
    assert [file.path for file in find_files(str(tmp_path / "**" / "a.*"))] == [two]
    assert [file.path for file in find_files("sub/a.jsonl", root=tmp_path)] == [two]
    assert list(documents(one)) == [("b", f"{one}:1")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "cut', "is not JSON (Unterminated string starting at at character 10)"),
        (b'["text"]', "is JSON of type list, not an object with a field 'text'"),
        (b'{"body": "x", "id": 3}', "has no field 'text'; its fields are body, id"),
        (b"{}", "has no field 'text'; its fields are none"),
        (b'{"text": 3}', "field 'text' is int, not a string"),
        (b'{"text": null}', "field 'text' is NoneType, not a string"),
        (b'{"text": "caf\xe9"}', "is not UTF-8 (character 14)"),
        (b'{"text": "\\ud800"}', "field 'text' holds half a surrogate pair, which is not text"),
        (b"[" * 100_000, "is not JSON that can be read (maximum recursion depth exceeded"),
        (b"1" * 5000, "is not JSON that can be read (Exceeds the limit"),
    ],
)
def test_a_broken_line_is_named_by_number_or_skipped_and_counted(tmp_path: Path, line: bytes, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    message = fault(path)
    assert message.startswith(f"{path}:3 {said}")
    assert message.endswith("; repair it, or set data.on_bad_line to skip")
    counts = Counts()
    texts = [text for text, _ in documents(path, on_bad_line="skip", counts=counts)]
    assert texts == ["first", "last"]
    assert (counts.bad_lines, counts.empty) == (1, 1)


def test_text_that_is_not_utf8_is_named_or_skipped(tmp_path: Path) -> None:
    for name, content in {"a": b"a", "b": b"caf\xe9", "c": b"c", "d": b"\xff", "e": b""}.items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    assert fault(tmp_path).startswith(f"{tmp_path / 'b.txt'} is not UTF-8 (byte 3)")
    counts = Counts()
    assert [text for text, _ in documents(tmp_path, on_bad_line="skip", counts=counts)] == [
        "a",
        "c",
    ]
    assert (counts.bad_lines, counts.empty) == (2, 1)


def test_parquet_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["x"], "n": [1]}), path)
    assert fault(path) == f"{path} has no column 'text'; its columns are body, n"
    assert fault(path, text_field="n") == f"{path} column 'n' is int64, not string"
    path.write_bytes(b"not parquet")
    assert fault(path).startswith(f"data file '{path}' cannot be read as parquet: ")
    pq.write_table(pa.table({"text": ["x", None]}), path)
    assert fault(path).startswith(f"{path}:2 field 'text' is null")


def test_a_missing_file_names_the_command_that_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "no.jsonl"
    assert fault(path) == f"data path '{path}' does not exist"
    assert fault(path, made_by="make data") == f"data path '{path}' does not exist; make it with: make data"
    assert "does not exist" in fault(str(tmp_path / "*.jsonl"))
    assert "holds no file that ends with .jsonl" in fault(tmp_path)
    assert "empty list" in fault([])
    assert "not a folder" in fault("a.jsonl", root=path)


def test_an_unknown_ending_and_unknown_values(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.json", ["x"])
    assert "unknown ending (known: .jsonl" in fault(path)
    assert [text for text, _ in documents(path, format="jsonl")] == ["x"]
    assert "format is 'json'; it must be one of auto, jsonl" in fault(path, format="json")
    assert "on_bad_line is 'ignore'" in fault(path, format="jsonl", on_bad_line="ignore")
    strange = write_jsonl(tmp_path / "a::b.jsonl", ["x"])
    assert "rename it" in fault(strange)


def test_data_without_a_document_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["", " \n"])
    assert fault(path) == f"no document with text in '{path}': every row is empty or was skipped"
    path.write_bytes(b"")
    assert "no document with text" in fault(path)


def test_nothing_outside_the_root_is_read(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    outside = write_jsonl(tmp_path / "secret.jsonl", ["secret"])
    inside = write_jsonl(root / "a.jsonl", ["a"])
    (root / "sub" / "link.jsonl").symlink_to(outside)
    (root / "out").symlink_to(tmp_path)
    leads = re.compile(f"leads to {re.escape(str(tmp_path))}.*outside the data root {re.escape(str(root))}")
    dots = ["../secret.jsonl", "sub/../../secret.jsonl", "../*.jsonl", "../missing.jsonl"]
    links = ["sub/link.jsonl", "sub", "sub/*.jsonl", "out/secret.jsonl", "out/*.jsonl"]
    for path in [*dots, *links, str(outside)]:
        assert leads.search(fault(path, root=root)), path
    assert list(documents(["a.jsonl", inside], root=root)) == [("a", f"{inside}:1")]
    (root / "inner.jsonl").symlink_to(inside)
    assert len(find_files("inner.jsonl", root=root)) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])
    path.chmod(0)
    assert "may not be read" in fault(path)
