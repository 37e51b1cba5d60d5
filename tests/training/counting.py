"""Counts the cost of a training step: token-layers, launches, embedded images, waits."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from vlmo.kernels import nn as multiway
from vlmo.model import layers, layout

_WAITS = {
    getattr(Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "cpu", "nonzero"),
        *("__bool__", "__int__", "__float__", "__index__"),
    )
}


class OnDevice(Tensor):
    """A tensor that counts synchronisations with the GPU; results computed from it do, too."""

    waits = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        leaves = func in _WAITS or (func is Tensor.to and "cpu" in args)
        if leaves:
            OnDevice.waits += 1
            args = [plain(arg) if isinstance(arg, OnDevice) else arg for arg in args]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def plain(tensor: Tensor) -> Tensor:
    return tensor.as_subclass(Tensor)


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count token-layers, launches of both operations, embedded images and waits in the block.

    A launch is a call of one of the two operations.
    """
    counts: Counter = Counter()
    OnDevice.waits = 0

    def wrapped(function, tokens):
        def call(x, *args, **kwargs):
            counts["launches"] += 1
            counts["token_layers"] += tokens(x)
            return function(x, *args, **kwargs)

        return call

    embed = layers.PatchEmbedding.forward

    def embed_counting(self, image):
        counts["images_embedded"] += len(image)
        return embed(self, image)

    with (
        mock.patch.object(
            multiway, "moe_ffn", wrapped(multiway.moe_ffn, lambda x: x.shape[:-1].numel())
        ),
        mock.patch.object(
            layout, "shared_attention", wrapped(layout.shared_attention, lambda x: 0)
        ),
        mock.patch.object(layers.PatchEmbedding, "forward", embed_counting),
    ):
        yield counts
    counts["waits"] = OnDevice.waits
