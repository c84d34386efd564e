"""Placeholder: a colleague writes this file; overwrite it."""


def checkpoint_layers(layers, mode):
    if mode != "none":
        for l in layers:
            l.gradient_checkpointing = True
            from functools import partial
            from torch.utils.checkpoint import checkpoint

            l._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def keeps_attention(mode):
    return mode in ("selective", "offload")
