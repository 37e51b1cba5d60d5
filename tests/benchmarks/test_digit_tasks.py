"""The comparisons on digit scenes: their trainings, and the committed page."""

import json

import pytest

import digit_tasks
from digit_tasks import RESULTS, SEEDS, TABLES, VARIANTS, Run, draw, kept, report, spread, stages
from vlmo.training.recipes import RECIPES

pytestmark = pytest.mark.heavy


def test_every_number_has_its_trainings():
    """Each row of each table is of runs that are made, after what they start from."""
    done: set[Run] = set()
    for runs in stages():
        for run in runs:
            assert run.recipe in RECIPES and run.variant in VARIANTS
            start = digit_tasks.origin(run)
            assert start is None or start in done
            initial = RECIPES[run.recipe].initial_from
            assert (None if start is None else start.recipe) == initial
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


def test_one_variant_leaves_the_runs_of_others_as_they_are(tmp_path):
    runs = [{"variant": "all", "seed": 1}, {"variant": "beit3", "seed": 1}]
    path = tmp_path / "digits.json"
    path.write_text(json.dumps({"versions": {"torch": "2.13.0"}, "runs": runs}))
    assert kept(path, None, {}) == []
    assert kept(path, "beit3", {"torch": "2.13.0"}) == runs[:1]
    with pytest.raises(ValueError, match=r"digits\.json: its runs are of .*2\.13\.0"):
        kept(path, "beit3", {"torch": "2.14.0"})


def test_the_committed_page_is_of_the_committed_runs(tmp_path):
    record = json.loads((RESULTS / "digits.json").read_text(encoding="utf-8"))
    assert report(record["runs"]) == (RESULTS / "digits.md").read_text(encoding="utf-8")
    draw(record["runs"], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (RESULTS / "digits.png").read_bytes().startswith(b"\x89PNG")
