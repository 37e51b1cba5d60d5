"""Resuming after any end gives the same result as an uninterrupted training."""

import itertools
import json
import os
import random
import shutil
import signal
import sys

import pytest
import torch

from processes import assert_same_weights, command, forked, rows_of, steps_of, wait_for
from training_cases import keep_states, run, shrink_digits, small
from vlmo.training import trainer
from vlmo.training.record import differences, identity
from vlmo.training.state import load_state

pytestmark = pytest.mark.heavy


@pytest.fixture(autouse=True)
def small_digits(monkeypatch):
    shrink_digits(monkeypatch)
    monkeypatch.setattr(trainer, "save_state", trainer.save_state)  # put back what tests change


WRITING = [
    f"{when} {name}" for name in ("write", "fsync", "replace") for when in ("before", "after")
]
WRITING += ["in save"]


def die(kind: str, count: int) -> None:
    """Have this process killed at the count-th moment of a kind."""
    left = itertools.count(count - 1, -1)

    def is_time(moment: str) -> bool:
        return moment == kind and next(left) == 0

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def around(name):
        real = getattr(os, name)

        def call(*args):
            if is_time(f"before {name}"):
                kill()
            result = real(*args)
            if is_time(f"after {name}"):
                kill()
            return result

        return call

    for name in ("write", "fsync", "replace"):
        setattr(os, name, around(name))
    save = torch.save

    def save_half(state, path):
        save(state, path)
        if is_time("in save"):
            os.truncate(path, path.stat().st_size // 2)
            kill()

    torch.save = save_half  # type: ignore[assignment]


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL while something is written, at moments counted by what was written before."""
    found = small("pretrain", steps=30)
    options = dict(log_every=1, save_every=1, evaluate_every=7)
    run(found, tmp_path / "whole", **options)
    folder, chance, saved = tmp_path / "killed", random.Random(0), [0]
    for kind in WRITING:
        count = chance.randint(2, 5)

        def killed(kind=kind, count=count):
            die(kind, count)
            run(found, folder, **options)

        process = forked(killed, tmp_path / "said")
        process.join()
        assert process.exitcode == -signal.SIGKILL, (tmp_path / "said").read_text()
        if (folder / "training.pt").exists():
            saved.append(load_state(folder / "training.pt")["step"])
    assert saved == sorted(saved) and 2 < saved[-1] < 30
    assert f"step {saved[-1]} of 30" in run(found, folder, **options)
    for name in ("log.csv", "metrics.json"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    for name in ("model.safetensors", "best.safetensors"):
        assert_same_weights(folder, tmp_path / "whole", name)
    lines = (folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_step_and_saves(tmp_path, monkeypatch, number, code):
    folder, said = tmp_path / "run", tmp_path / "said"
    arguments = ["train", "digits_textmlm", "--data", "digits", "--output", folder, "--device"]
    arguments += ["cpu", "--steps", "2000", "--batch-size", "8", "--log-every", "1"]
    arguments += ["--no-tensorboard", "--evaluate-every", "0"]

    def train():
        sys.exit(command(monkeypatch, *arguments))

    process = forked(train, said)
    wait_for(lambda: (folder / "log.csv").exists() and len(rows_of(folder)) > 2, process)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == code
    step = load_state(folder / "training.pt")["step"]
    assert steps_of(folder) == list(range(1, step + 1))
    assert f"stopped by signal {int(number)} after step {step} of 2000" in said.read_text()
    assert not (folder / "model.safetensors").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_go_on_with_their_scaler(tmp_path, dtype):
    keep_states()
    said = run(small("pretrain"), tmp_path / "whole", dtype=dtype)
    assert f"parameters in {dtype} on 1 x cpu" in said
    state = load_state(tmp_path / "whole" / "state2.pt")
    assert bool(state["scaler"]) == (dtype == "float16")
    assert state["model"]["transformer.cls_token"].dtype == torch.float32
    (tmp_path / "on").mkdir()
    shutil.copy(tmp_path / "whole" / "state2.pt", tmp_path / "on" / "training.pt")
    run(small("pretrain"), tmp_path / "on", dtype=dtype)
    assert_same_weights(tmp_path / "on", tmp_path / "whole", "model.safetensors")


def test_a_validation_that_cannot_work_is_told_before_the_first_step(tmp_path, monkeypatch):
    evaluated = []

    def broken(model, dataset, *args, **kwargs):
        evaluated.append(len(dataset))
        raise ValueError("no image_id")

    monkeypatch.setattr(trainer, "evaluate", broken)
    with pytest.raises(ValueError, match="no image_id"):
        run(small("retrieval"), tmp_path, evaluate_every=None)
    assert evaluated == [4]
    assert steps_of(tmp_path) == []


def test_workers_and_parts_change_nothing_that_matters(tmp_path):
    run(small("pretrain"), tmp_path / "none")
    run(small("pretrain"), tmp_path / "workers", workers=2)
    assert (tmp_path / "none" / "log.csv").read_text() == (
        tmp_path / "workers" / "log.csv"
    ).read_text()
    run(small("pretrain"), tmp_path / "parts", micro_batch=2, checkpointing=True)
    for row, parts in zip(*(rows_of(tmp_path / n) for n in ("none", "parts")), strict=True):
        assert float(parts["loss"]) == pytest.approx(float(row["loss"]), rel=1e-4)


def test_a_finished_training_is_not_begun_again(tmp_path):
    run(small("textmlm"), tmp_path)
    before = (tmp_path / "training.pt").stat()
    (tmp_path / ".training.123-0a1b2c3d.pt").write_bytes(b"half a state of a killed process")
    (tmp_path / ".mine").touch()
    assert "step 4 of 4" in run(small("textmlm"), tmp_path)
    assert (tmp_path / "training.pt").stat().st_mtime_ns == before.st_mtime_ns
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir() if path.name[0] == "."] == [".mine"]


@pytest.mark.parametrize("saved", [True, False])
def test_a_folder_of_another_training_is_refused(tmp_path, saved):
    run(small("textmlm"), tmp_path)
    if not saved:
        (tmp_path / "training.pt").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"another training \(lr: 0\.002 instead of 0\.001; seed"):
        run(small("textmlm", lr=2e-3), tmp_path, seed=7)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_what_is_no_state_is_refused(tmp_path):
    (tmp_path / "training.pt").write_bytes(b"not a state")
    with pytest.raises(ValueError, match=r"training\.pt: is damaged"):
        run(small("textmlm"), tmp_path)
    torch.save({"version": 0}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match=r"training\.pt: version 0 is not 1"):
        run(small("textmlm"), tmp_path)


def test_differences_name_their_fields():
    old = identity(small("textmlm", lr=1e-3), seed=1, samples=3, data="a", vocabulary=None)
    new = identity(small("textmlm", lr=2e-3), seed=2, samples=3, data="b", vocabulary=None)
    assert differences(old, new) == [
        "lr: 0.002 instead of 0.001",
        "seed: 2 instead of 1",
        "data (fingerprint): b instead of a",
    ]
    assert differences(old, old) == []


def test_what_an_older_version_did_not_record_is_not_compared():
    new = identity(small("textmlm"), seed=1, samples=3, data="a", vocabulary="v", answers=None)
    old = {name: value for name, value in new.items() if name != "data"}
    old["recipe"] = {k: v for k, v in old["recipe"].items() if k != "max_logit_scale"}
    assert differences(old, new) == []
    new["recipe"] = {**new["recipe"], "max_logit_scale": 100.0}
    assert differences(old, new) == ["max_logit_scale: 100.0 instead of None"]
