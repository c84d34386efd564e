"""Activation checkpointing: which of a layer's results the backward pass computes again.

The layers' own switch is used, which Hugging Face calls ``GradientCheckpointingLayer``: no module changes its name or
class, and FSDP's hooks stay outside of the recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ringspan.parallel.hf_attention import NAME, Forward
from ringspan.parallel.offload import Kept, Offload

Mode = Literal["none", "full", "selective", "offload"]
"""What is computed again: nothing; a layer; all of it but attention; the same, with what is kept in host memory."""


def keeps_attention(mode: Mode) -> bool:
    """Return what ``SequenceContext(keep_attention=...)`` must be for a mode.

    With ``full`` the recompute runs attention's exchange again, on all ranks in the same order.
    """
    return mode in ("selective", "offload")


def checkpoint_layers(layers: Iterable[nn.Module], mode: Mode, *, offload: Offload | None = None) -> None:
    """Let the backward pass compute decoder layers again, in place; before FSDP shards them, or after.

    Args:
        layers: of a transformers model, as ``parts_of(model).layers``, in their order; or of a pipeline stage.
        mode: the context must fit it: see ``keeps_attention``.
        offload: where ``mode="offload"`` puts a layer's input and attention's results; None: one of its own.

    Raises:
        ValueError: for an unknown mode, and by name for layers that cannot be checkpointed; nothing is changed then.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"activation_checkpointing: {mode!r} is not one of {', '.join(get_args(Mode))}")
    found = list(layers)
    for index, layer in enumerate(found):
        if mode != "none" and not isinstance(layer, GradientCheckpointingLayer):
            raise ValueError(
                f"activation_checkpointing: {mode}, but layer {index} ({type(layer).__name__}) is no "
                "GradientCheckpointingLayer of transformers; set it to none"
            )
    run: Callable[..., Any] = partial(checkpoint, use_reentrant=False)
    home = offload or Offload()
    for index, layer in enumerate(found):
        # As GradientCheckpointingLayer wants it; instances of it have no method of their own for this.
        settings: dict[str, Any] = {
            "gradient_checkpointing": mode != "none",
            "_gradient_checkpointing_func": partial(_put_away, home, index == 0) if mode == "offload" else run,
        }
        for name, value in settings.items():
            setattr(layer, name, value)


@torch.compiler.disable(recursive=False, reason="copies run beside the graph")
def _put_away(home: Offload, first: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Checkpoint a layer whose forward is ``function``, a partial that holds its keywords."""
    forward = getattr(function, "keywords", {}).get(NAME)
    if isinstance(forward, Forward) and forward.keep_attention:
        if not isinstance(forward.kept, Kept):
            forward.kept = Kept(home)
        forward.kept.home = home
    with home.layer(first=first):
        return checkpoint(function, *args, use_reentrant=False)
