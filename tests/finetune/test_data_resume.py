"""Resume of the stream of sequences: exact anywhere and again, refused where it cannot be."""

import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringspan.finetune.corpus import train_tokenizer
from ringspan.finetune.data import Sequence, SequenceStream
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


def same(one: Sequence, other: Sequence) -> bool:
    return (
        one.boundaries == other.boundaries
        and torch.equal(one.input_ids, other.input_ids)
        and torch.equal(one.labels, other.labels)
    )


@PROPERTY
@given(data=st.data())
def test_resume_is_exact_anywhere_and_again(tmp_path: Path, data: st.DataObject) -> None:
    seed = data.draw(st.integers(0, 10**6))
    for name in ("a", "b"):
        lines = [json.dumps({"text": text}) for text in some_texts(seed + ord(name), 7)]
        lines.insert(data.draw(st.integers(0, 7)), "broken")
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, '{"text": "quick fox"}']))
    options: dict[str, Any] = {
        "seq_length": data.draw(st.integers(12, 60)),
        "overlong": data.draw(st.sampled_from(["split", "drop", "truncate"])),
        "packing": data.draw(st.booleans()),
        "shuffle_block": data.draw(st.sampled_from([0, 1, 3, 5, 100])),
        "on_bad_line": "skip",
        "seed": seed,
    }
    straight = SequenceStream(tmp_path, TOKENIZER, **options)
    expected = list(islice(straight, 30))
    stops = sorted(data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=4)))
    stream = SequenceStream(tmp_path, TOKENIZER, **options)
    got: list[Sequence] = []
    for stop in [*stops, 30]:
        got += islice(stream, stop - len(got))
        state = json.dumps(stream.state_dict())
        assert len(state) < 1000
        stream = SequenceStream(tmp_path, TOKENIZER, **options)
        stream.load_state_dict(json.loads(state))
        assert json.dumps(stream.state_dict()) == state
    assert len(got) == 30
    assert all(same(one, other) for one, other in zip(got, expected, strict=True))
    assert stream.counts == straight.counts
    assert stream.epoch == straight.epoch


def test_resume_covers_the_places_it_claims(tmp_path: Path) -> None:
    """Stops at every sequence of three epochs: in mid document, in mid block and at their ends."""
    path = write(tmp_path / "a.jsonl", some_texts(3, 11))
    options: dict[str, Any] = {"seq_length": 16, "shuffle_block": 4, "seed": 5}
    stream = SequenceStream(path, TOKENIZER, **options)
    states, sequences = [stream.state_dict()], []
    while stream.epoch < 3:
        sequences.append(next(stream))
        states.append(stream.state_dict())
    assert {bool(state["offset"]) for state in states} == {True, False}
    assert {state["index"] for state in states} >= {0, 1, 2, 3}
    for at, state in enumerate(states[:-1]):
        again = SequenceStream(path, TOKENIZER, **options)
        next(again)
        again.load_state_dict(state)
        assert all(same(one, other) for one, other in zip(again, sequences[at : at + 5], strict=False))


def test_a_state_of_other_data_or_settings_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["the fox"] * 9)
    stream = SequenceStream(path, TOKENIZER, seq_length=7)
    next(stream)
    state = stream.state_dict()
    with pytest.raises(Fault, match="data of the checkpoint had seq_length = 7, now it is 8"):
        SequenceStream(path, TOKENIZER, seq_length=8).load_state_dict(state)
    other = write(tmp_path / "b.jsonl", ["the fox"] * 9)
    with pytest.raises(Fault, match="data of the checkpoint had files = 1 "):
        SequenceStream(other, TOKENIZER, seq_length=7).load_state_dict(state)
    for _ in range(4):
        next(stream)
    state = stream.state_dict()
    write(path, ["the fox"])
    with pytest.raises(Fault, match=r"data has changed since the checkpoint: row \d of .*a.jsonl is gone"):
        SequenceStream(path, TOKENIZER, seq_length=7).load_state_dict(state)


def test_a_document_that_shrank_below_the_place_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ["fox " * 30])
    stream = SequenceStream(path, TOKENIZER, seq_length=10)
    next(stream)
    state = stream.state_dict()
    write(path, ["fox"])
    again = SequenceStream(path, TOKENIZER, seq_length=10)
    again.load_state_dict(state)
    with pytest.raises(Fault, match=r"data has changed .* .*a.jsonl:1 is shorter"):
        next(again)
