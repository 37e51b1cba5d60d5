"""Two processes train the same weights as one, and each resumes from the other's state."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

import training_cases
from processes import in_ranks
from training_cases import (
    CASES,
    STAGES,
    STEPS,
    damaged,
    keep_states,
    run,
    shrink_digits,
    small,
)
from training_data import damage, make
from vlmo.training import trainer
from vlmo.training.lock import FolderLock
from vlmo.training.logs import read_table
from vlmo.training.parallel import WAYS
from vlmo.training.state import load_state

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of trainings: one process's by stage, two processes' by case."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        shrink_digits(patch)
        patch.setattr(trainer, "save_state", trainer.save_state)  # put back at the end
        keep_states()
        for stage in dict.fromkeys(stage for stage, *_ in CASES):
            run(small(stage), folder / stage, evaluate_every=None)
        shutil.copy(folder / "pretrain" / "state2.pt", folder / "given.pt")
        data = make(folder / "data" / "pairs", "pretrain", "records", count=12)
        for number in (3, 7):
            damage(data / f"train{number}.png")
        lock = FolderLock(folder / "locked")
        lock.take()
        in_ranks(lambda: training_cases.main(folder), folder)
        lock.release()
        yield folder


def assert_same_training(actual: Path, expected: Path, steps=range(1, STEPS + 1)) -> None:
    rows = [{row["step"]: row for row in read_table(f / "log.csv")[1]} for f in (actual, expected)]
    for step in map(str, steps):
        for name, value in rows[1][step].items():
            if name.endswith("loss") and not name.startswith("val_"):
                assert float(rows[0][step][name]) == pytest.approx(float(value), rel=2e-5), name
    weights = load_file(actual / "model.safetensors")
    wanted = load_file(expected / "model.safetensors")
    assert weights.keys() == wanted.keys()
    # Where a gradient is next to nothing, AdamW makes a step out of its rounding error.
    lr = small("pretrain").lr
    for name, tensor in wanted.items():
        if "k_proj" in name and name.endswith("bias"):  # softmax cancels it
            continue
        error = (weights[name] - tensor).float()
        assert error.abs().max() <= lr, name
        assert error.square().mean().sqrt() <= 0.01 * lr, name


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_train_as_one(folder, case):
    """With DistributedDataParallel and FSDP2, whole shares and parts."""
    stage, way, rows = case
    assert_same_training(folder / f"{stage}-{way}-{rows}", folder / stage)


def test_float16_with_parts_of_weights(folder):
    """The scaler of the loss sees sharded gradients and the whole one of the logit scale."""
    half, full = (read_table(folder / f / "log.csv")[1] for f in ("float16", "retrieval"))
    for row, wanted in zip(half, full, strict=True):
        assert float(row["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-2)
    assert load_state(folder / "float16" / "training.pt")["scaler"]["scale"] == 65536


@pytest.mark.parametrize("stage", STAGES)
def test_validation_of_two_processes(folder, stage):
    """Under FSDP2."""
    two, one = (
        json.loads((folder / name / "metrics.json").read_text())["validation"]
        for name in (f"{stage}-fsdp-2", stage)
    )
    assert two and two.keys() == one.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-3, abs=0.05), name


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_go_on_from_the_state_of_one(folder, way):
    assert_same_training(folder / f"resumed-{way}", folder / "pretrain", range(3, STEPS + 1))


@pytest.mark.parametrize("way", WAYS)
def test_one_process_goes_on_from_the_state_of_two(folder, way):
    output = folder / f"one-after-{way}"
    output.mkdir()
    shutil.copy(folder / f"pretrain-{way}-None" / "state2.pt", output / "training.pt")
    assert "step 2 of 4" in run(small("pretrain"), output)
    assert_same_training(output, folder / "pretrain", range(3, STEPS + 1))


def test_a_signal_to_one_process_stops_both_after_the_same_step(folder):
    stories = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert stories[0] == stories[1]
    assert stories[0]["number"] == signal.SIGTERM
    step = load_state(folder / "stopped" / "training.pt")["step"]
    assert 3 <= step <= 5
    assert f"after step {step} of 50" in stories[0]["said"]
    assert len(read_table(folder / "stopped" / "log.csv")[1]) == step


@pytest.mark.slow
def test_two_processes_leave_out_what_one_leaves_out(folder, tmp_path):
    shutil.copytree(folder / "data", tmp_path / "data")
    damaged(tmp_path, "skip")
    lists = [
        [json.loads(line) for line in (f / "skip" / "bad_samples.jsonl").open()]
        for f in (folder, tmp_path)
    ]
    kept = [[(e["sample"], e["step"]) for e in entries] for entries in lists]
    assert kept[0] == kept[1] and len(kept[0]) == 2
    rows = [read_table(f / "skip" / "log.csv")[1] for f in (folder, tmp_path)]
    for row, wanted in zip(*rows, strict=True):
        assert row["bad_samples"] == wanted["bad_samples"]
        assert float(row["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-4)


@pytest.mark.slow
def test_a_bad_sample_of_one_process_ends_both_and_loses_nothing(folder):
    told = [(folder / f"error{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1]
    state = load_state(folder / "error" / "training.pt")
    (entry,) = state["bad"].values()
    assert told[0].startswith(f"ValueError: {entry['reason']}; repair the file")
    assert told[0].endswith(
        f"step {state['step']} is saved, and the same command resumes from there"
    )
    assert entry["step"] - 2 <= state["step"] < entry["step"]
    assert state["fewer"] is not None


@pytest.mark.slow
def test_a_locked_folder_is_refused_by_all_processes(folder):
    told = [(folder / f"locked{rank}.txt").read_text() for rank in range(2)]
    assert told[0] == told[1]
    assert f"process {os.getpid()} on" in told[0]
