"""Faults injected into compiled kernels, one at a time: each is detected, and none without one."""

import functools
import re
from collections.abc import Callable, Iterator

import pytest
import torch

import attention_cases
import moe_ffn_cases
from ptx.driver import emulated
from ptx.machine import Fault, Interleaving

# Two row tiles per expert, and several tiles of queries and keys; the products have more steps than
# the software pipeline has stages.
MOE_FFN = moe_ffn_cases.Case(pieces=((0, 40), (1, 60)), batch=4, dim=128, hidden=(256, 256))
ATTENTION = attention_cases.Case(
    index="random", length=200, heads=1, head_dim=64, mask=None, entries=40
)
COUNTERS = ["moe_ffn_fwd", "moe_ffn_bwd_rows", "moe_ffn_bwd_weights"]  # kernels with counters
OTHERS = ["attention_fwd", "attention_bwd_q", "attention_bwd_kv", "attention_bwd_table"]
# A missing wait shows only in an unfavourable interleaving of programs.
INTERLEAVINGS = [Interleaving(seed=seed, skew=seed % 2 == 1, limit=10_000_000) for seed in range(6)]
RELEASE = r"(atom|red)\.(global\.)?(gpu\.)?release"
ACQUIRE = r"(ld|atom)\.global\.gpu\.acquire"
BARRIER = r"bar\.sync\s+0;"
COPY_WAIT = r"cp\.async\.wait_group\s+\d;"
STALE = "global memory: read races with write"

Change = tuple[int, str]  # (line number, new text)


def run(target: str, kernel: str, change: Callable[[str], str]) -> set[str]:
    """The findings when the PTX of one kernel is changed."""
    forward = kernel.endswith("fwd")
    with emulated(target, INTERLEAVINGS) as gpu:
        gpu.change = lambda text: change(text) if f".entry {kernel}_kernel" in text else text
        try:
            if kernel.startswith("moe_ffn"):
                run_moe_ffn(forward)
            else:
                run_attention(forward)
        except Fault as fault:
            return {f"fault: {fault}"}
    return {report.finding for report in gpu.reports}


def run_moe_ffn(forward: bool) -> None:
    routing = moe_ffn_cases.make_routing(MOE_FFN, "cpu")
    tensors = moe_ffn_cases.make_tensors(MOE_FFN, "cpu", torch.float16)

    def call(tensors):
        return moe_ffn_cases.call(MOE_FFN, routing, tensors, backend="triton")

    call(tensors) if forward else moe_ffn_cases.outputs_and_gradients(call, tensors)


def run_attention(forward: bool) -> None:
    tensors = attention_cases.make_tensors(ATTENTION, "cpu", torch.float16)

    def call(tensors):
        return attention_cases.call(ATTENTION, tensors, {}, backend="triton")

    call(tensors) if forward else attention_cases.outputs_and_gradients(call, tensors)


@functools.cache
def lines_of(target: str, kernel: str) -> list[str]:
    texts: list[str] = []

    def kept(text: str) -> str:
        texts.append(text)
        return text

    assert run(target, kernel, kept) == set()
    return texts[0].split("\n")


def run_changed(target: str, kernel: str, change: Change) -> set[str]:
    number, line = change
    lines = lines_of(target, kernel)
    return run(
        target, kernel, lambda text: "\n".join([*lines[:number], line, *lines[number + 1 :]])
    )


def replaced(pattern: str, by: str) -> Callable[[list[str]], Iterator[Change]]:
    def changes(lines: list[str]) -> Iterator[Change]:
        for number, line in enumerate(lines):
            if re.search(pattern, line):
                yield number, re.sub(pattern, by, line)

    return changes


def barrier_dropped(beside: str, step: int) -> Callable[[list[str]], Iterator[Change]]:
    """Drop the nearest barrier before (step -1) or after (1) each line that matches a pattern."""

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


# The injected faults and their findings; None if these depend on the position.
WAITS = {
    "release made relaxed": (replaced(RELEASE, r"\1.\2\3relaxed"), STALE),
    "acquire made relaxed": (replaced(ACQUIRE, r"\1.global.gpu.relaxed"), STALE),
    "no barrier in front of a release": (barrier_dropped(RELEASE, -1), STALE),
    "no barrier behind an acquire": (barrier_dropped(ACQUIRE, 1), None),
}
COPIES = {
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
FAULTS = WAITS | COPIES | WGMMA


def planted():
    for target in ("sm_80", "sm_90"):
        for kernel in (*COUNTERS, *OTHERS):
            for name in FAULTS:
                if (name in WAITS and kernel in OTHERS) or (name in WGMMA and target != "sm_90"):
                    continue
                marks = [] if kernel == "moe_ffn_fwd" else [pytest.mark.slow]
                yield pytest.param(target, kernel, name, marks=marks)


@pytest.mark.parametrize(("target", "kernel", "name"), [*planted()])
def test_each_is_seen(target, kernel, name):
    plant, expected = FAULTS[name]
    lines = lines_of(target, kernel)
    changes = [*plant(lines)]
    if kernel == "moe_ffn_fwd":
        assert changes, "no place for it"
    for change in changes:
        found = run_changed(target, kernel, change)
        assert found, f"line {change[0] + 1}: {lines[change[0]]}"
        fault = any(finding.startswith("fault") for finding in found)
        assert expected is None or expected in found or fault, found


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_dropped_barriers_are_seen(target):
    """All dropped barriers are detected, except redundant ones: at most one in six."""
    changes = [*replaced(BARRIER, "")(lines_of(target, "moe_ffn_fwd"))]
    silent = [c[0] for c in changes if not run_changed(target, "moe_ffn_fwd", c)]
    assert len(changes) > 30
    assert len(silent) <= len(changes) / 6, silent
