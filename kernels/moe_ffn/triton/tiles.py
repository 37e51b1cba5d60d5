"""Tile shapes of the Triton kernels: one row for each GPU generation and kind of operand.

A row comes from :func:`use_tiles`, else from the file that ``VLMO_TILES`` names (written by ``vlmo
tune``), else from TABLE. Nothing is measured here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from ... import target
from ..._backends.triton import OPERANDS, operands_of
from ...target import GENERATIONS, generation_of


@dataclass(frozen=True)
class Tile:
    """One kernel's tile: block_t x block_n results, block_k deep at a time."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    programs: int = 1  # resident on a multiprocessor, as registers and shared memory allow


@dataclass(frozen=True)
class Tiles:
    """The forward, the backward of the rows (also with ``recompute``), that of the weights."""

    forward: Tile
    rows: Tile
    recompute: Tile
    weights: Tile


# No row has been timed yet: no GPU has been at hand. They were chosen from what ptxas says, and
# tests/test_moe_ffn_compiled.py holds them to it: tensor cores in every product, no spill, shared
# memory within the limit. Wider tiles read less from L2 for each product (128 x 256: 11.7 bytes for
# 1000 FLOP; 128 x 128: 15.6), so each row has the widest that do not spill. Bytes spilt a thread by
# some that were rejected, for D 768, F 3072, bfloat16:
#
#   sm_90    recompute  128 x 256 x 64, 8 warps    1848
#   sm_100   recompute  128 x 256 x 64, 8 warps      32  (swiglu)
#   sm_100   weights    128 x 256 x 64, 8 warps     256
#   sm_80    recompute  128 x 128 x 32, 8 warps     240
#   sm_80    weights    128 x 256 x 32, 8 warps       8
#   sm_86    rows       64 x 64 x 32, 8 warps        64  (float32)
#   sm_100   weights    128 x 64 x 32, 8 warps       16  (float32)
#   sm_120   rows       64 x 64 x 32, 8 warps         8  (TF32)
#
# float32 without TF32 has no tensor cores, and small tiles keep its operands in registers.
_SINGLE = Tiles(
    forward=Tile(64, 64, 32, 8, 3),
    rows=Tile(64, 64, 32, 8, 3),
    recompute=Tile(64, 64, 32, 8, 3),
    weights=Tile(128, 64, 32, 8, 3),
)
TABLE: dict[tuple[str, str], Tiles] = {
    ("sm_80", "16-bit"): Tiles(
        forward=Tile(128, 256, 32, 8, 4),
        rows=Tile(128, 256, 32, 8, 4),
        recompute=Tile(64, 128, 32, 8, 4),
        weights=Tile(256, 128, 32, 8, 4),
    ),
    ("sm_86", "16-bit"): Tiles(
        forward=Tile(128, 128, 32, 8, 3),
        rows=Tile(128, 128, 32, 8, 3),
        recompute=Tile(64, 128, 32, 8, 4),
        weights=Tile(128, 128, 32, 8, 3),
    ),
    ("sm_90", "16-bit"): Tiles(
        forward=Tile(128, 256, 64, 8, 4),
        rows=Tile(128, 256, 64, 8, 4),
        recompute=Tile(128, 128, 64, 8, 4),
        weights=Tile(128, 256, 64, 8, 4),
    ),
    ("sm_100", "16-bit"): Tiles(
        forward=Tile(128, 256, 64, 8, 4),
        rows=Tile(128, 256, 64, 8, 4),
        recompute=Tile(128, 128, 64, 8, 4),
        weights=Tile(128, 128, 64, 8, 4),
    ),
    ("sm_120", "16-bit"): Tiles(
        forward=Tile(128, 128, 32, 8, 3),
        rows=Tile(128, 128, 32, 8, 3),
        recompute=Tile(128, 64, 32, 8, 3),
        weights=Tile(128, 128, 32, 8, 3),
    ),
    **{(name, "32-bit"): _SINGLE for name in GENERATIONS},
    ("sm_86", "32-bit"): replace(
        _SINGLE, rows=Tile(64, 64, 16, 8, 3), recompute=Tile(64, 64, 16, 8, 3)
    ),
    ("sm_120", "32-bit"): replace(_SINGLE, rows=Tile(64, 64, 32, 4, 3)),
    ("sm_100", "32-bit"): replace(_SINGLE, weights=Tile(64, 64, 32, 4, 4)),
}

INTERPRETED = Tiles(
    forward=Tile(32, 64, 32, 4, 1),
    rows=Tile(32, 64, 32, 4, 1),
    recompute=Tile(32, 64, 32, 4, 1),
    weights=Tile(32, 64, 32, 4, 1),
)

# A row of this name is for Triton's interpreter alone: no GPU ever takes it.
INTERPRETER = "interpreter"
FILE_VERSION = 1

_forced: Tiles | None = None


@contextlib.contextmanager
def use_tiles(tiles: Tiles) -> Iterator[None]:
    """Run every kernel inside the ``with`` block with ``tiles``, on any device; process-wide."""
    global _forced
    previous, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = previous


def choose(device: torch.device, dtype: torch.dtype) -> Tiles:
    """The row for a device and the dtype of the products' operands.

    Raises:
        ValueError: the file that ``VLMO_TILES`` names does not exist or is not as it must be.
    """
    if _forced is not None:
        return _forced
    path = os.environ.get("VLMO_TILES")
    if path:
        try:
            changed = os.stat(path).st_mtime_ns
        except OSError as error:
            raise ValueError(f"VLMO_TILES: {path}: {error.strerror}") from None
        row = _load_once(path, changed).get(key_of(device, dtype))
        if row is not None:
            return row
    return built_in(device, dtype)


def built_in(device: torch.device, dtype: torch.dtype) -> Tiles:
    """The row of this file, whatever the environment says."""
    if device.type == "cpu":
        return INTERPRETED
    return TABLE[key_of(device, dtype)]


def key_of(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Generation and kind of operand: what a row is found by."""
    if device.type == "cpu":
        return INTERPRETER, operands_of(dtype)
    capability = target.compute_capability(device)
    assert capability is not None, device
    return generation_of(capability), operands_of(dtype)


def load(path: str | os.PathLike[str]) -> dict[tuple[str, str], Tiles]:
    """The rows of a file of ``vlmo tune``, by generation and kind of operand.

    Raises:
        ValueError: it is not such a file, or holds something that is not known; names the field.
        OSError: it cannot be read.
    """
    rows = rows_of(path)
    return {(row["generation"], row["operands"]): _tiles(row["tiles"], str(path)) for row in rows}


def rows_of(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows as they are written, checked as by :func:`load`.

    What a row has ``measured`` is for people to read and may be anything.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    version = table.get("version") if isinstance(table, dict) else None
    if version != FILE_VERSION:
        raise ValueError(f"{path}: version: {version!r}, expected {FILE_VERSION}")
    _check_fields(table, ("version", "rows"), str(path))
    if not isinstance(table["rows"], list):
        raise ValueError(f"{path}: rows: expected a list")
    seen = set()
    for i, row in enumerate(table["rows"]):
        at = f"{path}: rows[{i}]"
        _check_fields(row, ("generation", "operands", "tiles", "measured"), at)
        for name, known in (("generation", (*GENERATIONS, INTERPRETER)), ("operands", OPERANDS)):
            if row[name] not in known:
                raise ValueError(f"{at}.{name}: {row[name]!r} is not one of {known}")
        key = row["generation"], row["operands"]
        if key in seen:
            raise ValueError(f"{at}.generation: a second row for {key[0]}, {key[1]}")
        seen.add(key)
        _tiles(row["tiles"], f"{at}.tiles")
    return table["rows"]


@functools.lru_cache(maxsize=8)
def _load_once(path: str, changed: int) -> dict[tuple[str, str], Tiles]:
    return load(path)


def _tiles(row: Any, at: str) -> Tiles:
    _check_fields(row, [field.name for field in fields(Tiles)], at)
    return Tiles(**{name: _tile(tile, f"{at}.{name}") for name, tile in row.items()})


def _tile(tile: Any, at: str) -> Tile:
    _check_fields(tile, [field.name for field in fields(Tile)], at)
    for name, value in tile.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{at}.{name}: {value!r} is not a positive integer")
        power = value & (value - 1) == 0
        if name.startswith("block_") and not (power and value >= 16):
            raise ValueError(f"{at}.{name}: {value} is not a power of two from 16")
        if name == "num_warps" and not power:
            raise ValueError(f"{at}.{name}: {value} is not a power of two")
    return Tile(**tile)


def _check_fields(found: Any, expected: Any, at: str) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{at}: expected an object, got {found!r}")
    for name in found:
        if name not in expected:
            raise ValueError(f"{at}.{name}: unknown field")
    for name in expected:
        if name not in found:
            raise ValueError(f"{at}.{name}: missing")
