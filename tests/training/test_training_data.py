"""Every task trains on every source of data, with a validation split and without."""

import json

import pytest

from processes import command, rows_of
from test_spm import trained
from training_cases import run, small
from training_data import DATASETS, SOURCES, make
from vlmo.run_folder import load_model

pytestmark = pytest.mark.heavy

JUDGED_BY = {
    "textmlm": "val_mlm_loss",
    "pretrain": "val_loss",
    "retrieval": "val_mean_recall",
    "vqa": "val_vqa_score",
    "nlvr2": "val_accuracy",
}


@pytest.mark.parametrize("validation", [True, False], ids=["val", "no-val"])
@pytest.mark.parametrize(("task", "source"), SOURCES)
def test_a_task_on_a_source(tmp_path, task, source, validation):
    data = make(tmp_path / "data", task, source, validation=validation)
    said = run(
        small(task, steps=1, batch_size=2),
        tmp_path / "run",
        data=str(data),
        vocabulary=tmp_path / "vocab.txt",
        datasets=DATASETS.get(task) if source == "arrow" else None,
        evaluate_every=None,
    )
    assert ("No validation" in said) != validation
    (row,) = rows_of(tmp_path / "run")
    assert float(row["loss"]) > 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert bool(metrics["validation"]) == (JUDGED_BY[task] in row) == validation
    if validation:
        assert metrics["best"]["value"] == float(row[JUDGED_BY[task]])


@pytest.mark.parametrize(("task", "source"), [("nlvr2", "arrow"), ("textmlm", "texts")])
def test_from_the_command_line(tmp_path, monkeypatch, task, source):
    data = make(tmp_path / "data", task, source)
    arguments = ["train", f"digits_{task}", "--data", data, "--vocab", tmp_path / "vocab.txt"]
    arguments += ["--output", tmp_path / "run", "--steps", 1, "--batch-size", 2]
    assert command(monkeypatch, *arguments, "--device", "cpu", "--no-tensorboard") == 0
    assert JUDGED_BY[task] in rows_of(tmp_path / "run")[0]


def test_a_run_keeps_its_sentencepiece_vocabulary(tmp_path):
    data = make(tmp_path / "data", "retrieval", "records")
    (tmp_path / "beit3.spm").write_bytes(trained())
    given = dict(data=str(data), vocabulary=tmp_path / "beit3.spm")
    run(small("retrieval", steps=1, batch_size=2), tmp_path / "run", **given)
    loaded = load_model(tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    assert loaded.vocabulary is not None and loaded.digests.vocabulary is not None
    assert loaded.vocabulary.encode("The cat").tokens[:2] == ["<s>", "\u2581"]

    found = small("retrieval", steps=2, batch_size=2)  # resumes with the vocabulary of the run
    assert "Resuming" in run(found, tmp_path / "run", data=str(data))
    given = dict(data=str(data), vocabulary=tmp_path / "vocab.txt", initial=tmp_path / "run")
    with pytest.raises(ValueError, match=r"vocab: is not the vocabulary that .*run \(--init\)"):
        run(found, tmp_path / "second", **given)
