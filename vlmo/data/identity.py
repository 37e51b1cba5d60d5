"""Fingerprints of data, and which samples show the same picture, without decoding pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def fingerprint(parts: Iterable[pa.Array | pa.ChunkedArray | np.ndarray | bytes]) -> str:
    """16 hex digits that identify some values, independent of Arrow's chunks and integer widths.

    Args:
        parts: numbers, texts, bytes, and lists of them; their order matters. None is a distinct
            value.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, pa.ChunkedArray):
            _feed(digest, part.chunks)
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            _feed(digest, [pa.array(part)])
    return digest.hexdigest()


def _feed(digest: hashlib.blake2b, chunks: Sequence[pa.Array]) -> None:
    """Hash the chunks in sequence: first the lengths of all values, then their contents."""
    kinds = {chunk.type for chunk in chunks}
    if not kinds:
        return
    (kind,) = kinds
    if pa.types.is_dictionary(kind):
        _feed(digest, [chunk.dictionary_decode() for chunk in chunks])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        _feed_numbers(digest, [pc.list_value_length(chunk) for chunk in chunks], pa.int64())
        _feed(digest, [chunk.flatten() for chunk in chunks])
    elif _is_text(kind):
        _feed_numbers(digest, [pc.binary_length(chunk) for chunk in chunks], pa.int64())
        for chunk in chunks:
            wide = chunk.cast(pa.large_binary())
            ends = np.frombuffer(wide.buffers()[1], np.int64)[wide.offset :][: len(wide) + 1]
            if len(wide) and ends[-1] > ends[0]:
                digest.update(memoryview(wide.buffers()[2])[ends[0] : ends[-1]])
    else:
        _feed_numbers(digest, chunks, pa.float64() if pa.types.is_floating(kind) else pa.int64())


def _feed_numbers(digest: hashlib.blake2b, chunks: Sequence[pa.Array], kind: pa.DataType) -> None:
    for chunk in chunks:
        digest.update(chunk.is_valid().to_numpy(zero_copy_only=False).tobytes())
    for chunk in chunks:
        digest.update(pc.fill_null(chunk.cast(kind), 0).to_numpy().tobytes())


def _is_text(kind: pa.DataType) -> bool:
    tests = (pa.types.is_string, pa.types.is_large_string)
    return any(is_kind(kind) for is_kind in (*tests, pa.types.is_binary, pa.types.is_large_binary))


def numbered(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Numbers int64 [N] from 0, equal for equal values; every null gets a number of its own."""
    if isinstance(values, pa.ChunkedArray):
        values = pa.concat_arrays(values.chunks) if values.chunks else pa.array([], values.type)
    found = pc.fill_null(values.dictionary_encode().indices, -1).to_numpy().astype(np.int64)
    missing = np.flatnonzero(found < 0)
    found[missing] = found.max(initial=-1) + 1 + np.arange(len(missing))
    return found


def same_pictures(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Merge two numberings of samples: connected components of equal numbers, int64 [N].

    Two samples get the same number if they agree in either numbering, directly or through a chain
    of other samples.

    Args:
        first, second: int64 [N], numbered from 0, such as the numbers of files and of image_ids.
    """
    offset = int(first.max(initial=-1)) + 1
    size = offset + int(second.max(initial=-1)) + 1
    links = coo_array((np.ones(len(first), bool), (first, offset + second)), (size, size))
    return connected_components(links, directed=False)[1].astype(np.int64)[first]


def none_if_different(keys: np.ndarray) -> np.ndarray | None:
    """The keys, or None if no two are equal."""
    return None if len(np.unique(keys)) == len(keys) else keys


def relative(paths: Iterable[str], folder: str) -> list[str]:
    """Paths relative to a folder."""
    folders: dict[str, str] = {}
    found = []
    for path in paths:
        above, name = os.path.split(path)
        if above not in folders:
            folders[above] = os.path.relpath(above, folder)
        found.append(os.path.join(folders[above], name))
    return found
