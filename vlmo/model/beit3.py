"""BEiT-3: a multiway transformer whose every projection, norm and network is one per modality.

Wang et al., "Image as a Foreign Language: BEiT Pretraining for Vision and Vision-Language Tasks",
2022 (arXiv 2208.10442). State dicts have the keys and shapes of the published checkpoints. The
reference implementation is torchscale with the folder ``beit3`` of unilm.

A sequence is an image ([CLS], then the patches row by row) followed by a text; either may be empty.
Expert "A" is for image tokens and "B" for text tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmo.kernels import ModalityRouting, shared_attention
from vlmo.kernels.nn import MultiwayFFN, MultiwayLinear, MultiwayNorm
from vlmo.kernels.wrappers import rows_of
from vlmo.model.layers import PatchEmbedding, classifier, normalised_pixels
from vlmo.model.layers import Pooler as PlainPooler
from vlmo.model.layout import survival
from vlmo.model.vlmo import LOGIT_SCALE

P = ParamSpec("P")
T = TypeVar("T")

TASKS = ("irtr", "vqa", "nlvr2", "captioning", "classification")
# Tasks whose heads read features without the final norm; a model of one of them has no other task.
UNNORMALISED = ("vqa", "classification")
# Fields of BEiT3Config that belong to a run, not to the weights; checkpoints do not record them.
RUN_FIELDS = ("kernels", "checkpointing")

EXPERTS = ("A", "B")  # of images and of texts
EPS = 1e-5  # of every norm
FIRST_POSITION = 2  # the row of a stream's first token in its position table, as in fairseq
# Statistics of ImageNet's pixels, for classification; other tasks scale pixels to [-1, 1].
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_COUNTS = (
    *("dim", "depth", "heads", "image_size", "patch_size", "max_text_length", "text_positions"),
    *("vocab_size", "vqa_labels", "classes"),
)


@dataclass(frozen=True)
class BEiT3Config:
    """Determines which parameters a :class:`BEiT3` has and how it runs.

    The defaults are those of the published base model at 224 pixels.

    Attributes:
        dim: width D of the model.
        depth: number of layers.
        heads: number of attention heads H; the head dimension is ``dim // heads``.
        mlp_ratio: hidden width of a feed-forward network divided by ``dim``.
        image_size: side of the square images, in pixels; a multiple of ``patch_size``.
        patch_size: side of a patch, in pixels.
        max_text_length: most tokens of a text, including <s>, </s> and padding.
        text_positions: rows of the position table of texts, of which the first two are unused.
        vocab_size: number of SentencePiece entries.
        drop_path: stochastic depth rate of the last layer; it increases linearly from 0.
        tasks: tasks whose heads the model has, out of ``TASKS``. Models of ``"vqa"`` and
            ``"classification"`` have no final norm, and therefore no other task.
        vqa_labels: number of VQA answers.
        classes: number of classes of ``"classification"``.
        kernels: backend of :mod:`vlmo.kernels` that this model requires, or None for the first that
            can run.
        checkpointing: store only the input of each layer for the backward pass and recompute the
            rest.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    image_size: int = 224
    patch_size: int = 16
    max_text_length: int = 64
    text_positions: int = 1024
    vocab_size: int = 64010
    drop_path: float = 0.1
    tasks: tuple[str, ...] = ()
    vqa_labels: int = 3129
    classes: int = 1000
    kernels: str | None = None
    checkpointing: bool = False

    def __post_init__(self):
        unknown = sorted(set(self.tasks) - set(TASKS))
        if unknown:
            raise ValueError(f"tasks: {unknown} are not among {TASKS}")
        alone = [task for task in self.tasks if task in UNNORMALISED]
        if alone and len(self.tasks) > 1:
            raise ValueError(f"tasks: {alone[0]} excludes the others of {self.tasks}")
        for name in _COUNTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: {value!r} is not a positive integer")
        if not (math.isfinite(self.mlp_ratio) and self.hidden >= 1):
            raise ValueError(f"mlp_ratio: {self.mlp_ratio} times dim {self.dim} is below 1")
        for small, large in (("heads", "dim"), ("patch_size", "image_size")):
            part, whole = getattr(self, small), getattr(self, large)
            if whole % part:
                raise ValueError(f"{large}: {whole} is not a multiple of {small} {part}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path: {self.drop_path} is not within [0, 1)")
        longest = self.text_positions - FIRST_POSITION
        if self.max_text_length > longest:
            raise ValueError(
                f"max_text_length: {self.max_text_length} exceeds the {longest} usable rows of "
                f"text_positions {self.text_positions}"
            )

    @property
    def grid(self) -> int:
        """Number of patches along one side of an image."""
        return self.image_size // self.patch_size

    @property
    def image_rows(self) -> int:
        """Rows of the position table of images: two unused ones, [CLS] and the patches."""
        return FIRST_POSITION + 1 + self.grid**2

    @property
    def hidden(self) -> int:
        """Hidden width of a feed-forward network."""
        return int(self.dim * self.mlp_ratio)

    @property
    def final_norm(self) -> bool:
        """Whether the encoder ends with a norm."""
        return not set(self.tasks) & set(UNNORMALISED)

    def replace(self, **changes) -> BEiT3Config:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def base(cls, **changes) -> BEiT3Config:
        """``beit3_base_patch16``: 221 M parameters without heads."""
        return cls(**changes)

    @classmethod
    def large(cls, **changes) -> BEiT3Config:
        """``beit3_large_patch16``."""
        return cls(**{**dict(dim=1024, depth=24, heads=16), **changes})


class FusionOutput(NamedTuple):
    """Features of joint image-text sequences."""

    image: Tensor  # [B, patches + 1, D], CLS first
    text: Tensor  # [B, T, D]


class StreamOutput(NamedTuple):
    """Features of image-only or text-only sequences."""

    tokens: Tensor  # [B, N, D]
    embedding: Tensor | None  # [B, D], unit length: the dual encoder's output, of the task irtr


@dataclass(frozen=True)
class Padded:
    """Sequences of one length, ``[B, N, D]``. Use :meth:`of` to create one.

    Attributes:
        batch: B.
        image: number of image tokens at the start of each sequence.
        text: number of text tokens after them; N is the sum of both.
        key_mask: ``[B, N]`` bool, False for padding; None if there is no padding.
        causal: whether a text token attends only to its image and to the text up to itself, and an
            image token only to the image.
        routing: the expert of each token.
    """

    batch: int
    image: int
    text: int
    key_mask: Tensor | None
    causal: bool
    routing: ModalityRouting

    @classmethod
    def of(
        cls, image: Tensor | None, text: Tensor | None, mask: Tensor | None, *, causal: bool = False
    ) -> Padded:
        """The layout of embeddings ``[B, N, D]`` of images and texts with the texts' mask."""
        before, after = (0 if tokens is None else tokens.shape[1] for tokens in (image, text))
        batch = next(tokens.shape[0] for tokens in (image, text) if tokens is not None)
        if mask is not None:
            mask = torch.cat([mask.new_ones(batch, before), mask], dim=1)
        routing = ModalityRouting.segments([(0, before), (1, after)], num_experts=len(EXPERTS))
        return cls(batch, before, after, mask, causal, routing)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> Tensor:
        """Attention within each sequence, ``[B, N, H, K]``."""
        mask = self.key_mask
        if not self.causal:
            return shared_attention(q, k, v, key_mask=mask, backend=backend)
        of_image = [t[:, : self.image] for t in (q, k, v)]
        image = shared_attention(*of_image, backend=backend)
        # To the text, every image token is an earlier one.
        text = shared_attention(q, k, v, key_mask=mask, causal=True, backend=backend)
        return torch.cat([image, text[:, self.image :]], dim=1)

    def drop_path(self, rate: float, device: torch.device) -> Tensor:
        """Factor of a branch for each token: one random draw per sequence."""
        return survival(self.batch, rate, device)[:, None].expand(-1, self.image + self.text)


class VisionEmbedding(PatchEmbedding):
    """Pixels ``[B, 3, S, S]`` to ``[B, patches + 1, D]``, CLS first, without positions."""

    def __init__(self, config: BEiT3Config):
        super().__init__(config.dim, config.patch_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))

    def forward(self, image: Tensor, masked: Tensor | None = None) -> Tensor:
        """``masked`` ``[B, patches]`` bool: the patches that the mask token replaces."""
        patches = super().forward(image)
        if masked is not None:
            patches = torch.where(masked[..., None], self.mask_token.to(patches), patches)
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1).to(patches), patches], 1)


class Attention(nn.Module):
    """Self-attention over all tokens with projections per modality and a norm before the last."""

    def __init__(self, config: BEiT3Config):
        super().__init__()
        self.heads, self.kernels, dim = config.heads, config.kernels, config.dim
        self.q_proj = MultiwayLinear(dim, dim, EXPERTS, backend=config.kernels)
        self.k_proj = MultiwayLinear(dim, dim, EXPERTS, backend=config.kernels)
        self.v_proj = MultiwayLinear(dim, dim, EXPERTS, backend=config.kernels)
        self.inner_attn_ln = MultiwayNorm(dim, EXPERTS, EPS)
        self.out_proj = MultiwayLinear(dim, dim, EXPERTS, backend=config.kernels)

    def forward(
        self, x: Tensor, layout: Padded, norm: MultiwayNorm, token_scale: Tensor | None
    ) -> Tensor:
        """``x + token_scale * attention(norm(x))``."""
        routing = layout.routing
        q, k, v = (
            # The norm is part of the operation of each projection.
            project(x, routing, norm=norm).unflatten(-1, (self.heads, -1))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = layout.attend(q, k, v, self.kernels).flatten(-2)
        return self.out_proj(
            attended, routing, norm=self.inner_attn_ln, token_scale=token_scale, residual=x
        )


class EncoderLayer(nn.Module):
    """Pre-norm layer: self-attention, then the feed-forward network of each token's modality."""

    def __init__(self, config: BEiT3Config, number: int):
        super().__init__()
        self.drop_path = config.drop_path * number / max(config.depth - 1, 1)
        self.self_attn_layer_norm = MultiwayNorm(config.dim, EXPERTS, EPS)
        self.self_attn = Attention(config)
        self.final_layer_norm = MultiwayNorm(config.dim, EXPERTS, EPS)
        self.ffn = MultiwayFFN(
            config.dim, config.hidden, EXPERTS, sub_norm=True, eps=EPS, backend=config.kernels
        )

    def forward(self, x: Tensor, layout: Padded) -> Tensor:
        kept_attention = kept_ffn = None
        if self.training and self.drop_path > 0:
            kept_attention = layout.drop_path(self.drop_path, x.device)
            kept_ffn = layout.drop_path(self.drop_path, x.device)
        x = self.self_attn(x, layout, self.self_attn_layer_norm, kept_attention)
        return self.ffn(
            x, layout.routing, norm=self.final_layer_norm, token_scale=kept_ffn, residual=x
        )


class Encoder(nn.Module):
    """Positions, layers and the final norm."""

    def __init__(self, config: BEiT3Config):
        super().__init__()
        self.checkpointing = config.checkpointing
        rows = dict(zip(EXPERTS, (config.image_rows, config.text_positions), strict=True))
        self.embed_positions = nn.ModuleDict(
            {expert: nn.Embedding(count, config.dim) for expert, count in rows.items()}
        )
        self.layers = nn.ModuleList(EncoderLayer(config, number) for number in range(config.depth))
        self.layer_norm = MultiwayNorm(config.dim, EXPERTS, EPS) if config.final_norm else None

    def positions(self, expert: str, count: int) -> Tensor:
        """``[count, D]``, the positions of a stream's tokens."""
        table = cast(nn.Embedding, self.embed_positions[expert])
        return rows_of(table, slice(FIRST_POSITION, FIRST_POSITION + count))

    def forward(self, x: Tensor, layout: Padded) -> Tensor:
        saves = self.checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            x = checkpoint(layer, x, layout, use_reentrant=False) if saves else layer(x, layout)
        return x if self.layer_norm is None else self.layer_norm(x, layout.routing)


class Backbone(nn.Module):
    """Embeddings and encoder."""

    def __init__(self, config: BEiT3Config):
        super().__init__()
        self.text_embed = nn.Embedding(config.vocab_size, config.dim)
        self.vision_embed = VisionEmbedding(config)
        self.encoder = Encoder(config)

    def embed_image(self, image: Tensor, masked: Tensor | None) -> Tensor:
        """Normalised pixels to ``[B, patches + 1, D]``, with positions."""
        x = self.vision_embed(image, masked)
        return x + self.encoder.positions("A", x.shape[1])

    def embed_text(self, text_ids: Tensor, mask: Tensor) -> Tensor:
        """Ids to ``[B, T, D]``, with positions; zeros for padding."""
        x = self.text_embed(text_ids) + self.encoder.positions("B", text_ids.shape[1])
        return x * mask[..., None]


class Pooler(PlainPooler):
    """tanh(dense(norm(first token))): ``[B, D]`` to ``[B, D]``."""

    def __init__(self, dim: int):
        super().__init__(dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, cls: Tensor) -> Tensor:
        return super().forward(self.norm(cls))


class TwoLayerMLP(nn.Module):
    """The head of NLVR2: ``[B, 4 D]`` to logits ``[B, 2]``."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(4 * dim)
        self.dense1 = nn.Linear(4 * dim, 2 * dim)
        self.norm2 = nn.LayerNorm(2 * dim)
        self.dense2 = nn.Linear(2 * dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class BEiT3(nn.Module):
    """The BEiT-3 model with the heads of ``config.tasks``.

    Texts are ``[B, T]`` int64 ids of up to ``config.max_text_length`` tokens, with a mask of the
    same shape (1 or True for tokens, 0 or False for padding). Images are ``[B, 3, S, S]`` with S =
    ``config.image_size``: uint8, or floats that are normalised as the task needs, in [-1, 1] or,
    for ``"classification"``, by the statistics of ImageNet.

    Args:
        config: sizes, tasks and the backend of the kernels.
    """

    def __init__(self, config: BEiT3Config):
        super().__init__()
        self.config = config
        self.beit3 = Backbone(config)
        self._add_heads(config)
        self.init_weights()

    @classmethod
    def from_checkpoint(cls, path: str | Path, **changes: Any) -> BEiT3:
        """Load the model of a checkpoint file; ``changes`` replace fields of its configuration.

        Use :func:`vlmo.load_checkpoint` to get its report; it also documents the layouts and
        errors.
        """
        from vlmo.checkpoint.beit3 import config_of
        from vlmo.checkpoint.io import load_checkpoint

        model = cls(config_of(path, **changes))
        load_checkpoint(model, path)
        return model

    def _add_heads(self, config: BEiT3Config) -> None:
        tasks, dim = set(config.tasks), config.dim
        if "irtr" in tasks:
            self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
            self.language_head = nn.Linear(dim, dim, bias=False)
            self.vision_head = nn.Linear(dim, dim, bias=False)
        if "captioning" in tasks:
            self.mlm_head = nn.Linear(dim, config.vocab_size)
        if "vqa" in tasks:
            self.pooler = Pooler(dim)
            self.head: nn.Module = classifier(dim, 2 * dim, config.vqa_labels)
        elif "nlvr2" in tasks:
            self.head = TwoLayerMLP(dim)
        elif "classification" in tasks:
            self.fc_norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, config.classes)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value, for example after ``to_empty``."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        nn.init.zeros_(self.beit3.vision_embed.mask_token)
        nn.init.zeros_(self.beit3.vision_embed.cls_token)
        if "irtr" in self.config.tasks:
            nn.init.constant_(self.logit_scale, LOGIT_SCALE)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """The initialisation of unilm's ``beit3``, which differs from torchscale's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.beit3.text_embed.weight, std=self.config.dim**-0.5)
        if set(self.config.tasks) & {"nlvr2", "classification"}:
            for module in self.head.modules():
                if isinstance(module, nn.Linear):
                    module.weight.mul_(0.001)

    def forward(
        self, function: Callable[Concatenate[BEiT3, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return ``function(self, *args, **kwargs)``, as :meth:`vlmo.VLMo.forward` does."""
        return function(self, *args, **kwargs)

    def fuse(
        self,
        text_ids: Tensor,  # [B, T]
        text_mask: Tensor,  # [B, T]
        image: Tensor,  # [B, 3, S, S]
        *,
        causal: bool = False,
        masked: Tensor | None = None,  # [B, patches]
    ) -> FusionOutput:
        """Encode images and texts jointly.

        Args:
            text_ids, text_mask, image: see :class:`BEiT3`.
            causal: let a text token attend only to the image and to the text up to itself, and
                image tokens only to the image, as captioning does.
            masked: True for patches that the mask token replaces.
        """
        patches = self.embed_image(image, masked)
        return self.fuse_patches(text_ids, text_mask, patches, causal=causal)

    def fuse_patches(
        self,
        text_ids: Tensor,  # [B, T]
        text_mask: Tensor,  # [B, T]
        patches: Tensor,  # [B, patches + 1, D]
        *,
        causal: bool = False,
    ) -> FusionOutput:
        """As :meth:`fuse`, with images from :meth:`embed_image`."""
        text, mask = self._embed_text(text_ids, text_mask)
        if text.shape[0] != patches.shape[0]:
            raise ValueError(f"image: {patches.shape[0]} images for {text.shape[0]} texts")
        layout = Padded.of(patches, text, mask, causal=causal)
        x = self.beit3.encoder(torch.cat([patches, text], dim=1), layout)
        return FusionOutput(x[:, : layout.image], x[:, layout.image :])

    def encode_text(self, text_ids: Tensor, text_mask: Tensor) -> StreamOutput:
        """Encode texts alone."""
        x, mask = self._embed_text(text_ids, text_mask)
        tokens = self.beit3.encoder(x, Padded.of(None, x, mask))
        return StreamOutput(tokens, self._embedding("language_head", tokens))

    def encode_image(self, image: Tensor, *, masked: Tensor | None = None) -> StreamOutput:
        """Encode images alone; ``masked`` is that of :meth:`fuse`."""
        return self.encode_patches(self.embed_image(image, masked))

    def encode_patches(self, patches: Tensor) -> StreamOutput:
        """As :meth:`encode_image`, with images ``[B, patches + 1, D]`` from :meth:`embed_image`."""
        tokens = self.beit3.encoder(patches, Padded.of(patches, None, None))
        return StreamOutput(tokens, self._embedding("vision_head", tokens))

    def vqa_logits(self, text_ids: Tensor, text_mask: Tensor, image: Tensor) -> Tensor:
        """Logits ``[B, vqa_labels]`` of the answers to questions."""
        return self.head(self.pooler(self.fuse(text_ids, text_mask, image).image[:, 0]))

    def nlvr2_logits(
        self, text_ids: Tensor, text_mask: Tensor, image_0: Tensor, image_1: Tensor
    ) -> Tensor:
        """Logits ``[B, 2]`` of a text being false or true of two images, in one pass of 2 B."""
        text_ids, text_mask = (torch.cat([t, t]) for t in (text_ids, text_mask))
        fused = self.fuse(text_ids, text_mask, torch.cat([image_0, image_1]))
        both = torch.cat([fused.image[:, 0], fused.text[:, 0]], dim=1)
        return self.head(torch.cat(both.chunk(2), dim=1))

    def caption_logits(
        self,
        text_ids: Tensor,  # [B, T]
        text_mask: Tensor,  # [B, T]
        image: Tensor,  # [B, 3, S, S]
        chosen: Tensor,  # [B, T] bool
    ) -> Tensor:  # [n, vocabulary]
        """Logits of the ``chosen`` tokens of captions, each from the image and the text up to it.

        A chosen token's own id is the mask token's: the model predicts words in the place of mask
        tokens.
        """
        return self.mlm_head(self.fuse(text_ids, text_mask, image, causal=True).text[chosen])

    def class_logits(self, image: Tensor) -> Tensor:
        """Logits ``[B, classes]``, from the mean of the patches."""
        return self.head(self.fc_norm(self.encode_image(image).tokens[:, 1:].mean(1)))

    def _embedding(self, head: str, tokens: Tensor) -> Tensor | None:
        if "irtr" not in self.config.tasks:
            return None
        return F.normalize(getattr(self, head)(tokens[:, 0]), dim=-1)

    def _embed_text(self, text_ids: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings ``[B, T, D]`` and the mask as bool."""
        longest = self.config.max_text_length
        if text_ids.dim() != 2 or not 1 <= text_ids.shape[1] <= longest:
            shape = tuple(text_ids.shape)
            raise ValueError(f"text_ids: shape {shape} is not (batch, 1 to {longest} tokens)")
        if text_mask.shape != text_ids.shape:
            raise ValueError(
                f"text_mask: shape {tuple(text_mask.shape)} is not {tuple(text_ids.shape)}"
            )
        mask = text_mask.bool()
        return self.beit3.embed_text(text_ids, mask), mask

    def embed_image(self, image: Tensor, masked: Tensor | None = None) -> Tensor:
        """Pixels to ``[B, patches + 1, D]``; raises ValueError for a wrong shape or range."""
        mean: float | Tensor = 0.5
        std: float | Tensor = 0.5
        if "classification" in self.config.tasks and image.dtype == torch.uint8:
            statistics = (_IMAGENET_MEAN, _IMAGENET_STD)
            mean, std = (image.new_tensor(s, dtype=torch.float32).view(3, 1, 1) for s in statistics)
        dtype = self.beit3.vision_embed.cls_token.dtype
        image = normalised_pixels(image, self.config.image_size, dtype, mean, std)
        if masked is not None and masked.shape != (image.shape[0], self.config.grid**2):
            wanted = (image.shape[0], self.config.grid**2)
            raise ValueError(f"masked: shape {tuple(masked.shape)} is not {wanted}")
        return self.beit3.embed_image(image, masked)
