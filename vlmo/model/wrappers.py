"""Modules that others have wrapped, replaced or hooked: adapters, quantisation, calibration.

The fused operations read the parameters of plain modules. A module that does more than its
parameters say has to be called, or what was added to it would have no effect.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether reading the parameters of ``module`` is the same as calling it.

    False for another class (PEFT, ``quantize_dynamic``, ``parametrize``, FSDP2 on this very
    module), hooks (calibration, offloading, ``register_module_forward_hook``) and a ``forward`` of
    the instance's own (accelerate).
    """
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not any(getattr(module, name) for name in _HOOKS)
        and not _has_any_global_hook()
    )


def rows_of(embedding: nn.Embedding, rows: int | slice | Tensor) -> Tensor:
    """Rows of an embedding's weight; through the module if there is more to it."""
    if is_plain(embedding, nn.Embedding):
        return embedding.weight[rows]
    if not isinstance(rows, Tensor):
        # Wrappers have a weight, but not always what else an embedding has.
        weight = embedding.weight
        rows = torch.arange(weight.shape[0], device=weight.device)[rows]
    return embedding(rows)
