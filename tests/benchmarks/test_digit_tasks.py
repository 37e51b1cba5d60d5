"""The comparisons on digit scenes: their trainings, and the committed page."""

import json

import pytest

import digit_tasks
from digit_tasks import RESULTS, SEEDS, TABLES, VARIANTS, Run, draw, report, spread, stages
from vlmo.training.recipes import RECIPES

pytestmark = pytest.mark.heavy


def test_every_number_has_its_trainings():
    """Each row of each table is of runs that are made, after what they start from."""
    done: set[Run] = set()
    for runs in stages():
        for run in runs:
            assert run.recipe in RECIPES and run.variant in VARIANTS
            if run.recipe != "digits_textmlm":
                assert digit_tasks.origin(run) in done
        done |= set(runs)
    for _, _, rows in TABLES:
        for _, variant, recipe, _ in rows:
            assert {Run(variant, recipe, seed) for seed in SEEDS} <= done


def test_spread_is_over_the_seeds_of_one_row():
    runs = [
        {"variant": variant, "recipe": "digits_nlvr2", "metrics": {"accuracy": value}}
        for variant, value in (("all", 0.8), ("all", 0.9), ("itc", 0.5))
    ]
    mean, deviation = spread(runs, ("", "all", "digits_nlvr2", ()), "accuracy")
    assert (mean, deviation) == pytest.approx((85, 50**0.5))


def test_the_committed_page_is_of_the_committed_runs(tmp_path):
    record = json.loads((RESULTS / "digits.json").read_text(encoding="utf-8"))
    assert report(record["runs"]) == (RESULTS / "digits.md").read_text(encoding="utf-8")
    draw(record["runs"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (RESULTS / "digits.png").read_bytes().startswith(b"\x89PNG")
