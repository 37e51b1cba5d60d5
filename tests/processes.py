"""Starts processes: trainings that are killed, and the ranks of a group."""

import multiprocessing
import os
import sys
import time
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from vlmo.commands.app import main
from vlmo.training.logs import read_table


def command(monkeypatch, *arguments: str) -> int:
    """Exit code of a command line."""
    monkeypatch.setattr(sys, "argv", ["vlmo", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def forked(function, output: Path) -> ForkProcess:
    """A process that runs ``function``; its output goes to ``output``."""

    def body():
        with output.open("w", buffering=1) as stream:
            sys.stdout = sys.stderr = stream
            function()

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    return process


def in_ranks(function, folder: Path, count: int = 2) -> None:
    """Call a function in ``count`` processes, with the environment that torchrun would set.

    They are forked from this process, which has already imported everything. The function joins the
    group itself, as under torchrun; each process exits when it returns.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port), WORLD_SIZE=str(count))
    environment |= dict(TORCHELASTIC_USE_AGENT_STORE="True", LOCAL_WORLD_SIZE=str(count))

    def ranked(rank: int):
        def call() -> None:
            os.environ |= environment | dict(RANK=str(rank), LOCAL_RANK=str(rank))
            torch.set_num_threads(1)
            function()
            # Exit at once: finalising the interpreter with gloo's threads has aborted (torch 2.13).
            sys.stdout.flush()
            os._exit(0)

        return call

    stories = [folder / f"said-by-rank{rank}" for rank in range(count)]
    ranks = [forked(ranked(rank), story) for rank, story in enumerate(stories)]
    for process in ranks:
        process.join()
    assert all(process.exitcode == 0 for process in ranks), "".join(s.read_text() for s in stories)


def wait_for(condition, process) -> None:
    deadline = time.monotonic() + 600  # long enough for a busy machine
    while not condition():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.002)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return read_table(folder / "log.csv")[1]


def steps_of(folder: Path) -> list[int]:
    return [int(row["step"]) for row in rows_of(folder)]


def assert_same_weights(folder: Path, other: Path, name: str) -> None:
    """Compare weights bitwise; files may differ, as safetensors writes metadata in any order."""
    weights, wanted = load_file(folder / name), load_file(other / name)
    assert weights.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(
            weights[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)
        ), key
