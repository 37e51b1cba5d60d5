"""The order of steps of the composed backend: passes of all experts, products of each expert."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._backends import triton_launch
from ..call import LISTS, Call
from ..plan import Gradients, Problem, wanted
from ..rows import bound_on_tiles, rows_of
from ..triton import arguments
from ..triton.tiles import Tile
from . import passes

_COLUMNS = 256  # of a program that does not have whole rows
_Rows = Tensor | tuple[Tensor, ...]  # grouped, or of each expert
# Elements of each tensor that a program holds, in 4 warps: 32 or, in the backward, 16 per thread.
_HELD_FORWARD, _HELD_BACKWARD = 4096, 2048
_WIDE = 4096  # from this model dimension on, programs with whole rows have 16 warps
_SUMMED = LISTS[2:]  # gradients that the passes sum, per expert
_TILE = Tile(block_t=16, block_n=_COLUMNS, block_k=16, num_warps=4, num_stages=1)


class Passes:
    """The rows of each expert, and launches of passes over the rows of all experts.

    Attributes:
        slices: the grouped rows of each expert.
        in_order: whether grouped rows are tokens, because one expert has all of them.
        tiles: number of row tiles, or an upper bound.
    """

    def __init__(self, call: Call, tile: Tile, held: int) -> None:
        self.call, self._tile, self._held = call, tile, held
        rows = rows_of(call)
        counts = _counts(call)
        ends = itertools.accumulate(counts)
        self.slices = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        self.in_order = rows.offsets is None and call.tokens in counts
        self.tiles = bound_on_tiles(call, rows, tile.block_t)
        self._rows, self._problem = arguments.passed(rows), Problem.of(call, rows)

    def over_rows(self, kernel: Any, width: int, eps: float, *args: Any) -> None:
        """Launch a pass whose programs have whole rows of ``width`` columns."""
        tile = replace(self._tile, num_warps=16) if width > _WIDE else self._tile
        block_r = self._held * tile.num_warps // _TILE.num_warps >> (width - 1).bit_length()
        self._launch(kernel, self.tiles, tile, block_r, *args, self._rows, eps)

    def over_columns(self, kernel: Any, width: int, *args: Any) -> None:
        """Launch a pass whose programs have a block of the ``width`` columns."""
        programs = self.tiles * -(-width // _COLUMNS)
        self._launch(kernel, programs, self._tile, self._held // _COLUMNS, *args, self._rows)

    def add_up(self, sums: Tensor, gradients: Gradients) -> None:
        """Add up the lines of ``sums`` to gradients."""
        needed = gradients.needed
        given = [tuple(gradients.lists[name]) if needed.wants(name) else None for name in _SUMMED]
        sizes = [max(self.call.pre_columns)]
        sizes += [max(self.call.x.shape[1], len(self.call.w2[0]))] * 4
        if self.call.sub_norm_weight:
            sizes += [max(map(len, self.call.sub_norm_weight))] * 2
        blocks = sum(-(-size // passes.LINE_COLUMNS.value) for size in sizes)
        self._launch(
            *(passes.moe_ffn_sums_kernel, blocks * len(self.slices), self._tile, 1),
            *(sums, *given, gradients.scale, self._rows, needed),
        )

    def _launch(self, kernel: Any, programs: int, tile: Tile, block_r: int, *args: Any) -> None:
        config = arguments.config_of(self._problem, arguments.precision(), tile)
        block_r = max(1, min(tile.block_t, block_r))
        config = config._replace(block_r=block_r, row_steps=tile.block_t // block_r)
        triton_launch.launch(kernel, self.call.x.device, programs, tile, *args, config)


def _counts(call: Call) -> list[int]:
    """Number of rows of each expert."""
    rows = rows_of(call)
    if rows.offsets is None:
        return [length * rows.sequences for length in rows.lengths]
    if call.pieces:
        counts = call.pieces[1::2]
        return [count * (call.tokens // sum(counts)) for count in counts]
    return rows.offsets.diff().tolist()  # on the CPU


def forward(call: Call, kept: Tensor) -> Tensor:
    """y [T, O]; writes h1 and h2 to ``kept`` unless it is empty.

    There are three launches of passes, four with a sub-norm, two for moe_linear.
    """
    y = call.x.new_empty(call.out, dtype=call.result_dtype)
    if call.tokens == 0:
        return y
    layer = _Layer(call, _TILE, _HELD_FORWARD)
    normed = layer.normed()
    if call.w1:
        h1, h2 = layer.kept(kept)
        h1 = layer.first_products(normed, h1)
        if h2 is None and not layer.passes_x:
            assert isinstance(normed, Tensor)
            h2 = normed  # overwritten
        del normed
        act = layer.activated(h1, overwrite=not call.save_pre)
        h2 = layer.second_products(layer.sub_normed(act, act), h2)
    else:
        assert isinstance(normed, Tensor)
        h2 = layer.second_products(normed)
    layer.passes.over_columns(
        *(passes.moe_ffn_branch_kernel, layer.out, h2, y, layer.b2),
        *(arguments.contiguous(call.layer_scale), layer.token_scale),
        arguments.by_token(call.residual, call.residuals),
    )
    return y


def backward(dy: Tensor, kept: Tensor, call: Call, needs: Sequence[bool]) -> list[Tensor]:
    """The gradients flagged in ``needs``, in the order of the schema; the others are empty.

    If ``kept`` is empty, h1 and h2 are computed again.
    """
    gradients = Gradients.empty(call, needs)
    if call.tokens:
        # As many rows per tile as leave each multiprocessor four tiles: a line of sums is written
        # per tile.
        each = call.tokens // (4 * arguments.workers_on(dy.device, _TILE))
        block_t = min(64, max(16, 1 << max(each, 1).bit_length() - 1))
        layer = _Layer(call, replace(_TILE, block_t=block_t), _HELD_BACKWARD)
        if call.w1:
            _differentiate(dy.contiguous(), kept, layer, gradients)
        else:
            _differentiate_linear(dy.contiguous(), layer, gradients)
    return gradients.result(call)


def _differentiate(dy: Tensor, kept: Tensor, layer: _Layer, gradients: Gradients) -> None:
    call, run, scale = layer.call, layer.passes, gradients.scale
    needed = gradients.needed
    through = needed.x or needed.wants("norm_weight", "norm_bias")
    of_h1 = through or needed.wants("w1")
    before_act = of_h1 or needed.wants("b1")
    of_sub_norm = needed.wants("sub_norm_weight", "sub_norm_bias")
    sums = layer.sums(gradients)
    h1, h2 = layer.kept(kept)
    # Otherwise the pass of the norm's gradient, which reads x as well, computes it.
    early = h1 is None or (needed.wants("w1") and (call.norm == "none" or not through))
    normed = layer.normed() if early else None
    if h1 is None:
        assert normed is not None
        h1 = layer.first_products(normed)
    act = None
    if scale is not None and h2 is None:
        act = layer.activated(h1)
        h2 = layer.second_products(layer.sub_normed(act))
    dh2 = layer.undo_branch(dy, h2, gradients, sums)
    dact, dh1 = None, None
    if before_act or of_sub_norm:
        dact = layer.new(layer.hidden)
        for w2, rows in layer.experts(call.w2):
            torch.mm(dh2[rows], w2, out=dact[rows, : w2.shape[1]])
    if call.sub_norm_weight and (before_act or of_sub_norm or needed.wants("w2")):
        act = layer.activated(h1) if act is None else act
        if dact is None:
            act = layer.sub_normed(act, act)
        else:
            run.over_rows(
                *(passes.moe_ffn_bwd_sub_norm_kernel, layer.hidden, call.sub_norm_eps, act, dact),
                *(act if needed.wants("w2") else None, dact if before_act else None),
                *(sums if of_sub_norm else None, *layer.sub_norm),
            )
    if before_act:
        assert dact is not None
        dh1 = layer.new(layer.width) if of_h1 else None
        written = dact if act is None and needed.wants("w2") else None
        run.over_columns(
            *(passes.moe_ffn_bwd_activation_kernel, layer.hidden, dact, h1, dh1, written),
            *(sums if needed.wants("b1") else None, layer.b1),
        )
        act = written if act is None else act
    if needed.wants("w2"):
        act = layer.activated(h1) if act is None else act
        for gradient, rows in layer.experts(gradients.lists["w2"]):
            if wanted(gradient):
                torch.mm(dh2[rows].t(), act[rows, : gradient.shape[1]], out=gradient)
    del act, dact, dh2
    if through:
        assert dh1 is not None
        late = needed.wants("w1") and normed is None
        dnormed = layer.undo_norm(dh1, call.w1, gradients, sums, keeps_normed=late)
        normed = dnormed if late else normed
    if needed.wants("w1"):
        assert dh1 is not None and normed is not None
        for gradient, e, columns in layer.first_layers(gradients.lists["w1"]):
            if wanted(gradient):
                part = dh1[run.slices[e], columns]
                torch.mm(part.t(), layer.of_expert(normed, e), out=gradient)
    if sums is not None:
        run.add_up(sums, gradients)


def _differentiate_linear(dy: Tensor, layer: _Layer, gradients: Gradients) -> None:
    """:func:`_differentiate` for moe_linear."""
    call, needed = layer.call, gradients.needed
    of_weight, of_scale = needed.wants("w2"), gradients.scale is not None
    normed = layer.normed() if of_weight or of_scale else None
    assert not isinstance(normed, tuple)  # moe_linear has no streams
    h2 = layer.second_products(normed) if of_scale and normed is not None else None
    sums = layer.sums(gradients)
    dh2 = layer.undo_branch(dy, h2, gradients, sums)
    if of_weight and normed is not None:
        for gradient, rows in layer.experts(gradients.lists["w2"]):
            if wanted(gradient):
                torch.mm(dh2[rows].t(), normed[rows], out=gradient)
    if needed.x or needed.wants("norm_weight", "norm_bias"):
        layer.undo_norm(dh2, call.w2, gradients, sums, keeps_normed=False)
    if sums is not None:
        layer.passes.add_up(sums, gradients)


class _Layer:
    """The steps that forward and backward share.

    Attributes:
        dim, out, hidden: D, O and the largest F.
        width: the columns of h1: the largest F, or 2 F if gated; 0 for moe_linear.
        passes_x: whether x serves as norm_e(x): there is no norm, and one expert has all tokens, or
            each expert has a stream.
    """

    def __init__(self, call: Call, tile: Tile, held: int) -> None:
        self.call, self.passes = call, Passes(call, tile, held)
        self.x: Any = arguments.by_token(call.x, call.streams)
        self.token_scale = arguments.by_token(call.token_scale, call.token_scales)
        self.dim, self.hidden = call.x.shape[1], max(w.shape[1] for w in call.w2)
        self.out, self.width = len(call.w2[0]), max(call.pre_columns)
        self.b1, self.b2 = arguments.pointers(call.b1), arguments.pointers(call.b2)
        in_place = self.passes.in_order or bool(call.streams)
        self.passes_x = call.norm == "none" and in_place

    def new(self, columns: int) -> Tensor:
        """Uninitialised scratch [T, columns] in the dtype of the weights."""
        call = self.call
        return call.x.new_empty(call.tokens, columns, dtype=call.w2[0].dtype)

    def experts(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, slice]]:
        """The tensor of each expert, and the expert's grouped rows."""
        return zip(tensors, self.passes.slices, strict=True)

    def first_layers(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, int, slice]]:
        """The tensors of the first layers, their experts, and their columns of h1.

        In moe_linear, the tensors of the only layer, and their columns of h2.
        """
        parts = 2 if self.call.split else 1
        for i, tensor in enumerate(tensors):
            e, part = divmod(i, parts)
            size = self.call.pre_columns[e] // parts or self.out
            yield tensor, e, slice(part * size, (part + 1) * size)

    def of_expert(self, normed: _Rows, e: int) -> Tensor:
        """The rows of an expert."""
        return normed[self.passes.slices[e]] if isinstance(normed, Tensor) else normed[e]

    def kept(self, kept: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """h1 [T, P] and h2 [T, D] in the tensor that the forward saves; None if not saved."""
        if not kept.numel():
            return None, None
        size = self.call.tokens * self.width
        h1, h2 = kept.view(-1)[:size], kept.view(-1)[size:]
        return h1.view(-1, self.width), h2.view(-1, self.dim) if h2.numel() else None

    def normed(self) -> _Rows:
        """norm_e(x) [T, D] in grouped order, or of each expert."""
        if self.passes_x:
            return self.x
        call, out = self.call, self.new(self.dim)
        vectors = arguments.pointers(call.norm_weight), arguments.pointers(call.norm_bias)
        self.passes.over_rows(
            passes.moe_ffn_norm_kernel, self.dim, call.norm_eps, self.x, out, *vectors
        )
        return out

    def first_products(self, normed: _Rows, out: Tensor | None = None) -> Tensor:
        """h1 = W1_e normed [T, P]."""
        out = self.new(self.width) if out is None else out
        for w1, e, columns in self.first_layers(self.call.w1):
            part = out[self.passes.slices[e], columns]
            torch.mm(self.of_expert(normed, e), w1.t(), out=part)
        return out

    def activated(self, h1: Tensor, *, overwrite: bool = False) -> Tensor:
        """act(h1 + b1) [T, max F]; with ``overwrite`` in the memory of h1 if it fits."""
        act = h1 if overwrite and self.width == self.hidden else self.new(self.hidden)
        self.passes.over_columns(passes.moe_ffn_activation_kernel, self.hidden, h1, act, self.b1)
        return act

    @property
    def sub_norm(self) -> tuple[Any, ...]:
        """The arguments that the passes of the sub-norm share."""
        lists = self.call.sub_norm_weight, self.call.sub_norm_bias
        return (*map(arguments.pointers, lists), 1 << (self.hidden - 1).bit_length())

    def sub_normed(self, act: Tensor, out: Tensor | None = None) -> Tensor:
        """sub_norm_e(act) [T, max F], written to ``out``, which may be act; act without one."""
        if not self.call.sub_norm_weight:
            return act
        out = self.new(self.hidden) if out is None else out
        self.passes.over_rows(
            *(passes.moe_ffn_sub_norm_kernel, self.hidden, self.call.sub_norm_eps),
            *(act, out, *self.sub_norm),
        )
        return out

    def second_products(self, act: Tensor, out: Tensor | None = None) -> Tensor:
        """h2 = W2_e act [T, O]."""
        out = self.new(self.out) if out is None else out
        for w2, rows in self.experts(self.call.w2):
            torch.mm(act[rows, : w2.shape[1]], w2.t(), out=out[rows])
        return out

    def sums(self, gradients: Gradients) -> Tensor | None:
        """Scratch for the sums of the passes; None if no gradient needs any."""
        if gradients.scale is None and not gradients.needed.wants(*_SUMMED):
            return None
        of_hidden = 2 * self.hidden if self.call.sub_norm_weight else 0
        lines = (self.passes.tiles, self.width + 4 * max(self.dim, self.out) + of_hidden)
        return self.call.x.new_empty(lines, dtype=torch.float32)

    def undo_branch(
        self, dy: Tensor, h2: Tensor | None, gradients: Gradients, sums: Tensor | None
    ) -> Tensor:
        """dh2 [T, O]; writes the sums for b2 and, from h2, for the layer scale."""
        scale, dh2 = gradients.scale, self.new(self.out)
        self.passes.over_columns(
            *(passes.moe_ffn_bwd_branch_kernel, self.out, dy, None if scale is None else h2, dh2),
            *(sums if gradients.needed.wants("b2") or scale is not None else None, self.b2),
            *(arguments.contiguous(self.call.layer_scale), self.token_scale),
        )
        return dh2

    def undo_norm(
        self,
        d: Tensor,  # [T, any], the gradient of weights @ norm_e(x)
        weights: Sequence[Tensor],
        gradients: Gradients,
        sums: Tensor | None,
        *,
        keeps_normed: bool,
    ) -> Tensor:
        """Write dx and the sums for the norm; returns scratch that holds norm_e(x) if wanted."""
        call, needed = self.call, gradients.needed
        dnormed = gradients.x if self.passes_x else self.new(self.dim)
        for weight, e, columns in self.first_layers(weights):
            rows = self.passes.slices[e]
            part, out = d[rows, columns], dnormed[rows]
            if columns.start:  # the value, after the gate
                torch.addmm(out, part, weight, out=out)
            else:
                torch.mm(part, weight, out=out)
        if not self.passes_x:
            self.passes.over_rows(
                *(passes.moe_ffn_bwd_norm_kernel, self.dim, call.norm_eps, self.x, dnormed),
                dnormed if keeps_normed else None,
                gradients.x if needed.x else None,
                sums if needed.wants("norm_weight", "norm_bias") else None,
                *(arguments.pointers(t) for t in (call.norm_weight, call.norm_bias)),
            )
        return dnormed
