"""training.pt: the state from which a training resumes as if it had never stopped.

The file has the same form for any number of ranks and for DDP, FSDP2 and a single process: weights
and optimizer state are unsharded and stored by name. It holds no random number generator, because
all randomness of a step follows from the seed and the step's number (:mod:`vlmo.data`,
:mod:`vlmo.training.step`).
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
# Checks of the fields that older states may lack, and of those that all states have.
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
    """The state that changes during a training.

    Attributes:
        model: possibly wrapped.
        optimizer: optimizer of the model's parameters.
        schedule: learning rate schedule of the optimizer.
        scaler: gradient scaler; enabled only with float16.
        step: number of steps done, which is also the position in the data.
        best: the best validation so far, ``{"step", "metric", "value"}``; empty before the first.
        metrics: metrics of the last validation; None before the first.
        pending: ``{"row", "machine"}`` for the logs, for a step whose validation is still due; None
            if there is none.
        bad: number of each sample that could not be read, and its description.
        fewer: fingerprint of the data without these samples; None if unknown.
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
    """Write training.pt; a collective call in which the first rank writes.

    The file is replaced atomically: the previous one stays until the new one is on disk.

    Args:
        path: path of the file.
        training: the state that changes.
        run: the identity, which does not change, see :func:`vlmo.training.record.identity`.

    Raises:
        OSError: on all ranks, if the file cannot be written.
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
        except (OSError, RuntimeError) as caught:  # RuntimeError from torch.save: the disk is full
            older = "; the older file is as it was" if Path(path).exists() else ""
            reason = str(caught).splitlines()[0]
            raise OSError(
                f"{path}: step {training.step} could not be saved ({reason}){older}"
            ) from caught

    on_first(write)


def load_state(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read training.pt without executing code from it.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is damaged, not a training state, or of another version.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about another pickle protocol
            # The ranks on one machine share the pages of a memory-mapped file.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=world_size() > 1)
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # for arbitrary bytes torch may raise anything
        # torch wraps the unpickler's error in advice to load the file unsafely; report the inner
        # one.
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
    """Load a state into the model, the optimizer and the rest; a collective call.

    The learning rate follows the current schedule, which may be longer than that of the state.

    Raises:
        ValueError: the state does not fit the model.
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
    # Older runs did not save these.
    training.metrics, training.pending = state.get("metrics"), state.get("pending")
    training.bad, training.fewer = dict(state.get("bad") or {}), state.get("fewer")
