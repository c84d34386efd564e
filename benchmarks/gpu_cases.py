"""What is measured: sequence, heads, mask; the most important first, for time may run out."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ringspan.kernels.mask import Causal, Documents, Mask, Sinks, Span, Window
from ringspan.kernels.masks.heads import by_head, s2_attention

K = 1024


@dataclass(frozen=True)
class Case:
    """One attention problem.

    Args:
        name: of the pattern; length: tokens; heads, groups: query and KV heads; dim: of a head.
        peers: names of other libraries' operators that compute the same (see ``gpu_peers``).
        window: keys back of a query that it sees, and sinks: first keys that all see, for the peers' own masks.
    """

    name: str
    mask: Mask
    length: int
    dim: int
    peers: tuple[str, ...]
    heads: int = 32
    groups: int = 8

    @property
    def key(self) -> str:
        """A name no other case has."""
        size = f"{self.length // K}K" if self.length % K == 0 else str(self.length)
        return f"{self.name}, {size}, hd {self.dim}"

    @property
    def area(self) -> float:
        """Live (query, key) pairs, mean over the heads."""
        whole = Span(0, self.length)
        patterns = by_head(self.mask, 0, self.groups, self.groups)
        return sum(len(heads) * mask.area(whole, whole) for heads, mask in patterns) / self.groups

    @property
    def flops(self) -> float:
        """Of the forward, on the live area: two products of 2 D operations per pair and head; the backward has 2.5x."""
        return 4 * self.area * self.dim * self.heads

    def facts(self) -> dict[str, object]:
        """Return what a row says of its case."""
        return {
            "case": self.name,
            "mask": str(self.mask)[:200],
            "length": self.length,
            "heads": self.heads,
            "kv_heads": self.groups,
            "head_dim": self.dim,
            "area": self.area,
        }


DENSE_PEERS = ("sdpa cudnn", "flex", "sdpa flash", "flash_attn 3", "flash_attn 2", "fla")
SPARSE_PEERS = ("flex",)


def windowed(left: int, sinks: int) -> Mask:
    """Return a causal window of ``left`` + 1 keys and the first tokens."""
    return Causal() & (Window(left) | Sinks(sinks))


def packed(length: int, mean: int, seed: int = 0) -> Documents:
    """Return documents of random lengths (exponential, this mean) that fill a sequence."""
    generator, edges = random.Random(seed), [0]
    while edges[-1] < length:
        edges.append(min(length, edges[-1] + 1 + int(generator.expovariate(1 / mean))))
    return Documents(edges)


def dense(dry: bool) -> list[Case]:
    """Return the causal cases."""
    if dry:
        return [Case("causal", Causal(), 80, 16, DENSE_PEERS, 2, 1)]
    sizes = [(32, 128), (8, 128), (128, 128), (32, 64), (16, 128), (64, 128), (128, 64), (8, 64), (4, 128), (4, 64)]
    return [Case("causal", Causal(), size * K, dim, DENSE_PEERS) for size, dim in sizes + [(16, 64), (64, 64)]]


def sparse(dry: bool) -> list[Case]:
    """Return windows with sinks, groups and packed documents, and the dense case that they are held against."""
    if dry:
        return [
            Case("window 16 + 4 sinks", windowed(16, 4), 80, 16, SPARSE_PEERS, 2, 1),
            Case("s2 groups of 32", s2_attention(32), 80, 16, SPARSE_PEERS, 2, 2),
            Case("documents of 24", Causal() & packed(80, 24), 80, 16, (*SPARSE_PEERS, "varlen"), 2, 1),
        ]
    wide, narrow = ("window 4096 + 4 sinks", windowed(4096, 4)), ("window 1024 + 4 sinks", windowed(1024, 4))
    groups = ("s2 groups of 8192", s2_attention(8192))
    cases = [Case("causal", Causal(), 128 * K, 128, ())]
    cases += [Case(*pattern, 128 * K, 128, SPARSE_PEERS) for pattern in (wide, narrow, groups)]
    cases += [
        Case("documents of 8192", Causal() & packed(128 * K, 8 * K), 128 * K, 128, (*SPARSE_PEERS, "varlen")),
        Case(*wide, 1024 * K, 128, SPARSE_PEERS),
        Case(*narrow, 32 * K, 128, SPARSE_PEERS),
        Case(*wide, 32 * K, 128, SPARSE_PEERS),
        Case(*wide, 128 * K, 64, SPARSE_PEERS),
        Case(*narrow, 1024 * K, 128, SPARSE_PEERS),
        Case("documents of 1024", Causal() & packed(128 * K, K), 128 * K, 128, (*SPARSE_PEERS, "varlen")),
        Case(*groups, 32 * K, 128, SPARSE_PEERS),
        Case(*wide, 512 * K, 128, SPARSE_PEERS),
    ]
    return cases
