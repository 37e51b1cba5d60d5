"""Optimizer and learning rate schedule of unilm, the reference implementation."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vlmo.model.beit3 import BEiT3
from vlmo.model.models import inner

# Parameters whose names contain one of these have no weight decay: every bias (including the
# relative position table) and these norms, but not the norms of the experts.
_NOT_DECAYED = ("bias", "LayerNorm.weight", "norm.weight", "norm1.weight")
_FINE_TUNING_HEADS = ("vqa_classifier.", "nlvr2_classifier.")
# Parameters of BEiT-3 without weight decay, besides vectors.
_NOT_DECAYED_OF_BEIT3 = ("vision_embed.cls_token", "embed_positions.A.weight", "logit_scale")


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

    def rule(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        decay = 0.0 if any(part in name for part in _NOT_DECAYED) else weight_decay
        head = any(part in name for part in _FINE_TUNING_HEADS)
        return decay, lr * head_lr_scale if head else lr

    return _grouped(model, rule)


def beit3_parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    head_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Parameter groups for fine-tuning BEiT-3, with the rules of unilm's ``optim_factory.py``.

    Layer i of L has the learning rate ``lr * layer_decay ** (L - i)`` (i from 0), the embeddings
    below it ``lr * layer_decay ** (L + 1)``, the final norm and the heads ``lr``. Vectors (biases,
    norms), scalars, [CLS] and the positions of images have no weight decay.

    Args:
        model: a :class:`vlmo.BEiT3`, possibly wrapped; parameters without ``requires_grad`` are
            omitted.
        lr: learning rate.
        weight_decay: for the parameters that have weight decay.
        layer_decay: factor from each layer to the one below it.
        head_lr_scale: factor of ``lr`` for ``head``, the classifier of VQA, NLVR2 or images; unilm
            uses it without layer decay only.
    """
    depth = 1 + max(_layer_of(name) for name, _ in model.named_parameters())

    def rule(name: str, parameter: nn.Parameter) -> tuple[float, float]:
        layer = _layer_of(name)
        exponent = 0 if layer < 0 else depth - layer
        if "embed" in name:
            exponent = depth + 1
        rate = lr * layer_decay**exponent
        head = re.search(r"(^|\.)head\.", name)
        vector = parameter.dim() <= 1 or name.endswith(_NOT_DECAYED_OF_BEIT3)
        return 0.0 if vector else weight_decay, rate * head_lr_scale if head else rate

    return _grouped(model, rule)


def _layer_of(name: str) -> int:
    """Number of the encoder layer of a parameter of BEiT-3; -1 if it is in none."""
    found = re.search(r"encoder\.layers\.(\d+)\.", name)
    return -1 if found is None else int(found[1])


def _grouped(
    model: nn.Module, rule: Callable[[str, nn.Parameter], tuple[float, float]]
) -> list[dict[str, Any]]:
    """Groups of equal weight decay and learning rate, which ``rule`` gives a parameter."""
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (*rule(name, parameter), parameter.dim() == 0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, "lr": rate}
        for (decay, rate, _), members in groups.items()
    ]


def adamw(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.01,
    head_lr_scale: float = 1.0,
    layer_decay: float = 1.0,
    beta2: float = 0.98,
) -> Optimizer:
    """AdamW for a model, possibly wrapped, with the parameter groups of unilm.

    For VLMo, unilm uses the AdamW of transformers 4.8, which applies weight decay after the update,
    by the same factor.

    Args:
        model: see :func:`parameter_groups` and :func:`beit3_parameter_groups`.
        lr: learning rate.
        weight_decay: for the parameters that have weight decay.
        head_lr_scale: factor of ``lr`` for the classifiers of fine-tuning.
        layer_decay: factor of ``lr`` from each layer of BEiT-3 to the one below it.
        beta2: decay of the second moments.

    Raises:
        ValueError: ``layer_decay`` is not 1 for VLMo.
    """
    options: dict[str, Any] = dict(lr=lr, weight_decay=weight_decay, head_lr_scale=head_lr_scale)
    if isinstance(inner(model), BEiT3):
        groups = beit3_parameter_groups(model, layer_decay=layer_decay, **options)
    elif layer_decay == 1:
        groups = parameter_groups(model, **options)
    else:
        raise ValueError(f"layer_decay: {layer_decay} is for BEiT-3, not for VLMo")
    # One loop for all parameters, and no copies of them.
    devices = {p.device.type for group in groups for p in group["params"]}
    fused = devices in ({"cuda"}, {"cpu"})
    return torch.optim.AdamW(groups, betas=(0.9, beta2), eps=1e-8, fused=fused or None)


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


def warmup_then_cosine(step: int, *, warmup: int, total: int, least: float = 0.0) -> float:
    """Factor of the learning rate: linear warm-up to 1, then a cosine to ``least`` at ``total``.

    As ``cosine_scheduler`` in unilm's ``beit3``, whose first step has a rate of 0.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    return least + (1 - least) * (1 + math.cos(math.pi * done)) / 2


def cosine_schedule(
    optimizer: Optimizer, *, warmup: int, total: int, least: float = 0.0
) -> LambdaLR:
    """Apply :func:`warmup_then_cosine` to every group."""
    return LambdaLR(
        optimizer,
        lambda step: warmup_then_cosine(step, warmup=warmup, total=total, least=least),
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
