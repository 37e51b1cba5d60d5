"""Relative position bias: a learned table, and the index of its row for each (query, key) pair."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..constants import Constants

_TEXT_SPECIALS = 3  # CLS to any, any to CLS, CLS to CLS; the image has three as well
_CROSS = 2  # text to image, image to text


class RelativePositionIndex(Constants):
    """The row of a bias table for each (query, key) pair.

    This is a module without parameters, so that its matrix moves with the model that owns it. It
    adds nothing to the state dict, and ``to_empty`` restores its values (:class:`Constants`).

    Kernels seldom read the matrix. They compute the entries of *regular* keys:
    ``matrix[q, k] = factor[q] * column[k] + offset[q]`` for every query q, with a factor of 0 or 1.
    All patches of an image are regular, or all words of a text: image offsets are u(q) - u(k) with
    u = y (2 W - 1) + x. The constructor finds and verifies the regular keys of any matrix.

    Attributes:
        matrix: ``[N, N]`` int32, row = query, column = key.
        affine: ``[N, 4]`` int32: offset and factor as a query, column as a key, and 1 if the key is
            regular.
        short: ``[N, P]`` int16 with P the next multiple of 8: the matrix for 16-byte loads, as
            unsigned numbers; ``[0, 0]`` if its entries do not fit 16 bits.
        entries: number of rows that the table must have.
    """

    matrix: Tensor
    affine: Tensor
    _pairs: Tensor  # short as int32: neither gloo nor NCCL broadcasts int16 buffers

    def __init__(self, matrix: Tensor, entries: int):
        """Copy any index matrix with entries in ``0..entries-1``.

        Raises:
            TypeError: ``matrix`` is not an integer tensor.
            ValueError: it is not square, has no values (on the meta device), or has an entry
                outside ``0..entries-1``.
        """
        super().__init__()
        if not isinstance(matrix, Tensor) or matrix.dtype.is_floating_point:
            raise TypeError("matrix: expected an integer tensor")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix: shape {tuple(matrix.shape)} is not square")
        if matrix.is_meta:
            raise ValueError("matrix: on the meta device, it has no values; make it on the CPU")
        if matrix.numel():
            low, high = (int(bound) for bound in matrix.aminmax())
            if low < 0 or high >= entries:
                value = low if low < 0 else high
                raise ValueError(f"matrix: value {value} is outside 0..{entries - 1}")
        self.entries = entries
        values = matrix.to("cpu", torch.int32, copy=True)
        # Under torch.device("meta"), the buffers of an index that VLMo builds are meta tensors too.
        device = torch.get_default_device() if matrix.device.type == "cpu" else matrix.device
        self.register_constant("matrix", values, device)
        self.register_constant("affine", _affine(values), device)
        self.register_constant("_pairs", _pairs(values, entries), device)

    @property
    def short(self) -> Tensor:
        return self._pairs.view(torch.int16)

    def extra_repr(self) -> str:
        return f"length={self.matrix.shape[0]}, entries={self.entries}"

    @staticmethod
    def table_entries(grid: int | tuple[int, int], text_capacity: int) -> int:
        """Rows of VLMo's table: image offsets, text offsets, special rows, two cross-modal rows.

        There are 1126 for a 14 x 14 grid and a text capacity of 196.
        """
        return _image_entries(_pair(grid)) + 2 * text_capacity + _CROSS

    @classmethod
    def image(cls, grid: int | tuple[int, int], text_capacity: int = 196) -> RelativePositionIndex:
        """The index of an image-only sequence [CLS, patches row by row]: N = height * width + 1."""
        with torch.device("cpu"):
            matrix = _image_matrix(_pair(grid))
        return cls(matrix, cls.table_entries(grid, text_capacity))

    @classmethod
    def text(
        cls, grid: int | tuple[int, int], length: int, text_capacity: int = 196
    ) -> RelativePositionIndex:
        """The index of a text-only sequence [CLS, tokens]: N = length.

        The image rows for ``grid`` precede the text rows in the table.
        """
        with torch.device("cpu"):
            matrix = _text_matrix(_pair(grid), length, text_capacity)
        return cls(matrix, cls.table_entries(grid, text_capacity))

    @classmethod
    def joint(
        cls, grid: int | tuple[int, int], text_length: int, text_capacity: int = 196
    ) -> RelativePositionIndex:
        """The index of VLMo's joint sequence, text first: N = text_length + height * width + 1.

        All cross-modal pairs share two more rows: one for text queries, one for image queries
        (``build_relative_position_embed`` in ``vlmo_module.py`` of unilm).
        """
        pair = _pair(grid)
        cross = _image_entries(pair)
        with torch.device("cpu"):
            text = _text_matrix(pair, text_length, text_capacity)
            image = _image_matrix(pair)
            right = torch.full((text.shape[0], image.shape[0]), cross)
            left = torch.full((image.shape[0], text.shape[0]), cross + 1)
            matrix = torch.cat([torch.cat([text, right], 1), torch.cat([left, image], 1)])
        return cls(matrix, cls.table_entries(grid, text_capacity))


class RelativePositionBias(NamedTuple):
    """The bias ``table[index.matrix]`` that :func:`vlmo.kernels.shared_attention` adds to scores.

    Attributes:
        table: ``[index.entries, H]``, any strides. For VLMo's model-wide table
            ``[entries, layers * H]``, ``table.view(entries, layers, H).unbind(1)`` gives the table
            of each layer, without a copy in the forward and with a single stack in the backward.
        index: the row for each (query, key) pair.
    """

    table: Tensor
    index: RelativePositionIndex


def _affine(matrix: Tensor) -> Tensor:
    """:attr:`RelativePositionIndex.affine`, inferred from the last query and two keys."""
    affine = matrix.new_zeros(matrix.shape[0], 4)
    if matrix.numel() == 0:
        return affine
    last, neighbour, column = matrix[:, -1], matrix[:, max(len(matrix) - 2, 0)], matrix[-1]
    factor = (last != neighbour).to(torch.int32)
    offset = last - factor * column[-1]
    affine[:, 0], affine[:, 1], affine[:, 2] = offset, factor, column
    affine[:, 3] = (matrix == factor[:, None] * column + offset[:, None]).all(0)
    return affine


def _pairs(matrix: Tensor, entries: int) -> Tensor:
    """The matrix with two 16-bit entries in each int32."""
    if entries > 2**16 or not matrix.numel():
        return matrix.new_empty(0, 0)
    padding = -matrix.shape[1] % 8
    # Numbers from 2^15 on wrap around; the kernels interpret the bits as unsigned.
    return nn.functional.pad(matrix, (0, padding)).to(torch.int16).view(torch.int32)


def _pair(grid: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (grid, grid) if isinstance(grid, int) else grid
    if height < 1 or width < 1:
        raise ValueError(f"grid: {grid} has no patch")
    return height, width


def _image_entries(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def _with_specials(inner: Tensor, last: int) -> Tensor:
    """Add a row and a column for CLS to ``inner``; ``last`` is the table row of (CLS, CLS)."""
    matrix = inner.new_empty(inner.shape[0] + 1, inner.shape[1] + 1)
    matrix[1:, 1:] = inner
    matrix[0, :] = last - 2
    matrix[:, 0] = last - 1
    matrix[0, 0] = last
    return matrix


def _image_matrix(grid: tuple[int, int]) -> Tensor:
    """Offsets query minus key, row-major over (dy, dx), as in BEiT."""
    height, width = grid
    position = torch.arange(height * width)
    y, x = position // width, position % width
    dy = y[:, None] - y[None, :] + height - 1
    dx = x[:, None] - x[None, :] + width - 1
    return _with_specials(dy * (2 * width - 1) + dx, _image_entries(grid) - 1)


def _text_matrix(grid: tuple[int, int], length: int, capacity: int) -> Tensor:
    """Offsets key minus query: the sign is opposite to that of images, as in unilm."""
    if not 1 <= length <= capacity:
        raise ValueError(f"text length: {length} is not within 1..{capacity} (text_capacity)")
    image = _image_entries(grid)
    position = torch.arange(1, length)
    inner = image + capacity + position[None, :] - position[:, None]
    return _with_specials(inner, image + 2 * capacity + _CROSS - 1)
