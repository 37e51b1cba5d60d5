"""What a resumed training must have in common with its start, and what is recorded of both."""

import json
import shutil

import pytest
import torch

from processes import command, rows_of, steps_of
from training_cases import run, shrink_digits, small
from training_data import make
from vlmo import save_checkpoint
from vlmo.files import write_json
from vlmo.run_folder import digests_of, load_model
from vlmo.training.state import load_state

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    shrink_digits(monkeypatch)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A finished training of two steps."""
    folder = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        shrink_digits(patch)
        run(small("textmlm", steps=2), folder)
    return folder


def record_of(folder):
    return json.loads((folder / "recipe.json").read_text())


def copy_of(folder, place):
    shutil.copytree(folder, place)
    return place


def forget(folder, *names, of_recipe=()):
    """Make a run one of a version that did not record some fields."""
    state = torch.load(folder / "training.pt", weights_only=True)
    record = record_of(folder)
    for run_ in (state["run"], record["run"]):
        for name in names:
            del run_[name]
        for name in of_recipe:
            del run_["recipe"][name]
    for name in ("metrics", "pending", "bad", "fewer"):
        del state[name]
    del record["resumed"]
    torch.save(state, folder / "training.pt")
    write_json(folder / "recipe.json", record)


# Length


def test_a_finished_training_is_made_longer(tmp_path, text):
    folder = copy_of(text, tmp_path / "run")
    first = record_of(folder)
    said = run(small("textmlm", steps=4), folder)
    assert "4 steps in all instead of 2" in said and "step 2 of 4" in said
    assert steps_of(folder) == [1, 2, 3, 4]
    run(small("textmlm", steps=4), tmp_path / "at once")
    rates = [[float(row["lr"]) for row in rows_of(f)] for f in (folder, tmp_path / "at once")]
    assert rates[0][2:] == rates[1][2:]
    record = record_of(folder)
    assert {name: record[name] for name in first if name != "resumed"} == {
        name: value for name, value in first.items() if name != "resumed"
    }
    (entry,) = record["resumed"]
    assert (entry["step"], entry["run"]["recipe"]["steps"]) == (2, 4)
    assert json.loads((folder / "metrics.json").read_text())["step"] == 4
    run(small("textmlm", steps=4), folder)  # nothing is left to do, and to record
    assert record_of(folder) == record


def test_a_training_goes_on_by_epochs(tmp_path, text):
    folder = copy_of(text, tmp_path / "run")
    run(small("textmlm", steps=None, epochs=1), folder)  # 96 samples
    assert steps_of(folder)[-1] == 12


def test_fewer_steps_than_are_done_are_refused(tmp_path, text):
    before = (text / "training.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"steps: 1 in all are fewer than the 2 already done in .*"
    ):
        run(small("textmlm", steps=1), text)
    assert (text / "training.pt").read_bytes() == before


# Data and weights


def test_other_data_of_equal_length_are_refused(tmp_path):
    data = make(tmp_path / "data", "pretrain", "records")
    found = small("pretrain", steps=1, batch_size=2)
    given = dict(data=str(data), vocabulary=tmp_path / "vocab.txt")
    run(found, tmp_path / "run", **given)
    record = record_of(tmp_path / "run")
    lines = (data / "train.jsonl").read_text()
    (data / "train.jsonl").write_text(lines.replace("two", "six", 1))
    with pytest.raises(ValueError, match=r"another training \(data \(fingerprint\): \w+ instead"):
        run(found.replace(steps=2), tmp_path / "run", **given)
    assert record_of(tmp_path / "run") == record
    (data / "train.jsonl").write_text(lines)
    data.rename(tmp_path / "moved")  # the same data elsewhere
    run(found.replace(steps=2), tmp_path / "run", **given | {"data": str(tmp_path / "moved")})
    assert record_of(tmp_path / "run")["data"] == str(data)
    assert record_of(tmp_path / "run")["resumed"][0]["data"] == str(tmp_path / "moved")


def test_other_initial_weights_are_refused(tmp_path, text):
    run(small("textmlm", steps=1, lr=2e-3), tmp_path / "other")
    first, folder = copy_of(text, tmp_path / "first"), tmp_path / "run"
    run(small("pretrain", steps=1), folder, initial=first)
    record = record_of(folder)
    assert record["run"]["initial"]["path"] == str(first)
    longer = small("pretrain", steps=2)
    with pytest.raises(ValueError, match=r"init: .*other \(digest .* started from, .*first \(dig"):
        run(longer, folder, initial=tmp_path / "other")
    with pytest.raises(ValueError, match=r"skip: \['mlm_score'\] instead of \[\]"):
        run(longer, folder, initial=first, skip=("mlm_score",))
    assert record_of(folder) == record
    first.rename(tmp_path / "renamed")
    with pytest.raises(FileNotFoundError):
        run(longer, folder, initial=tmp_path / "missing")
    run(longer, folder, initial=tmp_path / "renamed")  # the same weights
    run(longer, folder, initial=first)  # which are no longer there, nor needed
    run(small("pretrain", steps=3), folder)
    assert record_of(folder)["run"] == record["run"]
    assert record_of(folder)["initial"] == str(first)
    entries = record_of(folder)["resumed"]
    assert [entry["initial"] for entry in entries] == [str(tmp_path / "renamed"), None]


def test_a_random_start_does_not_become_another_one(tmp_path, text):
    run(small("pretrain", steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match=r"init: .*: this training started from random weights"):
        run(small("pretrain", steps=2), tmp_path / "run", initial=text)


def test_a_training_without_a_state_needs_its_initial_weights(tmp_path, text):
    """It was ended before the first state, and begins anew."""
    run(small("pretrain", steps=1), tmp_path / "run", initial=text)
    for name in ("training.pt", "model.safetensors"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(ValueError, match=r"init: this training starts from .*; give --init again"):
        run(small("pretrain", steps=1), tmp_path / "run")
    run(small("pretrain", steps=1), tmp_path / "run", initial=text)


@pytest.mark.parametrize("layout", ["model.safetensors", "model.pt"])
def test_a_file_is_checked_as_a_run_is(tmp_path, text, layout):
    path = text / layout
    if layout == "model.pt":  # of the same content, with the digests that it has
        path = tmp_path / layout
        known = digests_of(text)
        save_checkpoint(load_model(text).model, path, vocabulary=known.vocabulary)
    words = (text / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")
    found = small("pretrain", steps=1)
    with pytest.raises(
        ValueError, match=rf"vocab: is not the vocabulary that .*{layout} \(--init\)"
    ):
        run(found, tmp_path / "run", initial=path, vocabulary=tmp_path / "vocab.txt")
    run(found, tmp_path / "run", initial=path)
    assert digests_of(tmp_path / "run").vocabulary == record_of(text)["run"]["vocabulary"]


def test_answers_of_a_file_are_checked(tmp_path):
    data = make(tmp_path / "data", "vqa", "records")
    given = dict(data=str(data), vocabulary=tmp_path / "vocab.txt")
    found = small("vqa", steps=1, batch_size=2)
    run(found, tmp_path / "first", **given)
    answers = json.loads((tmp_path / "first" / "answers.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(answers[::-1]))
    weights = tmp_path / "first" / "model.safetensors"
    shuffled = given | dict(answers=tmp_path / "other.json", initial=weights)
    with pytest.raises(ValueError, match=r"init: .* other answers .* --skip vqa_classifier\."):
        run(found, tmp_path / "second", **shuffled)
    run(found, tmp_path / "second", **shuffled, skip=("vqa_classifier.",))
    run(found, tmp_path / "third", **given, initial=weights)


# Runs of earlier versions


def test_a_run_of_an_earlier_version_goes_on(tmp_path, text):
    folder = copy_of(text, tmp_path / "run")
    forget(folder, "data", "initial", of_recipe=("max_logit_scale", "official_batches"))
    run(small("textmlm", steps=3), folder)
    assert steps_of(folder) == [1, 2, 3]
    record = record_of(folder)
    assert "data" not in record["run"] and record["resumed"][0]["step"] == 2


def test_a_run_of_an_earlier_version_had_random_batches(tmp_path):
    data = make(tmp_path / "data", "pretrain", "arrow")  # two pictures
    given = dict(data=str(data), vocabulary=tmp_path / "vocab.txt", datasets=("coco",))
    found = small("pretrain", steps=1, batch_size=4, official_batches=True)
    run(found, tmp_path / "run", **given)
    forget(tmp_path / "run", "data", "initial", of_recipe=("official_batches",))
    without = found.replace(steps=2, batch_size=4, official_batches=False)
    with pytest.raises(ValueError, match=r"batch_size: 4 exceeds the 2 .* --official-batches"):
        run(without, tmp_path / "run", **given)
    run(found.replace(steps=2), tmp_path / "run", **given)
    found = small("pretrain", steps=1, batch_size=2, official_batches=True)
    run(found, tmp_path / "small", **given)
    forget(tmp_path / "small", "data", "initial", of_recipe=("official_batches",))
    with pytest.raises(
        ValueError, match=r"official_batches: False instead of True\); --official-b"
    ):
        run(found.replace(steps=2, official_batches=False), tmp_path / "small", **given)


# What is not the file it should be


def test_what_is_no_state_is_refused_in_a_sentence(tmp_path, text, monkeypatch, capsys):
    folder = copy_of(text, tmp_path / "run")
    whole = (folder / "training.pt").read_bytes()
    state = torch.load(folder / "training.pt", weights_only=True)
    arguments = ["train", "digits_textmlm", "--data", "digits", "--output", folder, "--steps", 2]
    arguments += ["--batch-size", 8, "--device", "cpu", "--no-tensorboard"]
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"nothing of the kind\n"}
    objects = {
        "code": torch.nn.Linear(1, 1),
        "weights": state["model"],
        "list": [1],
        "version": {"version": 1},
        "half": {**state, "optimizer": None},
        "run": {**state, "run": {}},
        "recipe": {**state, "run": {"recipe": {}, "samples": 1}},
        "other model": {**state, "model": {"a": torch.zeros(1)}},
    }
    for name in (*contents, *objects):
        if name in contents:
            (folder / "training.pt").write_bytes(contents[name])
        else:
            torch.save(objects[name], folder / "training.pt")
        assert command(monkeypatch, *arguments) == 2, name
        error = capsys.readouterr().err
        assert "training.pt" in error and error.count("\n") == 1, (name, error)
        assert "weights_only" not in error and "Traceback" not in error, (name, error)


@pytest.mark.parametrize("content", ["{}", "[1]", "not json", '{"run": {}}', '{"run": 3}', "\xff"])
@pytest.mark.parametrize("saved", [True, False])
def test_what_is_no_record_is_refused_and_stays(tmp_path, text, content, saved):
    folder = copy_of(text, tmp_path / "run")
    (folder / "recipe.json").write_text(content, encoding="latin-1")
    if not saved:
        (folder / "training.pt").unlink()
    with pytest.raises(ValueError, match=r"recipe\.json: is not the record of a training: "):
        run(small("textmlm", steps=3), folder)
    assert (folder / "recipe.json").read_text(encoding="latin-1") == content
    (folder / "recipe.json").unlink()
    if not saved:  # the weights of whatever training this was stay, too
        with pytest.raises(ValueError, match=r"holds model\.safetensors but no training\.pt"):
            run(small("textmlm", steps=3), folder)
        return
    run(small("textmlm", steps=3), folder)
    assert record_of(folder)["run"]["recipe"]["steps"] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", "step,loss\n1,2,3\n", "line 2 has 3 values in 2 columns"),
        ("log.csv", "step,loss\nx,2\n", "line 2: step: 'x' is not a number"),
        ("log.csv", "loss,lr\n1,2\n", "line 1 does not name the columns"),
        ("log.csv", "\x00\x01\n\xff\n", "it is not UTF-8"),
        ("log.csv", "\n1,2\n", "line 1 does not name the columns"),
        ("log.jsonl", "{}\n", "line 1 is not a JSON object with a step"),
        ("log.jsonl", '{"step": 1}\n[]\n', "line 2 is not a JSON object with a step"),
        ("log.jsonl", '{"step": "a"}\n', "line 1: step: 'a' is not a number"),
        ("log.jsonl", "step\n", "line 1 is not a JSON object with a step"),
    ],
)
def test_what_is_no_log_is_refused_and_stays(tmp_path, text, name, content, message):
    folder = copy_of(text, tmp_path / "run")
    (folder / name).write_text(content, encoding="latin-1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=f"{name}: is not the log of a training: {message}"):
        run(small("textmlm", steps=3), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / name).unlink()
    run(small("textmlm", steps=3), folder)
    assert load_state(folder / "training.pt")["step"] == 3


@pytest.mark.parametrize(
    ("name", "begun"),
    [
        ("model.safetensors", False),
        ("model.safetensors", True),
        ("best.safetensors", True),
        ("metrics.json", False),
        ("log.csv", False),
        ("bad_samples.jsonl", False),
        ("vocab.txt", False),
    ],
)
def test_a_training_that_begins_replaces_nothing(tmp_path, text, name, begun):
    folder = tmp_path / "run"
    folder.mkdir()
    if begun:  # what is left of a finished training whose state was taken away
        shutil.copy(text / "recipe.json", folder)
    words = (text / "vocab.txt").read_text()
    content = words + "another\n" if name == "vocab.txt" else "mine"
    (folder / name).write_text(content)
    vocabulary = text / "vocab.txt"
    with pytest.raises(ValueError, match=rf"output: .* holds (another )?{name}.*move it away"):
        run(small("textmlm", steps=2), folder, vocabulary=vocabulary)
    assert (folder / name).read_text() == content
    assert not (folder / "training.pt").exists()


def test_a_training_may_begin_where_one_was_killed_as_it_began(tmp_path, text):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("log.csv", "log.jsonl"):
        (folder / name).touch()
    shutil.copy(text / "vocab.txt", folder)
    run(small("textmlm", steps=1), folder)
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("pretrain", {"skip": ("mlm_score.",)}, "skip: .* only goes with --init"),
        ("pretrain", {"answer_minimum": 2}, "answer_minimum: only suits own data for vqa"),
        ("vqa", {"answer_minimum": 2}, "answer_minimum: only suits own data for vqa"),
        ("nlvr2", {"answers": "answers.json"}, "answers: .* does not suit nlvr2, only vqa"),
    ],
)
def test_options_without_an_effect_are_refused(tmp_path, stage, changes, message):
    if "answers" in changes:
        changes = {"answers": tmp_path / "answers.json"}
        changes["answers"].write_text('["yes"]')
    with pytest.raises(ValueError, match=message):
        run(small(stage), tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", -1),
        ("best", {"x": 1}),
        ("metrics", [1]),
        ("pending", "x"),
        ("bad", [1]),
        ("bad", {"a": 1}),
        ("run", {"recipe": {"steps": 2}, "samples": 96}),
    ],
)
def test_a_state_of_another_form_is_refused(tmp_path, text, name, value):
    folder = copy_of(text, tmp_path / "run")
    state = load_state(folder / "training.pt")
    torch.save({**state, name: value}, folder / "training.pt")
    with pytest.raises(ValueError, match=rf"training\.pt: is not the state of a training: {name}"):
        run(small("textmlm", steps=3), folder)


def test_weights_that_are_not_finite_are_refused_before_anything_is_written(tmp_path, text):
    folder = copy_of(text, tmp_path / "run")
    state = load_state(folder / "training.pt")
    key = "text_embeddings.word_embeddings.weight"
    state["model"][key][0, 0] = torch.nan
    torch.save(state, folder / "training.pt")
    with pytest.raises(ValueError, match=rf"training\.pt: 1 tensors hold NaN or .*{key}"):
        run(small("textmlm", steps=3), folder)
    model = load_model(text).model
    with torch.no_grad():
        model.get_parameter(key)[0, 0] = torch.inf
    save_checkpoint(model, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=rf"bad\.safetensors: 1 of .* NaN or infinite.*{key}"):
        run(small("textmlm"), tmp_path / "new", initial=tmp_path / "bad.safetensors")
    assert not (tmp_path / "new").exists()
