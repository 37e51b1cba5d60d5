"""The demo end to end, and its acceptance criteria."""

import dataclasses
import json
import os
import re
import signal
import sys

import pytest
import torch
from typer.testing import CliRunner

from vlmo.commands.app import app, main
from vlmo.demo import program
from vlmo.run_folder import load_model
from vlmo.tasks.retrieval import Recall
from vlmo.testing import Deviation, check_backends
from vlmo.training import trainer
from vlmo.training.logs import read_table

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
RUN = "run-4-steps-seed-0"


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """A demo of four steps: its result and its folder."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "results"
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(program, "GALLERY", 24)
        context.setattr(program, "CANDIDATES", 4)
        # Triton's interpreter would take a minute for what the tests of moe_ffn check anyway.
        context.setattr(
            program,
            "check_backends",
            lambda devices, backend, seed: check_backends(devices, backend="reference", seed=seed),
        )
        arguments = ["demo", "--steps", "4", "--device", "cpu", "--output", str(folder)]
        yield CliRunner().invoke(app, arguments, catch_exceptions=False), folder


def test_short_demo_says_that_it_judges_nothing(short_demo):
    result, folder = short_demo
    assert result.exit_code == 0, result.output
    assert "not judged" in result.output
    assert "All checks passed" not in result.output
    assert json.loads((folder / "retrieval.json").read_text())["judged"] is False


def test_short_demo_leaves_its_results_and_nothing_else(short_demo):
    _, folder = short_demo
    assert {path.name for path in folder.iterdir()} == {*program._RESULTS, RUN}
    for name in ("retrieval.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    recall = json.loads((folder / "retrieval.json").read_text())["recall"]
    assert recall["chance"]["text_to_image"]["1"] == pytest.approx(1 / 24)
    _, rows = read_table(folder / RUN / "log.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["itm_loss"]) > 0


def test_short_demo_saves_the_model_it_trained(short_demo):
    _, folder = short_demo
    loaded = load_model(folder / RUN)
    assert loaded.model.config.max_text_length == program.RECIPE.text_length
    assert loaded.vocabulary is not None


def test_short_demo_shows_the_parity_of_the_reference(short_demo):
    output = short_demo[0].output
    for operation in ("moe_ffn", "shared_attention"):
        for dtype in ("float32", "float16", "bfloat16"):
            assert re.search(rf"{operation} +reference +cpu +{dtype} .*yes", output)


def recall(first: float, rest: float) -> Recall:
    return Recall({1: first, 5: rest}, {1: first, 5: rest})


def test_judge_names_what_is_wrong():
    guess = recall(0.01, 0.05)
    assert program.judge(guess, recall(0.5, 0.8), recall(0.6, 0.8)) == []
    worse = program.judge(guess, recall(0.5, 0.8), recall(0.4, 0.8))
    assert len(worse) == 1 and "Re-ranking" in worse[0]
    assert len(program.judge(guess, recall(0.04, 0.2), recall(0.04, 0.3))) == 4


def test_demo_fails_when_a_kernel_or_the_retrieval_does(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "GALLERY", 16)
    monkeypatch.setattr(program, "RECIPE", program.RECIPE.replace(steps=1, batch_size=8))
    monkeypatch.setattr(program, "FARTHER_THAN_CHANCE", 1000)
    wrong = Deviation("y", 2.0, 0.1, 0.3), Deviation("x", 0.1, 0.1, 0.3)
    row = dataclasses.replace(next(check_backends([CPU], backend="reference")), deviations=wrong)
    monkeypatch.setattr(program, "check_backends", lambda *_, **__: [row])
    result = CliRunner().invoke(app, ["demo", "--device", "cpu", "--output", str(tmp_path)])
    assert result.exit_code == 1
    words = " ".join(result.output.split())
    assert "error 2.00e+00 of y exceeds 3.00e-01" in words
    assert "less than 1000 times chance" in words
    assert "All checks passed" not in words
    metrics = json.loads((tmp_path / "retrieval.json").read_text())
    assert metrics["judged"] and metrics["failures"]


def test_interrupted_demo_exits_with_130_and_goes_on(tmp_path, monkeypatch, capsys):
    arguments = ["demo", "--steps", "2", "--device", "cpu", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["vlmo", *arguments])
    monkeypatch.setattr(program, "check_backends", lambda *_, **__: [])
    backward = trainer.backward

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        return backward(*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(trainer, "backward", interrupted)
        with pytest.raises(SystemExit) as exit_info:
            main()
    assert exit_info.value.code == 130
    error = capsys.readouterr().err
    assert (
        error.startswith("vlmo: stopped by signal 2 after step 1 of 2") and "\n" not in error[:-1]
    )
    monkeypatch.setattr(program, "_search", lambda *_: [])
    main_exit = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert main_exit.exit_code == 0
    assert "step 1 of 2" in main_exit.output


def test_reference_passes_parity_with_several_seeds():
    for seed in range(3):
        for row in check_backends([CPU], backend="reference", seed=seed):
            assert row.ok, row


def test_deviation_that_is_not_a_number_fails():
    assert not Deviation("y", float("nan"), 0.1, 0.3).ok
