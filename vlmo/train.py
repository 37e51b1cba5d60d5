"""The parts of a training program: optimizer groups, schedule, step loop, loss log.

The rules are those of the official recipes. What a program trains on and what it does between two
steps (progress, validation, checkpoints) stays with the program.
"""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from vlmo.files import replacing

Batch = Mapping[str, Tensor]
Objective = Callable[[Batch], Mapping[str, Tensor]]

# Names that hold one of these are not decayed: every bias (the relative position table is one of
# them) and these norms, but not the norms of the experts.
_NOT_DECAYED = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight")
_FINE_TUNING_HEADS = ("vqa_classifier.", "nlvr2_classifier.")


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.01, head_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Groups for an optimizer, with the official rule for weight decay.

    Args:
        model: parameters without ``requires_grad`` are left out.
        lr: learning rate.
        weight_decay: of the parameters that have one.
        head_lr_scale: factor of ``lr`` for the VQA and NLVR2 classifiers.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if any(part in name for part in _NOT_DECAYED) else weight_decay
            head = any(part in name for part in _FINE_TUNING_HEADS)
            key = (decay, lr * head_lr_scale if head else lr)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr": rate}
        for (decay, rate), members in groups.items()
    ]


def adamw(model: nn.Module, *, lr: float, weight_decay: float = 0.01, **options) -> Optimizer:
    """AdamW with the official betas; ``options`` are those of :func:`parameter_groups`."""
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, **options)
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)


def warmup_then_decay(step: int, *, warmup: int, total: int, power: float = 1.0) -> float:
    """Factor of the learning rate: linear from 0 over ``warmup`` steps, then to 0 at ``total``."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(total - warmup, 1)) ** power


def linear_schedule(optimizer: Optimizer, *, warmup: int, total: int) -> LRScheduler:
    """:func:`warmup_then_decay` for every group; the first step already has a rate above 0."""
    return LambdaLR(
        optimizer, lambda step: warmup_then_decay(step + 1, warmup=warmup, total=total + 1)
    )


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
