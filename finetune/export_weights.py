"""A model's weights into safetensors files, from any mesh, without the whole model on any rank.

One weight at a time is gathered by the ranks that hold it, and kept by the one whose file it goes into; adapters are
merged on the way, in peft's own arithmetic, on a copy of their layer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ringspan.finetune.publish import sync_tree
from ringspan.parallel.data import whole
from ringspan.parallel.faults import Fault

MAX_BYTES = 2 << 30  # of a file
_PEFT = "base_model.model."  # what peft's wrapper puts before every name


@dataclass(frozen=True)
class Part:
    """Which ranks write the same weights as this one, those of a pipeline stage, and which of them it is."""

    stage: int = 0
    rank: int = 0
    ranks: int = 1


@dataclass(frozen=True)
class Unit:
    """Weights that are exported together.

    Args:
        bytes: of them; the same on every rank.
        gather: collective among the ranks that hold them; returns them, by stock names, to the one that keeps them.
    """

    bytes: int
    gather: Callable[[bool], Mapping[str, Tensor]]


def units(modules: Iterable[tuple[str, nn.Module]], gather: Callable[[Tensor], Tensor] = whole) -> list[Unit]:
    """Return what is exported of this rank's modules, given by name in the whole model; tied weights once."""
    modules = list(modules)
    found = [Unit(_bytes(m), partial(_merged, _stock(name), m, gather)) for name, m in modules if _adapted(m)]
    inside = tuple(f"{name}." for name, module in modules if _adapted(module))
    seen: set[int] = set()
    for name, module in modules:
        if inside and f"{name}.".startswith(inside):
            continue
        for key, tensor in _own(name, module):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found.append(Unit(tensor.nbytes, partial(_plain, _stock(key), tensor, gather)))
    return found


def write(
    modules: Iterable[tuple[str, nn.Module]],
    folder: Path,
    part: Part,
    failed: Callable[[Exception, int], Fault],
    stored: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict,
    gather: Callable[[Tensor], Tensor] = whole,
) -> None:
    """Gather all weights of this rank's stage, and write the files that are this rank's.

    Args:
        failed: makes the fault of an error and the bytes that were to be written.
        stored: turns weights as the model has them into those of its files.
        gather: returns all of a tensor, on every rank.

    Raises:
        Fault: the disk refuses; only after all weights were gathered, so that no rank waits for this one.
    """
    fault: Fault | None = None
    for number, group in enumerate(_files(units(modules, gather))):
        mine = number % part.ranks == part.rank
        held: dict[str, Tensor] = {}
        for unit in group:
            gathered = unit.gather(mine)
            if mine and fault is None:
                held |= {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in stored(gathered).items()}
        if mine and fault is None:
            path = folder / f"model-{part.stage:03d}-{number:05d}.safetensors"
            try:
                save_file(held, path, metadata={"format": "pt"})
                sync_tree(path)
            except (OSError, SafetensorError) as error:
                fault = failed(error, sum(tensor.nbytes for tensor in held.values()))
    if fault is not None:
        raise fault


def index(folder: Path) -> dict[str, Tensor]:
    """Name the files as transformers expects them, with an index where there are several.

    Returns:
        What they hold, by name, on the meta device.
    """
    files = sorted(folder.glob("model-*.safetensors"))
    names: dict[str, str] = {}
    held: dict[str, Tensor] = {}
    for number, path in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(path, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                names[key] = name
                shape = opened.get_slice(key).get_shape()
                # Its first rows without a value have its dtype, and read nothing.
                empty = opened.get_slice(key)[:0] if shape else opened.get_tensor(key)
                held[key] = torch.empty(shape, dtype=empty.dtype, device="meta")
        path.rename(folder / name)
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in held.values())
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(body, indent=2), encoding="utf-8")
    return held


def _files(units: Iterable[Unit]) -> Iterator[list[Unit]]:
    """Put units into files of at most MAX_BYTES, or of one unit that is larger."""
    file: list[Unit] = []
    size = 0
    for unit in units:
        if file and size + unit.bytes > MAX_BYTES:
            yield file
            file, size = [], 0
        file.append(unit)
        size += unit.bytes
    if file:
        yield file


def _own(name: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's own weights, and those of its buffers that belong to a state dict."""
    yield from module.named_parameters(prefix=name, recurse=False)
    for key, buffer in module.named_buffers(recurse=False):
        if key not in module._non_persistent_buffers_set:
            yield f"{name}.{key}", buffer


def _plain(name: str, tensor: Tensor, gather: Callable[[Tensor], Tensor], keep: bool) -> dict[str, Tensor]:
    full = gather(tensor)
    return {name: full} if keep else {}


def _adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)


def _merged(name: str, module: Any, gather: Callable[[Tensor], Tensor], keep: bool) -> dict[str, Tensor]:
    """Return the weights of a layer with its adapters merged, by stock names; the layer does not change."""
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        chosen = module.modules_to_save[module.active_adapters[0]]
        full = {f"{name}.{key}": gather(tensor) for key, tensor in chosen.state_dict().items()}
        return full if keep else {}
    gathered = {id(p): nn.Parameter(gather(p).clone(), requires_grad=False) for p in module.parameters()}
    if not keep:
        return {}
    # The layer's own arithmetic, so that every kind of adapter is right; on whole weights.
    twin = copy.deepcopy(module, gathered)
    with torch.no_grad():
        twin.merge()
    return {f"{name}.{key}": tensor for key, tensor in twin.get_base_layer().state_dict().items()}


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _stock(name: str) -> str:
    return name.removeprefix(_PEFT)
