"""Grouping of sequences in attention on the CPU: similar ones, and long ones only if adjacent."""

from unittest import mock

import pytest
import torch

from attention_cases import (
    Case,
    assert_parity,
    call,
    make_options,
    make_tensors,
    outputs_and_gradients,
)
from conftest import Place
from vlmo.kernels.attention import cpu as cpu_impl
from vlmo.kernels.attention.call import Call

CPU = Place(torch.device("cpu"), "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    # Short ones of one length are gathered, long ones are not; 66 joins its neighbour only.
    Case(index="random", lengths=(5, 70, 5, 66, 66, 5, 66), mask=None, heads=2),
    Case(index=None, lengths=(66, 66, 70, 66), mask=None, causal=True, heads=2),
    # Texts of different lengths beside an image: places in two runs, keys in two.
    Case(mask="padding", batch=5),
    Case(mask="padding", batch=5, causal=True),
    # Keys that leave the first queries with none.
    Case(index="random", length=70, mask="mask", batch=3, causal=True, heads=2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_parity(case, dtype):
    assert_parity(case, dtype, CPU)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64_is_that_of_the_reference(case):
    tensors, options = make_tensors(case, "cpu", torch.float64), make_options(case, "cpu")
    expected, actual = (
        outputs_and_gradients(lambda t, b=backend: call(case, t, options, backend=b), tensors)
        for backend in ("reference", "cpu")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [Case(batch=7, mask="padding"), Case(batch=7, mask=None)], ids=str)
def test_small_chunks_change_nothing(case):
    with mock.patch.object(cpu_impl, "_CACHE_BYTES", 1):
        assert_parity(case, torch.float32, CPU)


def groups_of(case: Case) -> list[tuple[int, int]]:
    """(length, sequences) of each."""
    tensors, options = make_tensors(case, CPU.device, torch.float32), make_options(case, "cpu")
    qkv = (tensors[name] for name in "qkv")
    facts = (options.get(name) for name in ("key_mask", "key_lengths", "offsets"))
    rest = (options.get("max_length", 0), None, case.causal, 1.0)
    batch = Call._make([*qkv, *[None] * 4, *facts, *rest])
    return [(group.length, len(group.starts)) for group in cpu_impl._Batch(batch).groups]


def test_alike_sequences_are_one_group():
    assert groups_of(Case(index=None, batch=4, mask=None)) == [(15, 4)]
    packed = Case(index=None, lengths=(5, 70, 5, 66, 66, 5, 66, 0), mask=None)
    assert groups_of(packed) == [(5, 3), (70, 1), (66, 2), (66, 1)]
    # The texts of "padding" have 1, 2, 2, 2, 3, 4, 4, 4 and 5 tokens.
    padded = groups_of(Case(index=None, batch=9, mask="padding"))
    assert padded == [(15, 1), (15, 3), (15, 1), (15, 3), (15, 1)]


def test_runs_of_places():
    places = torch.tensor([4, 5, 6, 0, 1, 9]).numpy()
    runs = [(slice(0, 3), slice(4, 7)), (slice(3, 5), slice(0, 2)), (slice(5, 6), slice(9, 10))]
    assert cpu_impl._runs(places) == runs
    assert cpu_impl._runs(places[:0]) == []
