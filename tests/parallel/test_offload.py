"""Activations in host memory: the same gradients, bit for bit, and nothing freed, overwritten or read too early."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from ringspan.parallel.offload import Away, Copies, HostBuffers, Kept, Offload, taken


class Late:
    """A device that does each copy at the last moment: when somebody waits for it, or for a later one.

    A source that is gone by then is no longer what it was, and a target is not to be read before.
    """

    pinned = False

    def __init__(self) -> None:
        self.begun: list[tuple[Tensor, weakref.ref[Tensor] | Tensor]] = []
        self.done = 0
        self.out: list[int] = []  # numbers of the copies to the host
        self.most_out = 0

    def start(self, target: Tensor, source: Tensor) -> int:
        leaves = target._base is not None  # a host buffer is a view of bytes
        if leaves:
            self.out.append(len(self.begun))
        else:
            target.fill_(torch.nan)
        self.begun.append((target, weakref.ref(source) if leaves else source))
        self.most_out = max(self.most_out, sum(number >= self.done for number in self.out))
        return len(self.begun) - 1

    def wait(self, event: int) -> None:
        for target, held in self.begun[self.done : event + 1]:
            source = held() if isinstance(held, weakref.ref) else held
            if source is None:
                target.fill_(torch.nan)
            else:
                target.copy_(source)
        self.done = max(self.done, event + 1)


class Layer(nn.Module):
    """Saves inputs, outputs, views of weights, a mask of booleans, and a transposed tensor."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.exp(-self.norm(x).transpose(0, 1).contiguous().transpose(0, 1).pow(2))
        return x + self.b(nn.functional.dropout(torch.relu(self.a(mixed)), 0.1))


Ways = Callable[[int, nn.Module, Tensor], Tensor]


def plain(number: int, layer: nn.Module, x: Tensor) -> Tensor:
    del number
    return layer(x)


def on_cpu(number: int, layer: nn.Module, x: Tensor) -> Tensor:
    del number
    with save_on_cpu():
        return layer(x)


def offloaded(home: Offload, recompute: bool) -> Ways:
    def way(number: int, layer: nn.Module, x: Tensor) -> Tensor:
        with home.layer(first=number == 0):
            return checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)  # pyright: ignore[reportReturnType]

    return way


def layers_of(count: int = 5) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Layer(8) for _ in range(count))


def forward(layers: nn.ModuleList, way: Ways, seed: int = 1, tokens: int = 6) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(3, tokens, 8, requires_grad=True)
    for number, layer in enumerate(layers):
        x = way(number, layer, x)
    return x.pow(2).sum()


def gradients(layers: nn.ModuleList, *losses: Tensor) -> list[Tensor]:
    for loss in losses:
        loss.backward()
    found = [parameter.grad for parameter in layers.parameters()]
    assert all(each is not None for each in found)
    return [each for each in found if each is not None]


def equal(found: list[Tensor], truth: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def homes() -> list[tuple[Offload, Copies | None]]:
    late = Late()
    return [(Offload(smallest=0), None), (Offload(smallest=0, copies=late), late)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [0, 1])
def test_gradients_are_the_same_bit_for_bit(kind: int, recompute: bool) -> None:
    home, _ = homes()[kind]
    layers = layers_of()
    truth = gradients(layers, forward(layers, plain))
    layers = layers_of()
    assert equal(gradients(layers, forward(layers, on_cpu)), truth)
    for _ in range(3):  # the second and third time in buffers used before
        layers = layers_of()
        assert equal(gradients(layers, forward(layers, offloaded(home, recompute))), truth)
    assert home.moved > 0
    assert not any(home._leaving)


@pytest.mark.parametrize("recompute", [False, True])
def test_passes_whose_backward_is_first_in_first_out_keep_apart(recompute: bool) -> None:
    def interleaved(way: Ways) -> list[Tensor]:
        layers = layers_of()
        first, second = forward(layers, way, 1), forward(layers, way, 2)
        first.backward()
        third = forward(layers, way, 3, tokens=7)
        return gradients(layers, second, third)

    home = Offload(smallest=0, copies=Late())
    assert equal(interleaved(offloaded(home, recompute)), interleaved(plain))
    if recompute:  # the last input of each pass stays, also when another pass begins
        assert home.moved == 4 * (6 + 6 + 7) * 3 * 8 * 4


def test_a_second_backward_through_the_same_graph_finds_everything() -> None:
    def twice(way: Ways) -> list[Tensor]:
        layers = layers_of()
        loss = forward(layers, way)
        loss.backward(retain_graph=True)
        return gradients(layers, loss)

    for recompute in (False, True):
        assert equal(twice(offloaded(Offload(smallest=0, copies=Late()), recompute)), twice(plain))


@pytest.mark.parametrize("in_flight", [1, 2])
def test_few_layers_are_on_their_way_at_once_and_the_last_never_leaves(in_flight: int) -> None:
    late, layers = Late(), layers_of(6)
    home = Offload(smallest=0, in_flight=in_flight, copies=late)
    loss = forward(layers, offloaded(home, recompute=True))
    size = 3 * 6 * 8 * 4
    assert len(late.out) == 5  # one input of each layer but the last
    assert home.moved == 5 * size
    assert late.most_out == in_flight + 1  # one more begins before the oldest is waited for
    assert sum(len(group) for group in home._leaving) == in_flight  # the rest has left the device
    loss.backward()
    # What had not left yet when the backward pass came to it was not fetched.
    assert len(late.begun) - len(late.out) == 5 - in_flight
    assert home.buffers.bytes == 5 * size


def test_a_layer_is_fetched_while_the_one_after_it_is_at_work() -> None:
    events: list[str] = []

    class Noted(Late):
        def start(self, target: Tensor, source: Tensor) -> int:
            if target._base is None:
                events.append("fetch")
            return super().start(target, source)

    class Loud(Layer):
        def forward(self, x: Tensor) -> Tensor:
            events.append("layer")
            return super().forward(x)

    layers = nn.ModuleList(Loud(8) for _ in range(5))
    loss = forward(layers, offloaded(Offload(smallest=0, copies=Noted()), recompute=True))
    assert events == ["layer"] * 5
    events.clear()
    loss.backward()
    # The last is there, the one before had not left; then each fetch stands before the layer above begins again.
    assert events == ["layer", "fetch", "layer", "fetch", "layer", "fetch", "layer", "layer"]


def test_small_tensors_parameters_and_other_devices_stay() -> None:
    home, weight = Offload(smallest=64, copies=Late()), nn.Parameter(torch.randn(8, 8))
    home.layer(first=True)
    for stays in (torch.ones(15), weight, weight.T, torch.ones(8, 8, device="meta"), torch.ones(8, 8).to_sparse()):
        home._device = torch.device("cpu")
        assert not isinstance(home.put(stays), Away)
    for leaves in (torch.ones(16), weight + 1, torch.ones(8, 8).T, torch.ones(8, 8, dtype=torch.bool)):
        away = home.put(leaves)
        assert isinstance(away, Away)
        assert taken(away).equal(leaves)


def test_strides_and_types_come_back() -> None:
    given = [
        torch.randn(4, 6, 5).transpose(0, 2),
        torch.randn(4, 6)[:, ::2],
        torch.randn(1, 6).expand(4, 6),
        torch.randn(7).to(torch.bfloat16),
        torch.arange(5),
        torch.tensor([True, False, True]),
        torch.randn(3, dtype=torch.complex64),
    ]
    home = Offload(smallest=0)
    home.layer(first=True)
    put = [home.put(each) for each in given]
    for _ in range(3):
        home.layer(first=False)
    assert all(isinstance(each, Away) and each._tensor is None for each in put)
    for away, each in zip(put, given, strict=True):
        back = taken(away)
        assert back.dtype == each.dtype
        assert back.equal(each)
    assert taken(put[0]).stride() == given[0].stride()


def test_host_memory_is_used_again_and_bounded() -> None:
    buffers = HostBuffers(pinned=False, limit=100)
    first, second = buffers.take(40), buffers.take(50)
    assert first is not None
    assert second is not None
    assert buffers.take(20) is None
    buffers.give(first)
    assert buffers.take(40) is first
    buffers.give(first)
    third = buffers.take(45)  # the idle one of 40 makes room
    assert third is not None
    assert buffers.bytes == 95
    buffers.give(second)
    buffers.give(third)
    assert buffers.take(90) is not None
    assert buffers.bytes == 90


def test_what_finds_no_host_memory_stays() -> None:
    truth = gradients(layers := layers_of(), forward(layers, plain))
    home = Offload(smallest=0, limit=2 * 3 * 6 * 8 * 4, copies=Late())
    layers = layers_of()
    assert equal(gradients(layers, forward(layers, offloaded(home, recompute=True))), truth)
    assert home.moved == home.buffers.bytes == 2 * 3 * 6 * 8 * 4


def test_a_pass_that_is_given_up_gives_its_memory_back() -> None:
    home, layers = Offload(smallest=0, copies=Late()), layers_of()
    loss = forward(layers, offloaded(home, recompute=True))
    used = home.buffers.bytes
    assert used > 0
    del loss
    gc.collect()
    truth = gradients(again := layers_of(), forward(again, plain, 2))
    layers = layers_of()
    assert equal(gradients(layers, forward(layers, offloaded(home, recompute=True), 2)), truth)
    assert home.buffers.bytes == used


def test_what_attention_kept_goes_the_same_way() -> None:
    home = Offload(smallest=0, copies=Late())
    kept: Any = Kept(home)
    pairs = [(torch.randn(3, 4), torch.randn(3)) for _ in range(4)]
    for index, pair in enumerate(pairs):
        home.layer(first=index == 0)
        kept[7 + index] = (pair[0].clone(), pair[1].clone())
    assert home.moved == 3 * 15 * 4
    for index in reversed(range(4)):
        out, lse = kept.pop(7 + index)
        assert out.equal(pairs[index][0])
        assert lse.equal(pairs[index][1])
    assert len(kept) == 0
    assert kept.pop(7, None) is None
