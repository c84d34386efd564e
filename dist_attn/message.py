"""One message: a header that says what it is, then its tensors end to end in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from zlib import crc32

import torch
from torch import Tensor

HEADER_BYTES = 64
TRAILER_BYTES = 64  # only in debug mode
_ALIGNMENT = 16

Spec = tuple[Sequence[int], torch.dtype]  # shape and dtype of one tensor of a message


class Message:
    """A buffer with a header, the payload, and in debug mode a trailer: shapes, dtypes, contents.

    Args:
        specs: shape and dtype of each tensor in the payload.
        device: where the buffer lies.
        debug: also carry a trailer that ``sealed`` fills and ``check_seal`` compares.
        note: a number both sides know (a digest of the hops inside); part of the trailer.
    """

    def __init__(self, specs: Sequence[Spec], device: torch.device, *, debug: bool = False, note: int = 0) -> None:
        self.specs = tuple((tuple(shape), dtype) for shape, dtype in specs)
        self.note = note
        starts, size = [], HEADER_BYTES
        for shape, dtype in self.specs:
            size = -(-size // _ALIGNMENT) * _ALIGNMENT
            starts.append(size)
            size += prod(shape) * dtype.itemsize
        self._end = -(-size // _ALIGNMENT) * _ALIGNMENT if debug else size
        self.debug = debug
        self.payload_bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in self.specs)
        self.buffer = torch.empty(self._end + TRAILER_BYTES * debug, dtype=torch.uint8, device=device)
        self.tensors: tuple[Tensor, ...] = tuple(
            self.buffer[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(starts, self.specs, strict=True)
        )

    @property
    def first(self) -> Tensor:
        """The first tensor: keys, or their gradient."""
        return self.tensors[0]

    @property
    def second(self) -> Tensor:
        """The second tensor: values, or their gradient."""
        return self.tensors[1]

    def label(self, values: Sequence[int]) -> None:
        """Write the header, eight integers; in debug mode the trailer too."""
        self.header.copy_(torch.tensor(values, dtype=torch.int64))
        if self.debug:
            self.trailer.copy_(torch.tensor(self._seal(), dtype=torch.int64))

    @property
    def header(self) -> Tensor:
        """The header as eight int64."""
        return self.buffer[:HEADER_BYTES].view(torch.int64)

    @property
    def trailer(self) -> Tensor:
        """The trailer as eight int64; debug mode only."""
        return self.buffer[self._end :].view(torch.int64)

    def check_seal(self) -> str | None:
        """Return what differs between the trailer that came and what this side expects, or None."""
        found, wanted = self.trailer.tolist(), self._seal()
        for name, a, b in zip(("shapes", "dtypes", "hops", "contents"), found, wanted, strict=False):
            if a != b:
                return f"its {name} are not the expected ones ({a:x} instead of {b:x}; expected {self._words()})"
        return None

    def _seal(self) -> list[int]:
        shapes = crc32(repr([shape for shape, _ in self.specs]).encode())
        dtypes = crc32(repr([str(dtype) for _, dtype in self.specs]).encode())
        contents = crc32(b"".join(x.contiguous().view(torch.uint8).cpu().numpy().tobytes() for x in self.tensors))
        return [shapes, dtypes, self.note, contents, 0, 0, 0, 0]

    def _words(self) -> str:
        return ", ".join(f"{list(shape)} {dtype}" for shape, dtype in self.specs)
