"""RoPE scaling through the Hugging Face config, and the proof that the live model uses it.

The factor follows from the target length. Each type's inverse frequencies are also computed here from the papers'
formulas, and compared with the rotary modules of the built model, because a scaling that silently vanishes ruins
every position past the original window.

``dynamic`` (NTK-aware by length) would change its frequencies with the longest position a rank happens to see. It is
therefore resolved at the target length, once, into the equivalent plain base, which the exported config carries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ringspan.parallel.faults import Fault

TYPES = ("linear", "dynamic", "yarn", "llama3")
_YARN_FAST, _YARN_SLOW = 32.0, 1.0
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0


@dataclass(frozen=True)
class Rope:
    """A scaling worked out for one model: what the config gets, and what the live module must then hold."""

    type: str
    factor: float
    original_length: int
    target_length: int
    parameters: dict[str, Any]
    inv_freq: Tensor
    attention_scaling: float

    def __str__(self) -> str:
        return f"{self.type} x{self.factor:g} ({self.original_length} -> {self.target_length} tokens)"


def work_out(config: Any, type_: str, *, target_length: int, factor: float | None = None) -> Rope:
    """Return the scaling of type ``type_`` that takes the model of ``config`` to ``target_length`` tokens.

    Args:
        config: a transformers config, unscaled (rope_type "default").
        factor: None: target_length / max_position_embeddings.

    Raises:
        Fault: for a model without plain RoPE, one scaled before, or a target the model already reaches.
    """
    present = getattr(config, "rope_parameters", None)
    if not present or "rope_theta" not in present:
        raise Fault(f"rope: {config.model_type} has no single set of rope parameters to scale; remove the rope section")
    if present.get("rope_type", "default") != "default":
        raise Fault(
            f"rope: the model is already scaled ({present['rope_type']}); start from its unscaled original, "
            "or remove the rope section"
        )
    if present.get("partial_rotary_factor", 1.0) != 1.0:
        raise Fault("rope: partial rotary embeddings are not supported; remove the rope section")
    original = int(config.max_position_embeddings)
    if factor is None and target_length <= original:
        raise Fault(
            f"rope: target length {target_length} is within the model's {original} positions; remove the rope section"
        )
    factor = target_length / original if factor is None else factor
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base = float(present["rope_theta"])
    parameters, inv_freq, scaling = _by_type(type_, base, int(dim), factor, original, target_length)
    return Rope(
        type_,
        factor,
        original,
        target_length,
        {"rope_theta": base, **parameters},
        inv_freq,
        scaling,
    )


def apply(config: Any, rope: Rope) -> None:
    """Write the scaling into the config, before the model is built from it."""
    config.rope_parameters = dict(rope.parameters)
    config.max_position_embeddings = max(rope.target_length, round(rope.original_length * rope.factor))


def check(model: nn.Module, rope: Rope) -> None:
    """Compare every live rotary module with the formula.

    Raises:
        Fault: naming the module whose frequencies differ, or that there is none.
    """
    found = False
    for name, module in model.named_modules():
        live = getattr(module, "inv_freq", None)
        if not isinstance(live, Tensor):
            continue
        found = True
        wanted = rope.inv_freq.to(live.device)
        scaling = float(getattr(module, "attention_scaling", 1.0))
        close = live.shape == wanted.shape and torch.allclose(live.double(), wanted, rtol=1e-5, atol=0)
        if not close or not math.isclose(scaling, rope.attention_scaling, rel_tol=1e-6):
            raise Fault(
                f"rope: the live {name} does not use {rope}: its slowest frequency is {float(live.min()):.3g}, the "
                f"formula's {float(wanted.min()):.3g}; its scale {scaling:.4g}, not {rope.attention_scaling:.4g}"
            )
    if not found:
        raise Fault(f"rope: the model has no rotary embedding that could use {rope}")


def _by_type(
    type_: str, base: float, dim: int, factor: float, original: int, target: int
) -> tuple[dict[str, Any], Tensor, float]:
    """Return (config entries, inverse frequencies [dim / 2] in fp64, attention scaling)."""
    plain = _frequencies(base, dim)
    if type_ == "linear":  # position interpolation, arXiv 2306.15595
        return {"rope_type": "linear", "factor": factor}, plain / factor, 1.0
    if type_ == "dynamic":  # NTK-aware base at the target length
        length = max(target, original)
        stretched = base * (factor * length / original - (factor - 1)) ** (dim / (dim - 2))
        return {"rope_type": "default", "rope_theta": stretched}, _frequencies(stretched, dim), 1.0
    if type_ == "yarn":  # arXiv 2309.00071, section 3.2 and 3.3
        entries = {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
        return entries, _yarn(plain, base, dim, factor, original), 0.1 * math.log(factor) + 1.0
    if type_ == "llama3":  # Llama 3.1's bands by wavelength
        entries = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LLAMA3_LOW,
            "high_freq_factor": _LLAMA3_HIGH,
            "original_max_position_embeddings": original,
        }
        turns = original * plain / (2 * math.pi)  # full turns a frequency makes within the original window
        smooth = ((turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)).clamp(0, 1)
        return entries, plain * (smooth + (1 - smooth) / factor), 1.0
    raise Fault(f"rope.type: {type_!r} is not one of {', '.join(TYPES)}")


def _frequencies(base: float, dim: int) -> Tensor:
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _yarn(plain: Tensor, base: float, dim: int, factor: float, original: int) -> Tensor:
    """Keep the frequencies that turn often, interpolate those that do not turn once, blend in between."""

    def index_of(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(index_of(_YARN_FAST)), 0)
    high = min(math.ceil(index_of(_YARN_SLOW)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp)
