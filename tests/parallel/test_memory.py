"""What a failed allocation is told as: one line with what was asked for, and settings that are not used yet."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ringspan.parallel.faults import Fault
from ringspan.parallel.memory import advice, explain, resident_bytes

PLAIN: dict[str, Any] = {
    "train.activation_checkpointing": "none",
    "train.mlp_tile": None,
    "train.loss_chunk": 1024,
    "train.batch_size": 1,
    "parallel.cp": 2,
    "parallel.dp_shard": None,
    "parallel.cpu_offload": False,
    "parallel.engine": "fsdp",
    "model.dtype": "float32",
}
# As torch 2.13's allocator says it.
CUDA = (
    "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 139.81 GiB of which 5.00 GiB is "
    "free. Including non-PyTorch memory, this process has 134.75 GiB memory in use. Of the allocated memory 130.00 GiB "
    "is allocated by PyTorch, and 1.20 GiB is reserved by PyTorch but unallocated."
)


def failing(do: Callable[[], object]) -> BaseException:
    try:
        do()
    except (RuntimeError, MemoryError) as error:
        return error
    raise AssertionError("nobody has so much memory")


@pytest.mark.parametrize(
    ("do", "asked"),
    [
        (lambda: torch.empty(1 << 60, dtype=torch.uint8), "1.0 EiB asked for"),
        (lambda: torch.ones(1 << 50, dtype=torch.float32), "4.0 PiB asked for"),
        (lambda: np.empty(1 << 57, dtype=np.float64), "1.0 EiB asked for"),
        (lambda: bytearray(1 << 60), None),
    ],
)
def test_allocations_that_fail_here_are_told_with_their_size(do: Callable[[], object], asked: str | None) -> None:
    said = explain(failing(do), rank=3, settings=PLAIN, in_use=3 << 30)
    assert said is not None
    assert said.startswith(
        f"rank 3: out of host memory, {asked} with 3.0 GiB in use; what helps most: "
        if asked
        else "rank 3: out of host memory with 3.0 GiB in use; what helps most: "
    )
    assert "\n" not in said
    assert "CUDA" not in said


def test_an_error_of_the_device_is_told_with_what_it_says() -> None:
    said = explain(torch.OutOfMemoryError(CUDA), rank=0, settings=PLAIN)
    assert said == (
        "rank 0: out of GPU memory, 20.5 GiB asked for with 134.8 GiB in use of 139.8 GiB; what helps most: "
        "train.activation_checkpointing=selective, train.mlp_tile=2048, model.dtype=bfloat16"
    )
    pinned = explain(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), rank=1, settings={})
    assert pinned == "rank 1: out of GPU memory; take more ranks, or a smaller model"


def test_what_an_error_was_raised_from_is_found_and_other_errors_are_not_explained() -> None:
    raised = Fault("the batch cannot be laid out")
    raised.__cause__ = failing(lambda: torch.empty(1 << 60, dtype=torch.uint8))
    assert explain(raised, rank=0, settings=PLAIN) is not None
    for other in (
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ValueError("CUDA out of memory"),
        OSError(),
    ):
        assert explain(other, rank=0, settings=PLAIN) is None


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_advice_that_is_taken_is_not_given_again_and_comes_to_an_end(device: str) -> None:
    settings, given = dict(PLAIN), []
    for _ in range(40):
        if not (helps := advice(settings, device)):
            break
        name, _, value = helps[0].partition("=")
        assert helps[0] not in given
        given.append(helps[0])
        before = settings[name]
        settings[name] = int(value) if value.isdigit() else value == "true" if value == "true" else value
        assert settings[name] != before
        if name in ("parallel.cp", "parallel.dp_shard"):  # there are no more ranks
            del settings[name]
    assert {name.partition("=")[0] for name in given} >= {
        "train.activation_checkpointing", "train.mlp_tile", "train.loss_chunk", "parallel.cp", "parallel.dp_shard",
    }  # fmt: skip
    assert ("parallel.cpu_offload=true" in given) == (device == "cuda")
    assert ("train.activation_checkpointing=offload" in given) == (device == "cuda")
    assert advice(settings, device) == []


def test_advice_fits_what_is_set() -> None:
    assert advice({**PLAIN, "train.batch_size": 8, "train.loss_chunk": 4096}, "cuda")[:3] == [
        "train.activation_checkpointing=selective",
        "train.batch_size=4",
        "train.loss_chunk=1024",
    ]
    used = {**PLAIN, "train.activation_checkpointing": "selective", "train.mlp_tile": 1024, "model.dtype": "bfloat16"}
    assert advice(used, "cuda") == [
        "train.activation_checkpointing=offload",
        "parallel.cp=4",
        "parallel.dp_shard=2",
        "parallel.cpu_offload=true",
        "train.loss_chunk=256",
    ]
    assert "parallel.cpu_offload=true" not in advice({**used, "parallel.engine": "deepspeed"}, "cuda")
    assert not any(
        "parallel.cp" in each for each in advice({**used, "parallel.cp": -1, "parallel.cpu_offload": True}, "cuda")
    )


def test_a_process_knows_what_it_occupies() -> None:
    before = resident_bytes()
    held = torch.ones(64 << 20, dtype=torch.uint8)
    after = resident_bytes()
    assert before is not None
    assert after is not None
    assert after - before > held.numel() // 2
