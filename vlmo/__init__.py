"""vlmo: fused kernels for multiway transformers, and the models VLMo and BEiT-3.

``vlmo.kernels`` holds the operations; everything else here is plain PyTorch that calls them. Names
are imported on first use, so that ``from vlmo.kernels import moe_ffn`` loads no model code.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "BEiT3": "model.beit3",
    "BEiT3Config": "model.beit3",
    "Predictor": "predictor",
    "VLMo": "model.vlmo",
    "VLMoConfig": "model.config",
    "load_checkpoint": "checkpoint.io",
    "save_checkpoint": "checkpoint.io",
}

__all__ = [
    "BEiT3",
    "BEiT3Config",
    "Predictor",
    "VLMo",
    "VLMoConfig",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"vlmo.{_HOME[name]}"), name)
