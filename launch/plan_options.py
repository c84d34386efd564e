"""What ``ringspan plan`` can be asked: its own options, told apart from the config's overrides. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ringspan.configs.fields import parse_size

USAGE = (
    "ringspan plan CONFIG.yaml [--world 8 | --world 16x8] [--length 1M] [--documents even:32] [--costs links.json] "
    "[--out plan.png] [--json plan.json] [section.key=value ...]"
)


@dataclass(frozen=True)
class Documents:
    """How long the documents of a sequence are.

    Args:
        kind: "file" (``text`` is its path), "even" (``count`` equal ones) or "lognormal" (``count`` tokens on average,
            drawn from ``seed``).
        text: what was asked for.
    """

    kind: str
    text: str
    count: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Options:
    """What was asked beside the config; None: the config's, or its default.

    Args:
        world: (ranks,), or (nodes, ranks in a node).
        length: tokens of a sequence.
        costs: "cuda", "cpu" or a file; None: attention.costs, or "cuda".
        out, json: where the picture and the numbers go.
    """

    world: tuple[int, ...] | None = None
    length: int | None = None
    documents: Documents | None = None
    costs: str | None = None
    out: Path | None = None
    json: Path | None = None


def take(arguments: Sequence[str]) -> tuple[Options, list[str]]:
    """Take the options out of the arguments; return them and what is left, for the config.

    Raises:
        ValueError: names the option, its value and the rule.
    """
    options, rest, left = Options(), iter(arguments), []
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not argument.startswith("--") or "." in name:
            left.append(argument)
            if argument.startswith("--") and not equals:  # an override's value may look like an option of ours
                left += [value for value in [next(rest, None)] if value is not None]
            continue
        if name[2:] not in PARSERS:
            near = get_close_matches(name, [f"--{known}" for known in PARSERS], n=1)
            hint = f"perhaps {near[0]}" if near else f"there is {', '.join(f'--{known}' for known in PARSERS)}"
            raise ValueError(f"{argument}: no such option; {hint}; settings are written --section.key value")
        if not equals:
            value = next(rest, "--")
        if not value or value.startswith("--"):
            raise ValueError(f"{name}: no value follows; write {name} {EXAMPLES[name[2:]]}")
        options = replace(options, **{name[2:]: PARSERS[name[2:]](value)})
    return options, left


def _world(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"([0-9]+)(?:x([0-9]+))?", text)
    sizes = tuple(int(one) for one in match.groups() if one is not None) if match else (0,)
    if min(sizes) < 1:
        raise ValueError(f"--world: {text!r} must be ranks, or nodes x ranks in a node: 8, or 16x8")
    return sizes


def _tokens(option: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            return parse_size(text)
        except ValueError as error:
            raise ValueError(f"--{option}: {text!r} {error}") from error

    return parse


def _documents(text: str) -> Documents:
    kind, colon, rest = text.partition(":")
    if not colon or kind not in ("even", "lognormal"):
        return Documents("file", text)
    count, comma, seed = rest.partition(",")
    if kind == "even":
        if not count.isascii() or not count.isdigit() or int(count) < 1 or comma:
            raise ValueError(f"--documents: {text!r} must give a number of documents of at least 1, as even:32")
        return Documents(kind, text, int(count))
    if comma and not (seed.isascii() and seed.isdigit()):
        raise ValueError(f"--documents: the seed of {text!r} must be a whole number, as lognormal:64k,0")
    return Documents(kind, text, _tokens("documents")(count), int(seed or 0))


PARSERS: dict[str, Callable[[str], Any]] = {
    "world": _world,
    "length": _tokens("length"),
    "documents": _documents,
    "costs": str,
    "out": Path,
    "json": Path,
}
EXAMPLES = {
    "world": "8, or 16x8",
    "length": "1M",
    "documents": "FILE, even:32 or lognormal:64k,0",
    "costs": "links.json",
    "out": "plan.png",
    "json": "plan.json",
}
VALUES = {  # how the help writes them
    "world": "N | NxM",
    "length": "TOKENS",
    "documents": "FILE | even:N | lognormal:MEAN,SEED",
    "costs": "FILE | cuda | cpu",
    "out": "FILE.png",
    "json": "FILE",
}
HELP = {
    "world": "ranks that share a sequence: 8, or 16x8 for nodes x ranks in a node (default: parallel.cp)",
    "length": "tokens of a sequence, as 10M (default: data.seq_length)",
    "documents": (
        "what a sequence is packed of: a FILE of lengths in tokens, one a line, laid end to end, over and over; "
        "even:N, N equal ones; lognormal:MEAN,SEED, lengths of that mean at random (default: one document)"
    ),
    "costs": "speeds of links and kernels: what benchmarks/links.py measured, or typical figures: cuda, cpu "
    "(attention.costs, else cuda)",
    "out": "PNG: the mask by owner rank, and the time line of transfers and computing",
    "json": "file for all numbers",
}
