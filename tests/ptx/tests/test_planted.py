"""Faults planted in the forward of moe_ffn, one at a time: each is seen. Without one, none is."""

import functools
import re
from collections.abc import Callable, Iterator

import pytest
import torch

from moe_ffn_cases import Case, call, make_routing, make_tensors
from ptx.driver import emulated
from ptx.machine import Fault, Interleaving

# Two row tiles of each expert; both products take more steps than are copied ahead.
CASE = Case(pieces=((0, 40), (1, 60)), batch=4, dim=128, hidden=(256, 256))
# A wait that is missing shows only where programs meet in a bad order.
INTERLEAVINGS = [Interleaving(seed=seed, skew=seed % 2 == 1, limit=10_000_000) for seed in range(6)]
RELEASE = r"(atom|red)\.(global\.)?(gpu\.)?release"
ACQUIRE = r"(ld|atom)\.global\.gpu\.acquire"
BARRIER = r"bar\.sync\s+0;"
COPY_WAIT = r"cp\.async\.wait_group\s+\d;"
STALE = "global memory: read races with write"

Change = tuple[int, str]  # the number of a line, and what it becomes


def run(target: str, change: Callable[[str], str]) -> set[str]:
    """What is found in the forward with changed PTX."""
    tensors = make_tensors(CASE, "cpu", torch.float16)
    with emulated(target, INTERLEAVINGS) as gpu:
        gpu.change = change
        try:
            call(CASE, make_routing(CASE, "cpu"), tensors, backend="triton")
        except Fault as fault:
            return {f"fault: {fault}"}
    return {report.finding for report in gpu.reports}


@functools.cache
def lines_of(target: str) -> list[str]:
    texts: list[str] = []
    assert run(target, lambda text: texts.append(text) or text) == set()
    return texts[0].split("\n")


def run_changed(target: str, change: Change) -> set[str]:
    number, line = change
    lines = lines_of(target)
    return run(target, lambda text: "\n".join([*lines[:number], line, *lines[number + 1 :]]))


def replaced(pattern: str, by: str) -> Callable[[list[str]], Iterator[Change]]:
    def changes(lines: list[str]) -> Iterator[Change]:
        for number, line in enumerate(lines):
            if re.search(pattern, line):
                yield number, re.sub(pattern, by, line)

    return changes


def barrier_dropped(beside: str, step: int) -> Callable[[list[str]], Iterator[Change]]:
    """The nearest barrier in front of (step -1) or behind (1) each line with a pattern."""

    def changes(lines: list[str]) -> Iterator[Change]:
        for number, _ in replaced(beside, "")(lines):
            while not re.search(BARRIER, lines[number]):
                number += step
            yield number, ""

    return changes


def one_more_in_flight(lines: list[str]) -> Iterator[Change]:
    for number, line in enumerate(lines):
        if found := re.search(r"(cp\.async\.wait_group\s+)([1-9]);", line):
            yield number, f"{found[1]}{int(found[2]) + 1};"


# What is planted, and what is found; None where it depends on the place.
PLANTED = {
    "release made relaxed": (replaced(RELEASE, r"\1.\2\3relaxed"), STALE),
    "acquire made relaxed": (replaced(ACQUIRE, r"\1.global.gpu.relaxed"), STALE),
    "no barrier in front of a release": (barrier_dropped(RELEASE, -1), STALE),
    "no barrier behind an acquire": (barrier_dropped(ACQUIRE, 1), None),
    "no barrier behind a copy's wait": (barrier_dropped(COPY_WAIT, 1), None),
    "no wait for the last copies": (replaced(r"cp\.async\.wait_group\s+0;", ""), None),
    "one more copy in flight": (one_more_in_flight, None),
}
WGMMA = {
    "no proxy fence": (
        replaced(r"fence\.proxy\.async\.shared::cta;", ""),
        "product reads shared memory without a proxy fence behind the write",
    ),
    "no wait for the last product": (
        replaced(r"wgmma\.wait_group\.sync\.aligned 0;", ""),
        "register of a product in flight",
    ),
    "one more product in flight": (
        replaced(r"(wgmma\.wait_group\.sync\.aligned) 1;", r"\1 2;"),
        None,
    ),
}


@pytest.mark.parametrize(
    ("target", "name"),
    [
        *((target, name) for target in ("sm_80", "sm_90") for name in PLANTED),
        *(("sm_90", name) for name in WGMMA),
    ],
)
def test_each_is_seen(target, name):
    plant, expected = (PLANTED | WGMMA)[name]
    changes = [*plant(lines_of(target))]
    assert changes, "no place for it"
    for change in changes:
        found = run_changed(target, change)
        assert found, f"line {change[0] + 1}: {lines_of(target)[change[0]]}"
        fault = any(finding.startswith("fault") for finding in found)
        assert expected is None or expected in found or fault, found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_dropped_barriers_are_seen(target):
    """All but those that others make superfluous: at most one in six."""
    changes = [*replaced(BARRIER, "")(lines_of(target))]
    silent = [change[0] for change in changes if not run_changed(target, change)]
    assert len(changes) > 30
    assert len(silent) <= len(changes) / 6, silent
