"""Adapts the tensors of a checkpoint to a model of another resolution, text length or task.

A published checkpoint is tied to one patch grid: base and large by the image rows of the relative
position table, base_plus by its learned positions. Both resizing functions reproduce unilm, the
reference implementation, number for number, so that fine-tuning at another resolution starts from
the same weights.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.checkpoint.formats import TABLE
from vlmo.model.config import VLMoConfig

POSITIONS = "transformer.pos_embed"
TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"
TOKEN_TYPES = "token_type_embeddings.weight"

# Rows of the relative position table after the image offsets that also belong to the image: [CLS]
# to any patch, any patch to [CLS], [CLS] to itself.
IMAGE_SPECIAL_ROWS = 3


def table_tail(text_capacity: int) -> int:
    """Number of rows of the relative position table that do not depend on the grid.

    They are the three special rows of the image, ``2 * text_capacity`` text rows, and the two rows
    for text to image and image to text.
    """
    return IMAGE_SPECIAL_ROWS + 2 * text_capacity + 2


def grid_of_offsets(rows: int) -> int | None:
    """Side ``w`` of the grid with ``rows == (2 * w - 1) ** 2`` offsets; None if there is none."""
    if rows < 1:
        return None
    side = math.isqrt(rows)
    return (side + 1) // 2 if side * side == rows and side % 2 else None


def grid_of_patches(patches: int) -> int | None:
    """Side ``w`` of the grid with ``patches == w * w``; None if there is none."""
    if patches < 1:
        return None
    side = math.isqrt(patches)
    return side if side * side == patches else None


def geometric_offsets(source: int, target: int) -> list[float]:
    """Positions of ``source`` known offsets on an axis of ``target`` integer offsets, as in BEiT.

    The distances from zero grow as a geometric series whose ratio makes the last one reach the end
    of the new axis, so near offsets keep their distance in patches and far ones are stretched. The
    ratio is searched within [1.01, 1.5], as in unilm: beyond either end the source covers more or
    less than the new axis, and the spline is cropped or extended by a constant.

    Args:
        source: number of offsets on one axis of the file's table, odd.
        target: number of offsets on one axis of the model's table, odd.

    Returns:
        ``source`` increasing positions, symmetric about 0.
    """
    half = source // 2
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2.0
        if (1.0 - ratio**half) / (1.0 - ratio) > target // 2:
            high = ratio
        else:
            low = ratio
    distances: list[float] = []
    distance = 1.0
    for power in range(half):
        distances.append(distance)
        distance += ratio ** (power + 1)
    return [-d for d in reversed(distances)] + [0.0] + distances


def resize_relative_table(
    table: Tensor,  # [(2 * w - 1) ** 2 + tail, C]
    grid: int,
    *,
    tail: int,
) -> Tensor:
    """Resample the image offsets of a relative position table to a ``grid`` x ``grid`` image.

    Source: BEiT's fine-tuning code, which unilm's ``vlmo_module.py`` uses. It calls SciPy's
    ``interp2d``, which has been removed; ``RectBivariateSpline`` without smoothing gives bitwise
    equal results.

    Args:
        table: relative position bias, any floating dtype; ``C`` is heads times blocks.
        grid: patches along one side of the new image.
        tail: number of last rows, which are copied unchanged.

    Returns:
        ``[(2 * grid - 1) ** 2 + tail, C]``, float32 (the table itself if the grid is the same).

    Raises:
        ValueError: the number of rows before ``tail`` is not the square of an odd number, or is 1,
            which is too few for a spline.
    """
    # scipy.interpolate takes longer to import than the rest of vlmo, and is rarely needed.
    from scipy.interpolate import RectBivariateSpline

    rows, columns = table.shape
    source_grid = grid_of_offsets(rows - tail)
    if source_grid is None:
        raise ValueError(f"{rows} rows less a tail of {tail} are no (2 * w - 1) ** 2 offsets")
    if source_grid == grid:
        return table
    if source_grid == 1:
        raise ValueError(f"a 1 x 1 grid holds one offset, too few for a {grid} x {grid} grid")
    source, target = 2 * source_grid - 1, 2 * grid - 1
    known = geometric_offsets(source, target)
    wanted = torch.arange(-(target // 2), target // 2 + 1, dtype=torch.float64).numpy()
    degree = min(3, source - 1)
    offsets = table[: rows - tail].float().T.reshape(columns, source, source).numpy()
    resampled = [
        torch.from_numpy(
            RectBivariateSpline(known, known, offsets[c].T, kx=degree, ky=degree, s=0)(
                wanted, wanted
            ).T.copy()
        )
        for c in range(columns)
    ]
    image = torch.stack(resampled, dim=-1).float().reshape(target * target, columns)
    return torch.cat([image, table[rows - tail :].float()])


def resize_absolute_positions(
    positions: Tensor,  # [1, kept + w * w, D]
    grid: int,
    *,
    kept: int = 1,
) -> Tensor:
    """Resample learned patch positions to a ``grid`` x ``grid`` image; the first rows are kept.

    Args:
        positions: any floating dtype.
        grid: patches along one side of the new image.
        kept: number of rows before those of the patches: [CLS], for BEiT-3 after two unused ones.

    Returns:
        ``[1, kept + grid * grid, D]``, float32 (``positions`` itself if the grid is the same),
        bicubic with ``align_corners=False`` as in unilm.

    Raises:
        ValueError: the number of rows after the first ones is not a square.
    """
    side = grid_of_patches(positions.shape[1] - kept)
    if side is None:
        raise ValueError(f"{positions.shape[1]} rows are not {kept} and a square of patches")
    if side == grid:
        return positions
    width = positions.shape[2]
    first, patches = positions.float().split([kept, side * side], dim=1)
    square = patches.reshape(1, side, side, width).permute(0, 3, 1, 2)
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([first, square.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def fit_tensor(
    key: str,
    value: Tensor,
    target: Tensor,
    config: VLMoConfig,
    *,
    beit: bool = False,
) -> tuple[Tensor, str | None] | None:
    """Convert a checkpoint's tensor to the shape that the model needs.

    Args:
        key: key in unilm's state dict.
        value: the file's tensor.
        target: the model's tensor; read only for text positions that the file lacks.
        config: configuration of the model.
        beit: ``value`` comes from BEiT, whose table has image rows only.

    Returns:
        The tensor in the shape of ``target`` and a description of the conversion (None if the shape
        was equal), or None if it cannot be converted or has no values.
    """
    if value.is_meta or value.is_floating_point() != target.is_floating_point():
        return None
    if value.shape == target.shape:
        return value, None
    if value.dim() != target.dim() or value.shape[-1:] != target.shape[-1:]:
        return None
    fitted = None
    if key == TABLE:
        fitted = _fit_table(value, config, beit)
    elif key == POSITIONS and grid_of_patches(value.shape[1] - 1):
        resized = resize_absolute_positions(value.cpu(), config.grid)
        fitted = resized, f"bicubic to a {config.grid} x {config.grid} grid"
    elif key == TEXT_POSITIONS:
        fitted = _fit_text_positions(value, target, config)
    elif key == TOKEN_TYPES:
        fitted = _fit_token_types(value, target)
    return fitted if fitted and fitted[0].shape == target.shape else None


def _fit_table(value: Tensor, config: VLMoConfig, beit: bool) -> tuple[Tensor, str] | None:
    """The relative position table for the model's grid; None if its rows fit no grid."""
    full = table_tail(config.text_capacity)
    tail = IMAGE_SPECIAL_ROWS if beit else full
    grid = grid_of_offsets(value.shape[0] - tail)
    if grid is None or grid == 1 != config.grid:
        return None
    how = []
    if grid != config.grid:
        value = resize_relative_table(value.cpu(), config.grid, tail=tail)
        how.append(f"geometric-grid cubic spline, grid {grid} to {config.grid}")
    if beit:
        value = torch.cat([value, value.new_zeros(full - tail, value.shape[1])])
        how.append("image rows of all layers side by side, text and cross rows zero")
    return value, "; ".join(how)


def _fit_text_positions(
    value: Tensor, target: Tensor, config: VLMoConfig
) -> tuple[Tensor, str] | None:
    """The first rows of the text positions; None if the model would use rows the file lacks."""
    rows, wanted = value.shape[0], target.shape[0]
    if rows > wanted:
        return value[:wanted], f"first {wanted} rows"
    if config.absolute_position:
        return None
    own = target[rows:].to(value)
    how = f"rows {rows} to {wanted - 1} kept, which the model does not use"
    return torch.cat([value, own]), how


def _fit_token_types(value: Tensor, target: Tensor) -> tuple[Tensor, str] | None:
    """Token types with or without NLVR2's second image; None for any other change."""
    rows = value.shape[0], target.shape[0]
    if rows == (2, 3):
        return torch.cat([value, value[1:]]), "row 2 (second image) copied from row 1 (image)"
    if rows == (3, 2):
        return value[:2], "first two rows, without the second image of NLVR2"
    return None
