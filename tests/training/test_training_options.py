"""Options of a training: their effects, and values that are rejected before anything is written."""

import errno
import json
import math
import os
import re
import resource
import sys

import pytest
import torch
from safetensors.torch import save_file

from processes import command, forked, rows_of, steps_of
from training_cases import run, shrink_digits, small
from training_data import make
from vlmo import VLMoConfig
from vlmo.run_folder import load_model
from vlmo.training import trainer
from vlmo.training.logs import RunLog
from vlmo.training.state import load_state

pytestmark = pytest.mark.heavy

DIGITS = ("--data", "digits", "--device", "cpu", "--no-tensorboard", "--batch-size", "8")


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    shrink_digits(monkeypatch)


# What they do


def test_sizes_of_text_and_model(tmp_path):
    found = small("textmlm", steps=1, text_length=20, mask_share=0.5, drop_path=0.1)
    run(found, tmp_path)
    config = load_model(tmp_path).model.config
    assert isinstance(config, VLMoConfig)
    assert (config.max_text_length, config.text_capacity, config.drop_path) == (20, 20, 0.1)


def test_a_model_between_tiny_and_base():
    found = small("textmlm", size="small").config(vocab_size=100)
    assert isinstance(found, VLMoConfig)
    assert (found.dim, found.depth, found.heads, found.vl_start) == (384, 12, 6, 10)
    assert found.patch_size == 16


def test_weight_decay_reaches_the_optimizer(tmp_path):
    run(small("textmlm", steps=1, weight_decay=0.25), tmp_path)
    groups = load_state(tmp_path / "training.pt")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}


@pytest.mark.parametrize("bound", [None, 5.0])
def test_the_logit_scale_is_logged_and_bounded(tmp_path, bound):
    """It begins at 1 / 0.07 = 14.3, and hardly moves in two steps."""
    run(small("rerank", steps=2, max_logit_scale=bound), tmp_path)
    model = load_state(tmp_path / "training.pt")["model"]
    rows = rows_of(tmp_path)
    for name in ("logit_scale", "logit_vl_scale"):
        assert [float(row[name]) for row in rows] == pytest.approx([bound or 14.286] * 2, rel=1e-2)
        assert float(rows[-1][name]) == pytest.approx(math.exp(model[name].item()))
        assert bound is None or float(rows[0][name]) <= bound * (1 + 1e-6)


def test_what_has_no_logit_scale_logs_none(tmp_path):
    run(small("textmlm", steps=1), tmp_path)
    assert "logit_scale" not in rows_of(tmp_path)[0]


def test_official_batches_are_random(tmp_path):
    """Six captions of two pictures: only random batches hold four of them."""
    data = make(tmp_path / "data", "pretrain", "arrow")
    given = dict(data=str(data), vocabulary=tmp_path / "vocab.txt", datasets=("coco",))
    found = small("pretrain", steps=1, batch_size=4)
    with pytest.raises(ValueError, match="batch_size: 4 exceeds the 2 different pictures"):
        run(found, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()
    run(found.replace(official_batches=True), tmp_path / "run", **given)
    assert steps_of(tmp_path / "run") == [1]


def test_parts_of_a_batch_are_told_and_logged(tmp_path):
    said = run(small("pretrain", steps=1), tmp_path, micro_batch=2)
    assert "batches of 8 (processes x parts x rows: 1 x 4 x 2)" in said
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert (line["parts"], line["micro_batch"]) == (4, 2)
    assert json.loads((tmp_path / "recipe.json").read_text())["micro_batch"] == 2


def test_parts_of_one_row_contrast_with_the_others(tmp_path):
    run(small("pretrain", steps=1), tmp_path / "one", micro_batch=1)
    run(small("pretrain", steps=1), tmp_path / "all")
    losses = [float(rows_of(tmp_path / name)[0]["loss"]) for name in ("one", "all")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_dry_run_tries_a_step_and_writes_nothing(tmp_path, monkeypatch, capsys):
    arguments = ["train", "digits_pretrain", *DIGITS, "--output", tmp_path / "run", "--dry-run"]
    assert command(monkeypatch, *arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "digits_pretrain: " in said and "A step works: " in said and "GiB of memory" in said
    assert list(tmp_path.iterdir()) == []
    run(small("textmlm", steps=1), tmp_path / "run")
    before = times(tmp_path / "run")
    assert "A step works" in run(small("textmlm", steps=2), tmp_path / "run", dry_run=True)
    assert "Nothing is left" in run(small("textmlm", steps=1), tmp_path / "run", dry_run=True)
    assert times(tmp_path / "run") == before


def times(folder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}


# What is refused

NUMBERS = {
    ("--lr", "nan"): "lr: nan is not positive and finite",
    ("--lr", "inf"): "lr: inf is not positive and finite",
    ("--lr", "-1"): "lr: -1.0 is not positive and finite",
    ("--lr", "1e38"): "lr: 1e+38 is too large for float32",
    ("--clip-norm", "nan"): "clip_norm: nan is not positive and finite",
    ("--clip-norm", "inf"): "clip_norm: inf is not positive and finite",
    ("--clip-norm", "0"): "clip_norm: 0.0 is not positive and finite",
    ("--itc-grad-scale", "nan"): "itc_grad_scale: nan is not finite and at least 0",
    ("--weight-decay", "nan"): "weight_decay: nan is not within [0, 1]",
    ("--weight-decay", "2"): "weight_decay: 2.0 is not within [0, 1]",
    ("--drop-path", "1"): "drop_path: 1.0 is not within [0, 1)",
    ("--drop-path", "nan"): "drop_path: nan is not within [0, 1)",
    ("--mask-share", "0"): "mask_share: 0.0 is not within (0, 1]",
    ("--mask-share", "nan"): "mask_share: nan is not within (0, 1]",
    ("--max-logit-scale", "0.5"): "max_logit_scale: 0.5 is not finite and at least 1",
    ("--max-logit-scale", "inf"): "max_logit_scale: inf is not finite and at least 1",
    ("--size", "huge"): "size: 'huge' is not one of",
    ("--seed", str(2**63)): f"seed: {2**63} is not within 0..{2**63 - 1}",
    ("--batch-size", "1"): "batch_size: 1 is too small for mlm, itc, itm",
    ("--on-bad-sample", "skip:0"): "on_bad_sample: 'skip:0' is not error, skip or skip:N",
}


@pytest.mark.parametrize("option", NUMBERS, ids="=".join)
def test_numbers_are_checked(tmp_path, monkeypatch, capsys, option):
    arguments = ["train", "digits_pretrain", *DIGITS, "--output", tmp_path / "run", *option]
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert NUMBERS[option] in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_large_rate_that_float32_holds_ends_with_what_it_does(tmp_path, monkeypatch, capsys):
    arguments = ["train", "digits_pretrain", *DIGITS, "--output", tmp_path, "--lr", "1e30"]
    assert command(monkeypatch, *arguments, "--log-every", "1") == 1
    assert re.search(r"step \d: the loss is (nan|inf)", capsys.readouterr().err)


@pytest.mark.parametrize("stage", ["retrieval", "rerank"])
def test_contrast_of_a_single_pair_is_refused(stage):
    with pytest.raises(ValueError, match="batch_size: 1 is too small for i"):
        small(stage, batch_size=1)


def test_options_that_do_not_suit_the_losses():
    with pytest.raises(ValueError, match=r"mask_share: 0\.2 does not suit vqa, which mask nothing"):
        small("vqa", mask_share=0.2)
    with pytest.raises(ValueError, match=r"mask_share: None does not suit textmlm, which predict"):
        small("textmlm", mask_share=None)
    with pytest.raises(ValueError, match="max_logit_scale: vqa have no logit scale"):
        small("vqa", max_logit_scale=100.0)


def test_an_unknown_backend_in_the_environment(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("VLMO_KERNELS", "bad")
    arguments = ["train", "digits_textmlm", *DIGITS, "--output", tmp_path / "run"]
    assert command(monkeypatch, *arguments) == 2
    assert "VLMO_KERNELS: 'bad' is not a backend" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["clip", "vilt", "state"])
def test_what_is_no_model_of_ours_is_not_started_from(tmp_path, monkeypatch, capsys, kind):
    path = tmp_path / "other.safetensors"
    if kind == "clip":
        names = ["text_model.embeddings.token_embedding.weight", "logit_scale", "visual.proj"]
        save_file({name: torch.zeros(()) for name in names}, path)
    elif kind == "vilt":
        names = ["text_embeddings.word_embeddings.weight", "token_type_embeddings.weight"]
        tensors = {name: torch.zeros(100, 96) for name in names}
        tensors["transformer.blocks.0.mlp.fc1.weight"] = torch.zeros(192, 96)
        save_file(tensors, path)
    else:
        run(small("textmlm", steps=1), tmp_path / "first")
        path = tmp_path / "first" / "training.pt"
    arguments = ["train", "digits_pretrain", *DIGITS, "--output", tmp_path / "run"]
    assert command(monkeypatch, *arguments, "--init", path) == 2
    error = capsys.readouterr().err
    assert path.name in error and error.count("\n") == 1, error
    assert kind != "state" or "model.safetensors" in error
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    arguments = ["train", "digits_textmlm", *DIGITS, "--output", tmp_path / "file" / "run"]
    assert command(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "file") in error and error.count("\n") == 1


# What ends a training from outside


@pytest.mark.parametrize("name", ["training.lock", "log.csv"])
def test_a_full_disk_while_small_files_are_written(tmp_path, monkeypatch, name):
    def write_or_not(descriptor, content):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, content)

    write = os.write
    run(small("textmlm", steps=1), tmp_path)
    before = (tmp_path / "training.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_or_not)
        with pytest.raises(OSError, match=rf"No space left on device: '.*{name}'"):
            run(small("textmlm", steps=3), tmp_path)
    assert (tmp_path / "training.pt").read_bytes() == before
    assert not (tmp_path / "training.lock").exists()
    run(small("textmlm", steps=3), tmp_path)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_full_disk_while_tensorboards_log_is_written(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    from tensorboard.summary.writer.record_writer import RecordWriter

    log = RunLog(tmp_path)
    monkeypatch.setattr(RecordWriter, "write", full)

    def write() -> None:
        for step in range(1, 1000):
            log.write({"step": step, "loss": 1.0}, {})
            log.sync()

    with pytest.raises(OSError, match=r"No space left on device: '.*/tensorboard'"):
        write()
    log.close()
    assert "Traceback" not in capsys.readouterr().err


def test_a_full_disk_while_weights_are_written(tmp_path, monkeypatch):
    """A limit on the size of files, above that of the logs, stands for the disk."""
    folder = tmp_path / "run"
    run(small("textmlm", steps=1), folder)
    limit = (folder / "model.safetensors").stat().st_size - 100
    before = (folder / "training.pt").read_bytes()
    (folder / "model.safetensors").unlink()
    arguments = ["train", "digits_textmlm", *DIGITS, "--output", folder, "--steps", "1"]

    def train():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.exit(command(monkeypatch, *arguments, "--evaluate-every", "0"))

    process = forked(train, tmp_path / "said")
    process.join()
    said = (tmp_path / "said").read_text()
    assert process.exitcode == 2, said
    assert "Traceback" not in said
    assert re.search(r"^vlmo: .*model\.safetensors", said, re.MULTILINE)
    assert (folder / "training.pt").read_bytes() == before
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    run(small("textmlm", steps=1), folder)
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("when", ["open_data", "new_model", "first validation"])
def test_ctrl_c_before_the_first_step(tmp_path, monkeypatch, capsys, when):
    from vlmo.training import setup

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    if when == "open_data":
        monkeypatch.setattr(setup, "open_data", stop)
    else:
        monkeypatch.setattr(trainer, {"new_model": "new_model"}.get(when, "evaluate"), stop)
    arguments = ["train", "digits_textmlm", *DIGITS, "--output", tmp_path / "run"]
    assert command(monkeypatch, *arguments) == 130
    assert capsys.readouterr().err == (
        "vlmo: stopped at once; what was saved before is as it was\n"
    )
    assert (tmp_path / "run").exists() == (when == "first validation")
    monkeypatch.undo()
    shrink_digits(monkeypatch)
    run(small("textmlm", steps=1), tmp_path / "again")


def test_without_tensorboard_the_other_logs_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    said = run(small("textmlm", steps=1), tmp_path, board=True)
    assert "No TensorBoard log: " in said
    assert steps_of(tmp_path) == [1]
    assert not (tmp_path / "tensorboard").exists()
