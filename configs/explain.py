"""What is wrong with a config, a line for each fault: key, value, rule, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from ringspan.configs.across import across
from ringspan.configs.schema import Config, Section

Keys = tuple[str, ...]
_LONGEST_VALUE = 60

_RULES = {
    "greater_than": "must be > {gt}",
    "greater_than_equal": "must be >= {ge}",
    "less_than": "must be < {lt}",
    "less_than_equal": "must be <= {le}",
    "literal_error": "must be {expected}",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be a text; put it in quotes",
    "string_too_short": "must not be empty",
    "list_type": "must be a list, as [512, 1k]",
    "dict_type": "must hold keys of its own",
    "model_type": "must hold keys of its own",
    "invalid-json-value": "must be null, true, false, a number, a text, a list or a mapping",
}


def sections() -> dict[str, type[Section]]:
    """Return the model of each section, by its key."""
    return {
        section: kind
        for section, field in Config.model_fields.items()
        for kind in get_args(field.annotation) or (field.annotation,)
        if isinstance(kind, type) and issubclass(kind, Section)
    }


def optional(section: str) -> bool:
    """Tell whether a section may be null, which turns it off."""
    return type(None) in get_args(Config.model_fields[section].annotation)


def explain(error: ValidationError, tree: Mapping[str, Any], origins: Mapping[Keys, str]) -> list[str]:
    """Return a line for each fault of ``tree``, those between fields included.

    Args:
        error: what validating ``tree`` raised.
        tree: the config as plain values, by section and key.
        origins: where a value came from, by its keys; the empty key stands for the file.
    """
    faults: list[tuple[Keys, str]] = []
    for detail in error.errors(include_url=False):
        # Rules between fields are asked below, of the fields that are right by themselves;
        # load has told of keys that are no names.
        if detail["type"] not in ("across", "invalid_key") and detail["loc"][-1] != "[key]":
            keys = tuple(str(key) for key in detail["loc"])
            faults.append((keys, _text(keys, detail)))
    for fault in across(_valid(tree)):
        faults.append((tuple(fault.key.split(".")), fault.text))
    return [f"{name(keys)}: {text} ({_origin(keys, origins)})" for keys, text in faults]


def name(keys: Keys) -> str:
    """Return keys as they are written: section.key, with the place in a list in brackets."""
    return ".".join(keys[:2]) + "".join(f"[{key}]" if key.isdigit() else f".{key}" for key in keys[2:])


def unknown(keys: Keys) -> str:
    """Say that nothing has this name, and what has a name near it."""
    *path, last = keys
    kinds = sections()
    here = list(kinds[path[0]].model_fields) if path and path[0] in kinds else list(kinds)
    prefix = ".".join([*path, ""])
    if near := get_close_matches(last, here, n=1):
        return f"unknown key; did you mean {prefix}{near[0]}?"
    everywhere = {key: f"{section}.{key}" for section, kind in kinds.items() for key in kind.model_fields}
    if near := get_close_matches(last, everywhere, n=1, cutoff=0.8):
        return f"unknown key; did you mean {everywhere[near[0]]}?"
    return f"unknown key; {'.'.join(path) or 'a config'} has {', '.join(here)}"


def show(value: object) -> str:
    """Return a value as YAML would have it, on one line and not too long."""
    plain = not isinstance(value, dict | list)
    text = json.dumps(value, default=str, ensure_ascii=False) if plain else repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


def _text(keys: Keys, detail: Mapping[str, Any]) -> str:
    kind = detail["type"]
    if kind == "extra_forbidden":
        return unknown(keys)
    if kind == "missing":
        return f"missing; needed: {_description(keys)}"
    rule = _RULES.get(kind)
    text = rule.format(**detail.get("ctx", {})) if rule else detail["msg"]
    return f"{show(detail['input'])} {text}"


def _description(keys: Keys) -> str:
    section, key = keys
    return (sections()[section].model_fields[key].description or "").rstrip(".").lower()


def _origin(keys: Keys, origins: Mapping[Keys, str]) -> str:
    while keys not in origins:
        keys = keys[:-1]
    return origins[keys]


def _valid(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are right by themselves, and defaults, by ``section.key``."""
    values: dict[str, Any] = {}
    for section, kind in sections().items():
        given = tree.get(section, None if optional(section) else {})
        if isinstance(given, Mapping):
            for key, field in kind.model_fields.items():
                if key not in given and not field.is_required():
                    values[f"{section}.{key}"] = field.get_default()
                elif key in given and (found := _alone(field, given[key])):
                    values[f"{section}.{key}"] = found[0]
    return values


def _alone(field: FieldInfo, value: object) -> tuple[Any] | None:
    """Return the value as the field has it, or None where it is at fault."""
    adapter = TypeAdapter(field.rebuild_annotation(), config=ConfigDict(strict=True))
    try:
        return (adapter.validate_python(value),)
    except ValidationError:
        return None
