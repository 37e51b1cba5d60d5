"""Counts the variants of the Triton kernels that a training compiles, without a GPU.

``python tests/kernels/variants.py`` prints a JSON object with the number of variants of each kernel
that steps of many lengths need, for each kind of batch. Run without TRITON_INTERPRET; nothing is
compiled.
"""

import contextlib
import json
from collections import defaultdict
from unittest import mock

import torch
from triton import knobs
from triton.runtime import driver

from compiled import NoDriver
from vlmo.kernels import (
    ModalityRouting,
    RelativePositionBias,
    RelativePositionIndex,
    moe_ffn,
    shared_attention,
)
from vlmo.kernels._backends import triton_launch
from vlmo.kernels._backends.triton import compile_options
from vlmo.kernels.attention.triton import arguments as attention_launch
from vlmo.kernels.moe_ffn.triton import arguments as host

DIM, HEADS, HIDDEN, PATCHES, TEXT = 48, 3, 80, 9, 16
IMAGE = PATCHES + 1
# Text lengths of the sequences of each step: single sequences, lengths of 1, and numbers of tokens
# and of sequences and longest lengths that are and are not divisible by 16.
TEXTS = [[1], [16], [5], [3, 7], [1, 1, 1], [6] * 16, [16] * 16, [7, 9], [2] * 48]


def new(*shape):
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


class Layer:
    """VLMo's attention and its feed-forward layer, forward and backward."""

    def __init__(self) -> None:
        self.index = RelativePositionIndex.joint(3, TEXT)
        self.table = torch.zeros(self.index.entries, HEADS, requires_grad=True)

    def attend(self, *leading, biased=True, **options) -> None:
        bias = RelativePositionBias(self.table, self.index) if biased else None
        qkv = new(*leading, 3, HEADS, DIM // HEADS)
        out = shared_attention(qkv, bias=bias, backend="triton", **options)
        out.sum().backward()

    def feed(self, routing, experts, *leading) -> None:
        """Run with and without stochastic depth, which has a factor for each token."""

        def each(*shape):
            return [new(*shape) for _ in range(experts)]

        for token_scale in (None, torch.ones(leading)):
            x = new(*leading, DIM)
            y = moe_ffn(
                x,
                routing,
                each(HIDDEN, DIM),
                each(DIM, HIDDEN),
                **dict(b1=each(HIDDEN), b2=each(DIM), norm="layer", norm_weight=each(DIM)),
                **dict(norm_bias=each(DIM), layer_scale=new(DIM), residual=x),
                token_scale=token_scale,
                backend="triton",
            )
            y.sum().backward()


def packed(layer: Layer, texts: list[int]) -> None:
    """Texts alone, images alone, and both, for one expert or two."""
    one, none = [1] * len(texts), [0] * len(texts)
    for words, pictures in ((texts, none), (none, one), (texts, one)):
        lengths = [word + picture * IMAGE for word, picture in zip(words, pictures, strict=True)]
        tokens = sum(lengths)
        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        # Rows of the index start at 0 for the tokens of a text, at TEXT for those of an image.
        places = [
            part
            for word, picture in zip(words, pictures, strict=True)
            for part in (torch.arange(word), torch.arange(TEXT, TEXT + picture * IMAGE))
        ]
        where = dict(positions=torch.cat(places).int(), distinct=True)
        layer.attend(tokens, offsets=offsets, max_length=max(lengths), **where)
        layer.feed(ModalityRouting.segments([(0, tokens)]), 1, tokens)
        if words is texts and pictures is one:
            runs = [[(0, word), (1, IMAGE)] for word in words]
            layer.feed(ModalityRouting.packed(runs, num_experts=2), 2, tokens)


def padded(layer: Layer, texts: list[int]) -> None:
    """Joint sequences of one length, which varies if there is no bias."""
    batch = len(texts)
    mask = torch.ones(batch, TEXT + IMAGE, dtype=torch.bool)
    layer.attend(batch, TEXT + IMAGE, key_mask=mask)
    length = max(texts) + IMAGE
    layer.attend(batch, length, biased=False, causal=True)
    routing = ModalityRouting.segments([(0, max(texts)), (1, IMAGE)])
    layer.feed(routing, 2, batch, length)


def main() -> None:
    driver.set_active(NoDriver("sm_90"))
    found: dict[str, dict[str, set]] = {}

    def ask(kernel, device, programs, tile, *args):
        kernel.run(*args, grid=(programs,), warmup=True, **compile_options(tile))

    def note(key, fn, **facts):
        kind[fn.jit_function.fn.__name__].add(key)
        return True  # do not compile it

    with contextlib.ExitStack() as stack:
        for change in (
            mock.patch.object(triton_launch, "launch", ask),
            mock.patch.object(host, "workers_on", return_value=132),
            mock.patch.object(attention_launch.target, "multiprocessors", return_value=132),
            mock.patch("vlmo.kernels._backends.triton.why_not", return_value=None),
            mock.patch.object(knobs.runtime, "jit_cache_hook", note),
        ):
            stack.enter_context(change)
        layer = Layer()
        for steps in (packed, padded):
            kind = found[steps.__name__] = defaultdict(set)
            for texts in TEXTS:
                steps(layer, texts)
    counts = {name: {k: len(v) for k, v in kind.items()} for name, kind in found.items()}
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
