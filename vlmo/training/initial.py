"""The model that a training starts from."""

from __future__ import annotations

import torch

from vlmo.model import VLMo


@torch.no_grad()
def start_wide(model: VLMo) -> None:
    """Draw blocks and patch positions anew, wider than the official ones.

    The official deviation of 0.02 suits width 768. At an eighth of the width it makes all branches
    next to nothing, and positions next to nothing beside the patches: a short training would be
    spent on growing them.
    """
    for parameter in model.transformer.blocks.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.8 * model.config.dim**-0.5)
    if model.transformer.pos_embed is not None:
        model.transformer.pos_embed.normal_(std=0.5)
