"""Replaces the feed-forward layers of other libraries' models by :func:`vlmo.kernels.moe_ffn`.

``apply_to_MODEL(model)`` changes the layers of that model object and of no other, and importing
this package changes nothing. Parameters remain the same tensors under the same names: state dicts,
optimizers, DDP and FSDP see no difference. The returned :class:`Handle` undoes it.
"""

from .bagel import apply_to_bagel
from .cosmos3 import apply_to_cosmos3
from .handle import Handle
from .torchscale import apply_to_torchscale
from .wall_x import apply_to_wall_x

__all__ = [
    "Handle",
    "apply_to_bagel",
    "apply_to_cosmos3",
    "apply_to_torchscale",
    "apply_to_wall_x",
]
