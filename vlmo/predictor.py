"""Inference with a trained VLMo or BEiT-3 on images and texts.

from vlmo import Predictor
predictor = Predictor.load("run/")
predictor.answer("photo.jpg", "what colour is the car?")
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import Dataset

from vlmo.data.tokenizer import TextTokenizer
from vlmo.data.transforms import SquareTransform
from vlmo.device import chosen_device, chosen_dtype, require_backend
from vlmo.inputs import Picture, Pictures, Texts, decoded
from vlmo.inputs import pictures as pictures_of
from vlmo.inputs import texts as texts_of
from vlmo.model import layout
from vlmo.model.attention_maps import AttentionMaps, attention_weights
from vlmo.model.models import Model, fits_vocabulary, name_of
from vlmo.model.vlmo import VLMo
from vlmo.run_folder import load_model
from vlmo.tasks import heads
from vlmo.tasks.inference import device_of, even_batches, precision
from vlmo.tasks.retrieval import (
    Embeddings,
    Gallery,
    Shortlist,
    Shortlists,
    embed_images,
    embed_texts,
    matching_logits,
    shortlist,
)
from vlmo.tasks.retrieval import (
    rerank as rerank_lists,
)

_THREADS = 8  # that decode images


class Answer(NamedTuple):
    """An answer to a question about an image.

    Attributes:
        text: as in the model's list of answers.
        probability: probability that it is right; answers are scored independently, so these need
            not sum to 1.
    """

    text: str
    probability: float


class Hit(NamedTuple):
    """An image found for a text.

    Attributes:
        image: its index among the images.
        score: cosine similarity; after re-ranking, matching logit plus cosine.
    """

    image: int
    score: float


class Predictor:
    """A model with its vocabulary and answers, for inference on any number of images and texts.

    Images are paths, the bytes of image files, files opened for reading bytes, Pillow images, or
    uint8 arrays ``[H, W]``, ``[H, W, 1]``, ``[H, W, 3]`` or, for several images, ``[n, H, W, 3]``;
    they are resized to the model's square input. Several images or texts are passed as a list, a
    tuple, an array, a pandas Series or a generator. Texts longer than the model's text length are
    truncated, with a warning; blank texts are accepted, with a warning. Methods that pair images
    with texts broadcast a single one to all of the others. All methods work in batches and return
    tensors in float32 on the CPU. Every method raises ValueError for images and texts of other
    kinds, and FloatingPointError if the model's outputs are NaN or infinite.

    Args:
        model: put into evaluation mode.
        vocabulary: from :func:`vlmo.data.load_vocabulary`; None for a model that only sees images.
        answers: answers to visual questions, in the order of their ids.
        autocast: dtype of the model's matrix products; None for that of the parameters.
        batch_size: images, texts or pairs per batch.

    Attributes:
        model: as given.
        answers: as given.

    Raises:
        ValueError: ``batch_size`` is not positive, or the vocabulary or the answers differ in
            number from those of the model.
    """

    def __init__(
        self,
        model: Model,
        vocabulary: Tokenizer | None = None,
        answers: Sequence[str] | None = None,
        *,
        autocast: torch.dtype | None = None,
        batch_size: int = 64,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is not positive")
        if vocabulary is not None and not fits_vocabulary(
            model.config, vocabulary.get_vocab_size()
        ):
            raise ValueError(
                f"vocabulary: has {vocabulary.get_vocab_size()} tokens, the model has "
                f"{model.config.vocab_size}"
            )
        labels = model.config.vqa_labels
        if answers is not None and "vqa" in model.config.tasks and len(answers) != labels:
            raise ValueError(f"answers: {len(answers)} were given, the model has {labels}")
        self.model, self.answers = model.eval(), answers
        self.autocast, self.batch_size = autocast, batch_size
        self._transform = SquareTransform(model.config.image_size)
        self._vocabulary = vocabulary
        self._tokenizer = None
        if vocabulary is not None:
            self._tokenizer = TextTokenizer(vocabulary, model.config.max_text_length)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        vocabulary: str | os.PathLike[str] | None = None,
        answers: str | os.PathLike[str] | Sequence[str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        backend: str | None = None,
        batch_size: int = 64,
        **changes: Any,
    ) -> Predictor:
        """Load a run folder or a checkpoint, see :func:`vlmo.run_folder.load_model`.

        Args:
            source: run folder, or checkpoint of any layout.
            vocabulary: file for :func:`vlmo.data.load_vocabulary`; a run folder has its own.
            answers: answers to visual questions; the run folder of a VQA training has its own.
            device: "auto" for the GPU if there is one, "cpu", "cuda" or "cuda:1".
            dtype: dtype of the matrix products: "float32", "bfloat16" or "float16"; "auto" is
                float32 on the CPU and a 16-bit type on a GPU.
            backend: backend of the kernels; None for the first that can run.
            batch_size: images, texts or pairs per batch.
            changes: fields to change in the configuration of the checkpoint, e.g.
                ``image_size=480``.

        Raises:
            NotImplementedError: the backend cannot run here.
            ValueError: there is no such device, dtype or backend; and all errors of
                :func:`vlmo.run_folder.load_model`.
        """
        place = chosen_device(device)
        autocast = chosen_dtype(dtype, place)
        require_backend(backend, place, autocast)
        loaded = load_model(
            source, vocabulary=vocabulary, answers=answers, kernels=backend, **changes
        )
        model = loaded.model.to(place)
        return cls(
            model, loaded.vocabulary, loaded.answers, autocast=autocast, batch_size=batch_size
        )

    def has(self, *heads: str) -> bool:
        """Whether the model has at least one of these heads."""
        return bool(set(heads) & set(self.model.config.tasks))

    def read_images(self, images: Pictures) -> list[np.ndarray | OSError | ValueError]:
        """Read images and resize them, uint8 ``[S, S, 3]``, so that several methods can use them.

        For an image that cannot be read, the list holds the error that explains why.
        """
        shown = pictures_of("images", images)
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            return list(pool.map(self._read, itertools.repeat(shown), range(len(shown))))

    def _read(self, images: Sequence[Picture], number: int) -> np.ndarray | OSError | ValueError:
        try:
            return self._decoded(images, number).permute(1, 2, 0).numpy()
        except (OSError, ValueError) as error:
            return error

    @torch.no_grad()
    def embed_images(self, images: Pictures) -> Tensor:
        """Embed images with the dual encoder: unit vectors ``[n, D]``.

        Raises:
            FileNotFoundError: an image does not exist.
            ValueError: an image cannot be read, or the model has no retrieval head.
        """
        self._require("embed_images", "itc", "irtr")
        shown = pictures_of("images", images)
        batches = even_batches(range(len(shown)), self.batch_size)
        with self._precision():
            found = [embed_images(self.model, pixels) for pixels in self._pixels(shown, batches)]
        return self._joined(found, (self.model.config.dim,))

    @torch.no_grad()
    def embed_texts(self, texts: Texts) -> Tensor:
        """Embed texts with the dual encoder: unit vectors ``[n, D]``.

        Raises:
            ValueError: the model has no retrieval head, or there is no vocabulary.
        """
        self._require("embed_texts", "itc", "irtr")
        said = texts_of("texts", texts)
        found = []
        with self._precision():
            for rows in even_batches(range(len(said)), self.batch_size):
                words = self._words([said[row] for row in rows])
                found.append(embed_texts(self.model, words))
        return self._joined(found, (self.model.config.dim,))

    def similarity(self, images: Pictures, texts: Texts) -> Tensor:
        """Cosine similarity ``[texts, images]``; raises the errors of both embedding methods."""
        return self.embed_texts(texts) @ self.embed_images(images).T

    @torch.no_grad()
    def match(self, images: Pictures, texts: Texts) -> Tensor:
        """Probability ``[n]`` that an image and a text belong together, from the fusion encoder.

        Raises:
            FileNotFoundError: an image does not exist.
            ValueError: an image cannot be read, the numbers of images and texts do not match, the
                model has no matching head, or there is no vocabulary.
        """
        self._require("match", "itm")
        model = cast(VLMo, self.model)

        def matched(texts: layout.Texts, pixels: Tensor, places: Sequence[int]) -> Tensor:
            return matching_logits(model, texts, pixels, places)

        found = self._joined([*self._pairs(matched, images, texts)], (2,))
        return found.softmax(1)[:, 1]

    def answer(self, image: Picture, question: str, top: int = 1) -> list[Answer]:
        """The most likely answers to one question about one image, best first.

        Raises:
            ValueError: several images or questions were given, which :meth:`answer_all` accepts;
                and all errors of that method.
        """
        shown, said = pictures_of("image", image), texts_of("question", question)
        if len(shown) != 1 or len(said) != 1:
            raise ValueError(
                f"answer: {len(shown)} images and {len(said)} questions instead of one of each; "
                "answer_all() takes several"
            )
        return self.answer_all(shown, said, top)[0]

    @torch.no_grad()
    def answer_all(self, images: Pictures, questions: Texts, top: int = 1) -> list[list[Answer]]:
        """The ``top`` most likely answers to each question, best first.

        Raises:
            FileNotFoundError: an image does not exist.
            ValueError: an image cannot be read, the numbers of images and questions do not match,
                ``top`` is not positive, the model has no VQA head, or there is no vocabulary or no
                answers.
        """
        self._require("answer", "vqa")
        if self.answers is None:
            raise ValueError("answer: no names of the answers were given: load(..., answers=...)")
        if top < 1:
            raise ValueError(f"top: {top} is not positive")
        model, names = self.model, self.answers

        def logits(texts: layout.Texts, pixels: Tensor, places: Sequence[int]) -> Tensor:
            return heads.vqa_logits(
                model, texts, model.embed_image(pixels), torch.tensor([*places])
            )

        found = [
            part.sigmoid().topk(min(top, len(names)), dim=1)
            for part in self._pairs(logits, images, questions)
        ]
        return [
            [Answer(names[n], p) for n, p in zip(numbers, values, strict=True)]
            for part in found
            for numbers, values in zip(part.indices.tolist(), part.values.tolist(), strict=True)
        ]

    @torch.no_grad()
    def judge(self, images_0: Pictures, images_1: Pictures, statements: Texts) -> Tensor:
        """Probability ``[n]`` that a statement about two images is true (NLVR2).

        Raises:
            FileNotFoundError: an image does not exist.
            ValueError: an image cannot be read, the numbers of images and statements do not match,
                the model has no NLVR2 head, or there is no vocabulary.
        """
        self._require("judge", "nlvr2")
        first, second = pictures_of("images_0", images_0), pictures_of("images_1", images_1)
        said = texts_of("statements", statements)
        count = _common_length(images_0=first, images_1=second, statements=said)
        batches = even_batches(range(count), self.batch_size)
        first, second, said = (_spread(given, count) for given in (first, second, said))
        found = []
        pixels = zip(self._pixels(first, batches), self._pixels(second, batches), strict=True)
        with self._precision():
            for rows, (one, other) in zip(batches, pixels, strict=True):
                words = self._words([said[row] for row in rows])
                found.append(heads.nlvr2_logits(self.model, words, one, other))
        return self._joined(found, (2,)).softmax(1)[:, 1]

    @torch.no_grad()
    def attention(
        self,
        image: Picture | None = None,
        text: str | None = None,
        layer: int | None = None,
    ) -> AttentionMaps:
        """Attention weights between the tokens of a text and an image, for all layers or one.

        Text and image form one sequence, as in matching and question answering. The weights are
        computed in plain PyTorch, separately from the model's own attention.

        Args:
            image: one image; None for a text alone.
            text: one text; None for an image alone.
            layer: number of a layer; -1 is the last one, None stands for all of them.

        Returns:
            Weights ``[layers, heads, N, N]``, or ``[heads, N, N]`` for one layer, and a description
            of the N positions.

        Raises:
            FileNotFoundError: the image does not exist.
            ValueError: neither or several were given, the image cannot be read, there is no such
                layer, there is no vocabulary, or the model is a BEiT-3.
        """
        if not isinstance(self.model, VLMo):
            raise ValueError(
                f"attention: has no maps of {name_of(self.model.config)}, only of VLMo"
            )
        shown = [] if image is None else pictures_of("image", image)
        said = [] if text is None else texts_of("text", text)
        if not 0 < max(len(shown), len(said)) < 2:
            raise ValueError(
                f"attention: takes an image, a text or one of each, not {len(shown)} images and "
                f"{len(said)} texts"
            )
        depth = self.model.config.depth
        if layer is not None and not -depth <= layer < depth:
            raise ValueError(f"layer: {layer} is not within {-depth}..{depth - 1}")
        words = self._words(said) if said else None
        pixels = next(self._pixels(shown, [[0]])) if shown else None
        with self._precision():
            weights = attention_weights(self.model, words, pixels, layer)
        tokens = [] if words is None else self._tokens_of(words)
        return AttentionMaps(self._finite(weights), tokens, self.model.config.grid if shown else 0)

    @torch.no_grad()
    def rank(
        self, texts: Texts, images: Pictures, k: int = 5, *, rerank: int = 0
    ) -> list[list[Hit]]:
        """Find the ``k`` best images for each text, best first.

        Args:
            texts: queries.
            images: images to search among.
            k: number of images to return for each text.
            rerank: number of candidates by cosine similarity that the fusion encoder re-scores, 0
                for none; the new score is the matching logit plus the cosine.

        Raises:
            FileNotFoundError: an image does not exist.
            ValueError: an image cannot be read, ``k`` is not positive, ``rerank`` is below ``k``
                and not 0, the model lacks a head, or there is no vocabulary.
        """
        self._require("rank", "itc", "irtr")
        if rerank:
            self._require("rank", "itm")
            if rerank < k:
                raise ValueError(f"rerank: {rerank} candidates are fewer than k: {k}")
        said, shown = texts_of("texts", texts), pictures_of("images", images)
        if not said or not shown:
            return [[] for _ in said]
        embeddings = Embeddings(self.embed_images(shown), self.embed_texts(said))
        found = shortlist(embeddings, rerank or k).image
        if rerank:
            found = self._reranked(said, shown, found)
        self._finite(found.scores)
        order = found.scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        rows, scores = found.rows.gather(1, order), found.scores.gather(1, order)
        return [
            [Hit(image, score) for image, score in zip(*row, strict=True)]
            for row in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _reranked(
        self, texts: Sequence[str], images: Sequence[Picture], found: Shortlist
    ) -> Shortlist:
        words = self._encoded(texts)
        gallery = Gallery(
            images=_Decoded(images, self._decoded),
            text_ids=words["text_ids"].cpu(),
            text_masks=words["text_masks"].cpu(),
            image_of_text=torch.zeros(len(texts), dtype=torch.int64),  # unused
        )
        device = device_of(self.model)
        nothing = Shortlist(
            torch.zeros(len(images), 0, dtype=torch.int64, device=device),
            torch.zeros(len(images), 0, device=device),
        )
        lists = Shortlists(Shortlist(*(part.to(device) for part in found)), nothing)
        model = cast(VLMo, self.model)
        reranked = rerank_lists(
            model, gallery, lists, batch_size=self.batch_size, autocast=self.autocast
        )
        return Shortlist(*(part.cpu() for part in reranked.image))

    def _require(self, method: str, *heads: str) -> None:
        if not self.has(*heads):
            raise ValueError(
                f"{method}: the model ({name_of(self.model.config)}) has no head of "
                f"{' or '.join(heads)}, it has those of {', '.join(self.model.config.tasks)}"
            )

    def _precision(self):
        return precision(device_of(self.model), self.autocast)

    def _pairs(
        self,
        function: Callable[[layout.Texts, Tensor, Sequence[int]], Tensor],
        images: Pictures,
        texts: Texts,
    ) -> Iterator[Tensor]:
        """Call ``function`` with the texts, images and image numbers of each batch of pairs."""
        shown, said = pictures_of("images", images), texts_of("texts", texts)
        count = _common_length(images=shown, texts=said)
        batches = even_batches(range(count), self.batch_size)
        alone = len(shown) == 1  # then every batch needs only this image
        pixels = self._pixels(shown, [[0] for _ in batches] if alone else batches)
        said = _spread(said, count)
        for rows, fetched in zip(batches, pixels, strict=True):
            words = self._words([said[row] for row in rows])
            with self._precision():
                found = function(words, fetched, [0] * len(rows) if alone else range(len(rows)))
            yield self._finite(found.float(), rows[0])

    def _pixels(
        self, images: Sequence[Picture], batches: Sequence[Sequence[int]]
    ) -> Iterator[Tensor]:
        """Images uint8 ``[n, 3, S, S]`` on the device; the next batch is decoded meanwhile."""
        device = device_of(self.model)
        waiting: deque[list[Future[Tensor]]] = deque()
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
            for rows in batches:
                waiting.append([pool.submit(self._decoded, images, row) for row in rows])
                if len(waiting) > 1:
                    yield _stacked(waiting.popleft()).to(device)
            for futures in waiting:
                yield _stacked(futures).to(device)

    def _decoded(self, images: Sequence[Picture], number: int) -> Tensor:
        return self._transform(decoded(images[number], f"images[{number}]"))

    def _encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if self._tokenizer is None:
            raise ValueError(
                "texts: no vocabulary was given: load(..., vocabulary='vocab.txt') in Python, "
                "--vocab on the command line"
            )
        batch = self._tokenizer.encode(texts)
        self._warn_of_long_texts(texts, batch["text_masks"])
        lengths = batch["text_masks"].sum(1)
        device = device_of(self.model)
        return {name: value.to(device) for name, value in batch.items()} | {"text_lengths": lengths}

    def _words(self, texts: Sequence[str]) -> layout.Texts:
        batch = self._encoded(texts)
        return layout.end_to_end(batch["text_ids"], layout.text_lengths(batch))

    def _warn_of_long_texts(self, texts: Sequence[str], masks: Tensor) -> None:
        assert self._vocabulary is not None
        for row in masks.all(1).nonzero()[:, 0].tolist():
            count = len(self._vocabulary.encode(texts[row]).ids)
            if count > masks.shape[1]:
                warnings.warn(
                    f"the text {texts[row]!r} has {count} tokens, the model reads the first "
                    f"{masks.shape[1]}",
                    stacklevel=2,
                )

    def _tokens_of(self, words: layout.Texts) -> list[str]:
        assert self._tokenizer is not None
        return self._tokenizer.tokens(words.ids.tolist())

    def _joined(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        if not parts:
            return torch.zeros(0, *shape)
        return self._finite(torch.cat([*parts]).float().cpu())

    def _finite(self, outputs: Tensor, first: int = 0) -> Tensor:
        """Outputs ``[n, ...]`` of the rows from ``first`` on; raises if one is not finite."""
        bad = (~outputs.flatten(1).isfinite().all(1)).nonzero()[:, 0].tolist()
        if bad:
            how = "" if self.autocast is None else f" in {self.autocast}; try dtype='float32'"
            raise FloatingPointError(
                f"the model's outputs are NaN or infinite, first in row {first + bad[0]}{how}"
            )
        return outputs


class _Decoded(Dataset):
    """Images as a map-style data set, decoded on access."""

    def __init__(
        self, images: Sequence[Picture], decoded: Callable[[Sequence[Picture], int], Tensor]
    ):
        self.images, self.decoded = images, decoded

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> Tensor:
        return self.decoded(self.images, number)


def _common_length(**given: Sequence[Any]) -> int:
    """Number of rows when single items are broadcast."""
    counts = {name: len(values) for name, values in given.items()}
    several = {count for count in counts.values() if count != 1}
    if len(several) > 1:
        listed = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"{listed}: are not one for each other")
    return several.pop() if several else 1


def _spread(given: list[Any], count: int) -> list[Any]:
    return [given[0]] * count if len(given) == 1 else given


def _stacked(futures: Sequence[Future[Tensor]]) -> Tensor:
    return torch.stack([future.result() for future in futures])
