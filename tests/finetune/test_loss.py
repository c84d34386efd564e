"""Chunked cross-entropy: the sum over tokens, its gradients, and logits that never exist all at once."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense import relative_rms
from ringspan.finetune.loss import chunked_cross_entropy, token_losses


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
