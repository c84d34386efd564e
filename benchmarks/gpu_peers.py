"""Other libraries' attention on the same problem, each behind ``make(case, clock) -> run(q, k, v) -> out``.

q [B, M, H, D], k and v [B, N, G, D], as ours; what a library wants otherwise is a view. A maker raises ``Unfit`` with
the reason where a library cannot do the case at all, and any other error where it is missing or fails: both become a
row.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_cases import Case, K
from gpu_clock import Clock
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ringspan.kernels.mask import And, Documents
from ringspan.kernels.masks.heads import by_head

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
FLEX_LIMIT = 256 * K  # create_block_mask walks all pairs: at 1M tokens it takes longer than the attention it serves


class Unfit(Exception):
    """The library cannot compute this case, or only by a detour nobody would take."""


def sdpa(backend: SDPBackend, case: Case, clock: Clock) -> Run:
    """Torch's scaled_dot_product_attention, held to one backend."""
    if clock.dry:
        backend = SDPBackend.MATH  # the same call; the CPU has neither of the two

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return run


def flex(case: Case, clock: Clock) -> Run:
    """FlexAttention with a block mask, compiled; uncompiled in a dry run, for the CPU has no backward either way."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.length > FLEX_LIMIT:
        raise Unfit(f"a block mask of {case.length} tokens: building it walks all pairs of blocks and tokens")
    rule = flex_rule(case, clock.device)
    patterns = by_head(case.mask, 0, case.groups, case.groups)
    heads = case.heads if len(patterns) > 1 else None
    torch._dynamo.reset()  # of an earlier case's shapes: at the limit of recompilations it would run uncompiled
    block = create_block_mask(
        rule, None, heads, case.length, case.length, device=str(clock.device), _compile=not clock.dry
    )
    operator = flex_attention if clock.dry else torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if clock.dry:
            q, k, v = q.detach(), k.detach(), v.detach()
        out = operator(q, k, v, block_mask=block, enable_gqa=True)
        assert isinstance(out, Tensor)
        return out.transpose(1, 2)

    return run


def flex_rule(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """Return FlexAttention's predicate for a case, written for it and not derived from our masks."""
    words, numbers = case.name, [int(word) for word in case.name.split() if word.isdigit()]
    if words.startswith("causal"):
        return lambda b, h, q, k: q >= k
    if words.startswith("window"):
        left, sinks = numbers
        return lambda b, h, q, k: (q >= k) & ((q - k <= left) | (k < sinks))
    if words.startswith("s2"):
        (size,), share = numbers, case.heads // case.groups

        def groups(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            shift = (h // share) % 2 * (size // 2)
            return (q >= k) & ((q + size - shift) // size == (k + size - shift) // size)

        return groups
    number = document_numbers(case).to(device)
    return lambda b, h, q, k: (q >= k) & (number[q] == number[k])


def boundaries(case: Case) -> list[int]:
    """Return the document boundaries of a case."""
    assert isinstance(case.mask, And)
    return [edge for part in case.mask.parts if isinstance(part, Documents) for edge in part.boundaries]  # pyright: ignore[reportReturnType]


def document_numbers(case: Case) -> Tensor:
    """Return the number of each token's document."""
    edges = torch.tensor(boundaries(case)[1:])
    return torch.searchsorted(edges, torch.arange(case.length), right=True)


def varlen(case: Case, clock: Clock) -> Run:
    """Torch's attention over packed documents (FlashAttention 2's kernel)."""
    if clock.dry:
        raise Unfit("its operator runs on CUDA alone")
    operator = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    known = inspect.signature(operator).parameters  # they move from release to release
    causal: dict[str, Any] = {"is_causal": True} if "is_causal" in known else {"window_size": (-1, 0)}
    grouped = "enable_gqa" in known
    edges = torch.tensor(boundaries(case), dtype=torch.int32, device=clock.device)
    longest = int(edges.diff().max())

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x[0] if grouped else x[0].repeat_interleave(q.shape[2] // x.shape[2], 1) for x in (k, v))
        more = {"enable_gqa": True} if grouped else {}
        return operator(q[0], keys, values, edges, edges, longest, longest, **causal, **more)[None]

    return run


def flash_attn_2(case: Case, clock: Clock) -> Run:
    """FlashAttention 2, if it is installed."""
    function = importlib.import_module("flash_attn").flash_attn_func
    return lambda q, k, v: function(q, k, v, causal=True)


def flash_attn_3(case: Case, clock: Clock) -> Run:
    """FlashAttention 3, if it is installed."""
    function = importlib.import_module("flash_attn_interface").flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Any = function(q, k, v, causal=True)
        return result[0] if isinstance(result, tuple) else result

    return run


def fla(case: Case, clock: Clock) -> Run:
    """flash-linear-attention's softmax attention, if it is installed."""
    function = importlib.import_module("fla.ops.attn.parallel").parallel_attn
    return lambda q, k, v: function(q, k, v)


PEERS: dict[str, Callable[[Case, Clock], Run]] = {
    "sdpa cudnn": functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION),
    "sdpa flash": functools.partial(sdpa, SDPBackend.FLASH_ATTENTION),
    "flex": flex,
    "varlen": varlen,
    "flash_attn 2": flash_attn_2,
    "flash_attn 3": flash_attn_3,
    "fla": fla,
}
