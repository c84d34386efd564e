"""Batches of transfers one after the other, in the order in which they are posted, as on NCCL's stream.

gloo starts whatever is posted at once, and all that is on its way shares the wire: what is needed first comes last. A
thread starts the next batch when one has ended; it lives while batches wait for their turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Event, Lock, Thread

import torch.distributed as dist


class Turns:
    """Runs the batches of one call. Every rank posts them in the same order, so that none waits for a later one."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._waiting: deque[_Batch] = deque()
        self._running: _Batch | None = None
        self._busy = False  # a thread looks after what waits

    def post(self, operations: Sequence[dist.P2POp]) -> list[Turn]:
        """Start these operations when those before have ended; return at once, with a handle for each operation."""
        batch = _Batch(operations)
        with self._lock:
            if self._busy:
                self._waiting.append(batch)
            elif self._running is None or self._running.ended:
                self._running = batch
                batch.start()
            else:
                self._waiting.append(batch)
                self._busy = True
                Thread(target=self._look_after, args=(self._running,), daemon=True).start()
        return [Turn(batch, index) for index in range(len(operations))]

    def _look_after(self, before: _Batch) -> None:
        while True:
            before.finish()
            with self._lock:
                if not self._waiting:
                    self._busy = False
                    return
                self._running = batch = self._waiting.popleft()
            batch.start(before.fault)
            before = batch


class Turn:
    """One operation of a batch; ``wait`` as of ``dist.Work``."""

    def __init__(self, batch: _Batch, index: int) -> None:
        self._batch, self._index = batch, index

    def wait(self) -> None:
        """Block until the operation is done.

        Raises:
            RuntimeError: if it, or one before it, failed.
        """
        self._batch.started.wait()
        self._batch.finish()
        if self._batch.fault is not None and self._index >= self._batch.failed:
            raise self._batch.fault


class _Batch:
    """Operations that run together."""

    def __init__(self, operations: Sequence[dist.P2POp]) -> None:
        self._operations = list(operations)
        self._works: deque[dist.Work] = deque()
        self._lock = Lock()
        self.started = Event()
        self.fault: Exception | None = None
        self.failed = 0  # the first operation that did not end

    @property
    def ended(self) -> bool:
        return self.started.is_set() and not self._works

    def start(self, fault: Exception | None = None) -> None:
        """Start all operations, or none after a fault: their peers may be where it happened."""
        self.fault = fault
        if fault is None:
            try:
                self._works = deque(dist.batch_isend_irecv(self._operations))
            except Exception as error:  # raised by who waits: in the thread nobody would see it
                self.fault = error
        self.started.set()

    def finish(self) -> None:
        """Wait for all operations; once for each, whoever asks: a second wait for one would not end."""
        with self._lock:
            while self._works:
                try:
                    self._works[0].wait()
                except Exception as error:
                    self.fault, self.failed = error, len(self._operations) - len(self._works)
                    self._works.clear()
                else:
                    self._works.popleft()
