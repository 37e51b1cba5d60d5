"""Measures the contenders of one case beside each other.

Times are those of :func:`vlmo.timing.times`: interleaved, after a flush of the L2 cache, with the
queue kept full, so that a GPU never waits for the host. CUDA graphs would do that too, but they
cannot hold contenders that wait for the GPU or build their launches from values. What remains: a
contender that waits for the GPU itself is timed with its waiting, and so are calls of more than
about a thousand kernels, which is as much as a queue holds, if the host is slower than the GPU.
There ``wall_ms`` is near ``device_ms``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from vlmo.bench import launches
from vlmo.bench.gpu import Sensors
from vlmo.timing import Work, times, wall_seconds

Numbers = dict[str, Any]

_LEAST_CALLS, _MOST_CALLS = 3, 100
_LEAST_LONG_CALLS, _LONG_CALL_SECONDS = 2, 5.0
_ROUNDS = 10
# Calls on a GPU of which the wall time is measured.
_MOST_WALLS = 20
# Kernels that wait in a GPU's queue before the host has to.
_QUEUE = 900
# Of a call on a CPU that one call warms up and tells the time of.
_ONCE_SECONDS = 1.0
# Between two looks at the sensors.
_GLANCE_SECONDS = 0.05


class Settings(NamedTuple):
    """How thoroughly to measure.

    Attributes:
        seconds: about what the timed calls of one contender may take; at least three are made, or
            two if each takes more than five seconds.
        energy_seconds: of the calls without a pause that energy is measured over. NVML's counter
            moves every 0.02 to 0.1 s, so that it is right to a tenth or better.
        flush: overwrite the L2 cache of a GPU before each timed call.
        sensors: of the GPU, if it has some.
    """

    seconds: float = 2.0
    energy_seconds: float = 1.0
    flush: bool = True
    sensors: Sensors | None = None


def measure(
    works: Mapping[str, Work],
    device: torch.device,
    settings: Settings | None = None,
    begun: Mapping[str, Numbers] | None = None,
) -> dict[str, Numbers]:
    """Numbers of each contender (the keys are those of a record, see :mod:`vlmo.bench.report`).

    All are called before anything is timed: here, or before, where ``begun`` is what :func:`begin`
    returned for each of them. One that raises then has a ``reason`` and no numbers.
    """
    settings = settings or Settings()
    found = {name: begun[name] if begun else begin(work, device) for name, work in works.items()}
    ready = {name: work for name, work in works.items() if "reason" not in found[name]}
    calls = [_calls(found[name], settings) for name in ready]
    timed = times(list(ready.values()), device, calls=calls, rounds=_ROUNDS, flush=settings.flush)
    for (name, work), seconds in zip(ready.items(), timed, strict=True):
        found[name] |= _times(work, seconds, device) | _sensed(work, found[name], settings)
    return found


def describe_error(error: Exception) -> str:
    """Its type and the first line that it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def _wall(work: Work, device: torch.device) -> float:
    """Seconds of one call with launch and synchronisation."""
    if device.type != "cuda":
        return wall_seconds(work)
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def calls_to_begin(seconds: float, device: torch.device) -> int:
    """How many calls :func:`begin` makes of so many seconds each."""
    if device.type == "cuda":
        return 5
    return 1 if seconds >= _ONCE_SECONDS else 2


def duration(begun: Numbers, device: torch.device, settings: Settings) -> float:
    """About how long :func:`measure` takes for a contender after it has begun."""
    calls = _calls(begun, settings) + (_ROUNDS + _MOST_WALLS if device.type == "cuda" else 0)
    energy = 0.0 if settings.sensors is None else settings.energy_seconds
    return calls * begun["wall_ms"] / 1e3 + energy


def begin(work: Work, device: torch.device) -> Numbers:
    """Time, memory and kernels of single calls, or the reason why it cannot be called."""
    try:
        first = _wall(work, device)
        warm = device.type != "cuda" and first >= _ONCE_SECONDS
        seconds = first if warm else _wall(work, device)
        begun: Numbers = dict(wall_ms=1e3 * seconds, peak_mib=None, launches=None)
        if device.type == "cuda":
            begun["peak_mib"] = _peak_bytes(work) / 2**20
            # The profiler sees no kernel where it has no right to look.
            begun["launches"] = launches.count(work)[0].total() or None
    except Exception as error:  # out of memory, a compiler's refusal: whatever others raise
        return {"reason": describe_error(error)}
    return begun


def _peak_bytes(work: Work) -> int:
    """Memory that a call takes beyond what is held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _calls(begun: Numbers, settings: Settings) -> int:
    """How often to call it."""
    wanted = min(_MOST_CALLS, int(1e3 * settings.seconds / begun["wall_ms"]))
    if begun["launches"] is not None:
        wanted = min(wanted, _ROUNDS * max(1, _QUEUE // begun["launches"]))
    least = _LEAST_CALLS if begun["wall_ms"] < 1e3 * _LONG_CALL_SECONDS else _LEAST_LONG_CALLS
    return max(least, wanted)


def _times(work: Work, seconds: list[float], device: torch.device) -> Numbers:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    wall = middle
    if device.type == "cuda":
        walls = min(len(seconds), _MOST_WALLS)
        wall = statistics.median(_wall(work, device) for _ in range(walls))
    return dict(
        device_ms=1e3 * middle,
        device_ms_low=1e3 * low,
        device_ms_high=1e3 * high,
        wall_ms=1e3 * wall,
        calls=len(seconds),
    )


def _sensed(work: Work, begun: Numbers, settings: Settings) -> Numbers:
    """Energy of a call, and clocks, temperature and throttling while it runs.

    Calls follow each other without a pause, and the sensors are read while the GPU is at work, for
    its clocks fall as soon as it is not. Without an energy counter, it is the mean power over time.
    """
    if settings.sensors is None:
        return dict(millijoules=None, clock_mhz=None, temperature_c=None, throttled=None)
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
