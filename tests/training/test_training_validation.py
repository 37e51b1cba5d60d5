"""Validation cannot lose progress: the state is saved first, and missed validations are redone."""

import itertools
import json
import os
import signal

import pytest

from processes import assert_same_weights, command, rows_of, steps_of
from training_cases import run, shrink_digits, small
from training_data import damage, make
from vlmo.tasks.evaluation import evaluate
from vlmo.training import Interrupted, trainer
from vlmo.training.state import load_state

pytestmark = pytest.mark.heavy

OPTIONS = dict(evaluate_every=2, save_every=100)


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    shrink_digits(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of 4 steps with validations after steps 2 and 4 that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        shrink_digits(patch)
        run(small("vqa"), folder, **OPTIONS)
    return folder


def assert_as_if_nothing_had_been(folder, whole):
    for name in ("log.csv", "metrics.json"):
        assert (folder / name).read_text() == (whole / name).read_text(), name
    for name in ("model.safetensors", "best.safetensors"):
        assert_same_weights(folder, whole, name)
    logs = [(f / "log.jsonl").read_text().splitlines() for f in (folder, whole)]
    assert [json.loads(line)["step"] for line in logs[0]] == [1, 2, 3, 4]
    assert len(logs[0]) == len(logs[1])


@pytest.mark.parametrize("step", [2, 4])
def test_a_validation_that_fails_is_made_up_for(tmp_path, monkeypatch, whole, step):
    calls = itertools.count()

    def failing(*args, **kwargs):
        if next(calls) == step // 2:  # the first call tries a few samples
            raise ValueError("val.jsonl, line 3: picture is damaged")
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluate", failing)
    with pytest.raises(ValueError, match=rf"validation after step {step}: val.* the training is s"):
        run(small("vqa"), tmp_path, **OPTIONS)
    assert load_state(tmp_path / "training.pt")["step"] == step
    assert steps_of(tmp_path) == list(range(1, step))
    with monkeypatch.context() as patch:  # still damaged
        patch.setattr(trainer, "evaluate", lambda *_, **__: json.loads("x"))
        with pytest.raises(ValueError, match=f"validation after step {step}: "):
            run(small("vqa"), tmp_path, **OPTIONS)
    assert steps_of(tmp_path) == list(range(1, step))
    run(small("vqa"), tmp_path, **OPTIONS)
    assert_as_if_nothing_had_been(tmp_path, whole)
    assert load_state(tmp_path / "training.pt")["pending"] is None


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_does_not_wait_for_a_validation(tmp_path, monkeypatch, whole, step):
    def backward_and_signal(*args, seed, **kwargs):
        if seed[1] == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*args, seed=seed, **kwargs)

    backward = trainer.backward
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "backward", backward_and_signal)
        with pytest.raises(Interrupted, match=f"after step {step} of 4"):
            run(small("vqa"), tmp_path, **OPTIONS)
    assert steps_of(tmp_path) == list(range(1, step))
    run(small("vqa"), tmp_path, **OPTIONS)
    assert_as_if_nothing_had_been(tmp_path, whole)


def test_a_damaged_picture_of_the_validation(tmp_path, monkeypatch, capsys):
    """By the command line: exit code 2, and all steps are kept; mended, it ends as it should."""
    data = make(tmp_path / "data", "pretrain", "records", count=12)
    picture = data / "val9.png"  # not among the few samples that are tried first
    content = picture.read_bytes()
    damage(picture)
    arguments = ["train", "digits_pretrain", "--data", data, "--output", tmp_path / "run"]
    arguments += ["--vocab", tmp_path / "vocab.txt", "--steps", 2, "--batch-size", 2]
    arguments += ["--device", "cpu", "--no-tensorboard"]
    for _ in range(2):
        assert command(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert "validation after step 2: " in error and "val9.png" in error
        assert error.count("\n") == 1
        assert load_state(tmp_path / "run" / "training.pt")["step"] == 2
    picture.write_bytes(content)
    assert command(monkeypatch, *arguments) == 0
    assert rows_of(tmp_path / "run")[-1]["val_loss"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]


def test_the_first_small_validation_says_what_is_wrong(tmp_path):
    data = make(tmp_path / "data", "pretrain", "records", count=12)
    damage(data / "val1.png")
    with pytest.raises(ValueError, match=r"val1\.png"):
        run(
            small("pretrain", steps=2, batch_size=2),
            tmp_path / "run",
            data=str(data),
            vocabulary=tmp_path / "vocab.txt",
            evaluate_every=None,
        )
    assert steps_of(tmp_path / "run") == []


def test_a_finished_training_is_not_validated_again(tmp_path, monkeypatch, whole):
    run(small("vqa"), tmp_path, **OPTIONS)
    monkeypatch.setattr(trainer, "evaluate", None)
    (tmp_path / "metrics.json").unlink()
    run(small("vqa"), tmp_path, **OPTIONS)
    assert_as_if_nothing_had_been(tmp_path, whole)
