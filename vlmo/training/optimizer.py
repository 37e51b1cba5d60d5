"""Optimizer and learning rate schedule of unilm, the reference implementation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Parameters whose names contain one of these have no weight decay: every bias (including the
# relative position table) and these norms, but not the norms of the experts.
_NOT_DECAYED = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight")
_FINE_TUNING_HEADS = ("vqa_classifier.", "nlvr2_classifier.")


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float = 0.01, head_lr_scale: float = 1.0
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer, with unilm's rule for weight decay.

    Scalars (the logit scales) form their own group: FSDP2 does not shard them, and an optimizer's
    fused loops cannot mix them with sharded parameters.

    Args:
        model: parameters without ``requires_grad`` are omitted.
        lr: learning rate.
        weight_decay: for the parameters that have weight decay.
        head_lr_scale: factor of ``lr`` for the VQA and NLVR2 classifiers.
    """
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if any(part in name for part in _NOT_DECAYED) else weight_decay
            head = any(part in name for part in _FINE_TUNING_HEADS)
            key = (decay, lr * head_lr_scale if head else lr, parameter.dim() == 0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr": rate}
        for (decay, rate, _), members in groups.items()
    ]


def adamw(model: nn.Module, *, lr: float, weight_decay: float = 0.01, **options) -> Optimizer:
    """AdamW with unilm's betas; ``options`` are those of :func:`parameter_groups`.

    unilm uses the AdamW of transformers 4.8, which applies weight decay after the update, by the
    same factor.
    """
    groups = parameter_groups(model, lr=lr, weight_decay=weight_decay, **options)
    # One loop for all parameters, and no copies of them.
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices in ({"cuda"}, {"cpu"})
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8, fused=fused or None)


def warmup_then_decay(step: int, *, warmup: int, total: int, power: float = 1.0) -> float:
    """Factor of the learning rate: linear warm-up from 0, then decay to 0 at step ``total``."""
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(total - warmup, 1)) ** power


def linear_schedule(optimizer: Optimizer, *, warmup: int, total: int) -> LambdaLR:
    """Apply :func:`warmup_then_decay` to every group; the rate of the first step is above 0."""
    return LambdaLR(
        optimizer, lambda step: warmup_then_decay(step + 1, warmup=warmup, total=total + 1)
    )


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most ``largest``; returns the norm.

    Sharded (FSDP2) and unsharded parameters may be mixed.
    """
    sharded: list[nn.Parameter] = []
    whole: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.grad is not None:
            (sharded if isinstance(parameter.grad, DTensor) else whole).append(parameter)
    norms = []
    for members in (sharded, whole):
        if members:
            norm = nn.utils.get_total_norm([p.grad for p in members if p.grad is not None])
            norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
    for members in (sharded, whole):
        nn.utils.clip_grads_with_norm_(members, largest, total)
    return total
