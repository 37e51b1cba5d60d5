"""The demo's step loop, whose objective changes as it goes, and its loss log."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vlmo.files import replacing

Batch = Mapping[str, Tensor]
Objective = Callable[[Batch], Mapping[str, Tensor]]


@dataclass(frozen=True)
class StepRecord:
    """What one step did. The losses stay on the device until :meth:`row` asks for them.

    Attributes:
        step: number of the step, from 1.
        samples: samples seen so far, this step's included.
        seconds: time since the first step began.
        lr: learning rate of the step, of the first group.
        losses: every loss of the objective, ``"loss"`` being the sum.
    """

    step: int
    samples: int
    seconds: float
    lr: float
    losses: Mapping[str, Tensor]

    def row(self) -> dict[str, float]:
        """One line of a loss log; waits for the device."""
        losses = {name: float(value) for name, value in self.losses.items()}
        return {"step": self.step, "samples": self.samples, "lr": self.lr} | losses


def train_steps(
    objective: Objective,
    batches: Iterable[Batch],
    optimizer: Optimizer,
    schedule: LRScheduler | None = None,
    *,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
) -> Iterator[StepRecord]:
    """Take one step per batch and yield its record; nothing waits for the device.

    Args:
        objective: from a batch to losses and more, as a :class:`vlmo.VLMo` is; ``"loss"`` is
            minimised.
        batches: mappings with ``text_ids`` [B, T], already on the device.
        optimizer: of the model's parameters.
        schedule: stepped after every step.
        clip_norm: largest norm of all gradients together.
        autocast: dtype of the forward pass. Gradients are scaled if it is float16.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    device_type = parameters[0].device.type
    scaler = torch.amp.GradScaler(device_type, enabled=autocast == torch.float16)
    start, samples = time.perf_counter(), 0
    for step, batch in enumerate(batches, 1):
        with torch.autocast(device_type, dtype=autocast, enabled=autocast is not None):
            output = objective(batch)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(output["loss"]).backward()
        if clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        lr = optimizer.param_groups[0]["lr"]
        scaler.step(optimizer)
        scaler.update()
        if schedule is not None:
            schedule.step()
        samples += len(batch["text_ids"])
        losses = {name: v.detach() for name, v in output.items() if name.endswith("loss")}
        yield StepRecord(step, samples, time.perf_counter() - start, lr, losses)


def write_log(path: str | os.PathLike[str], rows: Sequence[Mapping[str, float]]) -> None:
    """Write rows as CSV, atomically; a loss that a row lacks is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
