"""vlmo evaluate and vlmo predict: output, files and errors."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from evaluation_cases import HEADS, TINY, TOKENIZER, model_of
from vlmo import Predictor, save_checkpoint
from vlmo.commands.app import app, main
from vlmo.commands.records import reader
from vlmo.data import ANSWERS, open_data
from vlmo.run_folder import digest
from vlmo.tasks.evaluation import evaluate

pytestmark = pytest.mark.heavy

ALL = ("itc", "itm", "vqa", "nlvr2")


def run_folder(folder: Path, tasks: tuple[str, ...]) -> Path:
    """What a training leaves."""
    folder.mkdir()
    save_checkpoint(model_of(tasks), folder / "model.safetensors")
    TOKENIZER.save_vocabulary(folder / "vocab.txt")
    (folder / "recipe.json").write_text("{}")
    if "vqa" in tasks:
        (folder / "answers.json").write_text(json.dumps(ANSWERS))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run folder, and pictures a.png and b.png."""
    folder = tmp_path_factory.mktemp("prediction")
    run_folder(folder / "run", ALL)
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


def vlmo(*arguments: object) -> str:
    """Standard output of a command that succeeds."""
    options = [*map(str, arguments), "--device", "cpu"]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(monkeypatch, capsys, *arguments: object) -> str:
    """The one line of a command that fails."""
    monkeypatch.setattr(sys, "argv", ["vlmo", *map(str, arguments), "--device", "cpu"])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize("task", HEADS)
def test_evaluate_writes_what_evaluate_returns(tmp_path, task):
    run = run_folder(tmp_path / "run", HEADS[task])
    output = tmp_path / "metrics.json"
    options = ["--rerank", "4"] if task == "retrieval" else []
    shown = vlmo(
        *("evaluate", run, task, "--data", "digits", "--split", "val", "--output", output),
        *("--batch-size", 128, *options),
    )
    content = json.loads(output.read_text())
    dataset = open_data("digits", task, "val", image_size=32)
    expected = evaluate(
        model_of(HEADS[task]),
        dataset,
        TOKENIZER,
        task,
        batch_size=128,
        rerank=4 if task == "retrieval" else 0,
    )
    assert content["metrics"] == expected
    assert (content["task"], content["data"], content["split"]) == (task, "digits", "val")
    for name, value in expected.items():
        assert name in shown
        assert f"{value:.4f}" in shown


def test_evaluate_writes_the_answers_to_submit(folder, tmp_path):
    path = tmp_path / "answers.json"
    vlmo(
        *("evaluate", folder / "run", "vqa", "--data", "digits", "--split", "val"),
        *("--predictions", path, "--batch-size", 256),
    )
    rows = json.loads(path.read_text())
    scenes = open_data("digits", "vqa", "val", image_size=32)
    assert [row["question_id"] for row in rows] == list(range(len(scenes)))
    sample = scenes[3]
    picture = Image.fromarray(sample["image"].permute(1, 2, 0).numpy())
    predictor = Predictor.load(folder / "run", device="cpu")
    assert rows[3]["answer"] == predictor.answer(picture, sample["text"])[0].text


def test_evaluate_under_torchrun_writes_once_what_one_process_does(tmp_path):
    run = run_folder(tmp_path / "run", ("nlvr2",))
    common = ["evaluate", run, "nlvr2", "--data", "digits", "--split", "val"]
    vlmo(*common, "--output", tmp_path / "one.json", "--predictions", tmp_path / "one.csv")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "-m", "vlmo", *map(str, common), "--device", "cpu"]
    command += ["--output", str(tmp_path / "two.json"), "--predictions", str(tmp_path / "two.csv")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("accuracy") == 1
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("one", "two"))
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert (tmp_path / "two.csv").read_text() == (tmp_path / "one.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "textmlm", "--data", "digits"], "needs a head of mlm or textmlm"),
        (["run", "vqa", "--data", "nowhere"], "nowhere does not exist"),
        (["missing", "vqa", "--data", "digits"], "missing"),
        (["run", "vqa", "--data", "digits", "--rerank", "4"], "rerank: 4"),
        (["run", "vqa", "--data", "digits", "--output", "no/where.json"], "does not exist"),
        (["run", "vqa", "--data", "digits", "--backend", "numpy"], "'numpy'"),
    ],
)
def test_evaluate_refuses_in_one_line(folder, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert message in refused(monkeypatch, capsys, "evaluate", *arguments)
    assert sorted(folder.rglob("*")) == before


def test_a_checkpoint_alone_needs_a_vocabulary(tmp_path, monkeypatch, capsys):
    save_checkpoint(model_of(("vqa",)), tmp_path / "alone.pt")
    arguments = ["evaluate", tmp_path / "alone.pt", "vqa", "--data", "digits"]
    # Without a record, torch's format says nothing of the text capacity.
    assert "vocab: " in refused(monkeypatch, capsys, *arguments)
    TOKENIZER.save_vocabulary(tmp_path / "vocab.txt")
    vlmo(*arguments, "--vocab", tmp_path / "vocab.txt", "--split", "val", "--batch-size", 256)


@pytest.fixture
def questions(tmp_path) -> Path:
    """Six questions about pictures of their own, the fourth of which is damaged."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(6):
        pixels = np.random.default_rng(number).integers(0, 256, (9, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        record = {"image": f"{number}.png", "question": "how many?", "question_id": 100 + number}
        lines.append(json.dumps(record | {"answer": ANSWERS[number % 3]}) + "\n")
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "val.jsonl").write_text("".join(lines))
    return folder


def test_evaluate_names_a_damaged_picture_or_leaves_it_out(
    questions, folder, tmp_path, monkeypatch, capsys
):
    output, answers = tmp_path / "metrics.json", tmp_path / "answers.json"
    arguments = ["evaluate", folder / "run", "vqa", "--data", questions, "--split", "val"]
    arguments += ["--output", output, "--predictions", answers]
    said = refused(monkeypatch, capsys, *arguments)
    assert f"{questions / '3.png'}: is not an image" in said
    assert "; --on-bad-sample skip leaves out what cannot be read" in said
    assert not output.exists()
    assert not answers.exists()
    shown = vlmo(*arguments, "--on-bad-sample", "skip")
    assert re.search(r"skipped +1 ", shown)
    metrics = json.loads(output.read_text())["metrics"]
    assert metrics["skipped"] == 1
    rows = json.loads(answers.read_text())
    assert [row["question_id"] for row in rows] == [100, 101, 102, 104, 105]
    right = [row["answer"] == ANSWERS[(row["question_id"] - 100) % 3] for row in rows]
    assert metrics["vqa_score"] == pytest.approx(sum(right) / 5)


def test_evaluate_compares_the_answers_of_the_data_with_those_of_the_model(
    questions, tmp_path, monkeypatch, capsys
):
    """Data that name as many answers in another order, and nobody tells which is right."""
    run = run_folder(tmp_path / "run", ("vqa",))
    model = model_of(("vqa",), vqa_labels=3)
    found = {"answers": digest(ANSWERS[:3])}
    save_checkpoint(model, run / "model.safetensors", **found)
    (run / "answers.json").unlink()
    (questions / "3.png").write_bytes((questions / "2.png").read_bytes())
    records = (questions / "val.jsonl").read_text().splitlines()
    (questions / "train.jsonl").write_text("\n".join(records))
    arguments = ["evaluate", run, "vqa", "--data", questions, "--split", "val"]
    assert "vqa_score" in vlmo(*arguments)
    (questions / "train.jsonl").write_text("\n".join(records[::-1]))
    said = refused(monkeypatch, capsys, *arguments)
    assert f"data: {questions} has other answers, or the same in another order" in said
    assert str(run / "model.safetensors") in said
    # Told their order, the data are labelled by it.
    (tmp_path / "answers.json").write_text(json.dumps(ANSWERS[:3]))
    assert "vqa_score" in vlmo(*arguments, "--answers", tmp_path / "answers.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vqa", "--image-size", "33"], "image_size: 33 is not a multiple of patch_size 16"),
        (["vqa", "--rerank", "4"], "rerank: 4 candidates cannot be re-ranked for task 'vqa'"),
        (["retrieval", "--predictions", "x.json"], "predictions: task 'retrieval' has none"),
        (["textmlm"], "needs a head of mlm or textmlm"),
        (["vqa", "--output", "x", "--predictions", "./x"], "predictions: x is the file of output"),
        (["vqa", "--output", "."], "output: . is a directory"),
    ],
)
def test_evaluate_refuses_before_a_model_is_loaded(folder, monkeypatch, capsys, arguments, message):
    def loaded(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("vlmo.run_folder.load_model", loaded)
    said = refused(
        *(monkeypatch, capsys, "evaluate", folder / "run", *arguments), "--data", "digits"
    )
    assert message in said


def test_outputs_that_are_not_finite_are_no_metric(tmp_path):
    run = run_folder(tmp_path / "run", ("vqa",))
    model = model_of(("vqa",))
    with torch.no_grad():
        model.vqa_classifier[3].weight.fill_(3e38)
    save_checkpoint(model, run / "model.safetensors")
    arguments = ["evaluate", run, "vqa", "--data", "digits", "--split", "val", "--device", "cpu"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--output", str(tmp_path / "x.json")])
    assert result.exit_code == 1
    assert result.stderr.startswith("vlmo: the model's outputs are NaN or infinite")
    assert not (tmp_path / "x.json").exists()


def test_predict_says_all_that_the_heads_can_of_one_pair(folder):
    found = json.loads(
        vlmo("predict", folder / "run", "--image", folder / "a.png", "--text", "a one", "--top", 2)
    )
    predictor = Predictor.load(folder / "run", device="cpu")
    image = folder / "a.png"
    said = found.pop("prediction")
    assert found == {"image": str(image), "text": "a one"}
    assert said["similarity"] == pytest.approx(float(predictor.similarity(image, "a one")))
    assert said["match"] == pytest.approx(float(predictor.match(image, "a one")))
    expected = [answer._asdict() for answer in predictor.answer(image, "a one", top=2)]
    assert said["answers"] == expected
    assert set(said) == {"similarity", "match", "answers"}


def test_predict_judges_a_statement_about_two_images(folder):
    pair = folder / "a.png", folder / "b.png"
    found = json.loads(
        vlmo(
            *("predict", folder / "run", "--text", "both show a one"),
            *("--image", pair[0], "--image", pair[1]),
        )
    )
    predictor = Predictor.load(folder / "run", device="cpu")
    assert found["prediction"]["true"] == pytest.approx(
        float(predictor.judge(*pair, "both show a one"))
    )
    assert (found["image_0"], found["image_1"]) == tuple(map(str, pair))


def test_predict_reads_and_writes_many_records(folder, tmp_path, monkeypatch):
    records = [
        {"image": "a.png", "text": "a one", "mine": 1},
        {"image": "b.png", "question": "how many?"},
        {"image_0": "a.png", "image_1": "b.png", "statement": "both"},
        {"image": "a.png", "caption": "a two"},
    ]
    path = folder / "records.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n\n" for record in records))
    output = tmp_path / "found.jsonl"
    monkeypatch.setattr("vlmo.commands.predict._CHUNK", 3)
    assert vlmo("predict", folder / "run", "--input", path, "--output", output) == ""
    found = [json.loads(line) for line in output.read_text().splitlines()]
    said = [record.pop("prediction") for record in found]
    assert found == records
    pair = {"similarity", "match", "answers"}
    assert [set(one) for one in said] == [pair, pair, {"true"}, pair]
    predictor = Predictor.load(folder / "run", device="cpu")
    assert said[3]["match"] == pytest.approx(float(predictor.match(folder / "a.png", "a two")))


def predicted(folder: Path, content: str | bytes, name: str = "given.jsonl", *options) -> list:
    """What is written for a file of records in ``folder``."""
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    said = vlmo("predict", folder / "run", "--input", folder / name, *options)
    return [json.loads(line) for line in said.splitlines()]


def test_what_a_record_says_itself_is_returned_unchanged(folder):
    """Our own format of questions among them, with answers that are the truth."""
    records: list[dict[str, Any]] = [
        {
            "image": "a.png",
            "question": "how many?",
            "answers": {"2": 1.0, "3": 0.3},
            "split": "val",
        },
        {"image": "a.png", "question": "how many?", "answer": ["two"] * 3, "image_id": 2**70},
        {"image": "b.png", "caption": "a", "match": None, "similarity": "s", "true": [1.5e-7]},
        {"image_0": "a.png", "image_1": "b.png", "statement": "both", "label": True, "true": "x"},
        {"image": "a.png", "text": "a", "note": "\U0001f600 \u00e9 \ud800"},
    ]
    found = predicted(folder, "".join(f"{json.dumps(record)}\n" for record in records))
    said = [record.pop("prediction") for record in found]
    assert found == records
    assert [list(one) for one in found] == [list(one) for one in records]
    assert said[0]["answers"][0]["text"] in ANSWERS
    assert 0 < said[3]["true"] < 1


def test_predict_reads_arrays_and_tables_as_well(folder):
    records = [
        {"image": "a.png", "text": "a one", "id": "7"},
        {"image": "b.png", "text": 'a "two", or', "id": ""},
    ]
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    expected = predicted(folder, lines)
    table = 'image,text,id\r\na.png,a one,7\r\n\r\nb.png,"a ""two"", or",\r\n'
    for content, name in (
        (json.dumps(records, indent=2), "given.json"),
        (lines, "given.json"),
        (table, "given.csv"),
        ('image\ttext\tid\na.png\ta one\t7\nb.png\t"a ""two"", or"\t\n', "given.tsv"),
        ("\ufeff" + table, "given.csv"),
        ("\ufeff" + lines, "given.jsonl"),
        (lines.encode("utf-16"), "given.jsonl"),
        (json.dumps(records).encode("utf-16"), "given.json"),
    ):
        assert predicted(folder, content, name) == expected, name
    table = "image,image_0,image_1,text\na.png,,,a\n,a.png,b.png,both\n"
    found = predicted(folder, table, "given.csv")
    assert found[1]["image"] == ""
    assert set(found[1]["prediction"]) == {"true"}


def test_predict_reads_standard_input_and_writes_standard_output(folder, monkeypatch):
    monkeypatch.chdir(folder)
    line = '{"image": "a.png", "text": "a one \u00e9"}\n'
    arguments = ["predict", "run", "--input", "-", "--output", "-", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments, input=("\ufeff" + line).encode())
    assert result.exit_code == 0, result.output
    assert [json.loads(result.stdout)] == predicted(folder, line)
    result = CliRunner().invoke(app, arguments, input=line.encode() + b"\xff\n")
    assert str(result.exception) == "standard input, line 2: is not UTF-8"
    assert not (folder / "-").exists()


def test_a_picture_that_cannot_be_read_costs_its_record_only(folder, tmp_path, monkeypatch):
    (folder / "bad.png").write_bytes((folder / "a.png").read_bytes()[:200])
    records = [{"image": "a.png", "text": f"a {n}", "id": n} for n in range(7)]
    records[2]["image"], records[5]["image"] = "bad.png", "gone.png"
    records.insert(6, {"image_0": "a.png", "image_1": "bad.png", "text": "both"})
    path, output = folder / "some.jsonl", tmp_path / "found.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    monkeypatch.setattr("vlmo.commands.predict._CHUNK", 3)
    arguments = ["predict", folder / "run", "--input", path, "--output", output, "--device", "cpu"]
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert f"vlmo: 3 of 8 records have an error, the first is {path}, line 3: " in result.stderr
    found = [json.loads(line) for line in output.read_text().splitlines()]
    errors = [record.pop("error", None) for record in found]
    assert [n for n, error in enumerate(errors) if error] == [2, 5, 6]
    assert "bad.png: the image cannot be read" in errors[2]
    assert errors[5] == f"{folder / 'gone.png'}: No such file or directory"
    said = [record.pop("prediction", None) for record in found]
    assert found == records
    assert [one is None for one in said] == [error is not None for error in errors]
    whole = predicted(folder, json.dumps(records[4]))
    assert said[4]["match"] == pytest.approx(whole[0]["prediction"]["match"])


def test_a_picture_that_cannot_be_read_has_no_embedding(folder, tmp_path):
    (folder / "bad.png").write_bytes(b"no picture")
    path, output = folder / "some.jsonl", tmp_path / "vectors.npz"
    names = ["a.png", "bad.png", "b.png"]
    path.write_text("".join(f'{{"image": "{name}", "text": "a"}}\n' for name in names))
    arguments = ["predict", folder / "run", "--input", path, "--embeddings", output]
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 1
    assert "1 of 3 records have an error" in result.stderr
    with np.load(output) as arrays:
        assert set(arrays) == {"image", "text", "error"}
        assert [bool(error) for error in arrays["error"]] == [False, True, False]
        assert not arrays["image"][1].any()
        np.testing.assert_allclose(np.linalg.norm(arrays["image"][[0, 2]], axis=1), 1, rtol=1e-5)
        assert arrays["text"].shape == (3, TINY.dim)


def test_a_picture_of_the_command_line_must_be_readable(folder, monkeypatch, capsys):
    (folder / "bad.png").write_bytes(b"no picture")
    options = ["predict", folder / "run", "--text", "a", "--image"]
    assert "image: gone.png does not exist" in refused(monkeypatch, capsys, *options, "gone.png")
    assert "bad.png: is not an image" in refused(monkeypatch, capsys, *options, folder / "bad.png")


def test_outputs_that_are_not_finite_are_told(tmp_path, folder):
    """Neither invalid JSON nor half of a file."""
    model = model_of(("itm",))
    with torch.no_grad():
        model.itm_score.fc.weight.fill_(3e38)
    run = run_folder(tmp_path / "run", ("itm",))
    save_checkpoint(model, run / "model.safetensors")
    output = tmp_path / "found.jsonl"
    output.write_text("older")
    arguments = ["predict", run, "--image", folder / "a.png", "--text", "a", "--output", output]
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 1
    assert result.stderr == "vlmo: the model's outputs are NaN or infinite, first in row 0\n"
    assert output.read_text() == "older"
    with torch.no_grad():
        model.itm_score.fc.weight.fill_(math.nan)
    save_checkpoint(model, run / "model.safetensors")
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
    assert "hold NaN or infinite weights: itm_score.fc.weight" in str(result.exception)


def test_blank_texts_are_told_by_their_records(folder):
    path = folder / "blank.jsonl"
    path.write_text('{"image": "a.png", "text": "a"}\n' + '{"image": "a.png", "text": " "}\n' * 3)
    arguments = ["predict", folder / "run", "--input", path, "--device", "cpu"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0
    more = "the text is blank, and those of 2 more records"
    assert result.stderr == f"vlmo: {path}, line 2: {more}\n"


def test_predict_writes_embeddings(folder, tmp_path):
    path = folder / "texts.jsonl"
    path.write_text("".join(f'{{"text": "a {word}"}}\n' for word in ("one", "two", "three")))
    output = tmp_path / "vectors.npz"
    assert vlmo("predict", folder / "run", "--input", path, "--embeddings", output) == ""
    predictor = Predictor.load(folder / "run", device="cpu")
    with np.load(output) as arrays:
        assert set(arrays) == {"text"}
        expected = predictor.embed_texts(["a one", "a two", "a three"])
        torch.testing.assert_close(torch.from_numpy(arrays["text"]), expected)
    vlmo("predict", folder / "run", "--image", folder / "a.png", "--embeddings", output)
    with np.load(output) as arrays:
        assert arrays["image"].shape == (1, TINY.dim)
        assert set(arrays) == {"image"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"image": "a.png", "text": "a"}\n{"image": 1}\n', "line 2: image: 1 is not a text"),
        ("[1]\n", "line 1: [1] is not a JSON object"),
        ("{\n", "line 1: is not JSON"),
        ('{"image": "a.png"}\n', "line 1: the model's heads (itc, itm, vqa, nlvr2) need an image"),
        ('{"image": "a.png", "text": "a", "n": NaN}\n', "line 1: is not JSON: NaN is not a number"),
        ('{"image": "a.png", "text": "a", "n": 1e999}\n', "line 1: a number is too large"),
        ('{"image": "a.png", "text": "a", "text": "b"}\n', "line 1: is not JSON: the key 'text'"),
        ('{"image": "a.png", "text": "a\\ud800"}\n', "line 1: text: 'a\\ud800' is not valid Uni"),
        (f'{{"image": "a.png", "n": {"[" * 100_000}\n', "line 1: is nested too deeply"),
        ('{"image": "a.png", "text": ["a", "b"]}\n', "line 1: text: ['a', 'b'] is not a text"),
        ('{"image": "a.png", "text": "a", "prediction": 1}\n', "line 1: has the key 'prediction'"),
        ('{"image": "a.png", "text": "a", "error": 1}\n', "line 1: has the key 'error'"),
        ('\n{"text": "a"} x\n', "line 2: is not JSON: Extra data"),
        ('{"image_0": "a.png", "text": "a"}\n', "has image_0 instead of image"),
        ('{"image": "a.png", "text": "a", "caption": "b"}\n', "has text and caption"),
    ],
)
def test_predict_names_the_record_it_cannot_use(
    folder, tmp_path, monkeypatch, capsys, content, message
):
    path = folder / "bad.jsonl"
    path.write_text(content)
    output = tmp_path / "found.jsonl"
    arguments = ["predict", folder / "run", "--input", path, "--output", output]
    assert message in refused(monkeypatch, capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "é"}'.encode("latin-1"), "x.jsonl, line 1: is not UTF-8"),
        ("x.json", b'{"text": "a"}\n{"text": 3}', "x.json, line 2: text: 3 is not a text"),
        ("x.json", b'[{"text": "a"}, 3]', "x.json, record 2: 3 is not a JSON object"),
        ("x.json", b'[{"text": "a"},]', "x.json: is not JSON"),
        ("x.csv", b"text,text\na,b\n", "x.csv, line 1: two columns have the same name"),
        ("x.csv", b"text,n\na,1\nb\n", "x.csv, line 3: has 1 values for 2 columns"),
        ("x.csv", b'text,n\na,"1\n', "x.csv, line 2: is not CSV"),
        ("x.csv", b"n,image,image_0\n1,a.png,a.png\n", "x.csv, line 2: has image and image_0"),
    ],
)
def test_files_of_records_are_checked_before_a_model_is_loaded(
    tmp_path, monkeypatch, capsys, name, content, message
):
    path = tmp_path / name
    path.write_bytes(content)
    # There is no such model: it is not looked for.
    assert message in refused(monkeypatch, capsys, "predict", "no-run", "--input", path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --input, or --image and --text"),
        (["--input", "x.jsonl", "--text", "a"], "give either --input"),
        (["--text", "a", "--embeddings", "x.npy"], "x.npy does not end in .npz"),
        (["--text", "a", *["--image", "a.png"] * 3], "3 images are more than two"),
        (
            ["--text", "a", "--output", "no/where.jsonl"],
            "output: the folder of no/where.jsonl does",
        ),
        (["--text", "a", "--embeddings", "no/x.npz"], "embeddings: the folder of no/x.npz does"),
        (["--text", "a", "--output", "folder"], "output: folder is a directory"),
        (["--text", "a", "--output", "x.npz", "--embeddings", "./x.npz"], "is the file of output"),
        (["--input", "x.jsonl", "--output", "x.jsonl"], "output: x.jsonl is the file of input"),
        (["--input", "gone.jsonl"], "gone.jsonl"),
        (["--text", "a", "--image", "gone.png"], "image: gone.png does not exist"),
    ],
)
def test_predict_refuses_wrong_options(tmp_path, monkeypatch, capsys, arguments, message):
    """Before a model is loaded: there is none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.jsonl").write_text('{"text": "a"}')
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(monkeypatch, capsys, "predict", "no-run", *arguments)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "option"),
    [("predict", "--output"), ("predict", "--embeddings"), ("evaluate", "--output")],
)
def test_a_folder_that_cannot_be_written_to_is_found_first(
    tmp_path, monkeypatch, capsys, command, option
):
    path = tmp_path / "found.npz"
    monkeypatch.setattr(os, "access", lambda folder, mode: Path(folder) != tmp_path)
    rest = ["--text", "a"] if command == "predict" else ["vqa", "--data", "digits"]
    said = refused(monkeypatch, capsys, command, "no-run", *rest, option, path)
    assert said == f"vlmo: {option[2:]}: the folder of {path} cannot be written to\n"


@pytest.mark.parametrize(
    "rest", [("predict", "--text", "a"), ("evaluate", "vqa", "--data", "digits")]
)
def test_a_wrong_name_of_kernels_is_found_first(monkeypatch, capsys, rest):
    monkeypatch.setenv("VLMO_KERNELS", "bad")
    command, *options = rest
    said = refused(monkeypatch, capsys, command, "no-run", *options)
    assert "VLMO_KERNELS: 'bad' is not a backend" in said


@pytest.mark.parametrize(
    ("command", "defaults"),
    [
        ("predict", ["standard output", "none", "that of the run folder", "auto", "64", "1"]),
        (
            "evaluate",
            [
                "test",
                "those of the task",
                "the model's",
                "that of the run folder",
                "none",
                "error",
                "0",
            ],
        ),
    ],
)
def test_help_shows_the_defaults(monkeypatch, command, defaults):
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(app, [command, "--help"], env={"TERMINAL_WIDTH": "200"}).output
    for default in defaults:
        assert re.search(rf"\[default: \(?{re.escape(default)}\)?\]", shown), default


@pytest.fixture
def documented(folder, tmp_path, monkeypatch) -> str:
    """docs/prediction.md, in a folder that has what its examples name."""
    for name, source in (("photo.jpg", "a.png"), ("other.jpg", "b.png")):
        Image.open(folder / source).save(tmp_path / name)
    (tmp_path / "run").symlink_to(folder / "run")
    monkeypatch.chdir(tmp_path)
    return (Path(__file__).parents[2] / "docs" / "prediction.md").read_text()


@pytest.mark.filterwarnings("ignore:the text .* has 13 tokens")
def test_the_documented_python_runs(documented):
    examples = re.findall(r"```python\n(.*?)```", documented, re.DOTALL)
    assert len(examples) == 2
    names: dict = {}
    for code in examples:
        exec(code, names)
    similarity = names["predictor"].similarity(["photo.jpg", "other.jpg"], ["a red car", "a dog"])
    torch.testing.assert_close(names["texts"] @ names["images"].T, similarity)
    with Image.open("attention.png") as drawn, Image.open("photo.jpg") as photo:
        assert drawn.size == photo.size
        assert (np.array(drawn) <= np.array(photo)).all()


@pytest.mark.filterwarnings("ignore:the text .* has 13 tokens")
def test_the_documented_predictions_run(documented, tmp_path):
    records = re.findall(r"^    (\{.*\})$", documented, re.MULTILINE)
    (tmp_path / "pairs.jsonl").write_text("\n".join(records))
    texts = [{"caption": "a dog"}, {"caption": "a red car"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, texts)))
    commands = re.findall(r"^    vlmo (predict run/.*)$", documented, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        vlmo(*shlex.split(command))
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == len(records) == 2
    with np.load(tmp_path / "vectors.npz") as arrays:
        assert arrays["text"].shape == (2, TINY.dim)


def test_the_documented_evaluations_are_commands(documented):
    """Their data are not here: what is checked is that every option exists."""
    commands = re.findall(
        r"^    (?:torchrun .* -m )?vlmo (evaluate runs.*)$", documented, re.MULTILINE
    )
    assert len(commands) >= 8
    for command in commands:
        result = CliRunner().invoke(app, [*shlex.split(command), "--device", "cpu"])
        assert isinstance(result.exception, FileNotFoundError), command


def test_records_may_name_their_pictures_as_hugging_face_does(tmp_path):
    for record, images in (
        ({"file_name": "a.png", "text": "x"}, ["a.png"]),
        (
            {f"image_{n}_file_name": f"{n}.png" for n in range(2)} | {"text": "x"},
            ["0.png", "1.png"],
        ),
    ):
        (tmp_path / "given.jsonl").write_text(json.dumps(record))
        (found,) = reader(tmp_path / "given.jsonl")()
        assert found.images == tuple(tmp_path / name for name in images)
        assert found.given == record


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz"])
def test_tables_are_not_taken_for_lines(tmp_path, name):
    with pytest.raises(ValueError, match=rf"input: .*{name}: .* is not read here"):
        reader(tmp_path / name)
