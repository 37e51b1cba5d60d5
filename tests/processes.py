"""Trainings in processes of their own, to be killed."""

import multiprocessing
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from vlmo.cli import main
from vlmo.training.logs import read_table


def command(monkeypatch, *arguments: str) -> int:
    """Exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["vlmo", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    return 0


def forked(function, output: Path) -> multiprocessing.Process:
    """A process that has started ``function``; what it says goes to ``output``."""

    def body():
        with output.open("w", buffering=1) as stream:
            sys.stdout = sys.stderr = stream
            function()

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 600  # of a machine that is busy with something else
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return read_table(folder / "log.csv")[1]


def steps_of(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows_of(folder)]


def assert_same_weights(folder: Path, other: Path, name: str) -> None:
    """Bit by bit; safetensors writes its metadata in any order."""
    weights, wanted = load_file(folder / name), load_file(other / name)
    assert weights.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(
            weights[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
        ), key
