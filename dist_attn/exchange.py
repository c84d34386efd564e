"""Checked messages over a given process group, and the agreement that goes before them.

gloo accepts a wrong size, dtype or order without a word, and a receiver whose buffer is too small aborts. So the ranks
first agree on a digest of everything their plans derive from (``agree``), and each message then carries a 64-byte
header that its receiver compares with what the plan told it to expect. Bytes are counted from the buffers handed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

HEADER_BYTES = 64
_MAGIC = 0x52494E475350414E  # "RINGSPAN"
_PACKET_BYTES = 512


class Disagreement(ValueError):
    """The ranks' inputs differ, or one of them has a fault. ``rank`` is the lowest that knows (group rank)."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass
class Traffic:
    """Bytes counted from the tensors handed to send and receive; ``payload`` leaves out the headers."""

    sent_payload: int = 0
    received_payload: int = 0
    sent_wire: int = 0
    received_wire: int = 0
    messages: int = 0


class Message:
    """One buffer: a 64-byte header, then the payload as two tensors of equal shape (K and V, or dK and dV)."""

    def __init__(
        self,
        batch: int,
        rows: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.payload_bytes = 2 * batch * rows * heads * head_dim * dtype.itemsize
        self.buffer = torch.empty(HEADER_BYTES + self.payload_bytes, dtype=torch.uint8, device=device)
        both = self.buffer[HEADER_BYTES:].view(dtype).view(2, batch, rows, heads, head_dim)
        self.first, self.second = both[0], both[1]  # [B, rows, G, D] each

    def label(self, values: Sequence[int]) -> None:
        """Write the header."""
        self.buffer[:HEADER_BYTES].view(torch.int64).copy_(torch.tensor(values, dtype=torch.int64))


class Pending:
    """Transfers in flight; ``wait`` ends them and checks every header that came in."""

    def __init__(self, works: list[dist.Work], expected: list[tuple[int, Message, tuple[int, ...]]]) -> None:
        self._works = works
        self._expected = expected

    def wait(self) -> None:
        """Block until every transfer is done.

        Raises:
            RuntimeError: if a message is not the one the plan told this rank to expect.
        """
        for work in self._works:
            work.wait()
        for peer, message, header in self._expected:
            found = message.buffer[:HEADER_BYTES].view(torch.int64)
            if found.device.type != "cpu":
                # Asserting on the device keeps the host from waiting for the transfer.
                torch._assert_async((found == torch.tensor(header, device=found.device)).all())
            elif tuple(found.tolist()) != header:
                raise RuntimeError(
                    f"message from rank {peer} is not the expected one: header {found.tolist()}, "
                    f"expected {list(header)} "
                    "(magic, plan, plan, label, round, source, target, bytes); the ranks ran different code or calls"
                )
        self._works, self._expected = [], []


class Exchange:
    """Point-to-point messages of one call of attention over ``group``.

    Args:
        group: the ranks that share the sequence.
        digest: the plan's hash (hex); part of every header.
        label: tells calls with equal plans apart (the layer's index).
        traffic: counters to add to.
    """

    def __init__(self, group: dist.ProcessGroup, digest: str, label: int, traffic: Traffic) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.traffic = traffic
        self._digest = (int(digest[:15], 16), int(digest[15:30], 16))
        self._label = label

    def post(
        self,
        round_id: int,
        sends: Sequence[tuple[int, Message]],
        receives: Sequence[tuple[int, Message]],
    ) -> Pending:
        """Start all transfers of a round and return at once.

        Args:
            round_id: the same number on both sides; rounds are posted in the same order on every rank.
            sends: (group rank, message) in ascending rank; receives: likewise.
        """
        operations: list[dist.P2POp] = []
        expected: list[tuple[int, Message, tuple[int, ...]]] = []
        for peer, message in sends:
            message.label(self._header(round_id, self.rank, peer, message))
            operations.append(dist.P2POp(dist.isend, message.buffer, group=self.group, group_peer=peer))
            self.traffic.sent_payload += message.payload_bytes
            self.traffic.sent_wire += message.buffer.numel()
            self.traffic.messages += 1
        for peer, message in receives:
            expected.append((peer, message, self._header(round_id, peer, self.rank, message)))
            operations.append(dist.P2POp(dist.irecv, message.buffer, group=self.group, group_peer=peer))
            self.traffic.received_payload += message.payload_bytes
            self.traffic.received_wire += message.buffer.numel()
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, expected)

    def _header(self, round_id: int, source: int, target: int, message: Message) -> tuple[int, ...]:
        return (_MAGIC, *self._digest, self._label, round_id, source, target, message.payload_bytes)


def agree(group: dist.ProcessGroup | None, facts: str, fault: str | None = None) -> None:
    """Let all ranks go on only if none has a fault and all state the same facts. One fixed-size gather.

    Args:
        group: the ranks that must agree; None checks this process alone.
        facts: everything the ranks' plans derive from, readable; long texts are compared by digest.
        fault: what is wrong on this rank, in one line.

    Raises:
        Disagreement: on every rank alike, with the lowest rank's fault or the first difference.
    """
    if group is None or dist.get_world_size(group) == 1:
        if fault is not None:
            raise Disagreement(fault, 0)
        return
    digest = hashlib.sha256(facts.encode()).digest()
    text = (facts if fault is None else fault).encode()[: _PACKET_BYTES - 34]
    packet = bytes([fault is not None]) + digest + text
    mine = torch.frombuffer(bytearray(packet.ljust(_PACKET_BYTES, b"\0")), dtype=torch.uint8).clone()
    if dist.get_backend(group) == "nccl":
        mine = mine.cuda()
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, mine, group=group)
    packets = [bytes(each.cpu().tolist()) for each in gathered]
    texts = [each[33:].rstrip(b"\0").decode(errors="replace") for each in packets]
    for rank, each in enumerate(packets):
        if each[0]:
            raise Disagreement(texts[rank], rank)
    for rank, each in enumerate(packets):
        if each[1:33] != packets[0][1:33]:
            raise Disagreement(
                f"ranks disagree on their inputs: rank 0 has {texts[0]}; rank {rank} has {texts[rank]}; "
                "every rank of the group must pass the same mask, layout, length, heads, dtype and batch",
                0,
            )
