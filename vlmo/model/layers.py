"""The modules of VLMo: embeddings, multiway block, heads. Parameter names are those of unilm."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.kernels import Constants, moe_linear
from vlmo.kernels.arguments import check_values
from vlmo.kernels.nn import FeedForward, by_expert, feed_forward, linear
from vlmo.kernels.wrappers import is_plain, rows_of
from vlmo.model.config import VLMoConfig
from vlmo.model.layout import Chosen, Experts, Layout, Tokens

_LARGEST_PIXEL = 16.0  # larger than usual normalisations give, smaller than values of 0..255


def normalised_pixels(
    image: Tensor,  # [B, 3, S, S], uint8 or floating point
    size: int,
    dtype: torch.dtype,
    mean: float | Tensor = 0.5,
    std: float | Tensor = 0.5,
) -> Tensor:  # [B, 3, S, S]
    """Images as a model takes them; floats are unchanged, uint8 is normalised to ``dtype``.

    Raises:
        ValueError: the shape is wrong, or floats are far outside [-1, 1], such as 0 to 255; on a
            GPU the last case is a device-side assertion.
    """
    if image.dim() != 4 or image.shape[1:] != (3, size, size):
        raise ValueError(f"image: shape {tuple(image.shape)} is not (batch, 3, {size}, {size})")
    if image.dtype == torch.uint8:
        return image.to(dtype).div(255 * std).sub(mean / std)
    check_values("image", image, image.abs() > _LARGEST_PIXEL, "not scaled to -1..1")
    return image


class PatchEmbedding(nn.Module):
    """Pixels ``[B, 3, S, S]`` to patches ``[B, (S / patch)^2, D]``, row by row."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class TextEmbeddings(Constants):
    """Token ids ``[...]`` to ``[..., D]``: BERT's embeddings, without the outer token type.

    Only models with absolute positions add the position embedding; in other models it exists for
    compatibility with checkpoints and gets no gradient. The dropout rate is the drop-path rate, as
    in unilm, the reference implementation.
    """

    position_ids: Tensor

    def __init__(self, config: VLMoConfig):
        super().__init__()
        self.absolute = config.absolute_position
        self.word_embeddings = nn.Embedding(config.vocab_size, config.dim, padding_idx=0)
        self.position_embeddings = nn.Embedding(config.max_text_length, config.dim)
        self.token_type_embeddings = nn.Embedding(2, config.dim)
        self.LayerNorm = nn.LayerNorm(config.dim, eps=1e-12)
        self.dropout = nn.Dropout(config.drop_path)
        positions = torch.arange(config.max_text_length, device="cpu")[None]
        self.register_constant(
            "position_ids", positions, torch.get_default_device(), persistent=True
        )

    def forward(self, text_ids: Tensor, places: Tensor | None = None) -> Tensor:
        """``places``: each token's position in its text; by default its last index."""
        x = self.word_embeddings(text_ids) + rows_of(self.token_type_embeddings, 0)
        if self.absolute:
            wanted = slice(text_ids.shape[-1]) if places is None else places
            x = x + rows_of(self.position_embeddings, wanted)
        return self.dropout(self.LayerNorm(x))


class Attention(nn.Module):
    """The projections of self-attention: queries and values have biases, keys have none."""

    def __init__(self, config: VLMoConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)

    @property
    def bias(self) -> Tensor:
        """``[3 D]``: of queries, keys and values."""
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def project(self, x: Tensor) -> Tensor:
        """``[..., D]`` to packed queries, keys and values ``[..., 3 D]``."""
        if is_plain(self.qkv, nn.Linear):
            return F.linear(x, self.qkv.weight, self.bias)
        qkv = self.qkv(x)
        return qkv + self.bias.to(qkv.dtype)


class Block(nn.Module):
    """Pre-norm block: shared self-attention, then the expert of each token's modality."""

    def __init__(self, config: VLMoConfig, number: int):
        super().__init__()
        self.kernels = config.kernels
        self.has_vl = number >= config.first_vl_block
        self.drop_path = config.drop_path * number / max(config.depth - 1, 1)
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.attn_text: Attention | None = None
        if config.separate_attention and not self.has_vl:
            self.attn_text = Attention(config)
        for expert in ("text", "imag", *(("vl",) if self.has_vl else ())):
            self.add_module(f"norm2_{expert}", nn.LayerNorm(config.dim, eps=1e-6))
            hidden = int(config.dim * config.mlp_ratio)
            self.add_module(f"mlp_{expert}", FeedForward(config.dim, hidden))
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(
        self,
        x: Tensor,  # [B, N, D] or [T, D]
        layout: Layout,
        table: Tensor | None,  # [entries, H]
        experts: Experts,
        chosen: Chosen | None = None,
    ) -> Tensor:
        """The block's output for all tokens, or for ``chosen`` with their ``experts``."""
        own = experts
        if chosen is not None and self.attn_text is not None:
            own = layout.experts(self.has_vl)
        attended = self._attend(self.norm1(x), layout, table, own)
        tokens: Tokens = layout
        if chosen is not None:
            x, attended = (t.index_select(0, chosen.index) for t in (x, attended))
            tokens = chosen
        attended = self._project(attended, experts)
        if self.gamma_1 is not None:
            attended = attended * self.gamma_1
        drops = self.training and self.drop_path > 0
        if drops:
            kept = tokens.drop_path(self.drop_path, x.device)[..., None]
            attended = (attended * kept).to(attended.dtype)
        x = x + attended

        mlps: list[Any] = [getattr(self, f"mlp_{name}") for name in experts.names]
        norms: list[Any] = [getattr(self, f"norm2_{name}") for name in experts.names]
        token_scale = None
        if drops:
            token_scale = tokens.drop_path_of_experts(self.drop_path, self.has_vl, x.device)
        return feed_forward(
            x,
            experts.routing,
            mlps,
            norms=norms,
            layer_scale=self.gamma_2,
            token_scale=token_scale,
            residual=x,
            backend=self.kernels,
        )

    def _attend(self, x: Tensor, layout: Layout, table: Tensor | None, experts: Experts) -> Tensor:
        if self.attn_text is None:
            qkv = self.attn.project(x)
        else:
            # Each modality has its own projections; every token still attends to all others.
            own, routing = self._of_modality(experts), experts.routing
            if all(is_plain(attn.qkv, nn.Linear) for attn in own):
                weights, biases = [attn.qkv.weight for attn in own], [attn.bias for attn in own]
                qkv = moe_linear(x, routing, weights, biases, backend=self.kernels)
            else:
                qkv = by_expert(x, routing, [attn.project for attn in own])
        qkv = qkv.unflatten(-1, (3, self.attn.heads, -1))
        return layout.attend(qkv, table, self.kernels).flatten(-2)

    def _project(self, attended: Tensor, experts: Experts) -> Tensor:
        if self.attn_text is None:
            return self.attn.proj(attended)
        projections = [attn.proj for attn in self._of_modality(experts)]
        return linear(attended, experts.routing, projections, backend=self.kernels)

    def _of_modality(self, experts: Experts) -> list[Attention]:
        """The attention of each expert, if text and image have separate ones."""
        own = [self.attn_text if name == "text" else self.attn for name in experts.names]
        return cast(list[Attention], own)


class MultiwayTransformer(nn.Module):
    """Patch embedding, blocks and the final norm, which all passes share."""

    def __init__(self, config: VLMoConfig):
        super().__init__()
        self.patch_embed = PatchEmbedding(config.dim, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = None
        if config.absolute_position:
            self.pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.dim))
        self.blocks = nn.ModuleList(Block(config, number) for number in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)

    def embed(self, image: Tensor) -> Tensor:
        """Images ``[B, 3, S, S]`` to ``[B, patches + 1, D]``, CLS first."""
        patches = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1).to(patches), patches], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed


class Pooler(nn.Module):
    """tanh(dense(first token)): ``[B, D]`` to ``[B, D]``."""

    def __init__(self, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)

    def forward(self, cls: Tensor) -> Tensor:
        return torch.tanh(self.dense(cls))


class MLMTransform(nn.Module):
    """Dense layer, GELU and LayerNorm before the decoder."""

    def __init__(self, dim: int):
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.LayerNorm = nn.LayerNorm(dim, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class MLMHead(nn.Module):
    """``[..., D]`` to logits ``[..., vocabulary]``; the decoder is not tied to the embedding."""

    def __init__(self, dim: int, vocab_size: int):
        super().__init__()
        self.transform = MLMTransform(dim)
        self.decoder = nn.Linear(dim, vocab_size, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x)) + self.bias


class Projection(nn.Module):
    """One linear layer with the name ``fc``: the ITC projections and the ITM head."""

    def __init__(self, dim: int, out: int, bias: bool):
        super().__init__()
        self.fc = nn.Linear(dim, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def classifier(dim: int, hidden: int, out: int) -> nn.Sequential:
    """The head of VQA or NLVR2."""
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, out)
    )
