"""Checkpoints of BEiT-3: configuration, resizing, recognition.

The published files of unilm's ``beit3`` have a wrapper "model" (or "module", of DeepSpeed) and the
keys of :class:`vlmo.model.beit3.BEiT3`; :mod:`vlmo.checkpoint.io` reads and writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from vlmo.checkpoint.configs import ratio_of_widths, recorded_fields
from vlmo.checkpoint.formats import (
    BEIT3_RECORD,
    CheckpointError,
    Content,
    Source,
    likeness,
    read_content,
)
from vlmo.checkpoint.resize import grid_of_patches, resize_absolute_positions
from vlmo.model.beit3 import FIRST_POSITION, RUN_FIELDS, TASKS, BEiT3Config

PATCHES = "beit3.vision_embed.proj.weight"
WORDS = "beit3.text_embed.weight"
IMAGE_POSITIONS = "beit3.encoder.embed_positions.A.weight"
TEXT_POSITIONS = "beit3.encoder.embed_positions.B.weight"
HIDDEN = "beit3.encoder.layers.0.ffn.A.fc1.weight"
# The tensors from which sizes are inferred, and their number of dimensions.
SIZE_RANKS = {PATCHES: 4, WORDS: 2, IMAGE_POSITIONS: 2, TEXT_POSITIONS: 2, HIDDEN: 2}

# A key of each task's head that no other head has.
TASK_KEYS = {
    "irtr": "language_head.weight",
    "vqa": "head.3.weight",
    "nlvr2": "head.dense1.weight",
    "captioning": "mlm_head.weight",
    "classification": "fc_norm.weight",
}
# The number of heads, which no tensor shows, by (dim, depth).
PUBLISHED_HEADS = {(768, 12): 12, (1024, 24): 16}
_KEPT = FIRST_POSITION + 1  # rows of the image positions before those of the patches


def config_of(source: Source | Content, *, heads: int | None = None, **changes: Any) -> BEiT3Config:
    """Infer the configuration of the model that a BEiT-3 checkpoint was saved from.

    Sizes and tasks are inferred from keys and shapes. The rest comes from the record of
    :func:`vlmo.save_checkpoint`, otherwise from the arguments and the published models.

    Args:
        source: path of a file, or its content (tensors may be on the meta device).
        heads: number of attention heads, for a model of no published size.
        changes: fields to change in the inferred configuration, e.g. ``image_size=480,
            tasks=("vqa",)`` for fine-tuning.

    Raises:
        FileNotFoundError, IsADirectoryError, CheckpointError: as :func:`vlmo.load_checkpoint`.
        ValueError: the file does not determine the number of heads, or a change results in an
            invalid configuration.
    """
    content = read_content(source)
    _require_sizes(content)
    state = content.state
    recorded = recorded_fields(content, BEIT3_RECORD, BEiT3Config, RUN_FIELDS)
    dim, depth, patch = state[PATCHES].shape[0], len(layers_of(state)), state[PATCHES].shape[-1]
    heads = heads or recorded.get("heads") or PUBLISHED_HEADS.get((dim, depth))
    if heads is None:
        raise ValueError(
            f"{content.name}: nothing tells the number of attention heads of a model of width "
            f"{dim} and depth {depth}; pass heads="
        )
    grid = grid_of_patches(state[IMAGE_POSITIONS].shape[0] - _KEPT)
    if grid is None:
        shape = tuple(state[IMAGE_POSITIONS].shape)
        raise CheckpointError(f"{content.name}: {IMAGE_POSITIONS} has shape {shape}, no square")
    text_positions = state[TEXT_POSITIONS].shape[0]
    known = BEiT3Config.max_text_length
    longest = recorded.get("max_text_length", min(known, text_positions - FIRST_POSITION))
    sizes = dict(
        dim=dim,
        depth=depth,
        heads=heads,
        mlp_ratio=ratio_of_widths(dim, state[HIDDEN].shape[0]),
        image_size=grid * patch,
        patch_size=patch,
        max_text_length=longest,
        text_positions=text_positions,
        vocab_size=state[WORDS].shape[0],
        tasks=tuple(task for task in TASKS if TASK_KEYS[task] in state),
    )
    for field, key in (("vqa_labels", TASK_KEYS["vqa"]), ("classes", "head.weight")):
        if key in state:
            sizes[field] = state[key].shape[0]
    return BEiT3Config(**{**recorded, **sizes, **changes})


def layers_of(keys: Iterable[str], part: str = "") -> set[int]:
    """Numbers of the encoder layers with a key that starts with ``part``."""
    pattern = re.compile(rf"beit3\.encoder\.layers\.(\d+)\.{re.escape(part)}")
    found = (pattern.match(key) for key in keys)
    return {int(match[1]) for match in found if match}


def holds_a_layer(keys: Iterable[str]) -> bool:
    """Whether the keys include an encoder layer with its attention and its networks."""
    names = list(keys)
    return bool(layers_of(names, "self_attn.") & layers_of(names, "ffn."))


def fit_tensor(
    key: str, value: Tensor, target: Tensor, config: BEiT3Config
) -> tuple[Tensor, str | None] | None:
    """Convert a checkpoint's tensor to the shape that the model needs.

    As :func:`vlmo.checkpoint.resize.fit_tensor`; only the positions of patches can be converted.
    """
    if value.is_meta or value.is_floating_point() != target.is_floating_point():
        return None
    if value.shape == target.shape:
        return value, None
    if key != IMAGE_POSITIONS or value.dim() != 2 or value.shape[1] != target.shape[1]:
        return None
    if grid_of_patches(value.shape[0] - _KEPT) is None:
        return None
    resized = resize_absolute_positions(value.cpu()[None], config.grid, kept=_KEPT)[0]
    return resized, f"bicubic to a {config.grid} x {config.grid} grid"


def _require_sizes(content: Content) -> None:
    """Raise unless the tensors that determine the sizes exist and no layer is missing."""
    state: Mapping[str, Tensor] = content.state
    for key, rank in SIZE_RANKS.items():
        if key not in state:
            raise CheckpointError(
                f"{content.name}: not a whole BEiT-3 checkpoint, it lacks {key}{likeness(state)}"
            )
        if state[key].dim() != rank or not state[key].numel():
            shape = tuple(state[key].shape)
            raise CheckpointError(f"{content.name}: {key} has shape {shape}, not {rank} sizes")
    layers = layers_of(state)
    if max(layers) >= len(layers):
        raise CheckpointError(f"{content.name}: it has layers {sorted(layers)}, some are missing")
