"""The handwritten digits that scikit-learn includes, split by scan and enlarged.

1,797 real 8x8 scans with values 0..16 (UCI "Optical Recognition of Handwritten Digits"). A scan
belongs to one split only, so a model is never tested on a scan that it was trained on.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch

from vlmo.data.samples import SPLITS

HELD_OUT_SHARE = 0.15  # of each class, for val, and the same share for test


@functools.cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """All scans and their classes.

    Returns:
        scans uint8 [1797, 8, 8] with values 0..255, classes int64 [1797]; both read-only.

    Raises:
        ImportError: scikit-learn, which provides the scans, is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digit scenes need scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    scans = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    classes = digits.target.astype(np.int64)
    scans.setflags(write=False)
    classes.setflags(write=False)
    return scans, classes


@functools.cache
def split_scans(split: str) -> tuple[np.ndarray, ...]:
    """Scan numbers of one split.

    Within a class the scans are ordered by a hash of their number, not by a random generator, so
    the splits do not depend on the version of any library.

    Args:
        split: one of ``SPLITS``.

    Returns:
        Ten int64 arrays: the scan numbers of each class.

    Raises:
        ValueError: unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {SPLITS}")
    _, classes = load_scans()
    chosen = []
    for digit in range(10):
        members = sorted(np.flatnonzero(classes == digit).tolist(), key=_scan_hash)
        held_out = round(HELD_OUT_SHARE * len(members))
        bounds = {
            "test": (0, held_out),
            "val": (held_out, 2 * held_out),
            "train": (2 * held_out, len(members)),
        }
        chosen.append(np.array(members[slice(*bounds[split])], dtype=np.int64))
    return tuple(chosen)


@functools.lru_cache(maxsize=4)
def enlarged_scans(side: int) -> np.ndarray:
    """All scans resized bilinearly to ``side`` pixels: uint8 [1797, side, side], read-only."""
    scans, _ = load_scans()
    if side == scans.shape[-1]:
        return scans
    pixels = torch.from_numpy(scans.astype(np.float32)).unsqueeze(1)  # [1797, 1, 8, 8]
    enlarged = torch.nn.functional.interpolate(
        pixels, size=(side, side), mode="bilinear", align_corners=False
    )
    result = enlarged.squeeze(1).round().to(torch.uint8).numpy()
    result.setflags(write=False)
    return result


def _scan_hash(number: int) -> bytes:
    return hashlib.sha256(f"digit scan {number}".encode()).digest()
