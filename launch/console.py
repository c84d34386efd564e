"""What a person sees: a banner, a progress bar on a terminal, plain lines elsewhere; on the first rank only."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Console:
    """Prints for rank 0 and is silent on the others.

    Args:
        speaks: whether this process is the one that prints.
        total: training steps; ``start``: steps done before this run.
    """

    def __init__(self, speaks: bool, total: int, start: int = 0) -> None:
        self._speaks = speaks
        self._total, self._start = total, start
        self._began = time.monotonic()
        self._rich = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def banner(self, facts: Mapping[str, str]) -> None:
        """Print one aligned line per fact."""
        width = max(len(name) for name in facts)
        for name, value in facts.items():
            self.line(f"{name:<{width}}  {value}")

    def line(self, text: str) -> None:
        """Print one line; above the bar where there is one."""
        if self._speaks:
            self._rich.print(text, markup=False)
            sys.stdout.flush()

    def __enter__(self) -> Console:
        self._began = time.monotonic()
        if self._speaks and self._rich.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._rich)
            self._task = self._progress.add_task("training", total=self._total, completed=self._start)
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def step(self, number: int, facts: Sequence[str], say: bool) -> None:
        """Report a finished step: the bar moves, with the first facts; without one, a line with the time left.

        Args:
            facts: the most telling first; a bar has room for two.
            say: whether this step gets a line of its own.
        """
        text = "  ".join(facts)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=number, description="  ".join(facts[:2]))
        elif say:
            self.line(f"step {number:>{len(str(self._total))}}/{self._total}  {text}  left {self._left(number)}")

    def _left(self, number: int) -> str:
        done = number - self._start
        seconds = (time.monotonic() - self._began) / max(done, 1) * (self._total - number)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
