r"""Floating-point operations of a training step, from the model's sizes and the texts' lengths.

Only matrix products count, with two operations per multiplication and addition. With D the width, F
the hidden width of an expert, L blocks, t tokens of a pass and n_i of its sequence i:

.. math:: block = 2 t D (3 D + D) + 4 t D F + 4 D \sum_i n_i^2

These are the projections of attention, the expert, and attention scores and weighted values. The
last block applies its output projection and expert only to the tokens that a head reads: CLS, or
the masked words. The backward has two products for each of these: for the gradient of the input
and, if it is trained, of the weight. The total also includes the patch embedding (2 * 3 * 16^2 * D
per patch), the heads on the tokens that they read, and the cosines of the contrastive loss. The
last layer of BEiT-3 runs on all tokens.

Recomputation to save memory (activation checkpointing, micro-batches) and padding do not count, so
the operations divided by time and peak rate are the model FLOPs utilisation (MFU).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmo.model.beit3 import BEiT3Config
from vlmo.model.config import VLMoConfig

Trains = Callable[[str], bool]


@dataclass
class Flops:
    """Operations of the forward and the backward pass of a step."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        """Operations of both passes."""
        return self.forward + self.backward


def step_flops(
    config: VLMoConfig | BEiT3Config,
    text_lengths: Sequence[int],
    *,
    words: int = 0,
    others: int = 0,
    trains: Trains = lambda name: True,
) -> Flops:
    """Operations of one step of one process.

    Hard negative texts of matching are counted with the lengths of the batch's own texts, which
    they have on average.

    Args:
        config: configuration of the model.
        text_lengths: tokens of each text of the batch.
        words: number of masked tokens in the batch.
        others: images or texts of other processes that the contrastive loss compares with.
        trains: whether the parameter with a given name is trained.
    """
    if isinstance(config, BEiT3Config):
        return _BEiT3Step(config, list(text_lengths), others, trains).count()
    return _Step(config, list(text_lengths), words, others, trains).count()


def matching_flops(config: VLMoConfig, text_lengths: Sequence[int], images: int) -> int:
    """Operations of the forward pass that matches each text with an image.

    Args:
        config: configuration of the model.
        text_lengths: tokens of the text of each pair.
        images: number of different images among the pairs.
    """
    step = _Step(config, list(text_lengths), 0, 0, lambda name: False)
    step.patches(images)
    pairs = [length + step.image for length in text_lengths]
    step.fusion(pairs, read=len(pairs))
    step.linear(len(text_lengths), config.dim, config.dim, "pooler.dense.weight")
    step.linear(len(text_lengths), config.dim, 2, "itm_score.fc.weight")
    return step.flops.forward


class _Products:
    def __init__(
        self, config: VLMoConfig | BEiT3Config, texts: list[int], others: int, trains: Trains
    ):
        self.texts, self.others, self.trains = texts, others, trains
        self.dim, self.patch_values = config.dim, 3 * config.patch_size**2
        self.flops = Flops()
        self.image = config.grid**2 + 1

    def linear(
        self, rows: int, inputs: int, outputs: int, name: str, *, sends_back: bool = True
    ) -> None:
        product = 2 * rows * inputs * outputs
        self.flops.forward += product
        self.flops.backward += product * (sends_back + self.trains(name))

    def attention(self, sequences: Sequence[int]) -> None:
        """Add scores and weighted values of sequences with these lengths."""
        squares = sum(length**2 for length in sequences)
        self.flops.forward += 4 * self.dim * squares
        self.flops.backward += 8 * self.dim * squares

    def patches(self, images: int, name: str = "transformer.patch_embed.proj.weight") -> None:
        rows = images * (self.image - 1)
        self.linear(rows, self.patch_values, self.dim, name, sends_back=False)

    def cosines(self) -> None:
        """Add those of the contrastive loss, in both directions."""
        rows = len(self.texts)
        cosines = 2 * 2 * rows * (rows + self.others) * self.dim
        self.flops.forward += cosines
        self.flops.backward += 2 * cosines


class _BEiT3Step(_Products):
    def __init__(self, config: BEiT3Config, texts: list[int], others: int, trains: Trains):
        super().__init__(config, texts, others, trains)
        self.config = config

    def count(self) -> Flops:
        tasks, rows, dim = set(self.config.tasks), len(self.texts), self.dim
        pairs = [text + self.image for text in self.texts]
        if "irtr" in tasks:
            self._layers([*self.texts, *[self.image] * rows], images=rows)
            self.linear(rows, dim, dim, "language_head.weight")
            self.linear(rows, dim, dim, "vision_head.weight")
            self.cosines()
        if "vqa" in tasks:
            self._layers(pairs, images=rows)
            self.linear(rows, dim, dim, "pooler.dense.weight")
            self.linear(rows, dim, 2 * dim, "head.0.weight")
            self.linear(rows, 2 * dim, self.config.vqa_labels, "head.3.weight")
        if "nlvr2" in tasks:
            self._layers(pairs * 2, images=2 * rows)
            self.linear(rows, 4 * dim, 2 * dim, "head.dense1.weight")
            self.linear(rows, 2 * dim, 2, "head.dense2.weight")
        return self.flops

    def _layers(self, sequences: list[int], images: int) -> None:
        """Add all layers on sequences that contain so many images, and their patches."""
        dim, hidden = self.dim, self.config.hidden
        self.patches(images, "beit3.vision_embed.proj.weight")
        image = images * self.image
        for number in range(self.config.depth):
            name = f"beit3.encoder.layers.{number}."
            for expert, tokens in (("A", image), ("B", sum(sequences) - image)):
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    self.linear(tokens, dim, dim, f"{name}self_attn.{projection}.{expert}.weight")
                self.linear(tokens, dim, hidden, f"{name}ffn.{expert}.fc1.weight")
                self.linear(tokens, hidden, dim, f"{name}ffn.{expert}.fc2.weight")
            self.attention(sequences)


class _Step(_Products):
    def __init__(
        self, config: VLMoConfig, texts: list[int], words: int, others: int, trains: Trains
    ):
        super().__init__(config, texts, others, trains)
        self.config, self.words = config, words

    def count(self) -> Flops:
        tasks, rows = set(self.config.tasks), len(self.texts)
        dim, pair = self.config.dim, [text + self.image for text in self.texts]
        if tasks - {"textmlm"}:
            self.patches(rows * (2 if "nlvr2" in tasks else 1))
        if tasks & {"itc", "irtr"}:
            self._contrast()
        if "textmlm" in tasks:
            self._blocks(self.texts, sum(self.texts), 0, read=(self.words, 0))
            self._words()
        if "mlm" in tasks:
            self.fusion(pair, read=self.words)
            self._words()
        for task, passes, head in (("itm", 3, "itm_score"), ("vqa", 1, ""), ("nlvr2", 2, "")):
            if task in tasks:
                self.fusion(pair * passes, read=rows * passes)
                self.linear(rows * passes, dim, dim, "pooler.dense.weight")
                if head:
                    self.linear(rows * passes, dim, 2, f"{head}.fc.weight")
        if "vqa" in tasks:
            self._classifier("vqa_classifier", dim, self.config.vqa_labels)
        if "nlvr2" in tasks:
            self._classifier("nlvr2_classifier", 2 * dim, 2)
        return self.flops

    def _blocks(
        self,
        sequences: Sequence[int],
        text: int,
        image: int,
        *,
        vl: bool = False,
        start: int = 0,
        stop: int | None = None,
        read: tuple[int, int] | None = None,
    ) -> None:
        """Add blocks ``start`` to ``stop``, for ``text`` and ``image`` tokens in all sequences.

        ``read`` is the number of tokens of each modality that heads read from the last block.
        """
        dim, hidden = self.config.dim, int(self.config.dim * self.config.mlp_ratio)
        for number in range(start, self.config.depth if stop is None else stop):
            name = f"transformer.blocks.{number}."
            below = number < self.config.first_vl_block
            self._attention(name, "qkv", text, image, 3 * dim, below=below)
            self.attention(sequences)
            if number == self.config.depth - 1 and read is not None:
                text, image = read
            self._attention(name, "proj", text, image, dim, below=below)
            routed = (("text", text), ("imag", image))
            if vl and number >= self.config.first_vl_block:
                routed = (("vl", text + image), ("vl", 0))
            for expert, tokens in routed:
                self.linear(tokens, dim, hidden, f"{name}mlp_{expert}.fc1.weight")
                self.linear(tokens, hidden, dim, f"{name}mlp_{expert}.fc2.weight")

    def _attention(
        self, name: str, layer: str, text: int, image: int, outputs: int, *, below: bool
    ) -> None:
        own = "attn_text" if self.config.separate_attention and below else "attn"
        for attention, tokens in ((own, text), ("attn", image)):
            self.linear(tokens, self.config.dim, outputs, f"{name}{attention}.{layer}.weight")

    def fusion(self, pairs: list[int], *, read: int) -> None:
        """Add a pass over pairs with these lengths; heads read ``read`` text tokens in all."""
        images = len(pairs) * self.image
        self._blocks(pairs, sum(pairs) - images, images, vl=True, read=(read, 0))

    def _contrast(self) -> None:
        """Add texts alone and images alone, the top blocks twice with ITC, and their cosines."""
        rows, start = len(self.texts), self.config.first_vl_block
        streams = [*self.texts, *[self.image] * rows]
        tokens = sum(self.texts), rows * self.image
        tails = ["", "_vl"] if "itc" in self.config.tasks else [""]
        self._blocks(streams, *tokens, stop=start)
        for tail in tails:
            self._blocks(streams, *tokens, vl=bool(tail), start=start, read=(rows, rows))
            for stream in ("text", "image"):
                name = f"itc{tail}_{stream}_proj.fc.weight"
                self.linear(rows, self.config.dim, self.config.dim, name)
            self.cosines()

    def _words(self) -> None:
        dim = self.config.dim
        self.linear(self.words, dim, dim, "mlm_score.transform.dense.weight")
        self.linear(self.words, dim, self.config.vocab_size, "mlm_score.decoder.weight")

    def _classifier(self, name: str, inputs: int, outputs: int) -> None:
        hidden = 2 * self.config.dim
        self.linear(len(self.texts), inputs, hidden, f"{name}.0.weight")
        self.linear(len(self.texts), hidden, outputs, f"{name}.3.weight")
