"""vlmo evaluate and vlmo predict: what they print and write, and how they fail."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from evaluation_cases import HEADS, TINY, TOKENIZER, model_of
from vlmo import Predictor, save_checkpoint
from vlmo.cli import app, main
from vlmo.data import ANSWERS, open_data
from vlmo.evaluation import evaluate

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


def test_predict_says_all_that_the_heads_can_of_one_pair(folder):
    found = json.loads(
        vlmo("predict", folder / "run", "--image", folder / "a.png", "--text", "a one", "--top", 2)
    )
    predictor = Predictor.load(folder / "run", device="cpu")
    image = folder / "a.png"
    assert found["image"] == str(image)
    assert found["text"] == "a one"
    assert found["similarity"] == pytest.approx(float(predictor.similarity(image, "a one")))
    assert found["match"] == pytest.approx(float(predictor.match(image, "a one")))
    expected = [answer._asdict() for answer in predictor.answer(image, "a one", top=2)]
    assert found["answers"] == expected
    assert set(found) == {"image", "text", "similarity", "match", "answers"}


def test_predict_judges_a_statement_about_two_images(folder):
    pair = folder / "a.png", folder / "b.png"
    found = json.loads(
        vlmo(
            *("predict", folder / "run", "--text", "both show a one"),
            *("--image", pair[0], "--image", pair[1]),
        )
    )
    predictor = Predictor.load(folder / "run", device="cpu")
    assert found["true"] == pytest.approx(float(predictor.judge(*pair, "both show a one")))
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
    for record, said in zip(records, found, strict=True):
        assert said.items() >= record.items()
    pair = {"similarity", "match", "answers"}
    added = [said.keys() - record.keys() for record, said in zip(records, found, strict=True)]
    assert added == [pair, pair, {"true"}, pair]
    predictor = Predictor.load(folder / "run", device="cpu")
    assert found[3]["match"] == pytest.approx(float(predictor.match(folder / "a.png", "a two")))


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
        ("[1]\n", "line 1: '[1]' is not a JSON object"),
        ("{\n", "line 1: is not JSON"),
        ('{"image": "a.png"}\n', "line 1: the model's heads (itc, itm, vqa, nlvr2) need an image"),
        ('{"image": "gone.png", "text": "a"}\n', "gone.png"),
        ('{"image_0": "a.png", "text": "a"}\n', "has image_0, not image"),
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
    ("arguments", "message"),
    [
        ([], "give either --input, or --image and --text"),
        (["--input", "x.jsonl", "--text", "a"], "give either --input"),
        (["--text", "a", "--embeddings", "x.npy"], "x.npy does not end in .npz"),
        (["--text", "a", *["--image", "a.png"] * 3], "3 images are more than two"),
    ],
)
def test_predict_refuses_wrong_options(folder, monkeypatch, capsys, arguments, message):
    assert message in refused(monkeypatch, capsys, "predict", folder / "run", *arguments)


@pytest.fixture
def documented(folder, tmp_path, monkeypatch) -> str:
    """docs/prediction.md, in a folder that has what its examples name."""
    for name, source in (("photo.jpg", "a.png"), ("other.jpg", "b.png")):
        Image.open(folder / source).save(tmp_path / name)
    (tmp_path / "run").symlink_to(folder / "run")
    monkeypatch.chdir(tmp_path)
    return (Path(__file__).parents[1] / "docs" / "prediction.md").read_text()


@pytest.mark.filterwarnings("ignore:the text .* has 13 tokens")
def test_the_documented_python_runs(documented):
    (code,) = re.findall(r"```python\n(.*?)```", documented, re.DOTALL)
    names: dict = {}
    exec(code, names)
    similarity = names["predictor"].similarity(["photo.jpg", "other.jpg"], ["a red car", "a dog"])
    torch.testing.assert_close(names["texts"] @ names["images"].T, similarity)


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
