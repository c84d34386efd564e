"""Activations that lie in host memory between forward and backward, copied beside the computation.

A layer's tensors leave while the next layer computes, and are back before its backward begins: that of the layer after
it fetches them. So what the last layer put away never leaves, and at any time a few layers' tensors are on the device.
Every forward pass has a stack of its own, since micro-batches of a pipeline are not last in, first out.

All copies run in one order of their own (a side stream on CUDA). A host buffer may therefore be used again as soon as
its last copy has been asked for; and memory of the device is given back only after the computation waits for the copy.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, MutableMapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Copies(Protocol):
    """The device's side: copies that run in the order they were asked for, beside computation."""

    pinned: bool  # host memory must be page-locked

    def start(self, target: Tensor, source: Tensor) -> Any:
        """Begin a copy that comes after all that has been computed so far; return what ``wait`` takes."""
        ...

    def wait(self, event: Any) -> None:
        """Let what is computed from now on come after a copy."""
        ...


class PlainCopies:
    """Copies that are done at once, on the CPU: the same bookkeeping, and no memory won."""

    pinned = False

    def start(self, target: Tensor, source: Tensor) -> None:
        """See ``Copies``."""
        target.copy_(source)

    def wait(self, event: None) -> None:
        """See ``Copies``."""


class StreamCopies:
    """Copies on a side stream of a CUDA device."""

    pinned = True

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, target: Tensor, source: Tensor) -> Any:
        """See ``Copies``."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        if target.is_cuda:  # dropped unused, it must not be written to as somebody else's memory
            target.record_stream(self._stream)
        return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """See ``Copies``."""
        torch.cuda.current_stream(self._stream.device).wait_event(event)


class HostBuffers:
    """Host memory that is used again; never more bytes than were needed at one time, nor than ``limit``."""

    def __init__(self, pinned: bool, limit: int | None) -> None:
        self._pinned, self._limit = pinned, limit
        self._idle: dict[int, list[Tensor]] = {}
        self.bytes = 0  # that exist, in use or idle

    def take(self, size: int) -> Tensor | None:
        """Return a buffer of ``size`` bytes [size]; None where the limit is reached."""
        if same := self._idle.get(size):
            return same.pop()
        self._drop(size)
        if self._limit is not None and self.bytes + size > self._limit:
            return None
        self.bytes += size
        return torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._idle.setdefault(buffer.numel(), []).append(buffer)

    def _drop(self, size: int) -> None:
        """Let idle buffers of other sizes go, largest first, for one of ``size``."""
        for other in sorted(self._idle, reverse=True):
            while self._idle[other] and size > 0:
                self._idle[other].pop()
                self.bytes, size = self.bytes - other, size - other


class Away:
    """A tensor that lies in host memory, is on its way there or back, or waits to leave; its buffer goes with it."""

    def __init__(self, home: Offload, tensor: Tensor, layers: list[list[weakref.ref[Away]]]) -> None:
        self._home, self._layers, self._layer = home, layers, len(layers) - 1
        self._tensor: Tensor | None = tensor.detach()  # on the device; attached, it could keep its own graph alive
        self._buffer: Tensor | None = None
        self._event: Any = None
        self._taken = False
        # Strides that memory without gaps has, as near as can be to the tensor's own.
        self._like = torch.empty_like(tensor, device="meta")
        self._device = tensor.device

    def leave(self) -> tuple[Tensor, Any] | None:
        """Begin to leave; return the tensor, which must be held until the event, and that."""
        assert self._tensor is not None, "only what is on the device leaves"
        self._buffer = self._home.buffers.take(self._tensor.numel() * self._tensor.element_size())
        if self._buffer is None:
            return None
        self._event = self._home.copies.start(self._host, self._tensor)
        return self._tensor, self._event

    def left(self) -> None:
        """Forget the tensor on the device."""
        self._tensor = None

    def fetch(self) -> None:
        """Begin to come back."""
        if self._tensor is None:
            self._tensor = torch.empty_strided(
                self._like.shape, self._like.stride(), dtype=self._like.dtype, device=self._device
            )
            self._event = self._home.copies.start(self._tensor, self._host)

    def take(self) -> Tensor:
        """Return the tensor on its device; the rest of its layer, and the layer before it, begin to come back."""
        self.fetch()
        self._taken = True
        for number in (self._layer, self._layer - 1):
            for reference in self._layers[number] if number >= 0 else ():
                if (other := reference()) is not None and not other._taken:
                    other.fetch()
        tensor = self._tensor
        assert tensor is not None, "it was fetched"
        if self._buffer is not None:
            self._home.copies.wait(self._event)
            self._home.stay(tensor)
            self._tensor = None
        return tensor

    @property
    def _host(self) -> Tensor:
        assert self._buffer is not None, "it has left"
        return self._buffer.view(self._like.dtype).as_strided(self._like.shape, self._like.stride())

    def __del__(self) -> None:
        if self._buffer is not None:
            self._home.buffers.give(self._buffer)


class Offload:
    """Puts what layers save for the backward pass into host memory.

    Args:
        smallest: bytes; smaller tensors stay.
        in_flight: layers whose tensors may be on their way out at once; more: the computation waits.
        limit: bytes of host memory; what does not fit stays on the device. None: as many as it takes.
        copies: the device's side; None: made for the device of the first tensor.
    """

    def __init__(
        self, *, smallest: int = 1 << 20, in_flight: int = 1, limit: int | None = None, copies: Copies | None = None
    ) -> None:
        self._smallest, self._in_flight, self._limit = smallest, in_flight, limit
        self._copies, self._buffers = copies, None if copies is None else HostBuffers(copies.pinned, limit)
        self._device: torch.device | None = None
        self._layers: list[list[weakref.ref[Away]]] = []  # of the pass at work; what they hold is the graph's
        self._leaving: deque[list[tuple[Tensor, Any, weakref.ref[Away]]]] = deque()
        self.moved = 0  # bytes that left

    @property
    def copies(self) -> Copies:
        """The device's side, once a tensor has come."""
        assert self._copies is not None, "no tensor has come yet"
        return self._copies

    @property
    def buffers(self) -> HostBuffers:
        """The host memory, once a tensor has come."""
        assert self._buffers is not None, "no tensor has come yet"
        return self._buffers

    def layer(self, *, first: bool) -> saved_tensors_hooks:
        """Return the context of a layer's forward: what it saves for the backward pass is put away.

        Entering layers in their order sends away what the layer before has put away.

        Args:
            first: the first layer begins a new pass.
        """
        if first:
            self._layers = []
        elif self._layers:
            self._send(self._layers[-1])
        self._layers.append([])
        return saved_tensors_hooks(self.put, taken)

    def put(self, tensor: Tensor) -> Away | Tensor:
        """Put a tensor away, of the layer at work; return it, detached, if it is of those that stay."""
        if not self._layers or not self._may_leave(tensor):
            return tensor.detach()
        away = Away(self, tensor, self._layers)
        self._layers[-1].append(weakref.ref(away))
        return away

    def stay(self, tensor: Tensor) -> None:
        """Forget that a tensor was leaving; the caller has waited for its copy."""
        for layer in self._leaving:
            layer[:] = [each for each in layer if each[0] is not tensor]

    def _may_leave(self, tensor: Tensor) -> bool:
        # Subclasses are parameters, shards of a mesh, or what a compiler traces; a view of a weight frees nothing.
        plain = type(tensor) is Tensor and not isinstance(tensor._base, nn.Parameter)
        if not plain or tensor.layout != torch.strided or tensor.numel() * tensor.element_size() < self._smallest:
            return False
        if self._copies is None:
            self._copies = StreamCopies(tensor.device) if tensor.is_cuda else PlainCopies()
            self._buffers = HostBuffers(self._copies.pinned, self._limit)
        self._device = self._device or tensor.device
        return tensor.device == self._device and tensor.numel() > 0

    def _send(self, layer: list[weakref.ref[Away]]) -> None:
        sent = []
        for reference in layer:
            if (away := reference()) is not None and (begun := away.leave()) is not None:
                sent.append((*begun, reference))
                self.moved += begun[0].numel() * begun[0].element_size()
        self._leaving.append(sent)
        while len(self._leaving) > self._in_flight:
            for _, event, reference in self._leaving.popleft():
                self.copies.wait(event)
                if (away := reference()) is not None:
                    away.left()


class Kept(MutableMapping[int, tuple[Tensor, Tensor]]):
    """Layers' (out, lse) of attention, by the layer's index, put away with what else the layer saves.

    ``home`` is the ``Offload`` of the layer at work: those of several stages may share a pass.
    """

    def __init__(self, home: Offload) -> None:
        self.home = home
        self._held: dict[int, tuple[Away | Tensor, Away | Tensor]] = {}

    def __setitem__(self, index: int, pair: tuple[Tensor, Tensor]) -> None:
        self._held[index] = (self.home.put(pair[0]), self.home.put(pair[1]))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        out, lse = self._held[index]
        return taken(out), taken(lse)

    def __delitem__(self, index: int) -> None:
        del self._held[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def taken(put: Away | Tensor) -> Tensor:
    """Return what ``Offload.put`` took, on its device."""
    return put.take() if isinstance(put, Away) else put
