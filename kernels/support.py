"""Queries which backends this machine supports, without running anything."""

from __future__ import annotations

import torch

from . import routing_index
from .arguments import check_choice
from .attention import op as attention_ops
from .dispatch import BACKEND_NAMES
from .moe_ffn import op as moe_ffn_ops
from .moe_ffn.call import Facts

OPERATIONS = ("moe_ffn", "moe_linear", "shared_attention", "routing_index")


def why_not(
    operation: str,
    backend: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Why ``backend`` cannot run ``operation`` on ``device`` in ``dtype``; None if it can.

    The answer is for the sizes of the published base model: D 768, F 3072, 12 heads of 64, and a
    bias table of 1126 rows.

    Raises:
        ValueError: the operation or the backend does not exist.
    """
    check_choice("operation", operation, OPERATIONS)
    check_choice("backend", backend, BACKEND_NAMES)
    device = torch.device(device)
    if operation == "moe_ffn":
        return moe_ffn_ops.BACKENDS[backend].why_not(device, Facts(dtype, 768, (3072, 3072)))
    if operation == "moe_linear":
        facts = Facts(dtype, 768, (768, 768), linear=768)
        return moe_ffn_ops.BACKENDS[backend].why_not(device, facts)
    if operation == "shared_attention":
        return attention_ops.BACKENDS[backend].why_not(device, dtype, 64, 1126)
    ids = torch.empty(0, dtype=torch.int32, device=device)
    return routing_index.why_not(backend, ids, 2)
