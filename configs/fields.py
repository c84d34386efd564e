"""Types of single settings: what YAML gives, read strictly, told in one line.

Sizes count tokens: ``128k`` is 128 * 1024, ``1M`` is 1024 * 1024.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Annotated

from pydantic import BeforeValidator, Field, FiniteFloat
from pydantic_core import PydanticCustomError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmM]?)")


def parse_size(value: object) -> int:
    """Return the tokens that a number or a text such as ``128k`` or ``1.5M`` stands for.

    Raises:
        PydanticCustomError: if it is not a positive whole number of tokens.
    """
    tokens = Fraction(0)
    if isinstance(value, int) and not isinstance(value, bool):
        tokens = Fraction(value)
    elif isinstance(value, str) and (match := _SIZE.fullmatch(value.strip())):
        tokens = Fraction(match[1]) * {"": 1, "k": 1024, "m": 1024**2}[match[2].lower()]
    if tokens.denominator != 1 or not 1 <= tokens < 2**63:
        raise PydanticCustomError("size", "must be a positive whole number of tokens, as 4096, 128k or 1.5M")
    return int(tokens)


def _text_or_list(value: object) -> object:
    """Refuse all but a text or a list of texts, in one line instead of one for each type."""
    items = value if isinstance(value, list) else [value]
    if not items or not all(isinstance(item, str) and item for item in items):
        raise PydanticCustomError("text_or_list", "must be a text or a list of texts, none empty")
    return value


def _number(value: object) -> object:
    """Read a number that YAML takes for text: 1e-4, for lack of a dot."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def off(value: object) -> object:
    """Undo YAML's reading of the word off as false."""
    return "off" if value is False else value


def _axis(value: object) -> object:
    """Refuse what is neither a number of ranks nor -1, in one line."""
    if not isinstance(value, int) or isinstance(value, bool) or (value < 1 and value != -1):
        raise PydanticCustomError("axis", "must be a number of ranks, or -1 for what the world leaves")
    return value


def recompute(value: object) -> object:
    """Read true and false, which the setting once was, and YAML's null-like none."""
    return {True: "selective", False: "none"}.get(value, value) if isinstance(value, bool) else value


Axis = Annotated[int, BeforeValidator(_axis)]
Size = Annotated[int, BeforeValidator(parse_size)]
Float = Annotated[FiniteFloat, BeforeValidator(_number)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
TextOrList = Annotated[str | list[str], BeforeValidator(_text_or_list)]
