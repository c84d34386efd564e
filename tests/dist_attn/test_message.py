"""A message: tensors end to end in one buffer, and what its header and its seal tell."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringspan.dist_attn.message import HEADER_BYTES, TRAILER_BYTES, Message, Spec

CPU = torch.device("cpu")
LABEL = (1, -2, 3, 4, 5 << 40, 6, 7, 8)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
spec_lists = st.lists(st.tuples(st.lists(st.integers(0, 4), min_size=1, max_size=4), dtypes), max_size=4)


def filled(specs: list[Spec], *, debug: bool = True, note: int = 0) -> Message:
    message = Message(specs, CPU, debug=debug, note=note)
    for number, tensor in enumerate(message.tensors):
        tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + number)
    message.label(LABEL)
    return message


def arrived(sent: Message, specs: list[Spec], note: int = 0) -> Message:
    """Return what the receiver holds: its own expectation, with the bytes that were sent."""
    message = Message(specs, CPU, debug=True, note=note)
    message.buffer.copy_(sent.buffer[: message.buffer.numel()])
    return message


@given(spec_lists, st.booleans())
def test_tensors_lie_apart_and_aligned_behind_the_header(specs: list[Spec], debug: bool) -> None:
    message = filled(specs, debug=debug)
    assert message.header.tolist() == list(LABEL)
    assert message.payload_bytes == sum(x.numel() * x.element_size() for x in message.tensors)
    at, start = HEADER_BYTES, message.buffer.data_ptr()
    for number, (tensor, (shape, dtype)) in enumerate(zip(message.tensors, specs, strict=True)):
        assert (tuple(tensor.shape), tensor.dtype) == (tuple(shape), dtype)
        assert tensor.is_contiguous()
        if tensor.numel():
            offset = tensor.data_ptr() - start
            assert at <= offset < at + 16
            assert offset % 16 == 0
            at = offset + tensor.nbytes
        assert tensor.flatten().tolist() == [number + i for i in range(tensor.numel())]  # nothing was written over
    assert 0 <= message.buffer.numel() - TRAILER_BYTES * debug - at < 16


@given(spec_lists, st.integers(0, 1 << 32))
def test_what_was_sent_is_accepted(specs: list[Spec], note: int) -> None:
    sent = filled(specs, note=note)
    found = arrived(sent, specs, note)
    assert found.check_seal() is None
    assert all(torch.equal(a, b) for a, b in zip(sent.tensors, found.tensors, strict=True))


@settings(deadline=None)
@given(spec_lists.filter(lambda specs: any(0 not in shape for shape, _ in specs)), st.data())
def test_any_changed_byte_of_the_payload_is_noticed(specs: list[Spec], data: st.DataObject) -> None:
    found = arrived(filled(specs), specs)
    tensor = data.draw(st.sampled_from([x for x in found.tensors if x.numel()]))
    place = data.draw(st.integers(0, tensor.nbytes - 1))
    tensor.view(-1).view(torch.uint8)[place] ^= data.draw(st.integers(1, 255))
    assert str(found.check_seal()).startswith("its contents are not the expected ones")


@pytest.mark.parametrize(
    ("specs", "note", "what"),
    [
        ([([2, 6], torch.float32)], 3, "shapes"),
        ([([3, 4], torch.int32)], 3, "dtypes"),
        ([([3, 4], torch.float32)], 4, "hops"),
    ],
)
def test_the_seal_tells_what_differs(specs: list[Spec], note: int, what: str) -> None:
    found = arrived(filled([([3, 4], torch.float32)], note=3), specs, note)
    assert str(found.check_seal()).startswith(f"its {what} are not the expected ones")
    assert str(specs[0][0]) in str(found.check_seal())


def test_keys_and_values_have_names() -> None:
    message = filled([([2, 3], torch.float32), ([4], torch.float64)], debug=False)
    assert message.first is message.tensors[0]
    assert message.second is message.tensors[1]
    assert message.buffer.numel() == HEADER_BYTES + 2 * 3 * 4 + 8 + 4 * 8  # 8: the second tensor is aligned
    assert message.payload_bytes == 2 * 3 * 4 + 4 * 8
