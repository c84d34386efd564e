"""A model's weights into safetensors files, from any mesh, without the whole model on any rank.

One weight at a time is gathered by the ranks that hold it, and kept by the one whose file it goes into; adapters are merged
on the way, in peft's own arithmetic, on a copy of their layer.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ringspan.parallel.faults import Fault

MAX_BYTES = 2 << 30  # of a file
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PEFT = "base_model.model."  # what peft's wrapper puts before every name


@dataclass(frozen=True)
class Part:
    """Which ranks write the same weights as this one, those of a pipeline stage, and which of them it is."""

    stage: int = 0
    rank: int = 0
    ranks: int = 1


def whole(x: Tensor) -> Tensor:
    """Return all of a tensor, on every rank that holds a part of it; all of them call this."""
    if not isinstance(x, DTensor):
        return x.detach()
    x = x.detach()
    kind = x.device_mesh.device_type
    return (x if x.device.type == kind else x.to(kind)).full_tensor()


def units(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[int, Callable[[], Mapping[str, Tensor]]]]:
    """Return (bytes, what gathers them) for groups of weights that are exported together, under stock names.

    Args:
        modules: this rank's, by name in the whole model; weights that are tied are exported once.
    """
    modules = list(modules)
    inside: list[str] = []
    found: list[tuple[int, Callable[[], Mapping[str, Tensor]]]] = []
    for name, module in modules:
        if _adapted(module):
            inside.append(f"{name}.")
            found.append((_bytes(module), lambda name=name, module=module: _merged(_stock(name), module)))
    seen: set[int] = set()
    for name, module in modules:
        if f"{name}.".startswith(tuple(inside)) and inside:
            continue
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(
                    (
                        parameter.nbytes,
                        lambda key=key, parameter=parameter: {_stock(key): whole(parameter)},
                    )
                )
    return found


def write(
    modules: Iterable[tuple[str, nn.Module]], folder: Path, part: Part, failed: Callable[[Exception, int], Fault]
) -> None:
    """Gather all weights of this rank's stage, and write the files that are this rank's.

    Args:
        failed: makes the fault of an error and the bytes that were to be written.

    Raises:
        Fault: the disk refuses; only after all weights were gathered, so that no rank waits for this one.
    """
    fault: Fault | None = None
    for number, group in enumerate(_files(units(modules))):
        mine = number % part.ranks == part.rank
        held: dict[str, Tensor] = {}
        for gather in group:
            for name, tensor in gather().items():
                if mine:
                    held[name] = tensor.to("cpu", copy=True).contiguous()
        if mine and fault is None:
            path = folder / f"model-{part.stage:03d}-{number:05d}.safetensors"
            try:
                save_file(held, path, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                fault = failed(error, sum(tensor.nbytes for tensor in held.values()))
    if fault is not None:
        raise fault


def index(folder: Path) -> dict[str, torch.dtype]:
    """Name the files as transformers expects them, with an index where there are several; return what they hold."""
    files = sorted(folder.glob("model-*.safetensors"))
    names: dict[str, str] = {}
    held: dict[str, torch.dtype] = {}
    total = 0
    for number, path in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with safe_open(path, framework="pt") as opened:
            names |= dict.fromkeys(opened.keys(), name)
            held |= {key: _DTYPES[opened.get_slice(key).get_dtype()] for key in opened.keys()}
        total += path.stat().st_size
        path.rename(folder / name)
    if len(files) > 1:
        body = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(body, indent=2), encoding="utf-8")
    return held


def _files(
    groups: Iterable[tuple[int, Callable[[], Mapping[str, Tensor]]]],
) -> Iterator[list[Callable[[], Mapping[str, Tensor]]]]:
    """Put groups into files of at most MAX_BYTES, or of one group that is larger."""
    file: list[Callable[[], Mapping[str, Tensor]]] = []
    size = 0
    for count, gather in groups:
        if file and size + count > MAX_BYTES:
            yield file
            file, size = [], 0
        file.append(gather)
        size += count
    if file:
        yield file


def _adapted(module: nn.Module) -> bool:
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    return isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)


def _merged(name: str, module: Any) -> dict[str, Tensor]:
    """Return the weights of a layer with its adapters merged, by stock names; the layer does not change."""
    from peft.utils import ModulesToSaveWrapper

    if isinstance(module, ModulesToSaveWrapper):
        chosen = module.modules_to_save[module.active_adapters[0]]
        return {f"{name}.{key}": whole(tensor) for key, tensor in chosen.state_dict().items()}
    gathered = {id(p): nn.Parameter(whole(p).clone(), requires_grad=False) for p in module.parameters()}
    # The layer's own arithmetic, so that every kind of adapter is right; on whole weights.
    twin = copy.deepcopy(module, gathered)
    with torch.no_grad():
        twin.merge()
    return {f"{name}.{key}": tensor for key, tensor in twin.get_base_layer().state_dict().items()}


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def _stock(name: str) -> str:
    return name.removeprefix(_PEFT)
