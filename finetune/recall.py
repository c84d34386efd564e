"""Documents that only a look far back can finish: a pass key in a haystack, a list told twice.

Pure functions of an int seed. Both exist as text (for training, mixed into the corpus) and the pass
key also as tokens of an exact length (for evaluation), with the same sentences, so that one teaches
what the other asks.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ringspan.parallel.faults import Fault

NEEDLE = "\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is "
SENTENCES = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_LIST = """
apple bridge candle desert engine forest garden hammer island jacket kettle ladder mirror
needle orange pencil quarry ribbon saddle tunnel umbrella valley window yellow zipper anchor
button circle dinner eagle feather glove harbor insect jungle kitten lemon marble napkin
ocean pepper rocket silver timber uncle velvet wagon basket copper dragon finger guitar
helmet ladle magnet nickel oyster parrot rabbit sailor temple turtle violin walnut
"""
WORDS = tuple(_LIST.split())


@dataclass(frozen=True)
class PasskeyExample:
    """Tokens that end with the pass key; answer: the key's positions there, the ones to predict."""

    tokens: list[int]
    answer: slice
    key: str


def pass_key(seed: int) -> str:
    """Return five digits."""
    return str(random.Random(f"key/{seed}").randrange(10_000, 100_000))


def passkey(
    length: int,
    depth: float,
    seed: int,
    encode: Callable[[str], Sequence[int]],
    filler: Sequence[int] | None = None,
) -> PasskeyExample:
    """Return exactly length tokens: filler with the pass key at depth, the question, the answer.

    Args:
        length: tokens in all.
        depth: 0 puts the key at the start, 1 right before the question.
        seed: of the key and of where the filler begins.
        encode: text to tokens, without BOS or EOS.
        filler: tokens of real text, repeated if short; None: plain sentences.

    Raises:
        Fault: length has no room for key and question.
    """
    key = pass_key(seed)
    needle = list(encode(NEEDLE.format(key=key)))
    question, full = list(encode(QUESTION)), list(encode(QUESTION + key))
    # A tokenizer may join the question's last character with the key's first: the answer begins
    # where they part.
    same = next((i for i, (a, b) in enumerate(zip(question, full, strict=False)) if a != b), len(question))
    room = length - len(needle) - len(full)
    if room < 0:
        raise Fault(f"passkey length {length} is too short: key and question alone take {length - room} tokens")
    hay = _wrap(list(encode(SENTENCES)) if filler is None else filler, room, seed)
    before = round(_checked(depth) * room)
    tokens = hay[:before] + needle + hay[before:] + full
    return PasskeyExample(tokens, slice(length - len(full) + same, length), key)


def passkey_text(length: int, depth: float, seed: int, filler: str | None = None) -> str:
    """Return about length characters: filler with the key at depth, the question, the answer."""
    key = pass_key(seed)
    needle, end = NEEDLE.format(key=key), QUESTION + key + "\n"
    room = max(0, length - len(needle) - len(end))
    hay = "".join(_wrap(filler or SENTENCES, room, seed))
    # To the end of a line, so that the haystack keeps whole lines around the key.
    before = hay.rfind("\n", 0, round(_checked(depth) * room) + 1) + 1
    return hay[:before] + needle + hay[before:].rstrip("\n") + end


def copy_text(length: int, seed: int) -> str:
    """Return about length characters: random words, a marker, and the same words again."""
    rng = random.Random(f"copy/{seed}")
    lines: list[str] = []
    size = 0
    while not lines or 2 * size < length:
        lines.append(" ".join(rng.choices(WORDS, k=8)) + "\n")
        size += len(lines[-1])
    return "List:\n" + "".join(lines) + "The same list again:\n" + "".join(lines)


def _wrap(source: Sequence[Any], amount: int, seed: int) -> list[Any]:
    """Return amount items of source from a place that seed decides, repeating it as needed."""
    if not source:
        raise Fault("the filler of a passkey document is empty; give some text, or none for plain sentences")
    first = random.Random(f"filler/{seed}").randrange(len(source))
    if first + amount <= len(source):
        return list(source[first : first + amount])
    times = (first + amount) // len(source) + 1
    return (list(source) * times)[first : first + amount]


def _checked(depth: float) -> float:
    if not 0 <= depth <= 1:
        raise Fault(f"passkey depth is {depth}; it must lie between 0 (the start) and 1 (before the question)")
    return depth
