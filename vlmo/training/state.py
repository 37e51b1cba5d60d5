"""training.pt: all that a training needs to go on as if it had never stopped.

One file for any number of ranks, and for DDP, FSDP2 and a single process alike: weights and
optimizer are whole and named. Nothing random is in it, because everything random in a step follows
from the seed and the step's number (:mod:`vlmo.data`, :mod:`vlmo.training.step`).
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Mapping
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
from torch.optim.lr_scheduler import LambdaLR

from vlmo.checkpoint.formats import summary
from vlmo.distributed import world_size
from vlmo.files import replacing
from vlmo.training.parallel import on_first

VERSION = 1
STATE = "training.pt"
_ENTRIES = {
    "run": dict,
    "step": int,
    "best": dict,
    "model": dict,
    "optimizer": dict,
    "schedule": dict,
    "scaler": dict,
}
# Of what may be missing in states from before it was kept, and of what is in the others.
_FORMS: dict[str, Callable[[Any], bool]] = {
    "step": lambda v: v >= 0,
    "run": lambda v: {"vocabulary", "answers", "seed"} <= v.keys(),
    "best": lambda v: not v or {"step", "metric", "value"} <= v.keys(),
    "metrics": lambda v: v is None or isinstance(v, dict),
    "pending": lambda v: v is None or (isinstance(v, dict) and {"row", "machine"} <= v.keys()),
    "bad": lambda v: v is None or (isinstance(v, dict) and all(map(_is_bad_sample, v.items()))),
}


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
        metrics: of the last validation; None before the first.
        pending: ``{"row", "machine"}`` for the logs, of a step that is still to be validated; None
            if there is none.
        bad: number of each sample that could not be read, and what to say of it.
        fewer: fingerprint of the data without these samples; None if nothing tells it.
    """

    model: nn.Module
    optimizer: Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    step: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] | None = None
    pending: dict[str, Any] | None = None
    bad: dict[int, dict[str, Any]] = field(default_factory=dict)
    fewer: str | None = None


def save_state(path: str | os.PathLike[str], training: Training, run: Mapping[str, Any]) -> None:
    """Write training.pt; every rank calls this, the first one writes.

    The file appears whole or not at all: what was there before stays until the new one is on disk.

    Args:
        path: of the file.
        training: what changes.
        run: what does not, see :func:`vlmo.training.record.identity`.

    Raises:
        OSError: on all ranks, if it cannot be written.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optimizer = get_state_dict(training.model, training.optimizer, options=options)

    def write() -> None:
        state = {
            "version": VERSION,
            "run": dict(run),
            "step": training.step,
            "best": training.best,
            "metrics": training.metrics,
            "pending": training.pending,
            "bad": training.bad,
            "fewer": training.fewer,
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
            raise OSError(
                f"{path}: step {training.step} could not be saved ({reason}){older}"
            ) from caught

    on_first(write)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read training.pt, which executes nothing in it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, no state of a training, or of another version.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch says of a pickle in another protocol
            # The ranks of a machine share the pages of a mapped file.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=world_size() > 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # arbitrary bytes make torch raise nearly any
        # torch wraps what its unpickler found in advice to load the file unsafely.
        inner = error.__context__ if isinstance(error, pickle.UnpicklingError) else error
        reason = " ".join(str(inner or "").split()[:30]) or type(error).__name__
        raise ValueError(
            f"{path}: is damaged, or not the state of a training ({reason}); if you remove it, the "
            "training starts from the beginning"
        ) from error
    version = state.get("version") if isinstance(state, dict) else None
    if isinstance(version, int) and version != VERSION:
        raise ValueError(f"{path}: version {version} is not {VERSION}")
    entries = _ENTRIES.items() if version == VERSION else ()
    if not entries or not all(isinstance(state.get(name), kind) for name, kind in entries):
        raise ValueError(f"{path}: is not the state of a training")
    if wrong := [name for name, fits in _FORMS.items() if not fits(state.get(name))]:
        raise ValueError(
            f"{path}: is not the state of a training: {', '.join(wrong)} have another form"
        )
    weights = {key: v for key, v in state["model"].items() if isinstance(v, torch.Tensor)}
    if bad := [key for key, v in weights.items() if not v.isfinite().all()]:
        raise ValueError(f"{path}: {len(bad)} tensors hold NaN or infinite weights: {summary(bad)}")
    return state


def _is_bad_sample(item: tuple[Any, Any]) -> bool:
    number, entry = item
    return (
        isinstance(number, int) and isinstance(entry, dict) and {"step", "reason"} <= entry.keys()
    )


def restore(state: Mapping[str, Any], training: Training) -> None:
    """Put a state into the model, the optimizer and the rest; every rank calls this.

    The learning rate is that of the training's own schedule, which may be longer than before.

    Raises:
        ValueError: the state does not fit.
    """
    rates = training.schedule.base_lrs
    try:
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
    except (RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{STATE}: does not fit the model: {reason}") from error
    factors = [factor(training.schedule.last_epoch) for factor in training.schedule.lr_lambdas]
    for group, rate, factor in zip(training.optimizer.param_groups, rates, factors, strict=True):
        group["lr"] = rate * factor
    training.step, training.best = state["step"], dict(state["best"])
    # Runs from before these were kept have none.
    training.metrics, training.pending = state.get("metrics"), state.get("pending")
    training.bad, training.fewer = dict(state.get("bad") or {}), state.get("fewer")
