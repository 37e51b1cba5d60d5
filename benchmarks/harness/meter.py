"""Device times of several contenders, measured in turn; memory, launches and energy of a call.

Every round calls each contender in turn, so that a change of clocks affects all of them. On a GPU
each call is timed with two events, after a flush of the L2 cache, and the queue is kept full: the
device first spins for as long as the host needs to enqueue the calls, so that no event waits for
the host. CUDA graphs would achieve this too, but cannot capture contenders that synchronise or
whose launches depend on values. Two limitations remain: the time of a contender that synchronises
includes the wait, and so does the time of calls with more than about a thousand kernels, which fill
the queue, if the host is slower than the GPU. In both cases ``wall_ms`` is near ``device_ms``.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from harness.contenders import Work
from harness.nvml import Sensors

Numbers = dict[str, Any]

_LEAST_CALLS, _MOST_CALLS = 3, 100
_LEAST_LONG_CALLS, _LONG_CALL_SECONDS = 2, 5.0
_ROUNDS = 10
# Number of calls on a GPU whose wall time is measured.
_MOST_WALLS = 20
# Number of kernels that fit in a GPU's queue before the host must wait.
_QUEUE = 900
# A call on a CPU that takes this long, and does not compile, needs no second warm-up call.
_ONCE_SECONDS = 1.0
# Interval between two readings of the sensors.
_GLANCE_SECONDS = 0.05
# More bytes than the L2 cache of any current GPU, and more cycles per second than any reaches.
_FLUSHED_BYTES = 256 * 2**20
_CLOCK = 3e9
# Host time for a call's two events and its flush, in seconds.
_PER_CALL = 3e-5
# CUDA runtime and driver calls that make the host wait, or that copy.
_CALLS = ("StreamSynchronize", "EventSynchronize", "Memcpy")
_WAITING = tuple(f"{interface}{call}" for interface in ("cuda", "cu") for call in _CALLS)


class Settings(NamedTuple):
    """Effort of a measurement.

    Attributes:
        seconds: approximate duration of the timed calls of a contender; there are at least three,
            or two if each takes more than five seconds.
        energy_seconds: duration of the consecutive calls over which energy is measured. NVML's
            counter advances every 0.02 to 0.1 s, so the result is accurate to a tenth or better.
        sensors: sensors of the GPU, if available.
    """

    seconds: float = 0.8
    energy_seconds: float = 0.5
    sensors: Sensors | None = None


def measure(
    works: Mapping[str, Work],
    begun: Mapping[str, Numbers],
    device: torch.device,
    settings: Settings,
) -> dict[str, Numbers]:
    """Measure each contender; its list of times has the key ``seconds``.

    Args:
        works: the calls to measure.
        begun: results of :func:`begin` for each of them.
        device: device on which they run.
        settings: effort of the measurement.
    """
    calls = [_calls(begun[name], settings) for name in works]
    timed = times(list(works.values()), device, calls=calls, rounds=_ROUNDS, flush=True)
    found = {}
    for (name, work), seconds in zip(works.items(), timed, strict=True):
        wall = statistics.median(seconds)
        if device.type == "cuda":
            walls = min(len(seconds), _MOST_WALLS)
            wall = statistics.median(_wall(work, device) for _ in range(walls))
        told = dict(seconds=seconds, wall_ms=1e3 * wall)
        found[name] = begun[name] | told | _sensed(work, begun[name], settings)
    return found


def median_seconds(
    works: Sequence[Work], device: torch.device, *, calls: int, rounds: int
) -> list[float]:
    """Device time of a call of each function after a flush: the median of ``calls`` calls."""
    found = times(works, device, calls=[calls] * len(works), rounds=rounds, flush=True)
    return [statistics.median(seconds) for seconds in found]


def times(
    works: Sequence[Work],
    device: torch.device,
    *,
    calls: Sequence[int],
    rounds: int = 5,
    flush: bool = False,
) -> list[list[float]]:
    """Seconds of every call of each function, which must have been called before.

    Args:
        works: the functions to time.
        device: device on which they run; on the CPU the result is wall time.
        calls: number of calls of each function, distributed over the rounds.
        rounds: number of rounds, in each of which every function has its turn.
        flush: overwrite the L2 cache before each call, outside the measured time.
    """
    on_gpu = device.type == "cuda"
    scratch = torch.empty(
        _FLUSHED_BYTES if flush and on_gpu else 0, dtype=torch.int8, device=device
    )
    found: list[list[float]] = [[] for _ in works]
    for turn in range(rounds):
        for function, count, seconds in zip(works, calls, found, strict=True):
            launches = count * (turn + 1) // rounds - count * turn // rounds
            if on_gpu and launches:
                seconds += _burst(function, launches, scratch)
            else:
                seconds += [wall_seconds(function) for _ in range(launches)]
    return found


def _burst(function: Work, launches: int, scratch: torch.Tensor) -> list[float]:
    torch.cuda.synchronize()
    per_call = wall_seconds(function) + _PER_CALL
    torch.cuda.synchronize()
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(launches)]
    torch.cuda._sleep(int((1e-3 + 1.5 * launches * per_call) * _CLOCK))
    for start, end in pairs:
        if scratch.numel():
            scratch.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def wall_seconds(function: Work) -> float:
    """Host time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def count_launches(work: Work) -> tuple[Counter[str], Counter[str]]:
    """Number of kernels, copies and fills by name, and of CUDA runtime calls by name."""
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
    for event in profiler.events() or ():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            # The GPU event of a record_function is not a launch.
            if not getattr(event, "is_user_annotation", False):
                kernels[event.name] += 1
        elif event.name.startswith("cu"):
            calls[event.name] += 1
    return kernels, calls


def waiting(calls: Counter[str]) -> list[str]:
    """The calls that make the host wait for the GPU, or copy."""
    return sorted(name for name in calls if name.startswith(_WAITING))


def _wall(work: Work, device: torch.device) -> float:
    """Seconds of a call including launch and synchronisation."""
    if device.type != "cuda":
        return wall_seconds(work)
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def duration(begun: Numbers, device: torch.device, settings: Settings) -> float:
    """Approximate duration of :func:`measure` for a contender, from the results of `begin`."""
    calls = _calls(begun, settings) + (_ROUNDS + _MOST_WALLS if device.type == "cuda" else 0)
    energy = 0.0 if settings.sensors is None else settings.energy_seconds
    return calls * begun["wall_ms"] / 1e3 + energy


def begin(work: Work, device: torch.device, *, compiles: bool = False) -> Numbers:
    """Wall time, memory and kernels of single calls; raises what the call raises.

    Args:
        work: the call.
        device: device on which it runs.
        compiles: the first call may compile, so its duration says nothing about later ones.
    """
    first = _wall(work, device)
    warm = device.type != "cuda" and not compiles and first >= _ONCE_SECONDS
    begun: Numbers = dict(wall_ms=1e3 * (first if warm else _wall(work, device)))
    if device.type == "cuda":
        begun["peak_mib"] = _peak_bytes(work) / 2**20
        # Without permission the profiler sees no kernels.
        begun["launches"] = count_launches(work)[0].total() or None
    return begun


def _peak_bytes(work: Work) -> int:
    """Memory that a call allocates beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _calls(begun: Numbers, settings: Settings) -> int:
    """Number of timed calls."""
    wanted = min(_MOST_CALLS, int(1e3 * settings.seconds / begun["wall_ms"]))
    if begun.get("launches") is not None:
        wanted = min(wanted, _ROUNDS * max(1, _QUEUE // begun["launches"]))
    least = _LEAST_CALLS if begun["wall_ms"] < 1e3 * _LONG_CALL_SECONDS else _LEAST_LONG_CALLS
    return max(least, wanted)


def _sensed(work: Work, begun: Numbers, settings: Settings) -> Numbers:
    """Energy of a call, and clocks, temperature and throttling while it runs.

    Calls run without a pause, and the sensors are read during them, because clocks drop as soon as
    the GPU is idle. Without an energy counter, the energy is computed from the mean power.
    """
    if settings.sensors is None:
        return {}
    sensors, calls = settings.sensors, 0
    watts: list[float] = []
    throttled: dict[str, None] | None = None
    batch = max(1, round(1e3 * _GLANCE_SECONDS / begun["wall_ms"]))
    torch.cuda.synchronize()
    before, start = sensors.millijoules(), time.perf_counter()
    while True:
        for _ in range(batch):
            work()
        calls += batch
        state = sensors.state()
        torch.cuda.synchronize()
        if state.watts is not None:
            watts.append(state.watts)
        if state.throttled is not None:
            throttled = (throttled or {}) | dict.fromkeys(state.throttled)
        elapsed = time.perf_counter() - start
        if elapsed >= settings.energy_seconds:
            break
    after, millijoules = sensors.millijoules(), None
    if before is not None and after is not None:
        millijoules = (after - before) / calls
    elif watts:
        millijoules = 1e3 * statistics.mean(watts) * elapsed / calls
    return dict(
        millijoules=millijoules,
        clock_mhz=state.clock_mhz,
        temperature_c=state.temperature_c,
        throttled=None if throttled is None else list(throttled),
    )
