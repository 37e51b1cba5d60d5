"""Measurement of the contenders of a case."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from harness import meter
from harness.meter import Settings, begin, median_seconds, times
from harness.nvml import State

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_functions_are_called_in_turn_and_as_often_as_asked():
    order = []
    work = [lambda: order.append("a"), lambda: order.append("b"), lambda: order.append("c")]
    found = times(work, CPU, calls=[8, 3, 1], rounds=4)
    assert [len(seconds) for seconds in found] == [8, 3, 1]
    assert "".join(order) == "aa" + "aab" + "aab" + "aabc"
    assert min(min(seconds) for seconds in found) >= 0


def measure(works, device, settings):
    """Numbers of contenders after their first calls."""
    begun = {name: begin(work, device) for name, work in works.items()}
    return meter.measure(works, begun, device, settings)


@pytest.fixture
def passes(monkeypatch):
    """A clock, and functions that take as long as they are told on it."""
    now = [0.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])

    def make(*durations):
        left = itertools.cycle(durations)

        def work():
            now[0] += next(left)

        return work

    return make


def test_the_median_is_that_of_all_calls(passes):
    work = passes(0.0, 0.0, 0.02, 0.02, 0.02)
    assert median_seconds([work], CPU, calls=5, rounds=5) == [pytest.approx(0.02)]


def test_numbers_on_a_cpu_are_those_of_the_contender(passes):
    works = {"slow": passes(0.02, 0.02, 0.02, 0.03, 0.04), "fast": passes(0.0005)}
    found = measure(works, CPU, Settings(seconds=0.1))
    # Two calls came before: 20, 30, 40, 20, 20 ms.
    assert found["slow"]["seconds"] == pytest.approx([0.02, 0.03, 0.04, 0.02, 0.02])
    assert found["slow"]["wall_ms"] == pytest.approx(20)
    assert found["fast"]["seconds"] == pytest.approx(100 * [0.0005])
    assert set(found["slow"]) == {"seconds", "wall_ms"}  # nothing that only a GPU tells


def test_three_calls_at_least_and_a_hundred_at_most(passes):
    for seconds, calls in ((0, 3), (0.05, 50), (1, 100)):
        settings = Settings(seconds=seconds)
        found = measure({"quick": passes(0.001)}, CPU, settings)
        assert len(found["quick"]["seconds"]) == calls
        assert meter.duration(dict(wall_ms=1.0), CPU, settings) == calls / 1e3


def test_two_long_calls_after_one_that_warms_up(monkeypatch):
    called = []

    def long(work):
        called.append(work())
        return 5.5

    monkeypatch.setattr(meter, "wall_seconds", long)
    begin(lambda: None, CPU)
    assert len(called) == 1
    begin(lambda: None, CPU, compiles=True)
    assert len(called) == 3
    assert meter.duration(dict(wall_ms=5500.0), CPU, Settings(seconds=0)) == 11.0


def test_the_time_of_compiling_is_not_that_of_a_call(passes):
    begun = begin(passes(180.0, 2.0), CPU, compiles=True)
    assert begun == dict(wall_ms=pytest.approx(2000))
    assert meter.duration(begun, CPU, Settings(seconds=0)) == pytest.approx(6.0)


class FakeGpu:
    """As much of torch.cuda as is asked, and a GPU on which a call takes 10 ms and 2 kernels."""

    def __init__(self, monkeypatch, *, counter=True, power=250.0, kernels=2):
        self.now, self.counter, self.power, self.kernels = 0.0, counter, power, kernels
        self.queued = self.calls = self.glances = 0
        self.timed: list[int] = []
        self.seen_at_work = True
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**30)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**30 + 3 * 2**20)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
        monkeypatch.setattr(meter, "count_launches", self.count)
        monkeypatch.setattr(meter.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(meter, "times", self.times)

    def work(self):
        self.queued += 1
        self.calls += 1

    def synchronize(self):
        self.now += 0.01 * self.queued
        self.queued = 0

    def count(self, work):
        work()
        return Counter(kernel=self.kernels), Counter()

    def times(self, work, device, *, calls, rounds, flush):
        assert flush and device == CUDA
        self.timed = list(calls)
        return [[0.008] * count for count in calls]

    def millijoules(self):
        return int(1e6 * self.now * self.power / 1e3) if self.counter else None

    def state(self):
        self.seen_at_work &= self.queued > 0
        self.glances += 1
        reason = "power cap" if self.glances != 2 else "board limit"  # for a moment
        return State(1400, 2600, 70, self.power, [reason])


@pytest.mark.parametrize("counter", [True, False])
def test_numbers_on_a_gpu(monkeypatch, counter):
    gpu: Any = FakeGpu(monkeypatch, counter=counter)
    [found] = measure({"a": gpu.work}, CUDA, Settings(seconds=0.5, sensors=gpu)).values()
    assert found["seconds"] == 50 * [0.008]
    assert found["wall_ms"] == pytest.approx(10.0)  # with what the host adds
    assert found["peak_mib"] == 3.0 and found["launches"] == 2
    assert gpu.timed == [50]
    assert found["millijoules"] == pytest.approx(250 * 10)  # watts times milliseconds of a call
    sensed = (found["clock_mhz"], found["temperature_c"], found["throttled"])
    assert sensed == (1400, 70, ["power cap", "board limit"]) and gpu.seen_at_work


def test_energy_is_measured_for_as_long_as_asked(monkeypatch):
    gpu: Any = FakeGpu(monkeypatch)
    measure({"a": gpu.work}, CUDA, Settings(seconds=0.03, energy_seconds=0, sensors=gpu))
    few = gpu.calls
    measure({"a": gpu.work}, CUDA, Settings(seconds=0.03, energy_seconds=0.5, sensors=gpu))
    assert gpu.calls - few == few + 45  # five at a time: 50 ms between two looks


def test_a_gpu_that_tells_neither_energy_nor_power(monkeypatch):
    gpu: Any = FakeGpu(monkeypatch, counter=False, power=None)
    [found] = measure({"a": gpu.work}, CUDA, Settings(seconds=0, sensors=gpu)).values()
    assert found["millijoules"] is None and found["clock_mhz"] == 1400


def test_calls_of_a_turn_fit_the_queue_of_a_gpu(monkeypatch):
    gpu: Any = FakeGpu(monkeypatch, kernels=400)
    measure({"a": gpu.work}, CUDA, Settings(seconds=10))
    assert gpu.timed == [20]  # ten turns of 2 * 400 kernels
    gpu = FakeGpu(monkeypatch, kernels=0)
    [found] = measure({"a": gpu.work}, CUDA, Settings(seconds=10)).values()
    assert found["launches"] is None and gpu.timed == [100]
