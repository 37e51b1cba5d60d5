"""The roofline of a device."""

from __future__ import annotations

import pytest
import torch

from harness import roofline
from harness.cost import Cost
from harness.roofline import Roof

CPU = torch.device("cpu")


def test_the_lower_of_the_two_rates_is_attainable(monkeypatch):
    monkeypatch.setattr(roofline, "copy_gb_per_s", lambda device: 500.0)
    monkeypatch.setattr(roofline, "matrix_tflops", lambda device, dtype: 100.0)
    roof = Roof(CPU)
    assert roof.rates() == {}
    # 10 operations a byte: memory feeds 500 GB/s * 10 = 5 TFLOP/s.
    assert roof.attainable_tflops(Cost(flops=1000, bytes=100), torch.float16) == pytest.approx(5.0)
    assert roof.attainable_tflops(Cost(flops=10**6, bytes=1), torch.float16) == 100.0
    assert roof.rates() == {"copy_gb_per_s": 500.0, "matrix_tflops": {"float16": 100.0}}


@pytest.fixture
def one_second(monkeypatch):
    """Everything takes a second at best; what is timed has run before."""
    timed = []

    def times(work, device, **turns):
        timed.extend(work)
        return [[1.5, 1.0, 2.0]] * len(work)

    monkeypatch.setattr(roofline, "times", times)
    return timed


def test_a_copy_counts_what_it_reads_and_writes(one_second):
    assert roofline.copy_gb_per_s(CPU, 4000) == pytest.approx(2 * 4000 / 1e9)
    [work] = one_second
    [source] = work.args
    assert source.nbytes == 4000 and work().data_ptr() != source.data_ptr()


@pytest.mark.parametrize(("fast", "size"), [(True, 768), (False, 192)])
def test_a_product_is_large_enough_and_no_larger_on_a_cpu(monkeypatch, one_second, fast, size):
    monkeypatch.setattr(roofline, "_GPU_SIZE", 512)
    monkeypatch.setattr(roofline, "wall_seconds", lambda work: 0.001 if fast else 0.1)
    rate = roofline.matrix_tflops(CPU, torch.bfloat16)
    assert rate == pytest.approx(2 * size**3 / 1e12)
    a, b = one_second[0].args
    assert a.shape == b.shape == (size, size) and a.dtype == torch.bfloat16


def test_a_roof_of_this_machine(monkeypatch):
    monkeypatch.setattr(roofline, "_GPU_SIZE", 256)
    rates = [roofline.matrix_tflops(CPU, dtype) for dtype in (torch.float32, torch.float64)]
    # From a slow core to a large server.
    assert all(1e-4 < rate < 1e3 for rate in rates)
