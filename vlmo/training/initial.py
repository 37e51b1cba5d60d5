"""Initialisation of a model that is trained from scratch."""

from __future__ import annotations

import torch
from torch import nn

from vlmo.model.beit3 import BEiT3
from vlmo.model.models import Model, blocks_of

# The first and the last weight of each classifier.
_CLASSIFIERS = (
    ("vqa_classifier.0.weight", "vqa_classifier.3.weight"),
    ("nlvr2_classifier.0.weight", "nlvr2_classifier.3.weight"),
    ("head.0.weight", "head.3.weight"),
    ("head.dense1.weight", "head.dense2.weight"),
)


@torch.no_grad()
def start_wide(model: Model) -> None:
    """Initialise blocks, positions and classifiers with a wider distribution than unilm.

    unilm's standard deviation of 0.02 suits width 768. At an eighth of the width it makes the
    outputs of all branches negligible, and positions negligible beside the patches: a short
    training would be spent on growing them. A classifier whose output starts near zero mainly sees
    what all samples have in common, and its gradient makes the features of NLVR2 equal before it
    learns to distinguish them. A wide classifier with a last layer of zeros does learn this.
    """
    for block in blocks_of(model):
        for parameter in block.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.8 * model.config.dim**-0.5)
    for positions in _positions(model):
        positions.normal_(std=0.5)
    parameters = dict(model.named_parameters())
    for first, last in _CLASSIFIERS:
        if first in parameters:
            parameters[first].normal_(std=parameters[first].shape[1] ** -0.5)
            parameters[last].zero_()


def _positions(model: Model) -> list[nn.Parameter]:
    if isinstance(model, BEiT3):
        return [*model.beit3.encoder.embed_positions.parameters()]
    return [] if model.transformer.pos_embed is None else [model.transformer.pos_embed]
