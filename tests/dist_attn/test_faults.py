"""Bad input stops every rank alike, in one line, before anything is sent; and a wrong message is noticed."""

import pytest
import torch
import torch.distributed as dist

from ringspan.dist_attn import (
    Causal,
    Contiguous,
    Disagreement,
    Documents,
    Full,
    Traffic,
    ZigZag,
    attention,
    unshard,
)
from ringspan.dist_attn.exchange import Exchange, Message, agree
from ringspan.parallel.testing import run_ranks


def tensors(tokens: int = 8, heads: int = 4, groups: int = 2, dim: int = 8) -> list[torch.Tensor]:
    return [torch.zeros(1, tokens, h, dim) for h in (heads, groups, groups)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(1, 8, 2, 4), "v": torch.zeros(1, 8, 2, 4)},
            "k: shape .* does not fit q's",
        ),
        ({"v": torch.zeros(1, 7, 2, 8)}, "q, k, v: shapes"),
        (
            {"k": torch.zeros(1, 8, 3, 8), "v": torch.zeros(1, 8, 3, 8)},
            "3 KV heads for 4 query heads",
        ),
        ({"q": torch.zeros(1, 8, 4, 8, dtype=torch.float64)}, "q, k, v: dtypes"),
        ({"q": torch.zeros(8, 4, 8)}, "q, k, v: shapes"),
        ({"sinks": torch.zeros(2)}, r"sinks: shape \(2,\); must be \[4\]"),
        ({"strategy": "teleport"}, "strategy: 'teleport' is not one of"),
        ({"length": 9}, "length: 9, but the only rank holds 8"),
        ({"mask": Documents([0, 9])}, "ends at 9 but the sequence has 8"),
        ({"mask": [Causal(), Full()]}, "2 masks for 1 batch rows"),
        (
            {"first_kv_head": 3, "total_kv_heads": 4},
            r"first_kv_head: 3 \+ 2 KV heads here exceeds total_kv_heads 4",
        ),
    ],
)
def test_one_rank_refuses_by_name(change: dict[str, object], message: str) -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=message):
        attention(**{"q": q, "k": k, "v": v, **change})  # pyright: ignore[reportArgumentType]


def refused(group: dist.ProcessGroup, kind: str) -> list[str]:
    rank = dist.get_rank(group)
    q, k, v = tensors(8 if kind != "length" or rank == 0 else 7)
    if kind == "shape" and rank == 1:
        q = q[0]
    mask = Causal() if kind != "mask" or rank == 0 else Full()
    layout = None if kind == "layout" else ZigZag() if kind != "layouts" or rank == 0 else Contiguous()
    try:
        attention(q, k, v, mask=mask, group=group, layout=layout, length=16)
    except Disagreement as error:
        return [str(error), str(error.rank)]
    return ["no error", ""]


@pytest.mark.parametrize(
    ("kind", "message", "rank"),
    [
        ("length", "q: 7 tokens, but rank 1 of 2 holds 8 of 16", "1"),
        ("mask", "ranks disagree on their inputs: rank 0 has .*mask causal; rank 1 has .*mask full", "0"),
        ("layouts", "rank 0 has .*ZigZag.*rank 1 has .*Contiguous", "0"),
        ("layout", "layout: required with 2 ranks", "0"),
        ("shape", "q, k, v: shapes", "1"),
    ],
)
def test_every_rank_stops_for_the_same_reason(kind: str, message: str, rank: str) -> None:
    first, second = run_ranks(refused, 2, kind)
    assert first == second
    assert first[1] == rank
    with pytest.raises(ValueError, match=message):
        raise ValueError(first[0])


def wrong_message(group: dist.ProcessGroup, kind: str) -> str:
    """Rank 1 sends something else than rank 0 expects, in a way gloo does not notice."""
    rank, peer = dist.get_rank(group), 1 - dist.get_rank(group)
    digest = "ab" * 32 if kind != "plan" or rank == 0 else "cd" * 32
    exchange = Exchange(group, digest, 3 if kind != "layer" or rank == 0 else 4, Traffic())
    round_id = 7 if kind != "round" or rank == 0 else 8
    rows = 4 if kind != "size" or rank == 0 else 2
    dtype = torch.float32 if kind != "dtype" or rank == 0 else torch.bfloat16
    message = Message(1, rows, 2, 8, dtype, torch.device("cpu"))
    message.first.zero_()
    message.second.zero_()
    if rank == 1:
        exchange.post(round_id, [(peer, message)], []).wait()
        return "sent"
    try:
        exchange.post(round_id, [], [(peer, message)]).wait()
    except RuntimeError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize("kind", ["plan", "layer", "round", "size", "dtype"])
def test_a_wrong_message_is_noticed(kind: str) -> None:
    assert "is not the expected one" in run_ranks(wrong_message, 2, kind)[0]


def test_the_right_message_is_accepted() -> None:
    assert run_ranks(wrong_message, 2, "none") == ["accepted", "sent"]


def long_facts(group: dist.ProcessGroup) -> str:
    """Facts longer than a packet are still compared whole."""
    try:
        agree(group, "x" * 5000 + str(dist.get_rank(group)))
    except Disagreement as error:
        return str(error)[:40]
    return "agreed"


def test_agreement_compares_more_than_it_shows() -> None:
    assert set(run_ranks(long_facts, 2)) == {"ranks disagree on their inputs: rank 0 h"}


def test_unshard_names_a_wrong_share() -> None:
    with pytest.raises(ValueError, match="x: 5 tokens along dim 1, but rank 0 of 1 holds 6 of 6"):
        unshard(torch.zeros(1, 5, 2), ZigZag(), None, length=6)
