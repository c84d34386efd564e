"""The demo's text, found wherever Python is: its standard library, and recall documents.

Whole source files are documents. Some are held out by the hash of their path, so a file is never on
both sides, and files of equal content count once. Enough long files are among them for a curve of
the loss by position. A fixed share of recall documents (recall.py) is mixed into the training part
only. Deterministic for one interpreter. Written to a temporary folder and renamed, so a corpus that
exists is complete.
"""

import hashlib
import json
import random
import shutil
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ringspan.finetune.recall import copy_text, passkey_text
from ringspan.parallel.faults import Fault

MINIMUM_BYTES = 8_000_000
END = "<|endoftext|>"
RECALL_CHARACTERS = (300, 28_000)
"""Shortest and longest recall document; every octave between gets the same amount of text."""
TOKENIZER_CHARACTERS = 6_000_000
"""Text the tokenizer is trained on; more does not change two thousand merges, and takes longer."""
LONG_CHARACTERS = 30_000
"""A file of this length has more than 8K tokens (3.2 characters a token, seldom above 3.6)."""
LONG_HELD_OUT = 16
"""Long files held out at least."""


@dataclass(frozen=True)
class CorpusCounts:
    """What a corpus holds; bytes are UTF-8, files are whole documents."""

    source: str
    files: int
    train_files: int
    heldout_files: int
    duplicates: int
    undecodable: int
    train_bytes: int
    heldout_bytes: int
    recall_documents: int
    recall_bytes: int
    vocabulary: int

    def __str__(self) -> str:
        share = self.recall_bytes / max(1, self.train_bytes)
        return (
            f"corpus: {self.files} files of {self.source}: {self.train_files} to train on, "
            f"{self.heldout_files} held out ({self.heldout_bytes / 1e6:.2f} MB), "
            f"{self.duplicates} duplicates, {self.undecodable} not UTF-8; "
            f"training text {self.train_bytes / 1e6:.2f} MB, of which recall {100 * share:.1f} % "
            f"({self.recall_documents} documents); vocabulary {self.vocabulary}"
        )


def build(
    folder: Path,
    *,
    seed: int = 0,
    vocabulary: int = 257,
    recall_share: float = 0.2,
    heldout_share: float = 0.04,
    source: Path | None = None,
    minimum_bytes: int = MINIMUM_BYTES,
) -> CorpusCounts:
    """Write folder/{train.jsonl, heldout.jsonl, tokenizer/, corpus.json} and return the counts.

    An older corpus there is replaced. Records are {"text", "path"}. Held-out documents come longest
    first, so that the first few reach every position.

    Args:
        folder: where to; its parents are made.
        seed: of the order and of the recall documents.
        vocabulary: tokens of the tokenizer trained on the training text.
        recall_share: of the training bytes.
        heldout_share: of the files, by hash of path; see held_out.
        source: folder of Python sources; None: the running interpreter's standard library.
        minimum_bytes: of source text, without which there is no corpus.

    Raises:
        Fault: less than minimum_bytes of source text.
    """
    if not (0 <= recall_share < 1 and 0 < heldout_share < 1):
        raise Fault(f"recall_share is {recall_share}, heldout_share {heldout_share}; they are fractions below 1")
    source = source or Path(sysconfig.get_path("stdlib"))
    texts, duplicates, undecodable = _read(source, minimum_bytes)
    heldout = held_out({path: len(text) for path, text in texts.items()}, heldout_share)
    train = [{"text": text, "path": path} for path, text in texts.items() if path not in heldout]
    plain_bytes = sum(_size(record) for record in train)
    recall = list(_recall(train, int(plain_bytes * recall_share / (1 - recall_share)), seed))
    train += recall
    random.Random(f"order/{seed}").shuffle(train)
    kept = [{"text": texts[path], "path": path} for path in heldout]
    kept.sort(key=lambda record: (-len(record["text"]), record["path"]))

    with _replaced(folder) as temporary:
        _write(temporary / "train.jsonl", train)
        _write(temporary / "heldout.jsonl", kept)
        tokenizer = train_tokenizer((record["text"] for record in train), vocabulary)
        tokenizer.save_pretrained(temporary / "tokenizer")
        recall_bytes = sum(_size(record) for record in recall)
        counts = CorpusCounts(
            source=_name(source),
            files=len(texts),
            train_files=len(texts) - len(kept),
            heldout_files=len(kept),
            duplicates=duplicates,
            undecodable=undecodable,
            train_bytes=plain_bytes + recall_bytes,
            heldout_bytes=sum(_size(record) for record in kept),
            recall_documents=len(recall),
            recall_bytes=recall_bytes,
            vocabulary=len(tokenizer),
        )
        (temporary / "corpus.json").write_text(json.dumps(asdict(counts), indent=1) + "\n")
    return counts


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """Give a new folder that takes the place of folder once all is written."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def _name(source: Path) -> str:
    if source == Path(sysconfig.get_path("stdlib")):
        return f"Python {sysconfig.get_python_version()}'s standard library"
    return str(source)


def _read(source: Path, minimum_bytes: int) -> tuple[dict[str, str], int, int]:
    """Return text by relative path (sorted), and the numbers of duplicates and of files not UTF-8.

    Test suites and generated files (code tables, the help texts of pydoc) are left out as long as
    enough remains.
    """
    total, texts = 0, {}
    for left_out in ((_is_test, _is_generated), (_is_generated,), ()):
        paths = [path for path in sorted(_sources(source)) if not any(test(path) for test in left_out)]
        texts, duplicates, undecodable = _read_once(source, paths)
        total = sum(len(text.encode()) for text in texts.values())
        if total >= minimum_bytes:
            return texts, duplicates, undecodable
    raise Fault(
        f"{source} holds {total / 1e6:.2f} MB of Python source in {len(texts)} files; "
        f"the demo needs {minimum_bytes / 1e6:.2f} MB: "
        "install the interpreter's whole standard library (Debian: libpython3-stdlib)"
    )


def _read_once(source: Path, paths: list[str]) -> tuple[dict[str, str], int, int]:
    texts: dict[str, str] = {}
    seen: set[str] = set()
    duplicates = undecodable = 0
    for path in paths:
        try:
            text = (source / path).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            undecodable += 1
            continue
        if text in seen:
            duplicates += 1
        elif text and not text.isspace():
            seen.add(text)
            texts[path] = text
    return texts, duplicates, undecodable


def _sources(source: Path) -> Iterator[str]:
    for path in source.rglob("*.py"):
        inside = path.relative_to(source)
        # Installed packages are not the library; links and build settings differ between machines
        # of one Python.
        foreign = {"site-packages", "dist-packages"} & set(inside.parts)
        if not foreign and not path.is_symlink() and path.is_file() and not path.name.startswith("_sysconfigdata"):
            yield inside.as_posix()


def _is_test(path: str) -> bool:
    return bool({"test", "tests", "idle_test"} & set(path.split("/")[:-1]))


def _is_generated(path: str) -> bool:
    return path.startswith(("encodings/", "pydoc_data/"))


def held_out(lengths: Mapping[str, int], share: float) -> set[str]:
    """Return the paths held out: the lowest hashes of all, and LONG_HELD_OUT of the long ones.

    At least one is held out, and never more than half of the long ones for being long.
    """
    order = [path for _, path in sorted((hashlib.sha256(path.encode()).digest(), path) for path in lengths)]
    long = [path for path in order if lengths[path] >= LONG_CHARACTERS]
    chosen = order[: max(1, round(share * len(order)))]
    return {*chosen, *long[: min(LONG_HELD_OUT, len(long) // 2)]}


def _recall(train: list[dict[str, str]], amount: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield about amount bytes of recall documents: copies and pass keys by turns."""
    rng = random.Random(f"recall/{seed}")
    low, high = RECALL_CHARACTERS
    made = number = 0
    while made < amount:
        # Numbers fall as 1 / length^2. A base trained on short pieces sees nothing to recall in a
        # document that was cut, so much of the text has to lie in short ones.
        length = round(1 / rng.uniform(1 / high, 1 / low))
        depth, filler = rng.random(), rng.choice(train)["text"]
        # Every other pass key lies in real text, the rest in plain sentences.
        if number % 2 == 0:
            kind, text = "copy", copy_text(length, seed=_seed(seed, number))
        else:
            kind = "passkey"
            text = passkey_text(length, depth, _seed(seed, number), filler if number % 4 == 1 else None)
        record = {"text": text, "path": f"recall/{kind}-{number:05d}"}
        made += _size(record)
        number += 1
        yield record


def _seed(seed: int, number: int) -> int:
    """Return a document's seed, far from the small numbers that an evaluation counts from."""
    return 1_000_000_007 * (seed + 1) + number


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """Return a byte-level BPE tokenizer of that size in which digits stand one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_first(texts, TOKENIZER_CHARACTERS), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _size(record: dict[str, str]) -> int:
    return len(record["text"].encode())


def _write(path: Path, records: list[dict[str, str]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
