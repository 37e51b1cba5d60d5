"""Random numbers that belong to a sample, not to the process that happens to make it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_STEP = np.uint64(0x9E3779B97F4A7C15)


class Draw(NamedTuple):
    """One sample to make, and the seed of everything that is random about it.

    Augmentation takes its random numbers from ``seed``, and so does the masking of the sample's
    words, whatever the worker, the rank and the batch it comes to.

    Attributes:
        index: of the sample in its data set.
        seed: 0 .. 2**63 - 1.
        spares: samples to take in its place, in order, if it cannot be read.
    """

    index: int  # type: ignore[assignment]  # tuple.index finds members, which nobody asks for
    seed: int
    spares: tuple[int, ...] = ()

    @classmethod
    def of(cls, item: Draw | int) -> Draw:
        """``item`` itself, or the draw of a plain index, with seed 0."""
        return item if isinstance(item, Draw) else cls(int(item), 0)


def hashed(*parts: ArrayLike) -> np.ndarray:
    """Seeds int64 0 .. 2**63 - 1 that tell apart all combinations of some whole numbers.

    Args:
        parts: whole numbers or arrays of them, which broadcast; their order counts.
    """
    return (_mixed(*parts) >> np.uint64(1)).astype(np.int64)


def uniform(
    seeds: ArrayLike,  # [B]
    streams: int,
    length: int,
) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [streams, B, length].

    A row depends on its own seed alone, and is the beginning of a longer row of the same seed.
    """
    rows = np.asarray(seeds, dtype=np.int64)[:, None]
    stream = np.arange(streams)[:, None, None]
    bits = _mixed(rows, stream, np.arange(length))
    return (bits >> np.uint64(11)) * 2.0**-53


def _mixed(*parts: ArrayLike) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014) over the parts, one after the other."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _finalised(state + _STEP + np.asarray(part).astype(np.uint64))
    shape = np.broadcast_shapes(*(np.shape(part) for part in parts))
    return state.reshape(shape)


def _finalised(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
