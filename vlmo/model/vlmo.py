"""VLMo: one multiway transformer that is a text encoder, an image encoder and a fusion encoder.

Bao et al., "VLMo: Unified Vision-Language Pre-Training with Mixture-of-Modality-Experts", NeurIPS
2022. State dicts have the keys and shapes of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmo.kernels import Constants, RelativePositionIndex
from vlmo.kernels.wrappers import rows_of
from vlmo.model.config import VLMoConfig
from vlmo.model.layers import (
    Attention,
    Block,
    MLMHead,
    MultiwayTransformer,
    Pooler,
    Projection,
    TextEmbeddings,
    classifier,
    normalised_pixels,
)
from vlmo.model.layout import Chosen, Layout, Packed, Padded, Run

P = ParamSpec("P")
T = TypeVar("T")

LOGIT_SCALE = math.log(1 / 0.07)  # initial value, the temperature of CLIP


class FusionOutput(NamedTuple):
    """Features of joint text-image sequences, after the final norm."""

    text: Tensor  # [B, T, D]
    image: Tensor  # [B, patches + 1, D], CLS first
    pooled: Tensor  # [B, D], tanh(dense(text [CLS]))
    cls: Tensor  # [B, D], text [CLS]


class StreamOutput(NamedTuple):
    """Features of text-only or image-only sequences."""

    tokens: Tensor  # [B, N, D], after the final norm
    embedding: Tensor  # [B, D], unit length: the dual encoder's output
    vl_embedding: Tensor | None  # [B, D], unit length, after the vision-language blocks
    cls: Tensor  # [B, D], first token, before the final norm


def _materialise_constants(model: nn.Module, _: Any) -> None:
    """Recreate constants after a load with ``assign=True`` into a model on the meta device."""
    device = next(model.parameters()).device
    for module in model.modules():
        if isinstance(module, Constants):
            module.materialise(device)


class VLMo(nn.Module):
    """The VLMo model with the heads of ``config.tasks``.

    Texts are ``[B, config.max_text_length]`` int64 ids with a mask of the same shape (1 or True for
    tokens, 0 or False for padding). Images are ``[B, 3, S, S]`` with S = ``config.image_size``,
    uint8 or floats in [-1, 1].

    Args:
        config: sizes, tasks and the backend of the kernels.
    """

    def __init__(self, config: VLMoConfig):
        super().__init__()
        self.config = config
        self.transformer = MultiwayTransformer(config)
        self.text_embeddings = TextEmbeddings(config)
        self.token_type_embeddings = nn.Embedding(config.token_types, config.dim)
        self.pooler = Pooler(config.dim)
        self.relative_position_bias_table = None
        if config.relative_position_bias:
            grid, capacity = config.grid, config.text_capacity
            entries = RelativePositionIndex.table_entries(grid, capacity)
            self.relative_position_bias_table = nn.Parameter(
                torch.zeros(entries, config.heads * config.depth)
            )
            self.relative_position_indices = nn.ModuleDict(
                {
                    "text": RelativePositionIndex.text(grid, config.max_text_length, capacity),
                    "image": RelativePositionIndex.image(grid, capacity),
                    "joint": RelativePositionIndex.joint(grid, config.max_text_length, capacity),
                }
            )
        self._add_heads(config)
        self.init_weights()
        self.register_load_state_dict_post_hook(_materialise_constants)

    @classmethod
    def from_checkpoint(cls, path: str | Path, **changes: Any) -> VLMo:
        """Load the model of a checkpoint file; ``changes`` replace fields of its configuration.

        Use :func:`vlmo.load_checkpoint` to get its report; it also documents the layouts and
        errors.
        """
        from vlmo.checkpoint.io import config_of, load_checkpoint

        model = cls(config_of(path, **changes))
        load_checkpoint(model, path)
        return model

    def _add_heads(self, config: VLMoConfig) -> None:
        tasks, dim = set(config.tasks), config.dim
        if tasks & {"mlm", "textmlm"}:
            self.mlm_score = MLMHead(dim, config.vocab_size)
        if "itm" in tasks:
            self.itm_score = Projection(dim, 2, bias=True)
        if tasks & {"itc", "irtr"}:
            self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
            self.itc_text_proj = Projection(dim, dim, bias=False)
            self.itc_image_proj = Projection(dim, dim, bias=False)
        if "itc" in tasks:
            self.logit_vl_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
            self.itc_vl_text_proj = Projection(dim, dim, bias=False)
            self.itc_vl_image_proj = Projection(dim, dim, bias=False)
        if "vqa" in tasks:
            self.vqa_classifier = classifier(dim, 2 * dim, config.vqa_labels)
        if "nlvr2" in tasks:
            self.nlvr2_classifier = classifier(2 * dim, 2 * dim, 2)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set every parameter to its initial value, for example after ``to_empty``."""
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
            if isinstance(module, Attention):
                nn.init.zeros_(module.q_bias)
                nn.init.zeros_(module.v_bias)
            elif isinstance(module, Block) and module.gamma_1 is not None:
                assert module.gamma_2 is not None and self.config.layer_scale is not None
                nn.init.constant_(module.gamma_1, self.config.layer_scale)
                nn.init.constant_(module.gamma_2, self.config.layer_scale)
            elif isinstance(module, MLMHead):
                nn.init.zeros_(module.bias)
        if self.relative_position_bias_table is not None:
            nn.init.zeros_(self.relative_position_bias_table)
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("logit_scale", "logit_vl_scale"):
                nn.init.constant_(parameter, LOGIT_SCALE)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """unilm's initialisation: truncated normal in the transformer, normal elsewhere."""
        for name, module in self.named_modules():
            inside = name.startswith("transformer.")
            if isinstance(module, nn.Linear):
                if inside:
                    nn.init.trunc_normal_(module.weight, std=0.02, a=-2.0, b=2.0)
                else:
                    nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.trunc_normal_(self.transformer.cls_token, std=0.02, a=-2.0, b=2.0)
        if self.transformer.pos_embed is not None:
            nn.init.trunc_normal_(self.transformer.pos_embed, std=0.02, a=-2.0, b=2.0)
        if self.config.token_types == 3:
            self.token_type_embeddings.weight[2] = self.token_type_embeddings.weight[1]

    def forward(
        self, function: Callable[Concatenate[VLMo, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return ``function(self, *args, **kwargs)``: any use of the model's parts as one forward.

        Wrappers act on the forward of a module: DistributedDataParallel and FSDP2 gather parameters
        and average gradients there. A training step therefore calls ``wrapped(compute_losses,
        batch)``; :func:`vlmo.tasks.losses.compute_losses` computes the losses of ``config.tasks``.
        """
        return function(self, *args, **kwargs)

    def fuse(
        self, text_ids: Tensor, text_mask: Tensor, image: Tensor, *, image_type: int = 1
    ) -> FusionOutput:
        """Encode texts and images jointly; ``image_type`` is 2 for NLVR2's second image."""
        text = self._embed_padded(text_ids, text_mask)
        image = self.embed_image(image, image_type)
        if text.shape[0] != image.shape[0]:
            raise ValueError(f"image: {image.shape[0]} images for {text.shape[0]} texts")
        mask = torch.cat([text_mask.bool(), text_mask.new_ones(image.shape[:2]).bool()], dim=1)
        length = self.config.max_text_length
        layout = self._padded(text, length, self._patches, mask, vl=True)
        x = self.transformer.norm(self.run(torch.cat([text, image], dim=1), layout))
        return FusionOutput(x[:, :length], x[:, length:], self.pooler(x[:, 0]), x[:, 0])

    def encode_text(
        self, text_ids: Tensor, text_mask: Tensor, *, vl_tail: bool = False
    ) -> StreamOutput:
        """Encode texts alone; with ``vl_tail`` also with the vision-language experts on top."""
        x = self._embed_padded(text_ids, text_mask)
        return self._encode(x, self.config.max_text_length, 0, text_mask.bool(), vl_tail)

    def encode_image(self, image: Tensor, *, vl_tail: bool = False) -> StreamOutput:
        """Encode images alone; with ``vl_tail`` also with the vision-language experts on top."""
        x = self.embed_image(image)
        return self._encode(x, 0, self._patches, None, vl_tail)

    def _encode(
        self, x: Tensor, text: int, image: int, mask: Tensor | None, vl_tail: bool
    ) -> StreamOutput:
        """All layers with the stream's own expert; with ``vl_tail``, the top ones again with VL."""
        start = self.config.first_vl_block
        own = self._padded(x, text, image, mask, vl=False)
        middle = self.run(x, own, stop=start)
        last = self.run(middle, own, start=start)
        tokens = self.transformer.norm(last)
        stream = "text" if text else "image"
        embedding = self.project(f"itc_{stream}_proj", tokens[:, 0])
        vl_embedding = None
        if vl_tail:
            fused = self._padded(x, text, image, mask, vl=True)
            vl = self.transformer.norm(self.run(middle, fused, start=start))
            vl_embedding = self.project(f"itc_vl_{stream}_proj", vl[:, 0])
        return StreamOutput(tokens, embedding, vl_embedding, last[:, 0])

    @property
    def _patches(self) -> int:
        """Number of tokens of an image; a constant in graphs that ``torch.jit.trace`` records."""
        return self.config.grid**2 + 1

    def project(self, head: str, cls: Tensor) -> Tensor:
        """Project first tokens ``[B, D]`` to unit vectors ``[B, D]`` with an ITC projection."""
        return F.normalize(getattr(self, head)(cls), dim=-1)

    def run(
        self,
        x: Tensor,  # [B, N, D] or [T, D]
        layout: Layout,
        *,
        start: int = 0,
        stop: int | None = None,
        chosen: Chosen | None = None,
    ) -> Tensor:
        """Blocks ``start`` to ``stop`` without the final norm; for ``chosen`` tokens if given."""
        tables = self._tables()
        saves = self.config.checkpointing and torch.is_grad_enabled()
        stop = self.config.depth if stop is None else stop
        first_vl = self.config.first_vl_block
        # All layers with or without a vision-language expert share these.
        below = layout.experts(False) if start < min(stop, first_vl) else None
        above = layout.experts(True) if stop > max(start, first_vl) else None
        for number in range(start, stop):
            block = cast(Block, self.transformer.blocks[number])
            own = chosen if number == stop - 1 else None
            experts = above if block.has_vl else below
            experts = experts if own is None else own.experts(block.has_vl)
            inputs = (x, layout, tables[number], experts, own)
            x = checkpoint(block, *inputs, use_reentrant=False) if saves else block(*inputs)
        return x.index_select(0, chosen.index) if chosen is not None and start >= stop else x

    def _tables(self) -> list[Tensor | None]:
        """The bias table of each layer: strided views of the table of all layers."""
        table, depth = self.relative_position_bias_table, self.config.depth
        if table is None:
            return [None] * depth
        return list(table.view(-1, depth, self.config.heads).unbind(1))

    def pack(self, runs: Sequence[Run], device: torch.device) -> Packed:
        """Lay out sequences without padding, for :meth:`run`."""
        return Packed.of(
            runs,
            device,
            longest_text=self.config.max_text_length,
            index=self._index("joint"),
            image_position=self.config.max_text_length,
        )

    def _padded(self, x: Tensor, text: int, image: int, mask: Tensor | None, *, vl: bool) -> Padded:
        stream = "joint" if text and image else "text" if text else "image"
        return Padded(x.shape[0], text, image, vl, self._index(stream), mask)

    def _index(self, stream: str) -> RelativePositionIndex | None:
        if self.relative_position_bias_table is None:
            return None
        return cast(RelativePositionIndex, self.relative_position_indices[stream])

    def embed_text(self, text_ids: Tensor, places: Tensor | None = None) -> Tensor:
        """Ids ``[B, T]``, or ``[tokens]`` with their positions in the texts, to ``[..., D]``."""
        return self.text_embeddings(text_ids, places) + rows_of(self.token_type_embeddings, 0)

    def embed_image(self, image: Tensor, image_type: int = 1) -> Tensor:
        """Pixels ``[B, 3, S, S]``, uint8 or scaled to [-1, 1], to ``[B, patches + 1, D]``.

        Raises:
            ValueError: the shape is wrong, the model has no such ``image_type``, or floats are far
                outside [-1, 1], such as 0 to 255; on a GPU the last case is a device-side
                assertion.
        """
        if not 1 <= image_type < self.config.token_types:
            raise ValueError(
                f"image_type: {image_type} is not within 1..{self.config.token_types - 1}"
            )
        dtype = self.transformer.cls_token.dtype
        image = normalised_pixels(image, self.config.image_size, dtype)
        return self.transformer.embed(image) + rows_of(self.token_type_embeddings, image_type)

    def _embed_padded(self, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        wanted = (text_ids.shape[0], self.config.max_text_length)
        for name, tensor in (("text_ids", text_ids), ("text_mask", text_mask)):
            if tensor.shape != wanted:
                raise ValueError(f"{name}: shape {tuple(tensor.shape)} is not {wanted}")
        return self.embed_text(text_ids)
