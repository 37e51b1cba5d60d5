"""Training in one process: resuming after any end, rejected input, files left behind."""

import itertools
import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from named_init import named_init
from processes import command, forked, rows_of, steps_of
from test_data_arrow import PAIRS, write
from test_golden import REL, SHARED
from training_cases import keep_states, run, shrink_digits, small
from vlmo import VLMo, VLMoConfig, load_checkpoint, save_checkpoint
from vlmo.data import digit_tokenizer
from vlmo.run_folder import load_model
from vlmo.training import recipes, setup, trainer
from vlmo.training.logs import RunLog
from vlmo.training.optimizer import clip_gradients
from vlmo.training.recipes import Recipe
from vlmo.training.setup import check_batch
from vlmo.training.state import load_state
from vlmo.training.step import backward

pytestmark = pytest.mark.heavy

FOLDER = {"recipe.json", "vocab.txt", "training.pt", "log.csv", "log.jsonl", "model.safetensors"}


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    shrink_digits(monkeypatch)
    monkeypatch.setattr(trainer, "save_state", trainer.save_state)  # put back what tests change


# What a training leaves behind


def test_a_training_leaves_its_folder(tmp_path):
    said = run(small("vqa"), tmp_path, evaluate_every=3, board=True)
    assert {path.name for path in tmp_path.iterdir()} == FOLDER | {
        "answers.json",
        "metrics.json",
        "best.safetensors",
        "tensorboard",
    }
    assert "No --init" not in said and "Random weights" in said
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["val_vqa_score"] != "" for row in rows] == [False, False, True, True]
    assert float(rows[0]["loss"]) == float(rows[0]["vqa_loss"]) > 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [float(row["loss"]) for row in rows]
    assert all(line["samples_per_second"] > 0 and line["tflops"] > 0 for line in lines)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["validation"]["vqa_score"] == pytest.approx(float(rows[3]["val_vqa_score"]))
    assert metrics["best"]["value"] == max(float(row["val_vqa_score"]) for row in rows[2:])
    assert list((tmp_path / "tensorboard").glob("events*"))
    loaded = load_model(tmp_path)
    assert loaded.answers == json.loads((tmp_path / "answers.json").read_text())
    assert loaded.model.config.tasks == ("vqa",)


def test_rates_warm_up_and_fall(tmp_path):
    run(small("textmlm", warmup=2, lr=1e-3), tmp_path)
    rates = [float(row["lr"]) for row in rows_of(tmp_path)]
    assert rates == pytest.approx([5e-4, 1e-3, 2e-3 / 3, 1e-3 / 3])


def test_stages_follow_each_other(tmp_path):
    run(small("textmlm"), tmp_path / "text")
    said = run(small("pretrain"), tmp_path / "pretrain", initial=tmp_path / "text")
    assert "tensors loaded" in said and "mlp_vl" in said  # new in this stage
    before, after = (
        load_model(tmp_path / name).model.state_dict() for name in ("text", "pretrain")
    )
    key = "text_embeddings.word_embeddings.weight"
    assert 0 < (before[key] - after[key]).abs().max() < 0.02
    for stage in ("vqa", "nlvr2", "retrieval", "rerank"):
        said = run(small(stage), tmp_path / stage, initial=tmp_path / "pretrain")
        assert "tensors loaded" in said


def test_a_stage_trains_only_its_parameters(tmp_path):
    found = small("textmlm", trained=recipes.TEXT_PARTS)
    torch.manual_seed(3)
    start = VLMo(found.config(vocab_size=digit_tokenizer(12).vocab_size))
    save_checkpoint(start, tmp_path / "start.pt")
    run(found, tmp_path / "run", initial=tmp_path / "start.pt")
    after = load_model(tmp_path / "run").model
    for (name, old), new in zip(start.named_parameters(), after.parameters(), strict=True):
        assert torch.equal(old, new) != any(part in name for part in recipes.TEXT_PARTS), name


def test_a_golden_model_is_tuned_at_another_resolution(tmp_path, monkeypatch):
    model = named_init(VLMo(VLMoConfig(**SHARED, **REL)))
    save_checkpoint(model, tmp_path / "golden.pt")
    tokens = digit_tokenizer(12)
    words = [*tokens.tokens(range(tokens.vocab_size)), *(f"[unused{n}]" for n in range(200))]
    (tmp_path / "vocab.txt").write_text("\n".join(words[:200]) + "\n")

    def golden(**changes):
        return VLMoConfig(**{**SHARED, **REL, **changes})

    monkeypatch.setitem(recipes.SIZES, "golden", golden)
    found = Recipe(
        *("golden_retrieval", "retrieval", "golden", 1e-3, 8),
        steps=3,
        warmup=1,
        image_size=96,
        text_length=12,
        text_capacity=20,
        drop_path=0.1,
    )
    said = run(
        found,
        tmp_path / "run",
        initial=tmp_path / "golden.pt",
        vocabulary=tmp_path / "vocab.txt",
        evaluate_every=None,
    )
    assert "resized relative_position_bias_table" in said
    config = load_model(tmp_path / "run").model.config
    assert (config.image_size, config.dim, config.tasks) == (96, 64, ("irtr",))
    assert all(float(row["irtr_loss"]) < 10 for row in rows_of(tmp_path / "run"))


def test_own_questions_from_the_command_line(tmp_path, monkeypatch, capsys):
    digit_tokenizer(12).save_vocabulary(tmp_path / "vocab.txt")
    for split, count in (("train", 6), ("val", 3)):
        lines = []
        for number in range(count):
            Image.new("RGB", (40, 30), (40 * number,) * 3).save(tmp_path / f"{split}{number}.png")
            record = {"image": f"{split}{number}.png", "question": "how many?", "answer": "two"}
            lines.append(json.dumps(record | ({"answer": "none"} if number else {})))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    folder = tmp_path / "run"
    arguments = ["train", "digits_vqa", "--data", tmp_path, "--output", folder, "--device", "cpu"]
    arguments += ["--batch-size", 3, "--epochs", 2, "--no-tensorboard", "--log-every", 1]
    assert command(monkeypatch, *arguments, "--vocab", tmp_path / "vocab.txt") == 0
    assert json.loads((folder / "answers.json").read_text()) == ["two", "none"]
    assert (folder / "vocab.txt").read_bytes() == (tmp_path / "vocab.txt").read_bytes()
    assert steps_of(folder) == [1, 2, 3, 4]
    assert 0 <= json.loads((folder / "metrics.json").read_text())["validation"]["vqa_score"] <= 1
    assert "step 4/4" in capsys.readouterr().out
    assert command(monkeypatch, *arguments) == 0  # with the vocabulary of the run
    assert "step 4 of 4" in capsys.readouterr().out
    # What is trained on is not validated with.
    arguments[3], arguments[5] = tmp_path / "train.jsonl", tmp_path / "other"
    assert command(monkeypatch, *arguments, "--vocab", tmp_path / "vocab.txt") == 0
    assert "No validation: data: " in capsys.readouterr().out
    arguments[5] = tmp_path / "third"
    arguments += ["--vocab", tmp_path / "vocab.txt", "--evaluate-every", 2]
    assert command(monkeypatch, *arguments) == 2
    assert "has one split only" in capsys.readouterr().err


def test_official_files(tmp_path):
    """Of the recipe's data set among those that are there."""
    digit_tokenizer(12).save_vocabulary(tmp_path / "vocab.txt")
    names = [f"coco_caption_karpathy_{split}" for split in ("train", "restval", "val")]
    write(tmp_path, PAIRS, *names, "f30k_caption_karpathy_train", "f30k_caption_karpathy_val")
    found = small("retrieval", datasets=("coco",), batch_size=2)
    given = dict(data=str(tmp_path), vocabulary=tmp_path / "vocab.txt")
    assert "6 samples" in run(found, tmp_path / "run", **given)
    assert "3 samples" in run(found, tmp_path / "other", datasets=("f30k",), **given)
    (tmp_path / "coco_caption_karpathy_val.arrow").unlink()
    with pytest.raises(FileNotFoundError, match="coco_caption_karpathy_val"):
        run(found, tmp_path / "third", evaluate_every=2, **given)
    assert "No validation: " in run(found, tmp_path / "third", evaluate_every=None, **given)


# What goes wrong


def test_a_full_disk_leaves_the_older_state(tmp_path, monkeypatch):
    keep_states()
    run(small("textmlm"), tmp_path / "whole")
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(tmp_path / "whole" / "state2.pt", folder / "training.pt")
    before = (folder / "training.pt").read_bytes()
    arguments = ["train", "digits_textmlm", "--data", "digits", "--output", folder, "--steps", "4"]
    arguments += ["--batch-size", "8", "--no-tensorboard", "--evaluate-every", "0"]

    def train():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, len(before) // 2))
        sys.exit(command(monkeypatch, *arguments, "--device", "cpu"))

    process = forked(train, tmp_path / "said")
    process.join()
    assert process.exitcode == 2
    said = (tmp_path / "said").read_text()
    assert "training.pt: step 4 could not be saved" in said
    assert "the older file is as it was" in said
    assert "Traceback" not in said
    assert (folder / "training.pt").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_what_is_not_finite_is_never_saved(tmp_path, monkeypatch, fault):
    calls = itertools.count(1)

    def broken(model, *args, **kwargs):
        losses = backward(model, *args, **kwargs)
        if next(calls) == 3:
            if fault == "loss":
                losses["loss"] = losses["loss"] * float("nan")
            else:
                model.mlm_score.bias.grad.fill_(float("inf"))
        return losses

    monkeypatch.setattr(trainer, "backward", broken)
    words = {"loss": "step 3: the loss is nan", "gradient": "step 3: a weight is not finite"}
    every = {"loss": 2, "gradient": 1}  # a state is due when the weights are broken
    with pytest.raises(FloatingPointError, match=words[fault]):
        run(small("textmlm"), tmp_path, save_every=every[fault])
    assert load_state(tmp_path / "training.pt")["step"] == 2


def test_a_loss_that_is_not_finite_exits_with_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "backward", lambda *_, **__: {"loss": torch.tensor(float("inf"))})
    arguments = ["train", "digits_textmlm", "--data", "digits", "--output", tmp_path / "run"]
    assert command(monkeypatch, *arguments, "--device", "cpu", "--no-tensorboard") == 1
    assert capsys.readouterr().err == (
        "vlmo: step 10: the loss is inf; what was saved before is as it was\n"
    )


ERRORS = {
    "recipe: 'digits_pretrian' is unknown; did you mean digits_pretrain": [
        *("digits_pretrian", "--data", "digits"),
    ],
    "nowhere does not exist": ["digits_pretrain", "--data", "nowhere"],
    "vocab: a vocabulary is needed": ["digits_textmlm", "--data", "texts.txt"],
    "missing.txt": ["digits_textmlm", "--data", "digits", "--vocab", "missing.txt"],
    "micro_batch: 5 does not divide the 64 rows of a process (batch_size 64 over 1 processes)": [
        *("digits_pretrain", "--data", "digits", "--micro-batch", "5"),
    ],
    "batch_size: 97 exceeds the 96 samples": [
        *("digits_nlvr2", "--data", "digits", "--batch-size", "97"),
    ],
    "warmup: 1600 exceeds the 1500 steps": [
        *("digits_vqa", "--data", "digits", "--warmup", "1600"),
    ],
    "missing.pt": ["digits_vqa", "--data", "digits", "--init", "missing.pt"],
    "init: . has no model.safetensors": ["digits_vqa", "--data", "digits", "--init", "."],
    "image_size: 40 is not a multiple of patch_size 16": [
        *("digits_vqa", "--data", "digits", "--image-size", "40"),
    ],
    "parallel: 'fsdp' needs processes started by torchrun": [
        *("digits_vqa", "--data", "digits", "--parallel", "fsdp"),
    ],
    "texts.txt exists and is no folder": [
        *("digits_vqa", "--data", "digits", "--output", "texts.txt"),
    ],
    "datasets: ['coco'] cannot be chosen from digit scenes": [
        *("digits_vqa", "--data", "digits", "--datasets", "coco"),
    ],
    "backend 'cuda' cannot run moe_ffn on cpu": [
        *("digits_vqa", "--data", "digits", "--backend", "cuda"),
    ],
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors_are_one_line_and_leave_nothing(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("one\ntwo\n")
    arguments = ["train", *ERRORS[message], "--device", "cpu", "--no-tensorboard"]
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_processes_that_do_not_divide_a_batch_are_refused():
    check_batch(64, 4, 8)
    with pytest.raises(ValueError, match="batch_size: 64 is not a multiple of 3 processes"):
        check_batch(64, 3, None)
    with pytest.raises(ValueError, match=r"3 does not divide the 16 rows .* 64 over 4 processes"):
        check_batch(64, 4, 3)


def test_a_head_for_other_answers_is_not_taken_over(tmp_path):
    run(small("vqa"), tmp_path / "first")
    answers = json.loads((tmp_path / "first" / "answers.json").read_text())
    setup.write_json(tmp_path / "first" / "answers.json", answers[::-1])
    found = small("vqa")
    with pytest.raises(ValueError, match=r"init: .* --skip vqa_classifier\."):
        run(found, tmp_path / "second", initial=tmp_path / "first")
    given = dict(initial=tmp_path / "first", answers=tmp_path / "first" / "answers.json")
    with pytest.raises(ValueError, match="are not those of digit scenes"):
        run(found, tmp_path / "second", **given)
    said = run(found, tmp_path / "second", initial=tmp_path / "first", skip=("vqa_classifier.",))
    assert "missing, left as they were (6): vqa_classifier" in said


def test_another_vocabulary_is_not_taken_for_the_models_own(tmp_path):
    run(small("textmlm"), tmp_path / "first")
    words = (tmp_path / "first" / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]) + "\n")
    with pytest.raises(ValueError, match=r"vocab: is not the vocabulary that .*first \(--init\)"):
        run(
            small("pretrain"),
            tmp_path / "second",
            initial=tmp_path / "first",
            vocabulary=tmp_path / "vocab.txt",
        )


# The logs


def test_the_log_of_a_step_beyond_the_state_is_taken_out(tmp_path):
    log = RunLog(tmp_path, board=False)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": step / 2}, {"seconds": 1.0})
    for name in ("log.csv", "log.jsonl"):
        with (tmp_path / name).open("a") as stream:
            stream.write("4,")  # half a line, as a full disk leaves it
    log = RunLog(tmp_path, 2, board=False)
    log.write({"step": 3, "loss": 7.0, "val_accuracy": 0.5}, {})
    log.sync()
    assert (tmp_path / "log.csv").read_text() == (
        "step,loss,val_accuracy\n1,0.5,\n2,1.0,\n3,7.0,0.5\n"
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[:2] == [{"step": n, "loss": n / 2, "seconds": 1.0} for n in (1, 2)]
    assert lines[2] == {"step": 3, "loss": 7.0, "val_accuracy": 0.5}


def test_a_column_that_goes_with_the_steps_goes_from_the_table(tmp_path):
    """A table written anew is the one an uninterrupted training writes."""
    log = RunLog(tmp_path, board=False)
    log.write({"step": 1, "loss": 1.0}, {})
    log.write({"step": 2, "loss": 1.0, "val_loss": 2.0, "mlm_loss": 3.0}, {})
    RunLog(tmp_path, 1, board=False)
    assert (tmp_path / "log.csv").read_text() == "step,loss\n1,1.0\n"


# The optimizer


def test_gradients_are_clipped_together():
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 4)]
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 2.0)
    parameters.append(torch.nn.Parameter(torch.zeros(1)))  # without a gradient
    norm = clip_gradients(parameters, 1.0)
    assert float(norm) == pytest.approx(28**0.5)
    left = torch.cat([p.grad for p in parameters if p.grad is not None])
    assert float(left.norm()) == pytest.approx(1.0, rel=1e-5)
    assert clip_gradients(parameters, 5.0) == pytest.approx(1.0, rel=1e-5)
    assert float(left.norm()) == pytest.approx(1.0, rel=1e-5)


def test_a_run_loads_into_a_model_by_hand(tmp_path):
    run(small("retrieval"), tmp_path)
    config = small("retrieval").config(vocab_size=digit_tokenizer(12).vocab_size)
    report = load_checkpoint(VLMo(config), tmp_path / "model.safetensors", strict=True)
    assert not report.missing
