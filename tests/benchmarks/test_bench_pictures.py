"""Pictures of reports."""

from __future__ import annotations

import numpy as np
import pytest

import pictures
from bench_cases import measured, not_run, report
from pictures import draw
from vlmo.plotting import pyplot

STEM = "unit"
CONTENDERS = {"vlmo:triton": 1.0, "vlmo:reference": 4.0, "slices": 2.0, "dense": 1.5}


def cases(*tokens: int):
    return [
        measured(name, ms * count / 1000, tokens=count, phase=phase)
        for phase in ("forward", "forward+backward")
        for count in tokens
        for name, ms in CONTENDERS.items()
    ]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, by file name; they are not written."""
    found = {}
    monkeypatch.setattr(pictures, "save_figure", lambda f, path, **_: found.update({path.name: f}))
    yield found
    pyplot().close("all")


def test_every_picture_is_there_for_light_and_dark_pages(tmp_path):
    it = report(*cases(8192, 1000), not_run("quack", "is not installed"))
    written = draw(it, tmp_path / STEM)
    names = [
        f"unit-{name}-{theme}.png"
        for theme in ("light", "dark")
        for name in ("roofline", "speed-moe_ffn", "speed")
    ]
    assert [path.name for path in written] == names
    corners = [pyplot().imread(path)[0, 0, :3] for path in written]
    assert (np.array(corners[:3]) == 1).all() and (np.array(corners[3:]) < 0.1).all()
    # A README shows them at about 800 pixels, or twice as many on a fine screen.
    assert all(1300 < pyplot().imread(path).shape[1] < 1900 for path in written)


def test_pictures_of_something_else_are_missing(tmp_path):
    it = report(*cases(8192, 1000))
    written = draw(it, tmp_path / STEM)
    assert pictures.missing(it, tmp_path / STEM) == []
    written[-1].unlink()
    assert pictures.missing(it, tmp_path / STEM) == written[-1:]
    assert pictures.missing(report(*cases(8192, 2000)), tmp_path / STEM) == written


def test_bars_are_speedups_over_unilm(figures, tmp_path):
    draw(report(*cases(8192)), tmp_path / STEM)
    assert not any("speed-moe_ffn" in name for name in figures)
    [axis] = figures["unit-speed-light.png"].axes
    widths = [bar.get_width() for bar in axis.patches]
    assert widths == pytest.approx(2 * [2.0, 2 / 1.5, 1.0, 0.5])
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == 2 * ["vlmo:triton", "dense", "slices", "vlmo:reference"]
    colours = [bar.get_facecolor() for bar in axis.patches[:4]]
    assert len(set(colours)) == 4


def test_lines_go_over_the_first_number_in_its_order(figures, tmp_path):
    draw(report(*cases(8192, 1000)), tmp_path / STEM)
    axes = figures["unit-speed-moe_ffn-light.png"].axes
    assert [axis.get_title(loc="left") for axis in axes] == [
        "base, forward",
        "base, forward+backward",
    ]
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    assert set(lines) == set(CONTENDERS)
    assert list(lines["slices"].get_xdata()) == [1000, 8192]
    assert lines["slices"].get_ydata() == pytest.approx([1e3 / 2, 1e3 / 16.384])
    assert lines["vlmo:triton"].get_linewidth() > lines["slices"].get_linewidth()


def test_other_numbers_may_change_with_the_first_but_words_may_not(figures, tmp_path):
    records = [
        measured(name, ms * count, tokens=count, sequences=32768 // count, mask=mask)
        for mask in ("none", "text")
        for count in (237, 941)
        for name, ms in CONTENDERS.items()
    ]
    draw(report(*records), tmp_path / STEM)
    figure = figures["unit-speed-moe_ffn-light.png"]
    assert figure.get_suptitle().endswith("moe_ffn, bfloat16, split 40:197, mask none")
    [axis] = figure.axes
    assert {len(line.get_xdata()) for line in axis.get_lines()} == {2}


def test_points_stand_at_intensity_and_rate_below_the_roof(figures, tmp_path):
    draw(report(*cases(8192)), tmp_path / STEM)
    [axis] = figures["unit-roofline-light.png"].axes
    roof, *points = [line for line in axis.get_lines() if len(line.get_xdata())]
    xs, ys = roof.get_xdata(), roof.get_ydata()
    assert ys == pytest.approx(np.minimum(2.0, 10.0 * xs / 1e3))
    found = [(p.get_xdata()[0], p.get_ydata()[0]) for p in points]
    # The best peer and the best of ours, forward and backward; 1 TFLOP and 10 GB: 100 FLOP/byte.
    assert found == [(pytest.approx(100), pytest.approx(1e3 / ms)) for ms in 2 * [16.384, 8.192]]


def test_a_report_without_numbers_has_no_pictures(tmp_path):
    assert draw(report(not_run("quack", "is not installed")), tmp_path / STEM) == []


def test_a_suite_without_unilm_has_no_bars(figures, tmp_path):
    draw(report(measured("vlmo:triton", 1.0), measured("masks", 2.0)), tmp_path / STEM)
    assert {name.split("-")[-2] for name in figures} == {"roofline"}
