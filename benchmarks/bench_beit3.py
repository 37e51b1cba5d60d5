"""Benchmark suite of BEiT-3, compared with torchscale, the reference implementation.

Pairs of images and texts are encoded jointly and answered by the head of VQA; texts are padded to
64 tokens, as in unilm's ``beit3``. The head is the same module for all contenders, and torchscale's
model has the same parameters. A step is forward and backward of the loss, without an optimizer;
there is neither dropout nor stochastic depth.

Weights are in float32. In 16-bit cases all contenders run under autocast, as unilm's
``engine_for_finetuning.py`` does in its evaluation, and in its training without DeepSpeed.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.contenders import COMPILED, Case, Scale, Suite, half_dtypes, smoke_dtype
from harness.cost import Cost
from harness.models import (
    OURS,
    Batch,
    Exactly,
    Form,
    Named,
    Small,
    WholeModel,
    compiled,
    on_device,
    pair_batch,
    widened,
)
from harness.peers import why_not_installed
from vlmo.model.beit3 import BEiT3, BEiT3Config
from vlmo.model.flops import step_flops

ANSWERING, STEP = "answering", "VQA step"
PHASES = (STEP, ANSWERING)

_OFFICIAL = ("torchscale", f"torchscale{COMPILED}")
_TINY, _PRETRAINED, _FINE_TUNED = 32, 224, 480  # pixels
_CHECKED = 3  # pairs in the accuracy check
_CHECKED_WORDS = 4000  # most words have no gradient


def cases(device: torch.device, scale: Scale) -> list[Case]:
    """Every phase; a pair is an image and a text."""
    if scale is Scale.smoke:
        return [_case("tiny", smoke_dtype(device), phase, 2, _TINY) for phase in PHASES]
    dtypes = (torch.float32, half_dtypes(device)[0])
    pairs = 4 if scale is Scale.cpu else 128
    sizes = ("base",) if scale is Scale.cpu else ("base", "large")
    kinds = ((STEP, pairs, _PRETRAINED), (ANSWERING, pairs, _PRETRAINED))
    return [
        _case(size, dtype, *kind)
        for size in sizes
        for kind in (*kinds, (STEP, pairs // 2, _FINE_TUNED))
        for dtype in dtypes
    ]


def _case(size: str, dtype: torch.dtype, phase: str, pairs: int, pixels: int) -> Case:
    return Case("beit3", size, dtype, phase, dict(pairs=pairs, pixels=pixels))


def config_of(size: str, pixels: int) -> BEiT3Config:
    """A published size, for square images with sides of ``pixels``; "tiny" is for tests."""
    changes: dict[str, Any] = dict(tasks=("vqa",), drop_path=0.0, image_size=pixels)
    if size == "tiny":
        changes |= dict(dim=32, depth=3, heads=2, vocab_size=100, vqa_labels=50)
    return BEiT3Config.large(**changes) if size == "large" else BEiT3Config.base(**changes)


class Twofold(BEiT3):
    """A BEiT-3 with torchscale's model of the same parameters, which is not a submodule."""

    torchscale: Any

    def __init__(self, config: BEiT3Config) -> None:
        from official_beit3 import official_beit3

        super().__init__(config)
        with torch.device("meta"):
            model = official_beit3(config)
        model.load_state_dict(self.beit3.state_dict(keep_vars=True), assign=True)
        vars(self)["torchscale"] = model


class BEiT3Problem(WholeModel):
    """Pairs of images and texts, and a model that answers them or is trained on the answers."""

    operations = ("moe_ffn", "moe_linear", "shared_attention")

    def __init__(self, case: Case, device: torch.device) -> None:
        super().__init__(case, device, trains=case.phase == STEP)
        self.config = config_of(case.size, int(case.shape["pixels"]))
        self.contenders = (*OURS, *_OFFICIAL)
        self.samples = int(case.shape["pairs"])
        self.batch = _batch(self.config, self.samples, device)
        self.cost = _cost(self.config, self.batch, trains=self.trains)

    def why_not(self, contender: str) -> str | None:
        """The reason if it cannot run on this machine, else None."""
        # Without it there is nothing to compare the error with.
        reason = why_not_installed("torchscale")
        if reason is None and contender not in _OFFICIAL:
            return self.why_not_ours(contender)
        return reason

    @functools.cached_property
    def model(self) -> Twofold:
        return _model(self.config).to(self.device)

    @functools.cached_property
    def small(self) -> Small:
        """A model of this width, with two layers and a smaller vocabulary, and a few pairs."""
        words = min(_CHECKED_WORDS, self.config.vocab_size)
        config = self.config.replace(depth=2, vocab_size=words)
        batch, model = _batch(config, _CHECKED, self.device), _model(config).to(self.device)
        eager = self.results(_official(self.dtype), model, batch)
        wide = copy.deepcopy(_model(config)).to(self.device, torch.float64)
        with Exactly():
            exact = self.results(_official(torch.float64), wide, widened(batch))
        return Small(model, batch, eager, exact)

    def ours(self) -> Form:
        return _ours(self.dtype)

    def official(self, compiler: str | None) -> Form:
        form = _official(self.dtype)
        return form if compiler is None else compiled(form, compiler)


SUITE = Suite("beit3", cases, BEiT3Problem)


# Cached, so that a form is compiled once.
@functools.cache
def _ours(dtype: torch.dtype) -> Form:
    def form(phase: str, model: Twofold, batch: Batch) -> Named:
        with _autocast(batch, dtype):
            fused = model.fuse(batch["text_ids"], batch["text_masks"], batch["image"])
            return _answered(phase, model, batch, fused.image, fused.text)

    return form


@functools.cache
def _official(dtype: torch.dtype) -> Form:
    def form(phase: str, model: Twofold, batch: Batch) -> Named:
        padding = ~batch["text_masks"].bool()
        with _autocast(batch, dtype):
            found = model.torchscale(batch["text_ids"], batch["image"], padding)
            split = found["multiway_split_position"]
            image, text = found["encoder_out"].tensor_split([split], dim=1)
            return _answered(phase, model, batch, image, text)

    return form


def _answered(phase: str, model: BEiT3, batch: Batch, image: Tensor, text: Tensor) -> Named:
    """Features and answers, or the loss of the answers."""
    logits = model.head(model.pooler(image[:, 0]))
    if phase == ANSWERING:
        return {"image": image, "text": text, "logits": logits}
    targets = batch["vqa_targets"]
    wide = logits.to(targets.dtype)
    loss = F.binary_cross_entropy_with_logits(wide, targets) * targets.shape[1]
    return {"loss": loss, "logits": logits}


def _autocast(batch: Batch, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    if dtype.itemsize > 2:
        return contextlib.nullcontext()
    return torch.autocast(batch["image"].device.type, dtype=dtype)


@functools.lru_cache(maxsize=2)
def _model(config: BEiT3Config) -> Twofold:
    """A model in which random vectors replace those that are initialised with constants."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = Twofold(config)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("_token"):
                parameter.normal_(std=0.1).add_(float(name.endswith("weight")))
    return model


def _batch(config: BEiT3Config, rows: int, device: torch.device) -> Batch:
    batch = pair_batch(config, rows)
    lengths = batch.pop("text_lengths")
    return on_device(batch, device, torch.float32) | dict(text_lengths=lengths)


def _cost(config: BEiT3Config, batch: Batch, *, trains: bool) -> Cost:
    """FLOPs without padding; bytes of the parameters, which a step reads twice and writes once."""
    flops = step_flops(config, batch["text_lengths"].tolist())
    with torch.device("meta"):
        size = sum(p.numel() * p.itemsize for p in BEiT3(config).parameters())
    return Cost(flops.total if trains else flops.forward, size * (3 if trains else 1))


def bench_beit3(compete, case, contender):
    compete(SUITE, case, contender)
