"""The demo end to end, its training, and the rules it judges by."""

import csv
import dataclasses
import itertools
import json
import re

import pytest
import torch
from typer.testing import CliRunner

from vlmo import VLMo, load_checkpoint
from vlmo.cli import app
from vlmo.data import DigitScenes, digit_tokenizer
from vlmo.demo import program
from vlmo.demo.steps import train_steps, write_log
from vlmo.demo.training import (
    Recipe,
    pretrain_batches,
    pretrain_steps,
    tiny_config,
    tiny_model,
)
from vlmo.files import replacing
from vlmo.parity import Deviation, check_backends
from vlmo.retrieval import Recall
from vlmo.training.optimizer import (
    adamw,
    linear_schedule,
    parameter_groups,
    warmup_then_decay,
)

CPU = torch.device("cpu")
RESULTS = {"retrieval.png", "loss.png", "losses.csv", "metrics.json", "model.safetensors"}


def small_training(seed: int, recipe: Recipe) -> list[dict[str, float]]:
    tokenizer = digit_tokenizer(program.TEXT_LENGTH)
    config = tiny_config(tokenizer, dim=32, depth=2, heads=2, vl_start=1)
    batches = pretrain_batches(
        DigitScenes("train", 64, seed=seed),
        tokenizer,
        batch_size=recipe.batch_size,
        steps=recipe.steps,
        mask_share=recipe.mask_share,
        seed=seed,
        device=CPU,
    )
    return [step.row() for step in pretrain_steps(tiny_model(config, seed), batches, recipe)]


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory):
    """A demo of four steps: its result and its folder."""
    folder = tmp_path_factory.mktemp("demo") / "new" / "results"
    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(program, "SCENES", 256)
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
    assert json.loads((folder / "metrics.json").read_text())["judged"] is False


def test_short_demo_leaves_its_results_and_nothing_else(short_demo):
    _, folder = short_demo
    assert {path.name for path in folder.iterdir()} == RESULTS
    for name in ("retrieval.png", "loss.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    recall = json.loads((folder / "metrics.json").read_text())["recall"]
    assert recall["chance"]["text_to_image"]["1"] == pytest.approx(1 / 24)
    with (folder / "losses.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert float(rows[-1]["itm_loss"]) > 0


def test_short_demo_saves_the_model_it_trained(short_demo):
    _, folder = short_demo
    model = VLMo(tiny_config(digit_tokenizer(program.TEXT_LENGTH)))
    report = load_checkpoint(model, folder / "model.safetensors", strict=True)
    assert not report.resized


def test_short_demo_shows_the_parity_of_the_reference(short_demo):
    output = short_demo[0].output
    for operation in ("moe_ffn", "shared_attention"):
        for dtype in ("float32", "float16", "bfloat16"):
            assert re.search(rf"{operation} +reference +cpu +{dtype} .*yes", output)


def test_training_reduces_the_loss():
    tokenizer = digit_tokenizer(program.TEXT_LENGTH)
    torch.manual_seed(0)
    model = tiny_model(tiny_config(tokenizer, dim=32, depth=2, heads=2, vl_start=1), seed=0)
    batch = next(
        pretrain_batches(
            DigitScenes("train", 128),
            tokenizer,
            batch_size=16,
            steps=1,
            mask_share=0.25,
            seed=0,
            device=CPU,
        )
    )
    optimizer = adamw(model, lr=3e-3)
    steps = train_steps(model, itertools.repeat(batch, 60), optimizer, clip_norm=1.0)
    losses = [step.row()["loss"] for step in steps]
    assert losses[-1] < 0.75 * losses[0]


def test_same_seed_same_losses():
    recipe = Recipe(steps=3, contrast=0.4, batch_size=16)
    first, again, other = (small_training(seed, recipe) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert ["itm_loss" in row for row in first] == [False, True, True]


def test_negatives_harden_once_matching_is_trained():
    recipe = Recipe(steps=100, contrast=0.2, hardness=0.5)
    factors = [recipe.hardness_at(step) for step in (0, 20, 40, 60, 99)]
    assert factors == pytest.approx([0, 0, 0.25, 0.5, 0.5])


def test_batches_hold_no_meaning_twice():
    tokenizer, scenes = digit_tokenizer(8), DigitScenes("train", 512)
    batches = pretrain_batches(
        scenes, tokenizer, batch_size=64, steps=10, mask_share=0.25, seed=0, device=CPU
    )
    drawn = [batch["image_id"] for batch in batches]
    assert len(drawn) == 10
    assert all(len({scenes.keys[row] for row in rows}) == 64 for rows in drawn)


def test_schedule_rises_and_falls():
    factors = [warmup_then_decay(step, warmup=2, total=6) for step in range(8)]
    assert factors == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = linear_schedule(optimizer, warmup=2, total=5)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.5])


def test_parameter_groups_follow_the_official_rule():
    model = VLMo(tiny_config(digit_tokenizer(8), tasks=("vqa",), dim=32, depth=2, vl_start=1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    model.transformer.cls_token.requires_grad_(False)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, head_lr_scale=20.0)
    found = {names[p]: (g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    assert found["relative_position_bias_table"] == (0.0, 1.0)
    assert found["transformer.blocks.0.norm1.weight"] == (0.0, 1.0)
    assert found["transformer.blocks.0.norm2_text.weight"] == (0.1, 1.0)
    assert found["transformer.blocks.0.attn.q_bias"] == (0.0, 1.0)
    assert found["vqa_classifier.0.weight"] == (0.1, 20.0)
    assert set(found) == set(names.values()) - {"transformer.cls_token"}


def recall(first: float, rest: float) -> Recall:
    return Recall({1: first, 5: rest}, {1: first, 5: rest})


def test_judge_names_what_is_wrong():
    guess = recall(0.01, 0.05)
    assert program.judge(guess, recall(0.5, 0.8), recall(0.6, 0.8)) == []
    worse = program.judge(guess, recall(0.5, 0.8), recall(0.4, 0.8))
    assert len(worse) == 1 and "Re-ranking" in worse[0]
    assert len(program.judge(guess, recall(0.04, 0.2), recall(0.04, 0.3))) == 4


def test_demo_fails_when_a_kernel_or_the_retrieval_does(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "SCENES", 128)
    monkeypatch.setattr(program, "GALLERY", 16)
    monkeypatch.setattr(program, "Recipe", lambda: Recipe(1, 8))
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
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["judged"] and metrics["failures"]


def test_reference_passes_parity_with_several_seeds():
    for seed in range(3):
        for row in check_backends([CPU], backend="reference", seed=seed):
            assert row.ok, row


def test_deviation_that_is_not_a_number_fails():
    assert not Deviation("y", float("nan"), 0.1, 0.3).ok


def test_failed_write_leaves_the_older_file(tmp_path):
    path = tmp_path / "log.csv"
    write_log(path, [{"step": 1, "itc_loss": 2.0}, {"step": 2, "itc_loss": 1.0, "itm_loss": 0.5}])
    before = path.read_text()
    assert before.splitlines() == ["step,itc_loss,itm_loss", "1,2.0,", "2,1.0,0.5"]

    def fail_half_way():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert [item.name for item in tmp_path.iterdir()] == ["log.csv"]
    assert path.read_text() == before
