"""Benchmark suite of the whole model: training steps, matching and encoding, compared with unilm.

Texts have 12 tokens on average, like captions of COCO, out of at most 40. unilm, the reference
implementation, pads them to 40, fuses in separate passes, and embeds an image in each of them; this
library packs sequences. A step is forward and backward of the losses, without an optimizer and
without stochastic depth. ``torch.compile`` is applied to each block of unilm's model, and to the
whole computation of this library's, in both for the sizes of this batch alone.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

from harness import official
from harness.contenders import COMPILED, Case, Scale, Suite
from harness.cost import Cost
from harness.models import (
    OURS,
    Batch,
    Form,
    Named,
    Small,
    WholeModel,
    on_device,
    pair_batch,
    widened,
)
from harness.official import SwitchedVLMo
from vlmo.model import layout
from vlmo.model.config import VLMoConfig
from vlmo.model.flops import matching_flops, step_flops
from vlmo.tasks import losses, retrieval

MATCHING, ENCODING, RERANKING = "matching", "retrieval encoding", "re-ranking"
PRETRAINING, VQA = "pre-training step", "VQA step"
STEPS = (PRETRAINING, VQA)
PHASES = (PRETRAINING, MATCHING, RERANKING, ENCODING, VQA)

_OFFICIAL = ("official", f"official{COMPILED}")
_PIXELS = {"tiny": 32, "base": 224, "large": 224}
_VQA_PIXELS = 480  # as in the published fine-tuning; two pairs have about 1,900 tokens
_CANDIDATES = 4  # images that re-ranking matches each text with
# Pairs in the accuracy check. With two pairs, hard negatives are deterministic; six share images.
_CHECKED = {PRETRAINING: 2, VQA: 3, MATCHING: 3, RERANKING: 6, ENCODING: 3}
_CHECKED_WORDS = 4000  # all contenders use the same decoder layer, which is slow in float64
_MASKED = 2  # tokens of each text that masked language modelling predicts: 15 % of 12


def cases(device: torch.device, scale: Scale) -> list[Case]:
    """The cases of every phase; a pair is an image and a text."""
    if scale is Scale.smoke:
        return [_case("tiny", torch.float32, phase, 2) for phase in PHASES]
    if scale is Scale.cpu:
        pairs = {PRETRAINING: 2, VQA: 2, MATCHING: 4, RERANKING: 8, ENCODING: 4}
        return [
            _case("base", dtype, phase, pairs[phase], _VQA_PIXELS if phase == VQA else 0)
            for phase in PHASES
            for dtype in (torch.float32, torch.bfloat16)
        ]
    pairs = {PRETRAINING: 64, VQA: 128, MATCHING: 256, RERANKING: 256, ENCODING: 256}
    return [
        _case(size, dtype, phase, pairs[phase] // (2 if size == "large" else 1))
        for dtype in (torch.bfloat16, torch.float16)
        for size in ("base", "large")
        for phase in PHASES
    ]


def _case(size: str, dtype: torch.dtype, phase: str, pairs: int, pixels: int = 0) -> Case:
    return Case("model", size, dtype, phase, dict(pairs=pairs, pixels=pixels or _PIXELS[size]))


def config_of(size: str, phase: str, pixels: int) -> VLMoConfig:
    """A published size, for square images with sides of ``pixels``; "tiny" is for tests."""
    tasks = ("vqa",) if phase == VQA else ("mlm", "itc", "itm")
    changes: dict[str, Any] = dict(tasks=tasks, drop_path=0.0, image_size=pixels)
    if size == "tiny":
        changes |= dict(dim=32, depth=3, heads=2, vl_start=2, vocab_size=100)
    return VLMoConfig.large(**changes) if size == "large" else VLMoConfig.base(**changes)


class ModelProblem(WholeModel):
    """Pairs of images and texts, and a model that processes them in one phase.

    See :class:`harness.contenders.Problem`.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device, trains=case.phase in STEPS)
        self.config = config_of(case.size, case.phase, int(case.shape["pixels"]))
        self.contenders = (*OURS, *_OFFICIAL)
        self.samples = int(case.shape["pairs"])
        self.batch = _batch(self.config, self.samples, device, case.dtype)
        self.cost = _cost(self.config, self.batch, case)

    def why_not(self, contender: str) -> str | None:
        """The reason if it cannot run on this machine, else None."""
        return None if contender in _OFFICIAL else self.why_not_ours(contender)

    @functools.cached_property
    def model(self) -> SwitchedVLMo:
        return _model(self.config, self.device, self.dtype)

    @functools.cached_property
    def small(self) -> Small:
        """A model of this width, with two blocks and a smaller vocabulary, and a few pairs."""
        words = min(_CHECKED_WORDS, self.config.vocab_size)
        config = self.config.replace(depth=2, vl_start=1, vocab_size=words)
        batch = _batch(config, _CHECKED[self.phase], self.device, self.dtype)
        model, right = _model(config, self.device, self.dtype), _as_unilm(wide=True)
        eager = self.results(right, model, batch)
        wide = _model(config, self.device, torch.float64)
        wide.load_state_dict(model.state_dict())
        return Small(model, batch, eager, self.results(right, wide, widened(batch)))

    def compares(self, output: str) -> bool:
        """Losses, of which there are several."""
        return output.endswith("loss")

    def ours(self) -> Form:
        return _packed

    def official(self, compiler: str | None) -> Form:
        return _as_unilm(compiler=compiler)


SUITE = Suite("model", cases, ModelProblem)


def _as_unilm(*, compiler: str | None = None, wide: bool = False) -> Form:
    def form(phase: str, model: SwitchedVLMo, batch: Batch) -> Named:
        with model.as_unilm(compiler=compiler, wide_scores=wide):
            return _official(phase, model, batch)

    return form


def _packed(phase: str, model: SwitchedVLMo, batch: Batch) -> Named:
    """The computation of :class:`vlmo.Predictor`, ``vlmo evaluate`` and ``vlmo train``."""
    if phase in STEPS:
        return losses.compute_losses(model, batch)
    texts = layout.end_to_end(batch["text_ids"], layout.text_lengths(batch))
    if phase == ENCODING:
        images = retrieval.embed_images(model, batch["image"])
        return {"image": images, "text": retrieval.embed_texts(model, texts)}
    images, pairs = _candidates(phase, batch)
    return {"logits": retrieval.matching_logits(model, texts, images, pairs)}


def _official(phase: str, model: SwitchedVLMo, batch: Batch) -> Named:
    if phase == PRETRAINING:
        return official.pretraining(model, batch)
    if phase == VQA:
        return official.vqa(model, batch)
    ids, masks = batch["text_ids"], batch["text_masks"]
    if phase == ENCODING:
        image, text = model.encode_image(batch["image"]), model.encode_text(ids, masks)
        return {"image": image.embedding, "text": text.embedding}
    images, pairs = _candidates(phase, batch)
    return {"logits": model.itm_score(model.fuse(ids, masks, images[pairs]).pooled)}


def _candidates(phase: str, batch: Batch) -> tuple[Tensor, list[int]]:
    """The images and, for each text, the index of the image that it is matched with.

    Re-ranking matches a query with several candidates; here a text with the same few images, which
    ``vlmo.tasks.retrieval.rerank`` embeds once.
    """
    count = len(batch["text_ids"])
    images = batch["image"] if phase == MATCHING else batch["image"][:_CANDIDATES]
    return images, [row % len(images) for row in range(count)]


def _model(config: VLMoConfig, device: torch.device, dtype: torch.dtype) -> SwitchedVLMo:
    return copy.deepcopy(_random_model(config)).to(device, dtype)


@functools.lru_cache(maxsize=2)
def _random_model(config: VLMoConfig) -> SwitchedVLMo:
    """A model with random weights, including the bias, which unilm initialises with zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SwitchedVLMo(config)
        if model.relative_position_bias_table is not None:
            torch.nn.init.normal_(model.relative_position_bias_table)
    return model


def _batch(config: VLMoConfig, rows: int, device: torch.device, dtype: torch.dtype) -> Batch:
    batch = pair_batch(config, rows)
    lengths, ids = batch.pop("text_lengths"), batch["text_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, 1 : 1 + _MASKED] = ids[:, 1 : 1 + _MASKED]
    masked = torch.where(labels < 0, ids, 1)
    batch |= dict(text_ids_mlm=masked, text_labels_mlm=labels)
    return on_device(batch, device, dtype) | dict(
        text_lengths=lengths, mlm_tokens=(labels.flatten() >= 0).nonzero()[:, 0]
    )


def _cost(config: VLMoConfig, batch: Batch, case: Case) -> Cost:
    """FLOPs without padding; bytes of the parameters, which a step reads twice and writes once.

    Activations are not counted, because their memory traffic depends on the implementation.
    """
    lengths = batch["text_lengths"].tolist()
    if case.phase in STEPS:
        flops = step_flops(config, lengths, words=len(batch["mlm_tokens"])).total
    elif case.phase == ENCODING:
        flops = step_flops(config.replace(tasks=("irtr",)), lengths).forward
    else:
        flops = matching_flops(config, lengths, len(_candidates(case.phase, batch)[0]))
    with torch.device("meta"):
        size = sum(p.numel() for p in SwitchedVLMo(config).parameters()) * case.dtype.itemsize
    return Cost(flops, size * (3 if case.phase in STEPS else 1))


def bench_model(compete, case, contender):
    compete(SUITE, case, contender)
