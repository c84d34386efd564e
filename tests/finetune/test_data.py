"""The stream of sequences: no token lost, documents apart, everything counted."""

import json
import random
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringspan.finetune.corpus import train_tokenizer
from ringspan.finetune.data import Sequence, SequenceStream, documents, encode_document
from ringspan.parallel.faults import Fault

TOKENIZER = train_tokenizer(["the quick brown fox jumps over the lazy dog 0123456789 " * 20], 300)
PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def some_texts(seed: int, number: int, longest: int = 60) -> list[str]:
    """Return documents of 0 to longest words; some are empty."""
    rng = random.Random(seed)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    return [" ".join(rng.choices(words, k=rng.choice([0, 1, 2, longest // 4, longest]))) for _ in range(number)]


def all_tokens(path: Path) -> list[list[int]]:
    return [encode_document(TOKENIZER, text) for text, _ in documents(path)]


def spans(sequence: Sequence) -> list[list[int]]:
    """Return the pieces of documents in a sequence, without the padding."""
    cuts = zip(sequence.boundaries, sequence.boundaries[1:], strict=False)
    return [sequence.input_ids[a:b].tolist() for a, b in cuts if sequence.labels[a] != -100]


def test_a_document_ends_with_eos_once() -> None:
    tokens = encode_document(TOKENIZER, "the fox")
    assert tokens[-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(tokens[:-1]) == "the fox"
    assert encode_document(TOKENIZER, "the fox<|endoftext|>") == tokens


@PROPERTY
@given(seed=st.integers(0, 10**6), seq_length=st.integers(1, 70), number=st.integers(1, 20))
def test_split_and_packing_lose_no_token_and_pad_none(tmp_path: Path, seed: int, seq_length: int, number: int) -> None:
    path = write(tmp_path / "a.jsonl", [*some_texts(seed, number), "fox"])
    epoch = [token for document in all_tokens(path) for token in document]
    stream = SequenceStream(path, TOKENIZER, seq_length=seq_length)
    given_out: list[int] = []
    pieces = 0
    for sequence in islice(stream, 2 * len(epoch) // seq_length + 2):
        assert sequence.boundaries[0] == 0
        assert sequence.boundaries[-1] == seq_length == len(sequence.input_ids)
        assert all(a < b for a, b in zip(sequence.boundaries, sequence.boundaries[1:], strict=False))
        assert torch.equal(sequence.labels, sequence.input_ids)
        given_out += sequence.input_ids.tolist()
        pieces += len(sequence.boundaries) - 1
    times = len(given_out) // len(epoch) + 1
    assert times > 2
    assert given_out == (epoch * times)[: len(given_out)]
    assert stream.counts.tokens == len(given_out)
    assert stream.counts.padding == 0
    assert pieces >= stream.counts.documents


@PROPERTY
@given(
    seed=st.integers(0, 10**6),
    seq_length=st.integers(8, 70),
    overlong=st.sampled_from(["drop", "truncate", "split"]),
    packing=st.booleans(),
)
def test_documents_stay_whole_and_apart(
    tmp_path: Path, seed: int, seq_length: int, overlong: str, packing: bool
) -> None:
    path = write(tmp_path / "a.jsonl", [*some_texts(seed, 12), "the quick fox"])
    whole = all_tokens(path)
    expected: list[list[int]] = []
    for tokens in whole:
        if len(tokens) <= seq_length or overlong == "truncate":
            expected.append(tokens[:seq_length])
        elif overlong == "split" and not packing:
            expected += [tokens[at : at + seq_length] for at in range(0, len(tokens), seq_length)]
    if overlong == "split" and packing:
        return
    stream = SequenceStream(path, TOKENIZER, seq_length=seq_length, overlong=overlong, packing=packing)
    found: list[list[int]] = []
    given_out = 0
    while len(found) < len(expected):
        sequence = next(stream)
        pieces = spans(sequence)
        given_out += 1
        assert packing or len(pieces) == 1
        used = sum(len(piece) for piece in pieces)
        assert (sequence.labels[used:] == -100).all()
        assert torch.equal(sequence.labels[:used], sequence.input_ids[:used])
        assert (sequence.input_ids[used:] == TOKENIZER.pad_token_id).all()
        assert len(sequence.boundaries) - 1 == len(pieces) + (used < seq_length)
        found += pieces
    assert found[: len(expected)] == expected
    counts = stream.counts
    assert counts.tokens + counts.padding == given_out * seq_length
    longer = sum(len(tokens) > seq_length for tokens in whole)
    if stream.epoch == 0 and len(found) == len(expected):
        assert counts.dropped <= longer
        assert counts.truncated == (longer if overlong == "truncate" else 0)
        assert counts.split == (longer if overlong == "split" else 0)


def test_next_fit_pads_where_the_next_document_does_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["fox", "fox", "the quick brown fox jumps", "fox"])
    fox, _, long, _ = all_tokens(path)
    length = len(long) + 1
    assert 2 * len(fox) < length < 2 * len(fox) + len(long)
    first, second = islice(SequenceStream(path, TOKENIZER, seq_length=length, overlong="drop"), 2)
    assert first.boundaries == (0, len(fox), 2 * len(fox), length)
    assert second.boundaries == (0, len(long), length)
    assert first.labels[2 * len(fox) :].tolist() == [-100] * (length - 2 * len(fox))


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fox"}\n{"text": ""}\nbroken\n' + json.dumps({"text": "fox " * 50}) + "\n")
    stream = SequenceStream(path, TOKENIZER, seq_length=16, overlong="drop", on_bad_line="skip", packing=False)
    next(stream)
    next(stream)
    counts = stream.counts
    assert (counts.documents, counts.dropped, counts.empty, counts.bad_lines) == (2, 1, 1, 1)
    assert stream.epoch == 1
    split = SequenceStream(path, TOKENIZER, seq_length=16, on_bad_line="skip")
    for _ in range(3):
        next(split)
    assert split.counts.split == 1


def test_a_tokenizer_without_pad_pads_with_eos_or_zero(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["fox"])
    tokenizer = train_tokenizer(["fox"], 300)
    tokenizer.pad_token = None
    sequence = next(SequenceStream(path, tokenizer, seq_length=9, packing=False))
    assert sequence.input_ids[-1] == tokenizer.eos_token_id
    tokenizer.eos_token = None
    bare = next(SequenceStream(path, tokenizer, seq_length=9, packing=False))
    assert bare.input_ids[-1] == 0
    assert bare.boundaries == (0, len(tokenizer("fox")["input_ids"]), 9)


def test_shuffling_keeps_the_documents_and_changes_with_seed_and_epoch(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [f"fox {number}" for number in range(40)])

    def order(seed: int, block: int) -> list[str]:
        stream = SequenceStream(path, TOKENIZER, seq_length=8, packing=False, shuffle_block=block, seed=seed)
        return [TOKENIZER.decode(spans(sequence)[0][:-1]) for sequence in islice(stream, 80)]

    plain = [f"fox {number}" for number in range(40)]
    assert order(0, 0) == plain * 2
    shuffled = order(0, 8)
    assert shuffled == order(0, 8) != order(1, 8)
    assert shuffled[:40] != shuffled[40:] != plain
    for at in range(0, 80, 8):
        assert sorted(shuffled[at : at + 8]) == sorted((plain * 2)[at : at + 8])


def test_data_that_gives_nothing_is_refused_and_stays_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["", ""])
    stream = SequenceStream(path, TOKENIZER, seq_length=7)
    for _ in range(2):
        with pytest.raises(Fault, match="no document with text"):
            next(stream)
    write(path, ["the quick brown fox", "the lazy dog jumps"])
    with pytest.raises(Fault, match="all longer than seq_length = 3 and overlong is 'drop'"):
        next(SequenceStream(path, TOKENIZER, seq_length=3, overlong="drop"))
    path.write_text('{"text": "fox"}\n{"text": "fo')
    broken = SequenceStream(path, TOKENIZER, seq_length=100)
    for _ in range(2):
        with pytest.raises(Fault, match=r"a.jsonl:2 is not JSON"):
            next(broken)
        assert broken.epoch == 0, "a fault is not the end of the data"


def test_arguments_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["fox"])
    with pytest.raises(Fault, match="overlong is 'cut'; it must be one of split, drop, truncate"):
        SequenceStream(path, TOKENIZER, seq_length=7, overlong="cut")
    with pytest.raises(Fault, match="seq_length is 0"):
        SequenceStream(path, TOKENIZER, seq_length=0)
    with pytest.raises(Fault, match="make it with: make data"):
        SequenceStream(tmp_path / "no.jsonl", TOKENIZER, seq_length=7, made_by="make data")
