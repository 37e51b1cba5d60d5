"""The host's side of the backward in CUDA: what to compute, where to put it, its launches."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..._backends import cuda as cuda_target
from ..call import LISTS, Call, pre_shape
from ..counters import take_counters
from ..rows import bound_on_tiles, rows_of
from ..schedule import band_of
from . import arguments as host
from .backward_weights import Gradients, Operands, launch_weights
from .forward import launch_forward

_CUBIN = "moe_ffn_bwd_rows"
_TASKS_OF_ROWS = host.TILE // host.NORM_ROWS


class BackwardRowsArgument(ctypes.Structure):
    """``BackwardRows`` of csrc/moe_ffn/moe_ffn_bwd_rows.cu."""

    _fields_ = [
        ("call", host.CallArgument),
        ("dy", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("pre", ctypes.c_void_p),
        ("dbranch", ctypes.c_void_p),
        ("dh2", ctypes.c_void_p),
        ("normed", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("dpre", ctypes.c_void_p),
        ("dnormed", ctypes.c_void_p),
        ("sum_dbranch", ctypes.c_void_p),
        ("sum_dpre", ctypes.c_void_p),
        ("sum_norm", ctypes.c_void_p),
        ("dx", ctypes.c_void_p),
        ("dy_is_half", ctypes.c_int32),
        ("x_is_half", ctypes.c_int32),
    ]


class CudaGradients:
    """One backward: a launch for the rows and, if weights want gradients, one for them.

    A pre-activation that was not kept is made again before, by one launch of the forward's kernel.
    """

    def __init__(self, dy: Tensor, pre: Tensor, call: Call, needs: Sequence[bool]) -> None:
        params = [getattr(call, name) for name in LISTS]
        leaves = (call.x, *itertools.chain(*params), call.layer_scale)
        self.dtypes = [leaf.dtype for leaf in leaves if leaf is not None]
        self.dy, self.pre, self.call = host.readable(dy), pre, host.readable_call(call)
        self.rows = rows_of(call)
        flags = iter(needs)
        self.dx = _empty(self.call.x, next(flags))
        lists = {
            name: [_empty(tensor, next(flags)) for tensor in getattr(self.call, name)]
            for name in LISTS
        }
        scale = self.call.layer_scale
        self.wanted = Gradients(lists, None if scale is None else _empty(scale, next(flags)))

    def compute(self) -> list[Tensor]:
        flat = [self.dx, *(tensor for tensor in self.wanted.tensors if tensor is not None)]
        if self.call.x.shape[0] == 0:
            for gradient in flat:
                gradient.zero_()
        else:
            if self.pre.numel() == 0:
                kept = self.call._replace(save_pre=True, residual=None)
                self.pre = self.call.x.new_empty(pre_shape(kept), dtype=torch.float16)
                launch_forward(kept, None, self.pre)
            operands = self._launch_rows()
            if any(gradient.numel() for gradient in flat[1:]):
                launch_weights(self.call, self.rows, operands, self.wanted)
        return [gradient.to(dtype) for gradient, dtype in zip(flat, self.dtypes, strict=True)]

    def _launch_rows(self) -> Operands:
        """dx, and what the sums over tokens need; see moe_ffn_bwd_rows.cu."""
        call, wants, dim = self.call, self.wanted.wants, self.call.x.shape[1]
        scales, bound = self.wanted.scale is not None, bound_on_tiles(call, self.rows, host.TILE)
        of_w2, of_norm = wants("w2") or scales, wants("norm_weight") or wants("norm_bias")
        of_dbranch = wants("b2") or (scales and len(call.b2) > 0)
        through = self.dx.numel() > 0 or of_norm
        normed = call.norm != "none"
        max_hidden, max_pre = host.max_hidden(call), host.max_pre(call)
        tasks = (
            _TASKS_OF_ROWS,
            -(-max_hidden // host.TILE),
            -(-dim // host.TILE) if through else 0,
            _TASKS_OF_ROWS if normed and through else 0,
        )
        lines = bound * _TASKS_OF_ROWS
        outputs = {
            "dbranch": self._scratch(dim, of_w2 and call.layer_scale is not None),
            "dh2": self._scratch(dim, True),
            "normed": self._scratch(dim, wants("w1")),
            "hidden": self._scratch(max_hidden, of_w2),
            "dpre": self._scratch(max_pre, True),
            "dnormed": self._scratch(dim, normed and through),
            "sum_dbranch": self._sums(lines, dim, of_dbranch),
            "sum_dpre": self._sums(bound, max_pre, wants("b1")),
            "sum_norm": self._sums(lines, 2 * dim, of_norm),
            "dx": self.dx if self.dx.numel() else None,
        }
        self._launch(tasks, (None, dim, max_pre, None), bound, outputs)
        dbranch = outputs["dbranch"] if call.layer_scale is not None else outputs["dh2"]
        return Operands(
            dpre=outputs["dpre"],
            normed=outputs["normed"],
            dbranch=dbranch,
            hidden=outputs["hidden"],
            sum_dpre=outputs["sum_dpre"],
            sum_dbranch=outputs["sum_dbranch"],
            sum_norm=outputs["sum_norm"],
        )

    def _launch(
        self,
        tasks: tuple[int, ...],
        depths: tuple[int | None, ...],
        bound: int,
        outputs: dict[str, Tensor | None],
    ) -> None:
        call, device = self.call, self.call.x.device
        workers, num_counters = host.workers_on(device), 2 + 3 * bound
        band = band_of(bound, tasks, workers, depths, step=host.STEP, rows_cost=host.ROWS_COST)
        with take_counters(device, num_counters) as counters:
            argument = BackwardRowsArgument(
                call=host.call_argument(
                    call, self.rows, counters, num_counters, bound, band, tasks
                ),
                dy=host.pointer(self.dy),
                x=host.pointer(call.x),
                pre=host.pointer(self.pre),
                **{name: host.pointer(tensor) for name, tensor in outputs.items()},
                dy_is_half=host.is_half(self.dy),
                x_is_half=host.is_half(call.x),
            )
            cuda_target.launch(
                *(_CUBIN, f"{_CUBIN}_{call.activation}", device),
                min(workers, bound * sum(tasks)),
                host.THREADS,
                0,
                argument,
                [
                    *host.tensors_of(call, self.rows),
                    *(counters, self.dy, self.pre, *outputs.values()),
                ],
            )

    def _scratch(self, width: int, needed: bool) -> Tensor | None:
        shape = (self.call.x.shape[0], width)
        return self.call.x.new_empty(shape, dtype=torch.float16) if needed else None

    def _sums(self, lines: int, width: int, needed: bool) -> Tensor | None:
        return self.call.x.new_empty(lines, width, dtype=torch.float32) if needed else None


def _empty(tensor: Tensor, needed: bool) -> Tensor:
    return torch.empty(tensor.shape if needed else (0,), dtype=tensor.dtype, device=tensor.device)
