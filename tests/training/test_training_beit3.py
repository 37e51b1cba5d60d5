"""BEiT-3 through training, evaluation and prediction, on digit scenes and from published files."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from processes import assert_same_weights, command, rows_of
from test_spm import trained
from training_cases import keep_states, run, settings_of, shrink_digits, small
from training_data import make
from vlmo import BEiT3, BEiT3Config, Predictor, save_checkpoint
from vlmo.data import ANSWERS, open_data
from vlmo.run_folder import load_model
from vlmo.tasks.evaluation import evaluate
from vlmo.training import recipes, setup, trainer
from vlmo.training.recipes import recipe

pytestmark = pytest.mark.heavy

STAGES = {"retrieval": "mean_recall", "vqa": "vqa_score", "nlvr2": "accuracy"}
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 40, 30, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    shrink_digits(monkeypatch)
    monkeypatch.setattr(trainer, "save_state", trainer.save_state)  # put back what tests change


def beit3(stage: str, **changes):
    return small(f"beit3_{stage}", **changes)


@pytest.mark.parametrize("stage", STAGES)
def test_every_task_trains_validates_and_resumes(tmp_path, stage):
    keep_states()
    said = run(beit3(stage), tmp_path / "whole", evaluate_every=None)
    assert "digits_beit3_" in said
    rows = rows_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert 0 <= float(rows[3][f"val_{STAGES[stage]}"]) <= 1

    (tmp_path / "half").mkdir()
    state = (tmp_path / "whole" / "state2.pt").read_bytes()
    (tmp_path / "half" / "training.pt").write_bytes(state)
    assert "step 2 of 4" in run(beit3(stage), tmp_path / "half")
    assert_same_weights(tmp_path / "half", tmp_path / "whole", "model.safetensors")

    loaded = load_model(tmp_path / "whole")
    assert isinstance(loaded.model, BEiT3)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())["validation"]
    found = evaluate(
        loaded.model,
        open_data("digits", stage, "val", image_size=32),
        setup._tokenizer(settings_of(beit3(stage), tmp_path / "whole")),
        stage,
        batch_size=8,
    )
    assert found == pytest.approx(metrics, rel=1e-6)


def test_parts_of_a_batch_train_as_the_whole(tmp_path):
    run(beit3("retrieval"), tmp_path / "whole")
    run(beit3("retrieval"), tmp_path / "parts", micro_batch=2, checkpointing=True)
    for row, wanted in zip(rows_of(tmp_path / "parts"), rows_of(tmp_path / "whole"), strict=True):
        assert float(row["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-4)


def test_bfloat16_is_near_float32(tmp_path):
    for dtype in ("float32", "bfloat16"):
        run(beit3("vqa", steps=2), tmp_path / dtype, dtype=dtype)
    half, full = (rows_of(tmp_path / dtype) for dtype in ("bfloat16", "float32"))
    assert half != full
    for row, wanted in zip(half, full, strict=True):
        assert float(row["loss"]) == pytest.approx(float(wanted["loss"]), rel=0.02)


def test_a_few_steps_of_retrieval_reduce_the_loss(tmp_path):
    """Every step has the same pictures, so the loss must fall."""
    run(beit3("retrieval", steps=30, batch_size=64, warmup=3), tmp_path)
    losses = [float(row["loss"]) for row in rows_of(tmp_path)]
    assert sum(losses[-5:]) < sum(losses[:5]) - 1


def test_a_frozen_parameter_stays_as_it_was(tmp_path):
    """Of the last layer, VQA reads the image alone; the mask token is for pre-training."""
    keep_states()
    run(beit3("vqa"), tmp_path)
    first = torch.load(tmp_path / "state2.pt", weights_only=True)["model"]
    last = load_file(tmp_path / "model.safetensors")
    same = {name for name, value in last.items() if torch.equal(value, first[name])}
    assert "beit3.encoder.layers.2.ffn.B.fc1.weight" in same
    assert "beit3.vision_embed.mask_token" in same
    assert not any("layers.1." in name or name.startswith("head.") for name in same)


# From published files


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A checkpoint as unilm publishes it, of a tiny model, with its vocabulary; returns its file.

    Its embedding has more rows than the vocabulary has tokens.
    """
    config = recipes.beit3_tiny(vocab_size=100, image_size=32, tasks=("irtr",), max_text_length=64)
    torch.manual_seed(0)
    torch.save({"model": BEiT3(config).state_dict()}, tmp_path / "beit3_base_patch16_224.pth")
    (tmp_path / "beit3.spm").write_bytes(trained())

    def base(**changes) -> BEiT3Config:
        return recipes.beit3_tiny(**{**changes, "vocab_size": 100})

    monkeypatch.setitem(recipes.SIZES, "beit3_base", base)
    return tmp_path / "beit3_base_patch16_224.pth"


def test_fine_tuning_of_a_published_file(tmp_path, published):
    data = make(tmp_path / "data", "vqa", "records")
    found = recipe("beit3_vqa_base").replace(
        **dict(image_size=64, batch_size=2, steps=2, drop_path=0.1)
    )
    given = dict(data=str(data), vocabulary=tmp_path / "beit3.spm", evaluate_every=None)
    said = run(found, tmp_path / "run", initial=published, **given)
    assert "resized beit3.encoder.embed_positions.A.weight" in said
    assert "head.* (6)" in said
    assert len(rows_of(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "tokenizer.json").is_file()

    # The head of a model of VQA belongs to its answers.
    answers = json.loads((tmp_path / "run" / "answers.json").read_text())
    (tmp_path / "run" / "answers.json").write_text(json.dumps(answers[::-1]))
    with pytest.raises(ValueError, match=r"init: .* --skip head\."):
        run(found, tmp_path / "next", data=str(data), initial=tmp_path / "run")
    again = dict(data=str(data), initial=tmp_path / "run", skip=("head.",))
    assert "missing, left as they were (6): head" in run(found, tmp_path / "next", **again)


def test_a_file_of_the_other_model_is_refused(tmp_path, published):
    with pytest.raises(ValueError, match=r"not a VLMo or BEiT checkpoint.*a file of BEiT-3"):
        run(small("retrieval"), tmp_path / "run", initial=published)
    run(small("retrieval", steps=1), tmp_path / "vlmo")
    with pytest.raises(ValueError, match="not a BEiT-3 checkpoint"):
        run(beit3("retrieval"), tmp_path / "run", initial=tmp_path / "vlmo")


# On the command line


def test_every_command_takes_a_run_folder(tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    short: list = [
        "--steps",
        2,
        "--batch-size",
        4,
        "--warmup",
        0,
        "--device",
        "cpu",
        "--no-tensorboard",
    ]
    train: list = ["train", "digits_retrieval", "--size", "beit3_tiny", "--layer-decay", 0.9]
    assert command(monkeypatch, *train, *short, "--data", "digits", "--output", output) == 0
    recorded = json.loads((output / "recipe.json").read_text())["run"]["recipe"]
    assert (recorded["size"], recorded["layer_decay"]) == ("beit3_tiny", 0.9)

    run_of: list = [output, "--device", "cpu"]
    wanted: list = ["--data", "digits", "--output", tmp_path / "metrics.json"]
    assert command(monkeypatch, "evaluate", *run_of, "retrieval", *wanted) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert 0 <= metrics["mean_recall"] <= 1
    capsys.readouterr()
    refused: list[tuple[list, str]] = [
        (["vqa"], "task: 'vqa' needs a head of vqa, the model has ('irtr',) (BEiT-3)"),
        (["retrieval", "--rerank", 4], "the head of itm, the model has ('irtr',) (BEiT-3)"),
    ]
    for arguments, message in refused:
        assert command(monkeypatch, "evaluate", *run_of, *arguments, "--data", "digits") == 2
        assert message in capsys.readouterr().err

    make(tmp_path / "data", "retrieval", "records")
    shown = ["--image", tmp_path / "data" / "val0.png", "--text", "a two above a five"]
    assert command(monkeypatch, "predict", *run_of, *shown) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert -1 <= json.loads(line)["prediction"]["similarity"] <= 1


def test_training_of_what_the_model_does_not_have_is_refused(tmp_path, monkeypatch, capsys):
    arguments = ["train", "digits_pretrain", "--size", "beit3_tiny", "--data", "digits"]
    assert command(monkeypatch, *arguments, "--output", tmp_path / "run") == 2
    told = "is a BEiT-3, which has no mlm or itc or itm for the stage 'pretrain'"
    assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Prediction


def model_of(task: str) -> BEiT3:
    torch.manual_seed(0)
    config = recipes.beit3_tiny(vocab_size=100, vqa_labels=len(ANSWERS), tasks=(task,))
    return BEiT3(config).eval()


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "beit3.spm"
    path.write_bytes(trained())
    return path


def predictor_of(task: str, vocabulary, folder) -> Predictor:
    """From a checkpoint outside of any run folder."""
    save_checkpoint(model_of(task), folder / f"{task}.safetensors")
    answers = list(ANSWERS) if task == "vqa" else None
    given = dict(vocabulary=vocabulary, answers=answers, device="cpu", batch_size=2)
    return Predictor.load(folder / f"{task}.safetensors", **given)


def inputs_of(predictor: Predictor, texts: list[str]):
    words = predictor._tokenizer.encode(texts)
    pixels = np.stack(predictor.read_images(list(PICTURES)))
    return words["text_ids"], words["text_masks"], torch.from_numpy(pixels).permute(0, 3, 1, 2)


TEXTS = ["the cat", "a catalogue of mats", "unbelievable!"]


def test_similarity_is_that_of_the_model(vocabulary, tmp_path):
    predictor = predictor_of("irtr", vocabulary, tmp_path)
    ids, masks, pixels = inputs_of(predictor, TEXTS)
    with torch.no_grad():
        text = predictor.model.encode_text(ids, masks).embedding
        image = predictor.model.encode_image(pixels).embedding
    torch.testing.assert_close(predictor.similarity(PICTURES, TEXTS), text @ image.T)
    hits = predictor.rank(TEXTS[0], PICTURES, k=3)[0]
    assert [hit.image for hit in hits] == (text @ image.T)[0].argsort(descending=True).tolist()


def test_answers_are_those_of_the_model(vocabulary, tmp_path):
    predictor = predictor_of("vqa", vocabulary, tmp_path)
    ids, masks, pixels = inputs_of(predictor, TEXTS)
    with torch.no_grad():
        wanted = predictor.model.vqa_logits(ids, masks, pixels).sigmoid().max(1)
        one = predictor.model.vqa_logits(ids, masks, pixels[:1].expand(3, -1, -1, -1)).sigmoid()
    found = predictor.answer_all(PICTURES, TEXTS)
    assert [answer.text for (answer,) in found] == [ANSWERS[n] for n in wanted.indices]
    assert [a.probability for (a,) in found] == pytest.approx(wanted.values.tolist(), rel=1e-5)
    alone = [row[0].probability for row in predictor.answer_all(PICTURES[0], TEXTS)]
    assert alone == pytest.approx(one.max(1).values.tolist(), rel=1e-5)


def test_statements_are_judged_as_by_the_model(vocabulary, tmp_path):
    predictor = predictor_of("nlvr2", vocabulary, tmp_path)
    with torch.no_grad():  # the official head starts near zero
        predictor.model.head.dense2.weight.mul_(1000)
    ids, masks, pixels = inputs_of(predictor, TEXTS)
    with torch.no_grad():
        wanted = predictor.model.nlvr2_logits(ids, masks, pixels, pixels.flip(0)).softmax(1)[:, 1]
    torch.testing.assert_close(predictor.judge(PICTURES, PICTURES[::-1], TEXTS), wanted)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda p: p.match(PICTURES, TEXTS), r"match: the model \(BEiT-3\) has no head of itm"),
        (lambda p: p.answer(PICTURES[0], "a"), r"answer: the model \(BEiT-3\) has no head of vqa"),
        (
            lambda p: p.rank("a", PICTURES, rerank=9),
            r"rank: the model \(BEiT-3\) has no head of itm",
        ),
        (lambda p: p.attention(PICTURES[0], "a"), "attention: has no maps of BEiT-3, only of VLMo"),
    ],
)
def test_what_the_model_does_not_have_is_refused(vocabulary, tmp_path, use, message):
    with pytest.raises(ValueError, match=message):
        use(predictor_of("irtr", vocabulary, tmp_path))


def test_vocabularies_that_are_too_large_are_refused(vocabulary, tmp_path):
    save_checkpoint(
        BEiT3(recipes.beit3_tiny(vocab_size=20, tasks=("irtr",))), tmp_path / "model.pt"
    )
    with pytest.raises(ValueError, match=r"beit3.spm has \d+ tokens, the model has 20"):
        load_model(tmp_path / "model.pt", vocabulary=vocabulary)
