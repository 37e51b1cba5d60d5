"""training.pt: all that a training needs to go on as if it had never stopped.

One file for any number of ranks, and for DDP, FSDP2 and a single process alike: weights and
optimizer are whole and named. Nothing random is in it, because everything random in a step follows
from the seed and the step's number (:mod:`vlmo.data`, :mod:`vlmo.step`).
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vlmo.distributed import world_size
from vlmo.files import replacing
from vlmo.training.parallel import is_first, raise_together

VERSION = 1


@dataclass
class Training:
    """What changes while a model is trained.

    Attributes:
        model: maybe wrapped.
        optimizer: of its parameters.
        schedule: of the optimizer.
        scaler: of the loss; not enabled unless float16 is used.
        step: steps done, which is the position in the data as well.
        best: the best validation so far, ``{"step", "metric", "value"}``; empty before the first.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    step: int = 0
    best: dict[str, Any] = field(default_factory=dict)


def save_state(path: str | os.PathLike[str], training: Training, run: Mapping[str, Any]) -> None:
    """Write training.pt; every rank calls this, the first one writes.

    The file appears whole or not at all: what was there before stays until the new one is on disk.

    Args:
        path: of the file.
        training: what changes.
        run: what does not, see :func:`differences`.

    Raises:
        OSError: on all ranks, if it cannot be written.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(training.model, training.optimizer, options=options)
    error = None
    if is_first():
        state = {
            "version": VERSION,
            "run": dict(run),
            "step": training.step,
            "best": training.best,
            "model": model,
            "optimizer": optimizer,
            "schedule": training.schedule.state_dict(),
            "scaler": training.scaler.state_dict(),
        }
        try:
            with replacing(path) as temporary:
                torch.save(state, temporary)
        except (OSError, RuntimeError) as caught:  # torch.save's own of a full disk
            older = "; the older file is as it was" if Path(path).exists() else ""
            reason = str(caught).splitlines()[0]
            error = f"{path}: step {training.step} could not be saved ({reason}){older}"
    raise_together(error)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read training.pt, which executes nothing in it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or of another version.
    """
    try:
        # The ranks of a machine share the pages of a mapped file.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=world_size() > 1)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: is damaged ({str(error).splitlines()[0]})") from error
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise ValueError(f"{path}: version {version} is not {VERSION}")
    return state


def restore(state: Mapping[str, Any], training: Training) -> None:
    """Put a state into the model, the optimizer and the rest; every rank calls this."""
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    training.schedule.load_state_dict(dict(state["schedule"]))
    if training.scaler.is_enabled() and state["scaler"]:
        training.scaler.load_state_dict(state["scaler"])
    training.step, training.best = state["step"], dict(state["best"])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where two runs differ, one phrase each: ``lr: 0.001 instead of 0.002``."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += differences(before, now)
        elif _plain(before) != _plain(now):
            found.append(f"{name}: {now} instead of {before}")
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
