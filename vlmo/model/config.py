"""Configuration of VLMo: its sizes and everything else that determines its parameters."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

TASKS = ("mlm", "textmlm", "itc", "itm", "vqa", "nlvr2", "irtr")
# Fields of VLMoConfig that belong to a run, not to the weights; checkpoints do not record them.
RUN_FIELDS = ("kernels", "checkpointing", "itc_grad_scale")
_COUNTS = (
    *("dim", "depth", "heads", "image_size", "patch_size", "max_text_length", "text_capacity"),
    *("vocab_size", "vqa_labels"),
)


@dataclass(frozen=True)
class VLMoConfig:
    """Determines which parameters a :class:`vlmo.VLMo` has and how it runs.

    The defaults are those of the published base model at 224 pixels. "unilm" is the reference
    implementation.

    Attributes:
        dim: width D of the model.
        depth: number of blocks.
        heads: number of attention heads H; the head dimension is ``dim // heads`` (34 for
            base_plus).
        mlp_ratio: hidden width of an expert divided by ``dim``.
        vl_start: first block that has a vision-language expert. A model whose tasks include
            ``textmlm`` has none, as in unilm (see :attr:`first_vl_block`).
        image_size: side of the square images, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, in pixels.
        max_text_length: tokens per text, including [CLS], [SEP] and padding.
        text_capacity: longest text that the relative position table has rows for
            (``max_text_len_of_initckpt`` of unilm: 196 in every published file).
        vocab_size: number of WordPiece entries.
        relative_position_bias: one table for all layers (base, large) or none (base_plus).
        absolute_position: learned positions for patches and text (base_plus).
        layer_scale: initial value of ``gamma_1`` and ``gamma_2``, or None for no such parameters.
        drop_path: stochastic depth rate of the last block; it increases linearly from 0. It is also
            the dropout rate of the text embedding, as in unilm.
        tasks: tasks whose heads the model has, out of ``TASKS``.
        vqa_labels: number of VQA answers.
        separate_attention: give text and image their own attention projections in the blocks below
            ``first_vl_block`` (the ablation in Table 1 of the supplement); the published models
            share them.
        kernels: backend of :mod:`vlmo.kernels` that this model requires, or None for the first that
            can run; ``"moe_ffn=composed"`` requires one for the experts only.
        checkpointing: store only the input of each block for the backward pass and recompute the
            rest: a third more time, a fraction of the memory.
        itc_grad_scale: factor of the gradient from image-text contrast to the encoders. In unilm it
            is, unintentionally, 1 / GPUs (see :func:`vlmo.distributed.gather`); 1 is the true
            gradient.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    vl_start: int = 10
    image_size: int = 224
    patch_size: int = 16
    max_text_length: int = 40
    text_capacity: int = 196
    vocab_size: int = 30522
    relative_position_bias: bool = True
    absolute_position: bool = False
    layer_scale: float | None = 0.1
    drop_path: float = 0.1
    tasks: tuple[str, ...] = ("mlm", "itc", "itm")
    vqa_labels: int = 3129
    separate_attention: bool = False
    kernels: str | None = None
    checkpointing: bool = False
    itc_grad_scale: float = 1.0

    def __post_init__(self):
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks: {unknown} are not among {TASKS}")
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r} is not a positive integer")
        if not (math.isfinite(self.mlp_ratio) and int(self.dim * self.mlp_ratio) >= 1):
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} times dim {self.dim} is below 1")
        for name in ("layer_scale", "itc_grad_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name}: {value} is not finite")
        for small, large in (("heads", "dim"), ("patch_size", "image_size")):
            part, whole = getattr(self, small), getattr(self, large)
            if whole % part:
                raise ValueError(f"{large}: {whole} is not a multiple of {small} {part}")
        if not 0 <= self.vl_start <= self.depth:
            raise ValueError(f"vl_start: {self.vl_start} is not within 0..depth ({self.depth})")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: {self.drop_path} is not within [0, 1)")
        if self.relative_position_bias and self.max_text_length > self.text_capacity:
            length, capacity = self.max_text_length, self.text_capacity
            raise ValueError(f"max_text_length: {length} exceeds text_capacity {capacity}")

    @property
    def grid(self) -> int:
        """Number of patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def first_vl_block(self) -> int:
        """First block with a vision-language expert; ``depth`` if there is none."""
        return self.depth if "textmlm" in self.tasks else self.vl_start

    @property
    def token_types(self) -> int:
        """Rows of the token type embedding: text, image, and NLVR2's second image."""
        return 3 if "nlvr2" in self.tasks else 2

    def replace(self, **changes) -> VLMoConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def base(cls, **changes) -> VLMoConfig:
        """``vlmo_base_patch16``: 175 M parameters."""
        return cls(**changes)

    @classmethod
    def base_plus(cls, **changes) -> VLMoConfig:
        """``vlmo_base_plus_patch16``: 167 M parameters, head dim 34, absolute positions."""
        size = dict(
            dim=544,
            depth=24,
            heads=16,
            vl_start=21,
            relative_position_bias=False,
            absolute_position=True,
            layer_scale=None,
        )
        return cls(**{**size, **changes})

    @classmethod
    def large(cls, **changes) -> VLMoConfig:
        """``vlmo_large_patch16``: 562 M parameters."""
        return cls(**{**dict(dim=1024, depth=24, heads=16, vl_start=21), **changes})
