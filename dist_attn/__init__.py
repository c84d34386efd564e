"""Attention over a sequence that is sharded over ranks: exact, forward and backward.

Letters of every shape: B batch, L this rank's tokens, H query heads, G KV heads, D head dim.
"""

from ringspan.dist_attn.api import attention, attention_with_lse
from ringspan.dist_attn.balanced import Balanced
from ringspan.dist_attn.exchange import Disagreement, PeerLost, Traffic
from ringspan.dist_attn.layout import Assigned, Contiguous, Striped, ZigZag
from ringspan.dist_attn.planner import Plan, plan
from ringspan.dist_attn.sharding import shard, unshard
from ringspan.kernels.mask import (
    Causal,
    Dilated,
    Documents,
    Full,
    Groups,
    Mask,
    PerHead,
    Sinks,
    Span,
    Window,
    s2_attention,
    sf_attention,
)
from ringspan.kernels.mask import parse as parse_mask

__all__ = [
    "Assigned",
    "Balanced",
    "Causal",
    "Contiguous",
    "Dilated",
    "Disagreement",
    "Documents",
    "Full",
    "Groups",
    "Mask",
    "PeerLost",
    "PerHead",
    "Plan",
    "Sinks",
    "Span",
    "Striped",
    "Traffic",
    "Window",
    "ZigZag",
    "attention",
    "attention_with_lse",
    "parse_mask",
    "plan",
    "s2_attention",
    "sf_attention",
    "shard",
    "unshard",
]
