"""Chunked cross-entropy: the sum over tokens, its gradients, and logits that never exist all at once."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dense import relative_rms
from ringspan.finetune.loss import ChunkedLoss, chunked_cross_entropy, token_losses
from ringspan.parallel.tensor_weights import cut, run_locally
from ringspan.parallel.testing import run_ranks


class Head(nn.Linear):
    """Remembers the largest number of tokens it was ever asked for at once."""

    largest = 0

    def forward(self, input: Tensor) -> Tensor:
        self.largest = max(self.largest, input.shape[0])
        return super().forward(input)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_sum_and_gradients_match_the_whole(chunk: int) -> None:
    torch.manual_seed(0)
    head = Head(16, 31, dtype=torch.float64)
    hidden = torch.randn(2, 17, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 31, (2, 17))
    labels[0, :5] = -100
    truth = F.cross_entropy(F.linear(hidden, head.weight, head.bias).flatten(0, 1), labels.flatten(), reduction="sum")
    wanted = torch.autograd.grad(truth, (hidden, head.weight, head.bias))
    loss = chunked_cross_entropy(hidden, head, labels, chunk=chunk)
    found = torch.autograd.grad(loss, (hidden, head.weight, head.bias))
    assert float(loss.detach()) == pytest.approx(float(truth.detach()), rel=1e-13)
    assert max(relative_rms(a, b) for a, b in zip(found, wanted, strict=True)) < 1e-13
    assert head.largest == min(chunk, 34)


def test_a_shard_without_scored_tokens_gives_zero_and_a_gradient() -> None:
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, nn.Linear(8, 5), torch.full((1, 4), -100), chunk=3)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_token_losses_are_the_parts_of_the_sum() -> None:
    hidden, head = torch.randn(1, 9, 8), nn.Linear(8, 5)
    labels = torch.tensor([[0, 1, -100, 4, 3, 2, -100, 1, 0]])
    losses = token_losses(hidden, head, labels, chunk=4)
    assert losses.shape == (1, 9)
    assert losses[0, 2] == losses[0, 6] == 0
    total = chunked_cross_entropy(hidden, head, labels, chunk=4)
    assert float(losses.sum()) == pytest.approx(float(total.detach()), rel=1e-6)


def case(scored: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    """A head of 31 tokens, hidden states of which some are large, and labels; the last logits equal earlier ones."""
    torch.manual_seed(0)
    head = nn.Linear(16, 31, dtype=torch.float64)
    with torch.no_grad():
        head.weight[20], head.bias[20] = head.weight[3], head.bias[3]
    hidden = torch.randn(2, 17, 16, dtype=torch.float64)
    hidden[0, 2] = 500 * head.weight[3].detach()  # exp of its logits is beyond fp64, and two are the largest
    hidden[0, 3] = 500 * head.weight[29].detach()
    labels = torch.randint(0, 31, (2, 17))
    labels[0, :6] = torch.tensor([-100, 5, 3, 29, 20, -100])
    return head, hidden, labels if scored else torch.full((2, 17), -100)


def shared(group: dist.ProcessGroup, chunk: int, scored: bool) -> list[float]:
    """Return the errors of the sum, of the gradients and of each loss, and how many hits differ."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    head, hidden, labels = case(scored)
    logits = F.linear(hidden.requires_grad_(), head.weight, head.bias).flatten(0, 1)
    truth = F.cross_entropy(logits, labels.flatten(), reduction="sum")
    wanted = torch.autograd.grad(truth, (hidden, head.weight, head.bias))
    losses = F.cross_entropy(logits, labels.flatten(), reduction="none").view(2, 17)
    hits = (logits.argmax(-1) == labels.flatten()).view(2, 17)

    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    cut(head, "weight", 0, mesh)
    cut(head, "bias", 0, mesh)
    run_locally(head)
    mine = torch.tensor_split(hidden.detach(), ranks, dim=1)[rank].requires_grad_()
    loss = ChunkedLoss(chunk, group)
    total = loss.total(mine, head, labels)
    total.backward()
    found = [mine.grad, head.weight.grad, head.bias.grad]
    whole = [x.full_tensor() if isinstance(x, DTensor) else x for x in found if x is not None]
    right = [torch.tensor_split(wanted[0], ranks, dim=1)[rank], *wanted[1:]]
    each, likeliest = loss.each(mine, head, labels)
    assert each.dtype == torch.float64
    return [
        abs(float(total.detach() - truth.detach())) / max(1.0, float(truth.detach())),
        max(relative_rms(a, b) for a, b in zip(whole, right, strict=True)),
        relative_rms(each, losses),
        float((likeliest != hits).sum()),
    ]


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_that_share_the_vocabulary_give_the_loss_and_gradients_of_the_whole(
    ranks: int, chunk: int, scored: bool
) -> None:
    for total, gradient, each, hits in run_ranks(shared, ranks, chunk, scored):
        assert total <= 1e-13
        assert gradient <= 1e-13
        assert each <= 1e-13
        assert hits == 0


@pytest.mark.parametrize("scored", [True, False])
def test_alone_each_loss_and_hit_is_that_of_the_whole_logits(scored: bool) -> None:
    head, hidden, labels = case(scored)
    losses, hits = ChunkedLoss(7).each(hidden, head, labels)
    logits = F.linear(hidden, head.weight, head.bias).flatten(0, 1)
    truth = F.cross_entropy(logits, labels.flatten(), reduction="none").view(2, 17)
    assert relative_rms(losses, truth) <= 1e-13
    assert hits.equal((logits.argmax(-1) == labels.flatten()).view(2, 17))
    assert bool(hits.any()) == scored
    total = ChunkedLoss(7).total(hidden, head, labels)
    assert float(total.detach()) == pytest.approx(float(truth.detach().sum()), rel=1e-13)


def faulty(group: dist.ProcessGroup, how: str) -> str:
    head, hidden, labels = case(True)
    if how == "label":
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        cut(head, "weight", 0, mesh)
        cut(head, "bias", 0, mesh)
        run_locally(head)
        labels[1, 16] = 31
    mine: Any = torch.tensor_split(hidden, 2, dim=1)[dist.get_rank(group)]
    try:
        ChunkedLoss(7, group).total(mine, head, labels)
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "ran"


def test_a_label_outside_of_the_vocabulary_and_a_whole_head_are_refused_on_every_rank() -> None:
    assert all("out of bounds" in said for said in run_ranks(faulty, 2, "label"))
    assert all("head: Linear is not shared out; call shard_layers first" in s for s in run_ranks(faulty, 2, "whole"))
