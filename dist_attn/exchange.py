"""Checked transfers over a given process group, and the agreement that goes before them.

gloo accepts a wrong size, dtype or order without a word, and a receiver whose buffer is too small aborts. So the ranks
first agree on a digest of everything their plans derive from (``agree``), and each message then carries a 64-byte
header that its receiver compares with what the plan told it to expect. Bytes are counted from the buffers handed over.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ringspan.dist_attn.message import Message, Spec
from ringspan.dist_attn.turns import Turn, Turns

_MAGIC = 0x52494E475350414E  # "RINGSPAN"
_PACKET_BYTES = 512


class Disagreement(ValueError):
    """The ranks' inputs differ, or one of them has a fault. ``rank`` is the lowest that knows (group rank)."""

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


class PeerLost(RuntimeError):
    """A transfer did not end: its peer is dead, silent beyond the group's timeout, or runs other code."""


@dataclass
class Traffic:
    """Bytes counted from the tensors handed to send, receive and collectives; ``payload`` leaves out the headers."""

    sent_payload: int = 0
    received_payload: int = 0
    sent_wire: int = 0
    received_wire: int = 0
    messages: int = 0


Expected = tuple[int, Message, tuple[int, ...]]  # from which rank, into which buffer, with which header


class Pending:
    """Transfers in flight; ``wait`` ends them and checks every header that came in.

    Args:
        works: each with the peers it serves, in words ("rank 3"); they are ``dist.Work`` or wait like it.
        expected: the messages that come in.
        place: who waits, and where in its plan, for errors.
    """

    def __init__(
        self, works: Sequence[tuple[dist.Work | Turn, str]], expected: list[Expected], place: str = ""
    ) -> None:
        self._works, self._expected, self._place = list(works), expected, place

    def wait(self) -> None:
        """Block until every transfer is done.

        Raises:
            PeerLost: if one does not end; names this rank, the step, the peer and how long it was waited for.
            RuntimeError: if a message is not the one the plan told this rank to expect.
        """
        began = time.monotonic()
        for index, (work, _) in enumerate(self._works):
            try:
                work.wait()
            except RuntimeError as error:
                # A peer that does not take a message may itself wait for the one that is lost: name all that are left.
                left = " or ".join(dict.fromkeys(peers for _, peers in self._works[index:]))
                raise _lost(self._place, left, time.monotonic() - began, error) from error
        for peer, message, header in self._expected:
            _check(peer, message, header, self._place)
        self._works, self._expected = [], []


class Exchange:
    """Transfers of one call of attention over ``group``.

    Args:
        group: the ranks that share the sequence.
        digest: the plan's hash (hex); part of every header.
        label: tells calls with equal plans apart (the layer's index).
        traffic: counters to add to.
        debug: messages also carry their shapes, dtypes, hops and a checksum.
    """

    def __init__(
        self, group: dist.ProcessGroup, digest: str, label: int, traffic: Traffic, *, debug: bool = False
    ) -> None:
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        self.traffic, self.debug = traffic, debug
        self._digest = (int(digest[:15], 16), int(digest[15:30], 16))
        self._label = label
        self._turns = Turns()

    def message(self, specs: Sequence[Spec], device: torch.device, note: int = 0) -> Message:
        """Return an empty message for tensors of these shapes and dtypes."""
        return Message(specs, device, debug=self.debug, note=note)

    def post(
        self,
        round_id: int,
        sends: Sequence[tuple[int, Message]],
        receives: Sequence[tuple[int, Message]],
    ) -> Pending:
        """Start all transfers of a round, once those posted before are done; return at once.

        Args:
            round_id: the same number on both sides; rounds are posted in the same order on every rank.
            sends: (group rank, message) in ascending rank; receives: likewise.
        """
        operations: list[dist.P2POp] = []
        expected: list[Expected] = []
        for peer, message in sends:
            message.label(self._header(round_id, self.rank, peer, message))
            operations.append(dist.P2POp(dist.isend, message.buffer, group=self.group, group_peer=peer))
            self._count(message.payload_bytes, message.buffer.numel(), 0, 0)
        for peer, message in receives:
            expected.append((peer, message, self._header(round_id, peer, self.rank, message)))
            operations.append(dist.P2POp(dist.irecv, message.buffer, group=self.group, group_peer=peer))
            self._count(0, 0, message.payload_bytes, message.buffer.numel())
        self.traffic.messages += len(sends)
        peers = [f"rank {peer}" for peer, _ in [*sends, *receives]]
        place = self._place(f"step {round_id & 0xFFFF} (round {round_id:#x})")
        try:
            works = self._start(operations)
        except RuntimeError as error:
            raise _lost(place, " or ".join(peers), 0.0, error) from error
        # gloo gives a work for each transfer, NCCL one for the whole batch.
        named = peers if len(works) == len(peers) else [" or ".join(dict.fromkeys(peers))] * len(works)
        return Pending(list(zip(works, named, strict=True)), expected, place)

    def _start(self, operations: list[dist.P2POp]) -> Sequence[dist.Work | Turn]:
        if not operations:
            return []
        if operations[0].tensor.device.type == "cpu":
            return self._turns.post(operations)
        return dist.batch_isend_irecv(operations)  # NCCL's stream keeps the order

    def all_gather(self, local: Tensor, step: str) -> tuple[Tensor, Pending]:
        """Start gathering tensors of one shape: return [world, *local.shape], whole once ``wait`` returns.

        Args:
            local: contiguous, of the same shape and dtype on every rank.
            step: where in the plan, for errors.
        """
        whole = local.new_empty((self.world, *local.shape))
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        place, peers = self._place(step), f"the other {self.world - 1} ranks"
        try:
            work = gather(whole.flatten(0, 1), local, group=self.group, async_op=True)
        except RuntimeError as error:
            raise _lost(place, peers, 0.0, error) from error
        assert work is not None
        moved = (self.world - 1) * local.nbytes  # what any rank must take in, and the ring algorithm moves
        self._count(moved, moved, moved, moved)
        return whole, Pending([(work, peers)], [], place)

    def _count(self, sent: int, sent_wire: int, received: int, received_wire: int) -> None:
        self.traffic.sent_payload += sent
        self.traffic.sent_wire += sent_wire
        self.traffic.received_payload += received
        self.traffic.received_wire += received_wire

    def _place(self, step: str) -> str:
        return f"rank {self.rank} of {self.world}, layer {self._label}, {step}"

    def _header(self, round_id: int, source: int, target: int, message: Message) -> tuple[int, ...]:
        return (_MAGIC, *self._digest, self._label, round_id, source, target, message.payload_bytes)


def _lost(place: str, peers: str, seconds: float, error: RuntimeError) -> PeerLost:
    reason = str(error).splitlines()[0]
    return PeerLost(
        f"{place}: waited {seconds:.1f} s for {peers}, then: {reason}; see that rank's log for what ended or stopped it"
    )


def _check(peer: int, message: Message, header: tuple[int, ...], place: str) -> None:
    """Compare a message that came with what the plan told this rank to expect."""
    found = message.header
    if found.device.type != "cpu":
        # Asserting on the device keeps the host from waiting for the transfer.
        torch._assert_async((found == torch.tensor(header, device=found.device)).all())
    elif tuple(found.tolist()) != header:
        raise RuntimeError(
            f"{place}: message from rank {peer} is not the expected one: header {found.tolist()}, "
            f"expected {list(header)} "
            "(magic, plan, plan, label, round, source, target, bytes); the ranks ran different code or calls"
        )
    if message.debug and (fault := message.check_seal()):
        raise RuntimeError(f"{place}: message from rank {peer}: {fault}")


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
