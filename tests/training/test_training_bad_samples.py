"""Samples that cannot be read: an error, or left out, listed and counted."""

import json
import shutil

import pytest

from processes import assert_same_weights, command, rows_of
from training_cases import keep_states, run, small
from training_data import damage, make
from vlmo.training import trainer
from vlmo.training.bad_samples import BadSamples, bearable
from vlmo.training.state import load_state

pytestmark = pytest.mark.heavy

BAD = (3, 7)
STEPS = 6
OPTIONS = dict(evaluate_every=0, log_every=2, save_every=1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve pairs, of which two have a damaged picture; vocab.txt lies beside the folder."""
    folder = make(tmp_path_factory.mktemp("bad") / "data", "pretrain", "records", count=12)
    for number in BAD:
        damage(folder / f"train{number}.png")
    return folder


def train(data, output, policy="skip", **changes):
    steps = changes.pop("steps", STEPS)
    given = dict(data=str(data), vocabulary=data.parent / "vocab.txt", on_bad_sample=policy)
    return run(
        small("pretrain", steps=steps, batch_size=3), output, **{**OPTIONS, **given, **changes}
    )


def listed(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A training that left the two out, with a copy of each state, and what it said."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_state", trainer.save_state)
        keep_states()
        said = train(data, folder)
    return folder, said


def test_each_is_listed_and_counted_once(whole, data):
    folder, said = whole
    entries = listed(folder)
    assert sorted(entry["sample"] for entry in entries) == list(BAD)
    for entry in entries:
        assert f"train{entry['sample']}.png" in entry["reason"]
        assert said.count(f"Left out sample {entry['sample']}: {entry['reason'][:40]}") == 1
    rows = rows_of(folder)
    for row in rows:
        known = sum(entry["step"] <= int(row["step"]) for entry in entries)
        assert int(row["bad_samples"]) == known
    assert rows[-1]["bad_samples"] == "2"
    assert load_state(folder / "training.pt")["bad"] == {e["sample"]: e for e in entries}


def test_resumed_from_any_step_it_is_the_same(tmp_path, whole, data):
    for step in (1, 3, 5):
        folder = tmp_path / str(step)
        folder.mkdir()
        shutil.copy(whole[0] / f"state{step}.pt", folder / "training.pt")
        for name in ("log.csv", "log.jsonl", "bad_samples.jsonl"):
            shutil.copy(whole[0] / name, folder)
        train(data, folder)
        for name in ("log.csv", "bad_samples.jsonl"):
            assert (folder / name).read_text() == (whole[0] / name).read_text(), (step, name)
        assert_same_weights(folder, whole[0], "model.safetensors")


def test_workers_make_no_difference(tmp_path, whole, data):
    train(data, tmp_path, workers=1)
    for name in ("log.csv", "bad_samples.jsonl"):
        assert (tmp_path / name).read_text() == (whole[0] / name).read_text(), name


def test_by_default_the_first_one_is_an_error_that_loses_nothing(tmp_path, whole, data):
    """The state is saved, and the same training goes on when the option allows it."""
    with pytest.raises(
        ValueError, match=r"train\d\.png.*--on-bad-sample skip; step \d is saved"
    ) as caught:
        train(data, tmp_path, "error", save_every=100)
    state = load_state(tmp_path / "training.pt")
    (entry,) = state["bad"].values()
    assert str(caught.value).startswith(entry["reason"])
    assert state["step"] == entry["step"] - 1
    assert listed(tmp_path) == [entry]
    train(data, tmp_path)
    assert listed(tmp_path) == listed(whole[0])
    assert_same_weights(tmp_path, whole[0], "model.safetensors")


def test_more_than_may_be_skipped_is_an_error_that_loses_nothing(tmp_path, whole, data):
    message = r"on_bad_sample: 2 samples cannot be read, more than the 1 that may be skipped"
    with pytest.raises(ValueError, match=message):
        train(data, tmp_path, "skip:1", save_every=100)
    step = load_state(tmp_path / "training.pt")["step"]
    with pytest.raises(ValueError, match=message):  # at once
        train(data, tmp_path, "skip:1")
    assert load_state(tmp_path / "training.pt")["step"] == step
    train(data, tmp_path, "skip:2")
    assert (tmp_path / "log.csv").read_text() == (whole[0] / "log.csv").read_text()
    assert_same_weights(tmp_path, whole[0], "model.safetensors")


def test_it_goes_on_when_the_record_of_a_bad_sample_is_taken_out(tmp_path):
    data = make(tmp_path / "data", "pretrain", "records", count=12)
    damage(data / "train3.png")
    lines = (data / "train.jsonl").read_text().splitlines(keepends=True)
    with pytest.raises(ValueError, match=r"train3\.png"):
        train(data, tmp_path / "run", "error")
    # No other record may be missed.
    (data / "train.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match=r"another training \(samples: 11 instead of 12"):
        train(data, tmp_path / "run", "error")
    (data / "train.jsonl").write_text("".join(lines[:3] + lines[4:]))
    said = train(data, tmp_path / "run", "error")
    assert "1 samples that could not be read have been removed from the data; 11 are left" in said
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["run"]["samples"] == 12
    last = record["resumed"][-1]
    assert last["run"]["samples"] == 11
    assert [entry["sample"] for entry in last["removed"]] == [3]
    assert rows_of(tmp_path / "run")[-1]["step"] == str(STEPS)
    assert "of 6" in train(data, tmp_path / "run", "error")  # and again


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_a_validation_leaves_out_and_counts(tmp_path, task):
    data = make(tmp_path / "data", task, "records", count=12)
    damage(data / "val1.png")  # among the few that are tried first
    damage(data / "val9.png")
    given = dict(data=str(data), vocabulary=tmp_path / "vocab.txt", on_bad_sample="skip")
    found = small(task, steps=1, batch_size=3)
    run(found, tmp_path / "run", **OPTIONS | {"evaluate_every": 1} | given)
    (row,) = rows_of(tmp_path / "run")
    assert row["val_skipped"] == "2"
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["validation"]["skipped"] == 2
    assert row["bad_samples"] == "0"


def test_what_the_option_means():
    assert bearable("error", 100) is None
    assert bearable("skip", 100) == 10
    assert bearable("skip", 5001) == 51
    assert bearable("skip:3", 100) == 3
    for wrong in ("skip:0", "skip:-1", "skip:x", "replace", ""):
        with pytest.raises(ValueError, match=f"on_bad_sample: '{wrong}' is not error, skip or"):
            bearable(wrong, 100)


def test_a_sample_is_new_once():
    bad = BadSamples({}, 2)
    bad.note(2, [(5, "b")])
    bad.note(1, [(5, "a"), (4, "c")])
    assert bad.gather() == [
        {"sample": 4, "step": 1, "reason": "c"},
        {"sample": 5, "step": 1, "reason": "a"},
    ]
    bad.note(3, [(5, "a")])
    assert bad.gather() == []
    bad.check()
    bad.note(3, [(6, "d")])
    bad.gather()
    with pytest.raises(ValueError, match="3 samples cannot be read"):
        bad.check()


def test_it_is_no_part_of_the_identity_and_the_command_line_has_it(
    tmp_path, data, monkeypatch, capsys
):
    arguments = ["train", "digits_pretrain", "--data", data, "--output", tmp_path / "run"]
    arguments += ["--vocab", data.parent / "vocab.txt", "--steps", STEPS, "--batch-size", 3]
    arguments += ["--device", "cpu", "--no-tensorboard", "--evaluate-every", 0]
    assert command(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert command(monkeypatch, *arguments, "--on-bad-sample", "maybe") == 2
    assert "on_bad_sample: 'maybe' is not" in capsys.readouterr().err
    assert command(monkeypatch, *arguments, "--on-bad-sample", "skip:5") == 0
