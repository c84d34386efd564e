"""Batches run one after the other, each operation is waited for once, and nothing starts after a fault."""

import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from ringspan.dist_attn import turns as module
from ringspan.dist_attn.turns import Turn, Turns

PATIENCE_S = 20


class Operation:
    """Stands for an operation and its work: ends when told to, or fails; counts waits."""

    def __init__(self, fault: str | None = None) -> None:
        self.started, self.may_end, self.fault, self.waits = False, threading.Event(), fault, 0

    def wait(self) -> None:
        self.waits += 1
        assert self.waits == 1, "gloo's second wait would not end"
        assert self.may_end.wait(PATIENCE_S)
        if self.fault:
            raise RuntimeError(self.fault)


@pytest.fixture(autouse=True)
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def start(operations: list[Any]) -> list[Any]:
        for each in operations:
            each.started = True
        return operations

    monkeypatch.setattr(module, "dist", SimpleNamespace(batch_isend_irecv=start))
    before = threading.active_count()
    yield
    until(lambda: threading.active_count() == before)  # no thread stays behind


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def post(turns: Turns, *operations: Operation) -> list[Turn]:
    return turns.post(operations)  # pyright: ignore[reportArgumentType]


def test_a_batch_starts_when_the_one_before_has_ended() -> None:
    turns, batches = Turns(), [[Operation(), Operation()] for _ in range(3)]
    waits = [post(turns, *batch) for batch in batches]
    for number, batch in enumerate(batches):
        until(lambda batch=batch: all(each.started for each in batch))
        time.sleep(0.02)
        assert [any(each.started for each in other) for other in batches] == [other <= number for other in range(3)]
        for each in batch:
            each.may_end.set()
    for each in waits[2] + waits[0] + waits[1]:
        each.wait()
    assert [each.waits for batch in batches for each in batch] == [1] * 6


def test_alone_it_starts_at_once_and_without_a_thread() -> None:
    turns, threads = Turns(), threading.active_count()
    for _ in range(3):
        operation = Operation()
        operation.may_end.set()
        (turn,) = post(turns, operation)
        assert operation.started
        turn.wait()
        turn.wait()
        assert operation.waits == 1
    assert threading.active_count() == threads


def test_nothing_starts_after_a_fault_and_every_later_wait_says_so() -> None:
    turns = Turns()
    first, second, third = [Operation(), Operation("peer lost"), Operation()], [Operation()], [Operation()]
    waits = [post(turns, *batch) for batch in (first, second, third)]
    for each in first:
        each.may_end.set()
    waits[0][0].wait()
    for turn in (*waits[0][1:], *waits[1], *waits[2]):
        with pytest.raises(RuntimeError, match="peer lost"):
            turn.wait()
    assert not second[0].started
    assert not third[0].started


def test_main_and_the_thread_may_wait_for_the_same() -> None:
    turns, operations = Turns(), [Operation(), Operation()]
    (first,), (second,) = (post(turns, each) for each in operations)
    threading.Timer(0.05, operations[0].may_end.set).start()
    threading.Timer(0.1, operations[1].may_end.set).start()
    second.wait()
    first.wait()
    assert [each.waits for each in operations] == [1, 1]
