"""Masks as text, for configs: ``parse("causal & (window(1024) | sinks(4))")``; ``str(mask)`` writes what it reads.

The grammar is Python's for ``&``, ``|``, calls and numbers. The text is parsed to a syntax tree that is walked node by
node; nothing of it is ever run.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from collections.abc import Callable

from ringspan.kernels.masks.composition import And, Mask, Or
from ringspan.kernels.masks.documents import Documents
from ringspan.kernels.masks.heads import PerHead, s2_attention, sf_attention
from ringspan.kernels.masks.patterns import Causal, Dilated, Full, Groups, Sinks, Window

LENGTH = 1 << 20  # characters of a mask's text: a hundred thousand boundaries
DEPTH = 32  # brackets within brackets
OPERATORS = 1000

_SIMPLE: dict[str, Callable[..., Mask]] = {
    "causal": Causal,
    "full": Full,
    "window": Window,
    "sinks": Sinks,
    "groups": Groups,
    "dilated": Dilated,
    "s2_attention": s2_attention,
    "sf_attention": sf_attention,
}
KNOWN = (*_SIMPLE, "documents", "per_head")


def parse(text: str) -> Mask:
    """Return the mask that a text stands for.

    Args:
        text: ``causal``, ``full``, ``window(left, right=0)``, ``sinks(n)``, ``groups(size, shift=0,
            per_document=False)``, ``dilated(window, dilation)``, ``documents(0, ..., length)`` (or one list per batch
            row), ``per_head({(0, 2): mask, (2, 4): mask})``, ``s2_attention(size)``, ``sf_attention(size, sinks=4,
            unshifted=0.5)``, and what ``&`` (binds tighter), ``|`` and brackets make of them.

    Raises:
        ValueError: one line that names what was found, its column (from 1) and what is known.
    """
    tree = _tree(text)
    return _Reader(text).mask(tree)


def _tree(text: str) -> ast.expr:
    """Return the syntax tree of a text that is short and shallow enough to be walked."""
    if not isinstance(text, str):
        raise ValueError(f"mask: must be text, got {text!r}")
    if len(text) > LENGTH:
        raise ValueError(f"mask: {len(text)} characters; at most {LENGTH} are read")
    if strange := re.search(r"[^A-Za-z0-9_\s,()\[\]{}:&|.=+\-]", text, re.ASCII):
        raise ValueError(f"mask: unexpected {strange[0]!r} at column {strange.start() + 1}")
    depth = 0
    for place in re.finditer(r"[(\[{]|[)\]}]", text):
        depth += 1 if place[0] in "([{" else -1
        if depth < 0:
            raise ValueError(f"mask: unexpected {place[0]!r} at column {place.start() + 1}")
        if depth > DEPTH:
            raise ValueError(f"mask: more than {DEPTH} brackets within brackets at column {place.start() + 1}")
    if len(re.findall(r"[&|+\-]", text)) > OPERATORS:
        raise ValueError(f"mask: more than {OPERATORS} operators")
    # The brackets make a text of several lines, or with blanks before it, one expression.
    try:
        return ast.parse(f"({_one_line(text)})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = getattr(error, "offset", None)
        where = f" at column {min(max(column - 1, 1), len(text) + 1)}" if column else ""
        what = "unfinished or wrong" if isinstance(error, SyntaxError) else "too complex"
        raise ValueError(
            f"mask: {what}{where} in {_short(_one_line(text))}; write e.g. causal & window(1024)"
        ) from None


def _one_line(text: str) -> str:
    return re.sub(r"\s", " ", text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


class _Reader:
    """Walks the tree of one text; knows the text, to say what it found where."""

    def __init__(self, text: str) -> None:
        self.text = _one_line(text)

    def mask(self, node: ast.expr) -> Mask:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd | ast.BitOr):
            operator = type(node.op)
            parts: list[Mask] = []
            left: ast.expr = node
            while isinstance(left, ast.BinOp) and type(left.op) is operator:
                parts.append(self.mask(left.right))
                left = left.left
            parts.append(self.mask(left))
            return self._made(node, And if operator is ast.BitAnd else Or, tuple(reversed(parts)))
        if isinstance(node, ast.Name):
            return self._simple(node, node.id, [], {})
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._call(node, node.func.id)
        raise self._error(node, f"a mask is expected; known are {', '.join(KNOWN)}")

    def _call(self, node: ast.Call, name: str) -> Mask:
        if name == "per_head":
            if len(node.args) != 1 or node.keywords or not isinstance(node.args[0], ast.Dict):
                raise self._error(node, "per_head takes one table: per_head({(0, 2): causal, (2, 4): window(8)})")
            return self._made(node, PerHead, self._table(node.args[0]))
        given = [self._value(one) for one in node.args]
        if name == "documents":
            if node.keywords:
                raise self._error(node.keywords[0].value, "documents takes boundaries without names")
            return self._made(node, Documents, given)
        named = {one.arg: self._value(one.value) for one in node.keywords if one.arg}
        if len(named) < len(node.keywords):
            raise self._error(node, "arguments are written out, each once")
        return self._simple(node, name, given, named)

    def _simple(self, node: ast.expr, name: str, given: list[object], named: dict[str, object]) -> Mask:
        make = _SIMPLE.get(name)
        if make is None:
            if name in KNOWN:
                raise self._error(node, f"{name} needs brackets with what it takes")
            near = difflib.get_close_matches(name.lower(), KNOWN, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise self._error(node, f"no mask is named {name}; {hint}known are {', '.join(KNOWN)}")
        takes = inspect.signature(make).parameters
        for unknown in (one for one in named if one not in takes):
            near = difflib.get_close_matches(unknown, takes, 1)
            raise self._error(node, f"{name} takes no {unknown}{f'; did you mean {near[0]}?' if near else ''}")
        try:
            bound = inspect.signature(make).bind(*given, **named)
        except TypeError as error:
            written = ", ".join(f"{one}{_default(takes[one])}" for one in takes)
            raise self._error(node, f"{error}; {name} takes ({written})") from None
        return self._made(node, make, *bound.args, **bound.kwargs)

    def _table(self, node: ast.Dict) -> dict[tuple[int, int], Mask]:
        table: dict[tuple[int, int], Mask] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            heads = self._value(key) if key is not None else None
            if not isinstance(heads, tuple):
                raise self._error(key or value, "a range of KV heads is written (first, last + 1)")
            if heads in table:
                raise self._error(key or value, "this range of KV heads is given twice")
            table[heads] = self.mask(value)
        return table

    def _value(self, node: ast.expr) -> object:
        """Return a number, a truth value, or a tuple of numbers."""
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = node.operand.value if isinstance(node.operand, ast.Constant) else None
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self._value(one) for one in node.elts)
        raise self._error(node, "a number is expected")

    def _made(self, node: ast.expr, make: Callable[..., Mask], *given: object, **named: object) -> Mask:
        try:
            return make(*given, **named)
        except ValueError as error:
            raise self._error(node, str(error).removeprefix("mask: ")) from None

    def _error(self, node: ast.expr, rule: str) -> ValueError:
        # The tree's columns count the bracket put before the text, and so agree with counting from 1. A tuple's own
        # bracket is that one.
        column = max(node.col_offset, 1)
        found = self.text[column - 1 : (node.end_col_offset or column) - 1]
        return ValueError(f"mask: {_short(found)} at column {column}: {rule}")


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is inspect.Parameter.empty else f"={parameter.default!r}"
