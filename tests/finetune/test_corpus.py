"""The demo's corpus: whole files on one side only, recall in training only, always the same."""

import hashlib
import json
import sysconfig
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from ringspan.finetune import corpus
from ringspan.finetune.corpus import build, held_out
from ringspan.parallel.faults import Fault

SEVERAL = 60


def library(folder: Path, files: int = SEVERAL) -> Path:
    """Write a small library: long and short modules, a double, tests, packages, and no text."""
    for number in range(files):
        lines = 1200 if number % 3 == 0 else 20
        text = "".join(f"def function_{number}_{line}(x):\n    return x + {line}\n" for line in range(lines))
        path = folder / f"package{number % 5}" / f"module{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    extra = {
        "double.py": (folder / "package0" / "module0.py").read_bytes(),
        "latin.py": b"# caf\xe9\n",
        "empty.py": b"",
        "test/test_module.py": b"import unittest\n" * 500,
        "encodings/cp037.py": b"TABLE = 1\n" * 500,
        "site-packages/other.py": b"import other\n",
        "_sysconfigdata_x.py": b"build_time_vars = {}\n",
        "notes.txt": b"no source",
    }
    for name, content in extra.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "link.py").symlink_to(folder / "notes.txt")
    return folder


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_are_whole_once_and_on_one_side(tmp_path: Path) -> None:
    source = library(tmp_path / "lib")
    counts = build(tmp_path / "data", source=source, minimum_bytes=100_000, vocabulary=400)
    train, heldout = (
        records(tmp_path / "data" / "train.jsonl"),
        records(tmp_path / "data" / "heldout.jsonl"),
    )
    plain = [record for record in train if not record["path"].startswith("recall/")]
    recall = [record for record in train if record["path"].startswith("recall/")]
    assert (counts.train_files, counts.heldout_files) == (len(plain), len(heldout))
    assert (counts.files, counts.duplicates, counts.undecodable) == (SEVERAL, 1, 1)
    assert not any(record["path"].startswith("recall/") for record in heldout)
    # Equal content too would be a leak: "double.py" is module0 again.
    sides = [{hashlib.sha256(r["text"].encode()).digest() for r in side} for side in (train, heldout)]
    assert not sides[0] & sides[1]
    assert len(sides[0]) == len(train)
    for record in plain + heldout:
        assert record["text"] == (source / record["path"]).read_text()
        assert record["path"].startswith(("package", "double"))
    sizes = [len(record["text"]) for record in heldout]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(len(record["text"]) >= corpus.LONG_CHARACTERS for record in heldout) >= 10
    assert counts.recall_documents == len(recall)
    assert counts.recall_bytes == sum(len(record["text"].encode()) for record in recall)
    assert counts.train_bytes == sum(len(record["text"].encode()) for record in train)
    assert 0.19 < counts.recall_bytes / counts.train_bytes < 0.26
    assert {record["path"].split("-")[0] for record in recall} == {"recall/copy", "recall/passkey"}
    assert json.loads((tmp_path / "data" / "corpus.json").read_text())["files"] == SEVERAL
    assert "60 files" in str(counts)


def test_recall_never_quotes_a_held_out_file(tmp_path: Path) -> None:
    source = library(tmp_path / "lib")
    build(tmp_path / "data", source=source, minimum_bytes=100_000, vocabulary=400, recall_share=0.5)
    train, heldout = (
        records(tmp_path / "data" / "train.jsonl"),
        records(tmp_path / "data" / "heldout.jsonl"),
    )
    # Every function carries its file's number, so a quotation would show.
    marks = [f"def function_{record['path'].split('module')[1].removesuffix('.py')}_" for record in heldout]
    texts = [record["text"] for record in train]
    assert any("def function_" in r["text"] for r in train if r["path"].startswith("recall/passkey"))
    assert not any(mark in text for mark in marks for text in texts)


def test_the_same_again_and_another_order_by_seed(tmp_path: Path) -> None:
    source = library(tmp_path / "lib")

    def contents(name: str, seed: int) -> dict[str, bytes]:
        folder = tmp_path / name
        build(folder, source=source, minimum_bytes=100_000, vocabulary=400, seed=seed)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    first = contents("one", 0)
    assert first == contents("two", 0)
    assert first == contents("one", 0), "an older corpus is replaced"
    assert first["train.jsonl"] != contents("three", 1)["train.jsonl"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lib", "one", "three", "two"]


def test_tests_and_tables_come_in_only_where_text_is_short(tmp_path: Path) -> None:
    source = library(tmp_path / "lib", files=6)
    plain = sum(path.stat().st_size for path in source.glob("package*/*.py"))
    tests = (source / "test" / "test_module.py").stat().st_size

    def extra(minimum: int) -> set[str]:
        build(tmp_path / "data", source=source, minimum_bytes=minimum, vocabulary=400, recall_share=0)
        both = records(tmp_path / "data" / "train.jsonl") + records(tmp_path / "data" / "heldout.jsonl")
        return {record["path"].split("/")[0] for record in both} - {f"package{number}" for number in range(1, 5)}

    # "double.py" is package0's module0 again and comes first; package0 has another module too.
    assert extra(plain) == {"double.py", "package0"}
    assert extra(plain + 1) == {"double.py", "package0", "test"}
    assert extra(plain + tests + 1) == {"double.py", "package0", "test", "encodings"}


def test_too_little_text_says_what_was_found(tmp_path: Path) -> None:
    source = library(tmp_path / "lib", files=3)
    with pytest.raises(
        Fault,
        match=r"holds 0.\d\d MB of Python source in \d+ files; the demo needs 8.00 MB: install",
    ):
        build(tmp_path / "data", source=source)
    assert not (tmp_path / "data").exists()
    with pytest.raises(Fault, match="recall_share is 1.5"):
        build(tmp_path / "data", source=source, recall_share=1.5)


def test_held_out_is_a_share_by_hash_that_other_files_do_not_move() -> None:
    lengths = {f"package/module{number}.py": 1000 for number in range(1000)}
    chosen = held_out(lengths, 0.04)
    assert len(chosen) == 40
    rest = {path: length for path, length in lengths.items() if path not in chosen}
    assert not held_out({**rest, **dict.fromkeys(list(chosen)[:39], 1)}, 0.039) - chosen
    long = {f"long{number}.py": corpus.LONG_CHARACTERS for number in range(100)}
    assert sum(path.startswith("long") for path in held_out({**lengths, **long}, 0.001)) >= corpus.LONG_HELD_OUT
    assert len(held_out({"a.py": 10**6, "b.py": 10**6}, 0.04)) == 1


def test_the_tokenizer_loads_and_spells_digits(tmp_path: Path) -> None:
    build(tmp_path / "data", source=library(tmp_path / "lib"), minimum_bytes=100_000, vocabulary=400)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer", trust_remote_code=False)
    assert len(tokenizer) == 400
    assert tokenizer.eos_token == tokenizer.pad_token == corpus.END
    assert tokenizer.eos_token_id == 0
    text = "x = 12345\n\treturn 'é漢🙂' # 007\r\n"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("12345007")
    assert tokenizer(corpus.END)["input_ids"] == [0]


def test_this_interpreter_has_text_enough(tmp_path: Path) -> None:
    counts = build(tmp_path / "data")
    assert counts.train_bytes + counts.heldout_bytes - counts.recall_bytes >= corpus.MINIMUM_BYTES
    heldout = records(tmp_path / "data" / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "data" / "tokenizer", trust_remote_code=False)
    reaching = [len(tokenizer(record["text"], verbose=False)["input_ids"]) >= 8192 for record in heldout[:16]]
    assert sum(reaching) >= 12, "too few held-out documents reach the last position of 8K"
    assert Path(sysconfig.get_path("stdlib"), heldout[0]["path"]).read_text(encoding="utf-8") == heldout[0]["text"]
