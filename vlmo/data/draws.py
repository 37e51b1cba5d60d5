"""Random numbers that depend on the sample only, not on the process that prepares it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_STEP = np.uint64(0x9E3779B97F4A7C15)


class Draw(NamedTuple):
    """A sample to prepare, and the seed of everything random about it.

    Augmentation and the masking of the sample's words both take their random numbers from ``seed``,
    so they do not depend on the worker, the rank or the batch.

    Attributes:
        index: number of the sample in its data set.
        seed: 0 .. 2**63 - 1.
        spares: samples to use instead, in this order, if this one cannot be read.
    """

    index: int  # type: ignore[assignment]  # shadows tuple.index, which is not used
    seed: int
    spares: tuple[int, ...] = ()

    @classmethod
    def of(cls, item: Draw | int) -> Draw:
        """``item`` itself, or a draw with seed 0 for a plain index."""
        return item if isinstance(item, Draw) else cls(int(item), 0)


def hashed(*parts: ArrayLike) -> np.ndarray:
    """Hash tuples of integers to seeds, int64 0 .. 2**63 - 1; different tuples get different seeds.

    Args:
        parts: integers or arrays of integers, which broadcast; their order matters.
    """
    return (_mixed(*parts) >> np.uint64(1)).astype(np.int64)


def uniform(
    seeds: ArrayLike,  # [B]
    streams: int,
    length: int,
) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [streams, B, length].

    A row depends on its own seed only, and is a prefix of a longer row of the same seed.
    """
    rows = np.asarray(seeds, dtype=np.int64)[:, None]
    stream = np.arange(streams)[:, None, None]
    bits = _mixed(rows, stream, np.arange(length))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mixed(*parts: ArrayLike) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014) applied to the parts in sequence."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _finalised(state + _STEP + np.asarray(part).astype(np.uint64))
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts))
    return state.reshape(shape)


def _finalised(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
