"""Benchmark suite of self-attention over both modalities with VLMo's relative position bias.

    y = softmax(K ** -0.5 * q k^T + table[index]) v,  masked keys left out

from packed ``[B, N, 3, H, K]``. The table is float32, as in a model, with values that the dtype of
the operands can represent. Forward plus backward includes the gradients of q, k, v and the table.
Contenders that take the bias as a tensor look it up once per call, as unilm does once per layer,
and autograd differentiates the lookup.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness.contenders import (
    Case,
    Contender,
    Contest,
    Form,
    Make,
    Scale,
    Suite,
    compiled,
    compiler_of,
    half_dtypes,
    ours,
    smoke_dtype,
)
from harness.cost import attention_backward, attention_forward
from harness.official import scores_of
from vlmo.kernels import RelativePositionBias, RelativePositionIndex, shared_attention
from vlmo.kernels.target import compute_capability

NAME = "attention"
PHASES = ("forward", "forward+backward")
SIZES = {"base": (12, 64), "large": (16, 64), "tiny": (2, 64)}  # H, K
# Patch grid and text tokens by sequence length.
LENGTHS = {
    40: (14, 40),  # a text
    128: (14, 128),  # a long one
    197: (14, 0),  # an image of 224 pixels
    237: (14, 40),  # a text with an image of 224 pixels
    617: (24, 40),  # of 384
    941: (30, 40),  # of 480
    30: (4, 13),  # for tests
}
TOKENS = 32768  # approximate number in every case on a GPU
CPU_TOKENS = 1896  # the same on a CPU, in two sequences or more


class Parameters(NamedTuple):
    """Learned parameters."""

    table: list[Tensor]  # one, [entries, H] float32; none without a bias


class Inputs(NamedTuple):
    """Inputs without gradients."""

    index: RelativePositionIndex
    key_mask: Tensor | None  # [B, N] bool

    def mask(self, chosen: Sequence[int] | None) -> Tensor | None:
        """``[B, 1, 1, N]``, the mask of the chosen sequences."""
        if self.key_mask is None:
            return None
        mask = self.key_mask if chosen is None else self.key_mask[list(chosen)]
        return mask[:, None, None, :]


def eager(inputs: Inputs, *, wide_scores: bool = True) -> Make:
    """The form of unilm: float32 scores of all heads, with the bias as a tensor.

    unilm multiplies queries and keys in float32 (``wide_scores``), which autocast overrides.
    """

    def make(chosen: Sequence[int] | None) -> Form:
        mask, matrix = inputs.mask(chosen), inputs.index.matrix.long()

        def form(qkv: Tensor, p: Parameters) -> Tensor:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            scores = scores_of(q * q.shape[-1] ** -0.5, k, wide=wide_scores)
            if p.table:
                scores = scores + F.embedding(matrix, p.table[0]).permute(2, 0, 1)[None]
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            return (scores.softmax(dim=-1).type_as(v) @ v).transpose(1, 2)

        return form

    return make


def routed(inputs: Inputs, backend: str) -> Make:
    """This library's operation."""

    def form(qkv: Tensor, p: Parameters) -> Tensor:
        bias = RelativePositionBias(p.table[0], inputs.index) if p.table else None
        return shared_attention(qkv, bias=bias, key_mask=inputs.key_mask, backend=backend)

    return lambda chosen: form


def sdpa(inputs: Inputs, backends: list[SDPBackend] | None) -> Make:
    """``scaled_dot_product_attention``, with bias and mask as one tensor in the dtype of q."""
    mask, matrix = inputs.mask(None), inputs.index.matrix.long()

    def attend(qkv: Tensor, p: Parameters) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        bias = _bias(matrix, mask, p, q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    def restricted(qkv: Tensor, p: Parameters) -> Tensor:
        with sdpa_kernel(backends or []):
            return attend(qkv, p)

    return lambda chosen: attend if backends is None else restricted


def _bias(matrix: Tensor, mask: Tensor | None, p: Parameters, dtype: torch.dtype) -> Tensor | None:
    """``[1 or B, H, N, N]``; ``[B, 1, 1, N]`` bool without a table; None without table and mask."""
    if not p.table:
        return mask
    bias = F.embedding(matrix, p.table[0]).permute(2, 0, 1)[None].to(dtype)
    return bias if mask is None else bias.masked_fill(~mask, float("-inf"))


def flex(inputs: Inputs) -> Make:
    """FlexAttention whose score_mod reads the table; it must be compiled."""
    from torch.nn.attention.flex_attention import flex_attention

    matrix, key_mask = inputs.index.matrix, inputs.key_mask

    def form(qkv: Tensor, p: Parameters) -> Tensor:
        def modified(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
            if p.table:
                score = score + p.table[0][matrix[row, column], h]
            if key_mask is not None:
                score = torch.where(key_mask[b, column], score, float("-inf"))
            return score

        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        plain = not p.table and key_mask is None
        out: Any = flex_attention(q, k, v, score_mod=None if plain else modified)
        return out.transpose(1, 2)

    return lambda chosen: form


class Attention(Contest):
    """Random inputs of one case, and its contenders."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.heads, self.dim = SIZES[case.size]
        length, sequences = int(case.shape["length"]), int(case.shape["sequences"])
        grid, text = LENGTHS[length]
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(case.dtype)

        qkv = draw(sequences, length, 3, self.heads, self.dim).requires_grad_()
        dy = draw(sequences, length, self.heads, self.dim)
        index = _index(grid, text, length).to(device)
        table = draw(index.entries, self.heads).float().requires_grad_()
        with_table = case.shape["bias"] == "table"
        self.parameters = Parameters([table] if with_table else [])
        masked = case.shape["mask"] == "text"
        self.inputs = Inputs(index, _padding(sequences, text, length, device) if masked else None)
        self.backward = case.phase != "forward"
        super().__init__(self._contenders(), qkv, dy, backward=self.backward)

        shape = (sequences, length, self.heads, self.dim)
        entries = index.entries if with_table else 0
        itemsize = case.dtype.itemsize
        self.cost = attention_forward(
            *shape, itemsize=itemsize, entries=entries, keeps_lse=self.backward
        )
        if self.backward:
            self.cost += attention_backward(*shape, itemsize=itemsize, entries=entries)

    def _contenders(self) -> dict[str, Contender]:
        right, inputs = eager(self.inputs), self.inputs
        official = eager(inputs, wide_scores=False)
        facts = (self.case, self.device)

        def entry(make: Make, why_not: Callable[[], str | None] = lambda: None) -> Contender:
            return Contender(make, right, lambda: self.parameters, why_not)

        found = ours(
            *("shared_attention", *facts, lambda name: routed(inputs, name)),
            eager=right,
            parameters=lambda: self.parameters,
        )
        of_any = None
        if self.backward and self.parameters.table:
            of_any = [
                SDPBackend.FLASH_ATTENTION,
                SDPBackend.EFFICIENT_ATTENTION,
                SDPBackend.MATH,
            ]
        efficient, cudnn = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION
        return found | {
            "eager": entry(official),
            "eager-compiled": compiled(entry(official), *facts, whole=True),
            "sdpa": entry(sdpa(inputs, of_any)),
            "sdpa-efficient": entry(
                sdpa(inputs, [efficient]), functools.partial(self._why_not_sdpa, efficient)
            ),
            "sdpa-cudnn": entry(
                sdpa(inputs, [cudnn]), functools.partial(self._why_not_sdpa, cudnn)
            ),
            "flex-compiled": compiled(
                entry(flex(inputs), functools.partial(why_not_flex, *facts)), *facts, whole=True
            ),
        }

    def _why_not_sdpa(self, backend: SDPBackend) -> str | None:
        """PyTorch's reason why the backend cannot run this call, or None."""
        is_cudnn = backend == SDPBackend.CUDNN_ATTENTION
        name = "cuDNN" if is_cudnn else "memory-efficient"
        if compute_capability(self.device) is None:
            return f"PyTorch's {name} attention needs an NVIDIA GPU."
        if is_cudnn and self.backward and self.parameters.table:
            return "PyTorch's cuDNN attention has no gradient of a bias."
        cuda = torch.backends.cuda
        with torch.set_grad_enabled(self.backward):
            q, k, v = (t.transpose(1, 2) for t in self.x.unbind(2))
            matrix, mask = self.inputs.index.matrix.long(), self.inputs.mask(None)
            bias = _bias(matrix, mask, self.parameters, q.dtype)
            asked = cuda.SDPAParams(q, k, v, bias, 0.0, False, False)
        can = cuda.can_use_cudnn_attention if is_cudnn else cuda.can_use_efficient_attention
        return None if can(asked) else f"PyTorch's {name} attention refuses this call."


def why_not_flex(case: Case, device: torch.device) -> str | None:
    """The reason if FlexAttention cannot be compiled for the case on the device, else None.

    On a CPU its forward takes a score_mod and float32, bfloat16 and float16.
    """
    if device.type == "cpu":
        if case.phase != "forward":
            return "FlexAttention has no backward on a CPU."
        vectors = torch.backends.cpu.get_cpu_capability()
        if compiler_of(case, device) == "inductor" and vectors not in ("AVX2", "AVX512"):
            return f"FlexAttention's kernel for CPUs needs AVX2; PyTorch uses {vectors} here."
        return None
    capability = compute_capability(device)
    if capability is None:
        return "FlexAttention is compiled for CPUs and NVIDIA GPUs."
    if capability < (8, 0):
        name = "sm_{}{}".format(*capability)
        return f"FlexAttention is compiled by Triton, which has no tensor cores on {name}."
    return None


def cases(device: torch.device, scale: Scale) -> list[Case]:
    """All cases. Joint sequences at 224 pixels come first, as most attention in pre-training."""

    def listed(
        dtypes: Sequence[torch.dtype],
        sizes: Sequence[str],
        shapes: Sequence[tuple[int, int, str, str]],
        phases: Sequence[str] = PHASES,
    ) -> list[Case]:
        names = ("length", "sequences", "bias", "mask")
        return [
            Case(NAME, size, dtype, phase, dict(zip(names, shape, strict=True)))
            for dtype in dtypes
            for size in sizes
            for shape in shapes
            for phase in phases
        ]

    if scale is Scale.smoke:
        shapes = [(30, 3, "table", "none"), (30, 3, "table", "text"), (30, 3, "none", "none")]
        return listed([smoke_dtype(device)], ["tiny"], shapes)
    if scale is Scale.cpu:
        dtypes, base = [torch.float32, torch.bfloat16], ["base"]
        first, *others = (
            (length, max(2, round(CPU_TOKENS / length)), "table", "none")
            for length in (237, 617, 40, 941, 128)
        )
        plain = [(*first[:2], "table", "text"), (*first[:2], "none", "none")]
        return (
            listed(dtypes, base, [first])
            + listed(dtypes, base, others)
            + listed(dtypes[:1], base, plain, phases=PHASES[:1])
        )
    shapes = [
        (length, round(TOKENS / length), bias, mask)
        for length, bias, mask in (
            *((237, "table", "none"), (237, "table", "text"), (617, "table", "none")),
            *((197, "table", "none"), (40, "table", "none"), (941, "table", "none")),
            (237, "none", "none"),
        )
    ]
    return listed(half_dtypes(device), ["base", "large"], shapes)


def _index(grid: int, text: int, length: int) -> RelativePositionIndex:
    if text == 0:
        return RelativePositionIndex.image(grid)
    if text == length:
        return RelativePositionIndex.text(grid, text)
    return RelativePositionIndex.joint(grid, text)


def _padding(sequences: int, text: int, length: int, device: torch.device) -> Tensor:
    """Key mask ``[B, N]``: text lengths evenly from 1 to ``text``, then the whole image."""
    lengths = 1 + torch.arange(sequences) * text // sequences
    mask = torch.arange(length) < lengths[:, None]
    mask[:, text:] = True
    return mask.to(device)


SUITE = Suite(NAME, cases, Attention)


def bench_attention(compete, case, contender):
    compete(SUITE, case, contender)
