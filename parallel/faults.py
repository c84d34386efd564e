"""Faults of the user's input or machine: told in one line, without a traceback, and on every rank alike.

Library code raises ``Fault`` where the cause lies outside the program (a missing file, a broken line, a full disk). The
launcher prints its message once and ends; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from ringspan.dist_attn.exchange import agree

T = TypeVar("T")


class Fault(ValueError):
    """One line that names what is wrong, the rule, and the remedy."""


def together(group: dist.ProcessGroup | None, what: str, do: Callable[[], T]) -> T:
    """Return ``do()``, once every rank of ``group`` has done it without a fault.

    Args:
        what: names the stage; every rank must be in the same one.
        do: must not communicate; a ``Fault`` it raises on any rank stops all of them.

    Raises:
        Disagreement: on every rank alike, with the lowest faulty rank's message.
    """
    fault, value = None, None
    try:
        value = do()
    except Fault as error:
        fault = str(error)
    agree(group, what, fault)
    return value  # pyright: ignore[reportReturnType]
