"""Detects modules that were wrapped, replaced or hooked: adapters, quantisation, calibration.

The fused operations read the parameters of plain modules. A module that does more than its
parameters imply must be called instead; otherwise the addition would have no effect.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether reading the parameters of ``module`` is equivalent to calling it.

    False for another class (PEFT, ``quantize_dynamic``, ``parametrize``, FSDP2 on this module
    itself), for hooks (calibration, offloading, ``register_module_forward_hook``), and for a
    ``forward`` that is set on the instance (accelerate).
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not any(getattr(module, name) for name in _HOOKS)
        and not _has_any_global_hook()
    )


def rows_of(embedding: nn.Embedding, rows: int | slice | Tensor) -> Tensor:
    """Rows of an embedding's weight; calls the module if it is not plain."""
    if is_plain(embedding, nn.Embedding):
        return embedding.weight[rows]
    if not isinstance(rows, Tensor):
        # Wrappers have a weight, but not always the other attributes of an embedding.
        weight = embedding.weight
        rows = torch.arange(weight.shape[0], device=weight.device)[rows]
    return embedding(rows)
