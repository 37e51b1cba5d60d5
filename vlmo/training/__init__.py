"""Training: runs a recipe on some data and saves checkpoints, logs and the training state.

Names are imported on first use, so that recipes are available without torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {"Interrupted": "stopping", "Settings": "setup", "train": "trainer"}

__all__ = ["Interrupted", "Settings", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
