"""ModalityRouting: its three constructors, rows grouped by expert, and bad input."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmo.kernels import ModalityRouting
from vlmo.kernels.routing import Grouping
from vlmo.kernels.routing_index import routing_index

UNTYPED: Any = ModalityRouting  # for arguments that its types forbid


def listed(tensor: Any) -> list:
    return tensor.tolist()


def oracle(ids: list[int], experts: int) -> tuple[list[int], list[int]]:
    """rows and offsets, token by token."""
    rows = [t for e in range(experts) for t, i in enumerate(ids) if i == e]
    return rows, [sum(i < e for i in ids) for e in range(experts + 1)]


def assert_grouped(grouping: Grouping, expected: tuple[list[int], list[int]]) -> None:
    assert grouping.rows.dtype == grouping.offsets.dtype == torch.int32
    assert (grouping.rows.tolist(), grouping.offsets.tolist()) == expected


@settings(deadline=None, max_examples=60)
@given(experts=st.integers(1, 5), seed=st.integers(0, 2**31 - 1), tokens=st.integers(0, 70))
def test_grouping_of_ids(experts, seed, tokens):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (tokens,), generator=generator)
    routing = ModalityRouting.from_ids(ids, experts)
    assert_grouped(routing.grouping(tokens, ids.device), oracle(ids.tolist(), experts))


def test_docstring_example(device):
    routing = ModalityRouting.from_ids(torch.tensor([1, 0, 1, 3, 1], device=device), 4)
    grouping = routing.grouping(5, device)
    assert_grouped(grouping, ([1, 0, 2, 4, 3], [0, 1, 4, 4, 5]))
    assert routing.grouping(5, device) is grouping  # built once


@pytest.mark.parametrize("pieces", [[(0, 3), (1, 5)], [(2, 4), (0, 1), (2, 2)], [(0, 0), (1, 6)]])
def test_forms_agree(pieces, device):
    batch, experts = 3, 3
    ids = [expert for expert, length in pieces for _ in range(length)] * batch
    segments = ModalityRouting.segments(pieces, num_experts=experts)
    packed = ModalityRouting.packed([pieces] * batch, num_experts=experts, device=device)
    by_id = ModalityRouting.from_ids(torch.tensor(ids, device=device), experts)
    for routing in (segments, packed, by_id):
        assert_grouped(routing.grouping(len(ids), device), oracle(ids, experts))
    length = len(ids) // batch
    assert segments.sequence_length == length
    assert listed(packed.offsets) == [0, length, 2 * length, 3 * length]
    assert packed.max_length == length


def test_the_grouping_of_segments_is_looked_up_before_anything_is_built(monkeypatch):
    routing = ModalityRouting.segments([(0, 3), (1, 5)])
    grouping = routing.grouping(16, torch.device("cpu"))
    monkeypatch.setattr(ModalityRouting, "expert_ids", None)
    assert routing.grouping(16, torch.device("cpu")) is grouping
    with pytest.raises(TypeError):
        routing.grouping(24, torch.device("cpu"))


def test_pieces_are_merged_and_tell_whether_arithmetic_finds_the_rows():
    routing = ModalityRouting.segments([(0, 0), (1, 2), (0, 0), (1, 3), (0, 1), (2, 0)])
    assert routing.pieces == ((1, 5), (0, 1))
    assert routing.num_experts == 3
    assert routing.by_arithmetic
    assert not ModalityRouting.segments([(1, 2), (0, 1), (1, 3)]).by_arithmetic
    assert not ModalityRouting.packed([[(0, 2), (1, 3)]]).by_arithmetic


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_grouping_ignores_the_backend_that_was_asked_for(backend, device):
    """It is for another operation's kernel; the index itself has no Triton kernel, for example."""
    from vlmo.kernels import use_backend

    ids = [1, 0, 1, 3, 1]
    routing = ModalityRouting.from_ids(torch.tensor(ids, device=device), 4)
    with use_backend(backend):
        grouping = routing.grouping(5, device)
    assert grouping.ids is routing.ids
    assert grouping.rows.tolist() == [1, 0, 2, 4, 3]
    assert grouping.offsets.tolist() == [0, 1, 4, 4, 5]


def test_what_inference_mode_or_a_trace_made_does_no_harm_later():
    from torch._subclasses.fake_tensor import FakeTensorMode

    ids = torch.tensor([1, 0, 1, 3, 1])
    routing = ModalityRouting.from_ids(ids, 4)
    with torch.inference_mode():
        assert not routing.grouping(5, ids.device).rows.is_inference()
    routing = ModalityRouting.segments([(0, 1), (1, 1), (0, 1)])
    with FakeTensorMode():
        routing.grouping(3, ids.device)
    grouping = routing.grouping(3, ids.device)
    assert type(grouping.rows) is torch.Tensor
    assert grouping.rows.tolist() == [0, 2, 1]


def test_packed_sequences_of_different_lengths():
    routing = ModalityRouting.packed([[(0, 2), (1, 3)], [], [(1, 1)]])
    assert listed(routing.ids) == [0, 0, 1, 1, 1, 1]
    assert listed(routing.offsets) == [0, 5, 5, 6]
    assert routing.max_length == 5
    assert routing.num_experts == 2


def test_index_under_fake_tensors_has_the_real_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = routing_index(torch.tensor([0, 1, 1], dtype=torch.int32), 2)
    with FakeTensorMode() as mode:
        ids = mode.from_tensor(torch.tensor([0, 1, 1], dtype=torch.int32))
        fake = routing_index(ids, 2)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


def test_opcheck(device):
    ids = torch.tensor([0, 2, 1, 1], dtype=torch.int32, device=device)
    torch.library.opcheck(routing_index, (ids, 3))


def test_ids_of_any_shape_are_read_row_by_row():
    routing = ModalityRouting.from_ids(torch.tensor([[0, 1], [1, 0]], dtype=torch.uint8), 2)
    assert listed(routing.ids) == [0, 1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_ids_of_every_integer_type(dtype):
    assert listed(ModalityRouting.from_ids(torch.tensor([2, 0]).to(dtype), 3).ids) == [2, 0]
    with pytest.raises(ValueError, match="ids: 7 is outside"):
        ModalityRouting.from_ids(torch.tensor([0, 7]).to(dtype), 3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_are_copied(dtype):
    buffer = torch.tensor([0, 1, 1], dtype=dtype)
    routing = ModalityRouting.from_ids(buffer, 2)
    buffer.fill_(77)
    assert listed(routing.ids) == [0, 1, 1]


def test_integers_of_numpy_are_integers():
    pieces: Any = [(np.int64(1), np.uint8(4))]
    experts: Any = np.int32(3)
    routing = ModalityRouting.segments(pieces, num_experts=experts)
    assert (routing.num_experts, routing.pieces) == (3, ((1, 4),))
    assert {type(number) for number in (routing.num_experts, *routing.pieces[0])} == {int}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ModalityRouting.segments([(True, 5)]), TypeError, "not a pair of integers"),
        (lambda: ModalityRouting.segments([]), ValueError, "pieces: .* hold no token"),
        (lambda: ModalityRouting.segments([(0, 0)]), ValueError, "hold no token"),
        (lambda: ModalityRouting.segments([(0, -1)]), ValueError, "length -1"),
        (lambda: UNTYPED.segments([0, 5]), TypeError, "0 is not an"),
        (lambda: UNTYPED.segments([(0, 1.5)]), TypeError, "not a pair of integers"),
        (
            lambda: ModalityRouting.segments([(2, 5)], num_experts=2),
            ValueError,
            r"expert 2 is outside 0\.\.1",
        ),
        (lambda: ModalityRouting.segments([(-1, 5)]), ValueError, "expert -1 is outside"),
        (
            lambda: ModalityRouting.packed([[(0, 3)], [(1, -2)]]),
            ValueError,
            r"sequences\[1\]: length -2",
        ),
        (
            lambda: ModalityRouting.from_ids(torch.tensor([0, 1, 3]), 3),
            ValueError,
            r"ids: 3 is outside the experts 0\.\.2",
        ),
        (lambda: ModalityRouting.from_ids(torch.tensor([-1]), 3), ValueError, "ids: -1 is outside"),
        (
            lambda: ModalityRouting.from_ids(torch.tensor([0.5]), 3),
            TypeError,
            "dtype torch.float32",
        ),
        (lambda: UNTYPED.from_ids([0, 1], 3), TypeError, "ids: expected a tensor"),
        (
            lambda: ModalityRouting.from_ids(torch.tensor([0]), 0),
            ValueError,
            "num_experts: 0 is not a positive integer",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_wrong_number_of_tokens_or_device():
    from vlmo.kernels import moe_ffn

    x, w1, w2 = torch.zeros(6, 4), [torch.zeros(8, 4)] * 2, [torch.zeros(4, 8)] * 2
    with pytest.raises(ValueError, match="routing: made for 5 tokens, but x has 6"):
        moe_ffn(x, ModalityRouting.from_ids(torch.zeros(5).long(), 2), w1, w2)
    routing = ModalityRouting.packed([[(0, 6)]], num_experts=2, device="meta")
    with pytest.raises(ValueError, match="routing: on meta, but x is on cpu"):
        moe_ffn(x, routing, w1, w2)
    assert torch.equal(moe_ffn(x, ModalityRouting.segments([(1, 3)]), w1, w2), x)
