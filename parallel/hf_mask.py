"""What a model's mask says, on its way from transformers' mask function to the attention functions of its layers.

No table is built. Padding travels as it came, and a window as a size: some models declare it to their mask alone, and
their layers never name it. A size is known while a model is compiled, and no value has to be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# The functions of transformers.masking_utils that causal, full and sliding masks of packed sequences are made of. Any
# other stands for a pattern that no mask expression here computes, and must not get lost.
_KNOWN = {
    "and_masks",
    "bidirectional_mask_function",
    "causal_mask_function",
    "packed_sequence_mask_function",
    "padding_mask_function",
    "remap_positions_for_packed_sequence",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
}


def ringspan_mask(
    *args: Any,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function for transformers: hand padding and window on to the layers instead of building a table.

    Returns:
        What ``declared`` reads.

    Raises:
        ValueError: for a model whose mask is more than causal or full, sliding, padded and packed.
    """
    del args, kwargs
    if use_vmap:
        raise ValueError("the model composes its own attention mask function; ringspan attention cannot honour it")
    if local_size is not None and getattr(config, "attention_chunk_size", None) == local_size:
        raise ValueError(f"attention_chunk_size {local_size} of the model is not supported by ringspan attention")
    if mask_function is not None and not torch.compiler.is_compiling():  # closures are closed to the compiler
        for name in _parts(mask_function):
            if name not in _KNOWN:
                raise ValueError(f"the model's mask holds {name}, which ringspan attention cannot honour")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)}; must be [batch, tokens], 0 where padded"
        )
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if local_size is None:
        return attention_mask
    if attention_mask is None:
        return torch.empty(0, 0, local_size, dtype=torch.bool, device=device)
    return attention_mask[:, :, None].expand(-1, -1, local_size)


def declared(mask: Tensor | None) -> tuple[Tensor | None, int | None]:
    """Return (padding [B, L] or None, window or None) from what ``ringspan_mask`` returned; a window counts the query.

    Raises:
        ValueError: for another mask.
    """
    if mask is None or mask.dim() == 2:
        return mask, None
    if mask.dim() == 3:
        return (mask[:, :, 0] if mask.shape[0] else None), mask.shape[2]
    raise ValueError(
        f"attention_mask of {mask.dim()} dimensions; put a [batch, tokens] one into the batch that "
        "SequenceContext.shard cuts"
    )


def _parts(function: Callable[..., Any]) -> Iterator[str]:
    """Yield the names of the functions that a mask function is made of: what made it, and what it closed over."""
    yield getattr(function, "__qualname__", type(function).__name__).split(".")[0]
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        for each in held if isinstance(held, tuple) else (held,):
            if callable(each) and not isinstance(each, Tensor):
                yield from _parts(each)
