"""Buffers whose values are computed from a module's arguments, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Constants(nn.Module):
    """A module with computed buffers, which therefore need not be in a state dict.

    :meth:`torch.nn.Module.to_empty` restores their values. A module that contains such modules must
    call :meth:`materialise` after ``load_state_dict(..., assign=True)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, Tensor] = {}  # on the CPU, where a model may share them

    def register_constant(
        self, name: str, value: Tensor, device: torch.device, *, persistent: bool = False
    ) -> None:
        """Add a buffer on ``device`` with the value of a CPU tensor, which must not be modified."""
        self._values[name] = value
        self.register_buffer(name, value.to(device), persistent=persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Constants:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in self._values.items():
            buffer = self._buffers[name]
            assert buffer is not None
            if buffer is not before[name] and not buffer.is_meta:
                self._buffers[name] = value.to(buffer.device)
        return self

    def materialise(self, device: torch.device) -> None:
        """Recreate the buffers that are on the meta device on ``device``."""
        for name, value in self._values.items():
            buffer = self._buffers[name]
            assert buffer is not None
            if buffer.is_meta:
                self._buffers[name] = value.to(device)
