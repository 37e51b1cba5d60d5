"""Classes of other libraries, which are installed without their dependencies.

Not installed: make install, or pip install --no-deps -r tests/integrations/third_party.txt
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def _bare(name: str) -> None:
    """A package whose ``__init__`` is not run, because it imports what is not installed."""
    top, *rest = name.split(".")
    spec = importlib.util.find_spec(top) if top not in sys.modules else None
    if spec is not None:
        package = ModuleType(top)
        package.__path__ = list(spec.submodule_search_locations or [])
        sys.modules[top] = package
    for end in range(2, len(rest) + 2):
        part = ".".join([top, *rest][:end])
        parent = sys.modules[part.rpartition(".")[0]]
        package = ModuleType(part)
        package.__path__ = [str(Path(parent.__path__[0]) / part.rpartition(".")[2])]
        sys.modules.setdefault(part, package)


def bagel() -> Any:
    """The module ``modeling/bagel/qwen2_navit.py`` of BAGEL, as lmms-engine has it."""
    _bare("lmms_engine.models.bagel")
    limits = ("cache_size_limit", "accumulated_cache_size_limit")
    # It changes these for the whole process.
    kept = {name: getattr(torch._dynamo.config, name) for name in limits}
    with torch._dynamo.config.patch(kept):
        return importlib.import_module("lmms_engine.models.bagel.qwen2_navit")


def wall_x() -> Any:
    """The module ``qwen_model/qwen2_5_vl_moe.py`` of Wall-X in lerobot.

    It imports a name that transformers 5 does not have, and does not use it here.
    """
    _bare("lerobot.policies.wall_x")
    gone = ModuleType("transformers.modeling_attn_mask_utils")
    vars(gone)["AttentionMaskConverter"] = None
    name = "lerobot.policies.wall_x.qwen_model.qwen2_5_vl_moe"
    importlib.import_module("transformers.modeling_utils")
    sys.modules[gone.__name__] = gone
    try:
        return importlib.import_module(name)
    finally:
        del sys.modules[gone.__name__]


def cosmos3() -> Any:
    """The module of Cosmos3 in diffusers."""
    return importlib.import_module("diffusers.models.transformers.transformer_cosmos3")
