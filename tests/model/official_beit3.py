"""BEiT-3 of torchscale, the reference implementation, of any size."""

import sys
from types import ModuleType
from typing import Any
from unittest import mock

from torch import nn

from vlmo.model.beit3 import BEiT3Config


def _unused(*arguments: Any) -> Any:
    raise AssertionError("BEiT-3 without drop path and checkpoints calls nothing of this package")


def _stand_ins() -> dict[str, ModuleType]:
    """What torchscale imports of two packages that it is installed without."""
    names = {"fairscale.nn": ("checkpoint_wrapper", "wrap"), "timm.models.layers": ("drop_path",)}
    modules: dict[str, ModuleType] = {}
    for name, functions in names.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            dotted = ".".join(parts[:end])
            modules.setdefault(dotted, ModuleType(dotted))
        vars(modules[name]).update(dict.fromkeys(functions, _unused))
    return modules


with mock.patch.dict(sys.modules, _stand_ins()):
    # Not installed: make install, or pip install --no-deps -r tests/model/torchscale.txt
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    _imported = {
        name: module for name, module in sys.modules.items() if name.startswith("torchscale.")
    }
# By their names, torch.compile and pickle find modules again.
sys.modules.update(_imported)


def official_beit3(config: BEiT3Config) -> nn.Module:
    """The model without heads; its keys are those of ours without the prefix ``beit3.``."""
    return BEiT3(
        EncoderConfig(
            img_size=config.image_size,
            patch_size=config.patch_size,
            vocab_size=config.vocab_size,
            max_source_positions=config.text_positions,
            multiway=True,
            normalize_output=config.final_norm,
            no_output_layer=True,
            encoder_embed_dim=config.dim,
            encoder_attention_heads=config.heads,
            encoder_ffn_embed_dim=config.hidden,
            encoder_layers=config.depth,
        )
    )
