"""Small trainings on digit scenes, for tests in one process and in two."""

import io
import json
import os
import shutil
import signal
from pathlib import Path

import torch
from rich.console import Console

from vlmo.data import sources
from vlmo.distributed import rank
from vlmo.training import Interrupted, Settings, train, trainer
from vlmo.training.parallel import WAYS, is_first, joined_group
from vlmo.training.recipes import Recipe, recipe
from vlmo.training.state import save_state
from vlmo.training.step import backward

STAGES = ("textmlm", "pretrain", "vqa", "nlvr2", "retrieval")
STEPS = 4
# stage, parallelism, rows per micro-batch
CASES: list[tuple[str, str, int | None]] = [(stage, "ddp", None) for stage in STAGES]
CASES += [(stage, "fsdp", 2) for stage in STAGES]
CASES += [("pretrain", "ddp", 2), ("pretrain", "fsdp", None)]
CASES += [("beit3_vqa", "ddp", None), ("beit3_retrieval", "fsdp", 2)]

SIZES = {"train": 96, "val": 24, "test": 24}


def shrink_digits(patch) -> None:
    """Reduce the number of digit scenes, by pytest's monkeypatch."""
    for split, size in SIZES.items():
        patch.setitem(sources._DIGIT_SIZES, split, size)


def small(stage: str, **changes) -> Recipe:
    return recipe(f"digits_{stage}").replace(**{"steps": STEPS, "batch_size": 8, **changes})


def settings_of(found: Recipe, output: Path, data: str = "digits", **changes) -> Settings:
    options = dict(board=False, log_every=1, save_every=2, evaluate_every=0, evaluation_batch=8)
    return Settings(found, data, output, **{**options, **changes})


def run(found: Recipe, output: Path, **changes) -> str:
    """Train on the CPU; returns the output."""
    said = io.StringIO()
    train(settings_of(found, output, device="cpu", **changes), Console(file=said, width=200))
    return said.getvalue()


def keep_states() -> None:
    """Keep a copy of every saved state in the run's folder, such as state2.pt after step 2."""

    def save_and_keep(path, training, run):
        save_state(path, training, run)
        if is_first():
            shutil.copy(path, path.with_name(f"state{training.step}.pt"))

    trainer.save_state = save_and_keep


def main(folder: Path) -> None:
    """Run on one of two ranks.

    Trains every case of ``CASES`` in its own folder within ``folder``, one in float16; resumes from
    given.pt there, the state of a single process, with each of ``WAYS``; stops a training by a
    signal to the second process only; trains on data/pairs, some of whose pictures are damaged; and
    fails to train in the folder locked, which another process has locked.
    """
    sources._DIGIT_SIZES |= SIZES
    keep_states()
    with joined_group("cpu"):
        for stage, way, rows in CASES:
            run(
                small(stage),
                folder / f"{stage}-{way}-{rows}",
                parallel=way,
                micro_batch=rows,
                checkpointing=(way, rows) in (("ddp", 2), ("fsdp", None)),
                evaluate_every=None if way == "fsdp" and rows else 0,
            )
        run(small("retrieval"), folder / "float16", parallel="fsdp", dtype="float16")
        for way in WAYS:
            output = folder / f"resumed-{way}"
            if is_first():
                output.mkdir()
                shutil.copy(folder / "given.pt", output / "training.pt")
            torch.distributed.barrier()
            run(small("pretrain"), output, parallel=way)
        stop_the_second(folder / "stopped")
        damaged(folder, "error")
        damaged(folder, "skip")
        fail(folder, "locked", lambda: run(small("textmlm"), folder / "locked"))


def damaged(folder: Path, policy: str) -> None:
    """Train on data with damaged pictures, in a folder that is named after the policy."""
    given = dict(data=str(folder / "data" / "pairs"), vocabulary=folder / "data" / "vocab.txt")
    given |= dict(on_bad_sample=policy, save_every=100, workers=1)
    found = small("pretrain", steps=6, batch_size=4)
    fail(folder, policy, lambda: run(found, folder / policy, **given))


def fail(folder: Path, name: str, function) -> None:
    """Write the error of each rank to NAME0.txt and NAME1.txt."""
    told = ""
    try:
        function()
    except (OSError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
    (folder / f"{name}{rank()}.txt").write_text(told)


def stop_the_second(output: Path) -> None:
    """Write the outcome on each rank to rank0.json and rank1.json."""

    def backward_and_signal(*args, seed, **kwargs):
        if rank() == 1 and seed[1] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(*args, seed=seed, **kwargs)

    trainer.backward = backward_and_signal  # type: ignore[assignment]
    story = {}
    try:
        run(small("textmlm", steps=50), output)
    except Interrupted as stop:
        story = {"said": str(stop), "number": stop.number}
    trainer.backward = backward
    (output.parent / f"rank{rank()}.json").write_text(json.dumps(story))
