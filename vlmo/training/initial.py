"""Initialisation of a model that is trained from scratch."""

from __future__ import annotations

import torch

from vlmo.model.vlmo import VLMo


@torch.no_grad()
def start_wide(model: VLMo) -> None:
    """Initialise blocks, patch positions and classifiers with a wider distribution than unilm.

    unilm's standard deviation of 0.02 suits width 768. At an eighth of the width it makes the
    outputs of all branches negligible, and positions negligible beside the patches: a short
    training would be spent on growing them. A classifier whose output starts near zero mainly sees
    what all samples have in common, and its gradient makes the features of NLVR2 equal before it
    learns to distinguish them. A wide classifier with a last layer of zeros does learn this.
    """
    for parameter in model.transformer.blocks.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.8 * model.config.dim**-0.5)
    if model.transformer.pos_embed is not None:
        model.transformer.pos_embed.normal_(std=0.5)
    for name in ("vqa_classifier", "nlvr2_classifier"):
        if hasattr(model, name):
            first = model.get_parameter(f"{name}.0.weight")
            first.normal_(std=first.shape[1] ** -0.5)
            model.get_parameter(f"{name}.3.weight").zero_()
