"""The parity cases as PTX of three GPU generations: exact, in any order of programs, without races.

Each launch runs in several interleavings of few CTAs, which must leave the same memory behind.
"""

import itertools

import pytest
import torch

import attention_cases
import moe_ffn_cases
from ptx.driver import TARGETS, emulated

PLACE = torch.device("cpu"), "triton"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOE_FFN = [case for case in moe_ffn_cases.CASES if case.batch]
ATTENTION = [
    *(case for case in attention_cases.CASES if case.batch and (case.length or case.lengths)),
    attention_cases.ONES,
]


def each(cases) -> list:
    """Every case on every target in every dtype; one target and dtype of each in make test."""
    combinations = [*itertools.product(TARGETS, DTYPES)]
    return [
        pytest.param(
            *(case, dtype, target),
            marks=[pytest.mark.slow] if k != number % len(combinations) else [],
            id=f"{target}-{dtype}-{case}",
        )
        for number, case in enumerate(cases)
        for k, (target, dtype) in enumerate(combinations)
    ]


@pytest.mark.parametrize(("case", "dtype", "target"), each(MOE_FFN))
def test_moe_ffn(case, dtype, target):
    with emulated(target) as gpu:
        moe_ffn_cases.assert_parity(case, dtype, PLACE)
    assert len(gpu.launches) == 3
    assert not gpu.reports, gpu.reports


@pytest.mark.parametrize(("case", "dtype", "target"), each(ATTENTION))
def test_attention(case, dtype, target):
    with emulated(target) as gpu:
        attention_cases.assert_parity(case, dtype, PLACE)
    assert len(gpu.launches) == (3 if case.index is None else 4)
    assert not gpu.reports, gpu.reports
