"""Recall documents: exact lengths, the key where it should be, the answer where it is said."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.finetune.corpus import train_tokenizer
from ringspan.finetune.recall import (
    NEEDLE,
    QUESTION,
    SENTENCES,
    WORDS,
    copy_text,
    pass_key,
    passkey,
    passkey_text,
)
from ringspan.parallel.faults import Fault

TOKENIZER = train_tokenizer([SENTENCES * 9, NEEDLE, QUESTION * 9, "def f(x):\n    return x\n" * 9], 400)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(80, 700),
    depth=st.floats(0, 1),
    seed=st.integers(0, 10**9),
    code=st.booleans(),
)
def test_passkey_has_the_length_the_key_and_the_answer(length: int, depth: float, seed: int, code: bool) -> None:
    filler = encode("def f(x):\n    return x\n" * 7) if code else None
    example = passkey(length, depth, seed, encode, filler)
    assert len(example.tokens) == length
    assert example == passkey(length, depth, seed, encode, filler)
    assert example.key == pass_key(seed)
    assert len(example.key) == 5
    answer = example.tokens[example.answer]
    assert TOKENIZER.decode(answer) == example.key
    assert [TOKENIZER.decode([token]) for token in answer] == list(example.key)
    assert example.answer.stop == length
    assert example.tokens[: example.answer.start][-len(encode(QUESTION)) :] == encode(QUESTION)
    needle = encode(NEEDLE.format(key=example.key))
    room = length - len(needle) - len(encode(QUESTION + example.key))
    at = round(depth * room)
    assert example.tokens[at : at + len(needle)] == needle
    hay = example.tokens[:at] + example.tokens[at + len(needle) : at + len(needle) + room - at]
    source = filler or encode(SENTENCES)
    assert any(hay == ((source * (room // len(source) + 2))[i:])[:room] for i in range(len(source)))


def test_the_answer_of_a_tokenizer_that_joins_space_and_digits() -> None:
    """As sentence-piece tokenizers do: the question's last token changes once the key follows."""

    def joined(text: str) -> list[int]:
        words = text.replace(" ", "\0 ").split("\0")
        return [hash(word) for word in words if word]

    example = passkey(60, 0.5, 7, joined)
    assert example.tokens[example.answer] == [hash(f" {example.key}")]
    assert len(example.tokens) == 60


def test_passkeys_differ_by_seed_and_depth_moves_them() -> None:
    assert len({pass_key(seed) for seed in range(200)}) > 190
    first, last = (passkey(300, depth, 1, encode) for depth in (0.0, 1.0))
    needle = encode(NEEDLE.format(key=first.key))
    assert first.tokens[: len(needle)] == needle
    tail = len(encode(QUESTION + first.key))
    assert last.tokens[-tail - len(needle) : -tail] == needle


def test_passkey_bad_input() -> None:
    with pytest.raises(Fault, match=r"passkey length 9 is too short: key and question alone take \d\d tokens"):
        passkey(9, 0.5, 0, encode)
    with pytest.raises(Fault, match=r"passkey depth is 1.5; it must lie between 0"):
        passkey(200, 1.5, 0, encode)
    with pytest.raises(Fault, match="filler of a passkey document is empty"):
        passkey(200, 0.5, 0, encode, [])


@pytest.mark.parametrize("filler", [None, "def f(x):\n    return x\n" * 3])
@pytest.mark.parametrize("depth", [0.0, 0.4, 1.0])
def test_passkey_text_asks_what_the_evaluation_asks(filler: str | None, depth: float) -> None:
    text = passkey_text(2000, depth, 5, filler)
    assert text == passkey_text(2000, depth, 5, filler)
    needle, end = NEEDLE.format(key=pass_key(5)), QUESTION + pass_key(5) + "\n"
    assert text.count(needle) == 1
    assert text.endswith(end)
    assert abs(text.index(needle) - depth * (2000 - len(needle) - len(end))) < 120
    assert 1880 <= len(text) <= 2000
    assert len(passkey_text(10, depth, 5, filler)) < 200


def test_a_copy_is_told_twice() -> None:
    text = copy_text(900, 3)
    assert text == copy_text(900, 3) != copy_text(900, 4)
    first, second = text.removeprefix("List:\n").split("The same list again:\n")
    assert first == second
    assert 900 <= len(text) < 1200
    assert set(first.split()) <= set(WORDS)
    assert len(set(WORDS)) == len(WORDS) == 64
