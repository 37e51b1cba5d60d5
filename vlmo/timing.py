"""How long work takes on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Work = Callable[[], object]

# More than the L2 cache of any GPU so far, and cycles a second that none reaches.
_FLUSHED_BYTES = 256 * 2**20
_CLOCK = 3e9
# What the host needs around a call: two events, and the flush.
_PER_CALL = 3e-5


def median_seconds(
    work: Sequence[Work],
    device: torch.device,
    *,
    rounds: int = 5,
    launches: int = 10,
    flush: bool = False,
) -> list[float]:
    """Device time of one call of each function: the median over ``rounds * launches`` calls.

    Args:
        work: what to time.
        device: where it runs; on the CPU, wall time.
        rounds: how often every function has its turn.
        launches: calls in one turn.
        flush: as in :func:`times`.
    """
    calls = [rounds * launches] * len(work)
    found = times(work, device, calls=calls, rounds=rounds, flush=flush)
    return [statistics.median(seconds) for seconds in found]


def times(
    work: Sequence[Work],
    device: torch.device,
    *,
    calls: Sequence[int],
    rounds: int = 5,
    flush: bool = False,
) -> list[list[float]]:
    """Device time of every call of each function, in seconds.

    Every round calls each function in its turn, so that a change of clocks meets all of them. On a
    GPU a call lies between two events, and the queue is kept full: the device first spins for as
    long as the host needs to enqueue the calls, so that no event waits for the host. Functions must
    have been called before, and must not wait for the device themselves.

    Args:
        work: what to time.
        device: where it runs; on the CPU, wall time.
        calls: of each function, spread over the rounds.
        rounds: how often a function has its turn, if it has as many calls.
        flush: overwrite the L2 cache before each call, outside the measured time.
    """
    on_gpu = device.type == "cuda"
    scratch = torch.empty(
        _FLUSHED_BYTES if flush and on_gpu else 0, dtype=torch.int8, device=device
    )
    found: list[list[float]] = [[] for _ in work]
    for turn in range(rounds):
        for function, count, seconds in zip(work, calls, found, strict=True):
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
    """What one call keeps the host busy."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
