"""Two reports side by side."""

from __future__ import annotations

import pytest
from rich.console import Console

from bench_cases import measured, not_run, report
from vlmo.bench.compare import compare


def quartiles(ms: float, low: float, high: float, **changes):
    return measured("vlmo:cpu", ms, device_ms_low=low, device_ms_high=high, **changes)


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((1.0, 0.98, 1.02), (0.9, 0.88, 0.92), "faster"),
        ((1.0, 0.98, 1.02), (1.1, 1.08, 1.12), "slower"),
        # The medians are far apart, but the ranges meet.
        ((1.0, 0.8, 1.2), (0.7, 0.6, 0.85), "same"),
        ((0.7, 0.6, 0.85), (1.0, 0.8, 1.2), "same"),
        # The ranges are apart, but too little has changed.
        ((1.0, 0.999, 1.001), (1.015, 1.014, 1.016), "same"),
        ((1.0, 0.999, 1.001), (0.985, 0.984, 0.986), "same"),
    ],
)
def test_a_change_counts_if_it_is_large_and_outside_the_quartiles(before, after, verdict):
    result = compare(report(quartiles(*before)), report(quartiles(*after)))
    [change] = result.changes
    assert change.verdict == verdict
    assert change.times == pytest.approx(before[0] / after[0])
    assert not result.warnings


def test_records_are_matched_by_case_and_contender():
    before = report(
        measured("slices", 1.0, tokens=1), measured("slices", 2.0, tokens=2), measured("dense", 3.0)
    )
    # The same labels in another order, as a later version may write them.
    moved = dict(reversed(measured("slices", 1.0, tokens=2).items()))
    after = report(moved, measured("masks", 1.0, tokens=1), not_run("dense", "is not installed"))
    result = compare(before, after)
    assert [(c.before["tokens"], c.times) for c in result.changes] == [(2, 2.0)]
    assert [name.rsplit(": ", 1)[1] for name in result.only_before] == ["slices", "dense"]
    assert "tokens 1, " in result.only_before[0]
    assert [name.rsplit(": ", 1)[1] for name in result.only_after] == ["masks"]


@pytest.mark.parametrize(
    ("command", "same"),
    [
        ("vlmo bench --suite moe_ffn --output 'x' --commit=b --no-pictures", True),
        ("vlmo bench --suite moe_ffn --minutes 2", False),
    ],
)
def test_where_results_go_is_no_difference(command, same):
    before = report(measured("slices", 1.0), command="vlmo bench --output y --suite moe_ffn")
    warnings = compare(before, report(measured("slices", 1.0), command=command)).warnings
    assert (not warnings) == same


def test_other_differences_are_warned_of():
    before = report(measured("slices", 1.0))
    after = report(
        measured("slices", 1.0),
        machine={"name": "Other Unit", "cores": 4},
        command="vlmo bench",
        versions={"torch": "2.13.0", "triton": "3.7.1"},
    )
    text = "\n".join(compare(before, after).warnings)
    assert "'Testing Unit 9' before, 'Other Unit' after" in text
    assert "machine cores differs: 2 before, 4 after" in text
    assert "the command differs" in text
    assert "version of triton differs: None before, '3.7.1' after" in text
    assert "torch" not in text


@pytest.mark.parametrize(("masks", "warned"), [(0.99, []), (0.8, ["1.25 x"]), (1.25, ["0.80 x"])])
def test_a_machine_in_another_state_is_warned_of(masks, warned):
    names = ["slices", "masks", "dense", "vlmo:cpu"]
    before = report(*(measured(name, 1.0) for name in names))
    after = report(*(measured(n, t) for n, t in zip(names, [1.6, masks, 0.5, 1.0], strict=True)))
    found = compare(before, after).warnings
    for times, text in zip(warned, found, strict=True):
        assert f"contenders of others are {times} as fast as before (median of 3)" in text


def test_everything_is_printed_with_the_rule():
    before = report(measured("slices", 2.0), measured("masks", 1.0), measured("dense", 1.0))
    after = report(measured("slices", 1.0), measured("masks", 1.0), commit="def", command="other")
    console = Console(width=140)
    with console.capture() as capture:
        compare(before, after).table(console)
    text = capture.get()
    assert "differ by more than 2%" in text and "quartiles do not overlap" in text
    assert "1 faster, 0 slower, 1 same." in text
    assert "2.00 x" in text
    assert "Warning: the command differs" in text
    assert text.index("Measured before only") < text.index("dense")
    assert "Measured after only" not in text
