"""From a YAML file and overrides to a checked Config, or to every fault of it at once.

Defaults < file < overrides. One file says it all: nothing is inherited or included, a key stands
once, aliases are refused. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ringspan.configs.explain import Keys, explain, optional, sections, show
from ringspan.configs.schema import Config


class ConfigError(ValueError):
    """A config that cannot be used; one line for each fault."""

    def __init__(self, faults: Sequence[str]) -> None:
        """Keep the lines, each complete in itself."""
        self.faults = tuple(faults)
        super().__init__("\n".join(self.faults))


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the config of a YAML file with overrides laid over it.

    Args:
        path: the file.
        overrides: texts ``section.key=value``; the value is YAML, a later one wins.

    Raises:
        ConfigError: with all faults of the file and the overrides.
    """
    tree, origins, faults = _read(Path(path))
    values = {} if tree is None else tree
    for override in overrides:
        faults += _override(values, origins, override)
    if tree is None:
        raise ConfigError(faults)
    for section in sections():
        if tree.get(section) is None and not optional(section):
            tree[section] = {}  # its defaults, and a fault for each key it needs
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(faults + explain(error, tree, origins)) from None
    if faults:
        raise ConfigError(faults)
    return config


def dump(config: Config) -> str:
    """Return the config as YAML, defaults included; ``load`` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path) -> tuple[dict[str, Any] | None, dict[Keys, str], list[str]]:
    """Return the file's values (None: unreadable), where each stands, and faults of the file."""
    origins: dict[Keys, str] = {(): str(path)}
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None, origins, [f"{path}: no such file{_nearest(path)}"]
    except OSError as error:
        return None, origins, [f"{path}: cannot be read: {error.strerror}"]
    except UnicodeDecodeError as error:
        return (
            None,
            origins,
            [f"{path}: not UTF-8 text at byte {error.start}; a config is a YAML file"],
        )
    faults: list[str] = []
    try:
        faults += _scan(path, text, origins)
        tree = yaml.safe_load(text)
    except _NOT_YAML as error:
        return None, origins, [*faults, f"{path}{_yaml_fault(error)}"]
    if tree is not None and not isinstance(tree, dict):
        return None, origins, [f"{path}: {show(tree)} is no config; it holds sections, as model"]
    return tree or {}, origins, faults


_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # ValueError: a date such as 2026-13-45


def _scan(path: Path, text: str, origins: dict[Keys, str]) -> list[str]:
    """Note the line of every key; return faults YAML lets pass: doubled keys, keys not names."""
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                problem=f"alias *{event.anchor}; write the value out", problem_mark=event.start_mark
            )
    faults: list[str] = []

    def walk(node: yaml.Node, keys: Keys) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            place = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                faults.append(f"{'.'.join(keys) or 'the config'}: a key must be a name ({place})")
                continue
            here = (*keys, key.value)
            if here in origins:
                faults.append(f"{'.'.join(here)}: given twice ({origins[here]} and {place})")
            origins[here] = place
            walk(value, here)

    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is not None:
        walk(root, ())
    return faults


def _override(tree: dict[str, Any], origins: dict[Keys, str], override: str) -> list[str]:
    """Lay one override over the values; return what is wrong with it."""
    name, equals, text = override.partition("=")
    keys = tuple(name.split("."))
    if not equals or not all(keys):
        return [f"override {override}: must be section.key=value"]
    try:
        value = yaml.safe_load(text)
    except _NOT_YAML as error:
        return [f"override {override}{_yaml_fault(error)}"]
    node = tree
    for depth, key in enumerate(keys[:-1]):
        if node.get(key) is None:
            node[key] = {}
            origins.setdefault(keys[: depth + 1], f"override {override}")
        if not isinstance(node[key], dict):
            above = ".".join(keys[: depth + 1])
            return [f"override {override}: {above} is {show(node[key])}, which has no keys"]
        node = node[key]
    node[keys[-1]] = value
    for known in [known for known in origins if known[: len(keys)] == keys]:
        del origins[known]
    origins[keys] = f"override {override}"
    return []


def _yaml_fault(error: Exception) -> str:
    """Return what YAML disliked, with the line where it is known."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark and mark.line else ""
        return f"{line}: not plain YAML: {error.problem or error.context}"
    if isinstance(error, RecursionError):
        return ": nested too deeply"
    return f": not plain YAML: {' '.join(str(error).split())}"


def _nearest(path: Path) -> str:
    """Return a hint at the file beside a missing one whose name is nearest."""
    near = get_close_matches(path.name, (one.name for one in path.parent.glob("*.yaml")), n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
