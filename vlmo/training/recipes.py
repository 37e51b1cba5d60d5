"""Every training of the paper as a named recipe, fine-tuning of BEiT-3, and small recipes.

Sources, given in :attr:`Recipe.source`: "supplement" is the supplementary material of the paper
(NeurIPS 2022); "code" are the configurations of the reference implementation (``vlmo/config.py`` of
microsoft/unilm; of BEiT-3, the commands in ``beit3/get_started``). If the two differ, the
supplement's values have the plain name and those of the code the same name with ``_code``. Values
that the supplement does not give are those of the code. "own" marks values that neither has.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from vlmo.model.config import VLMoConfig

if TYPE_CHECKING:
    from vlmo.model.beit3 import BEiT3Config

STAGES = ("textmlm", "pretrain", "vqa", "nlvr2", "retrieval")
TASKS_OF = {
    "textmlm": ("textmlm",),
    "pretrain": ("mlm", "itc", "itm"),
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "retrieval": ("irtr",),
}
# Retrieval whose fusion encoder can re-rank, as in Table 2 of the supplement. unilm has a function
# for re-ranking (never called) but no training for it.
RERANK_LOSSES = ("itc", "itm")
# Stage 2 trains parameters whose names contain one of these; the rest, from BEiT, is frozen
# (run.py:153).
TEXT_PARTS = (
    "text_embeddings",
    "token_type_embeddings",
    "mlp_text",
    "norm2_text",
    "mlm_score",
    "relative_position_bias_table",
    "transformer.norm",
)
PRETRAINING_DATA = ("coco", "vg", "sbu", "gcc")

# 32-pixel pictures in four patches. There are learned positions besides the relative bias: they
# show [CLS] where a digit is.
_TINY = dict(
    dim=96,
    depth=3,
    heads=4,
    mlp_ratio=2.0,
    vl_start=2,
    patch_size=16,
    absolute_position=True,
    layer_scale=1.0,
)


def tiny(**changes: Any) -> VLMoConfig:
    """A VLMo for digit scenes that trains in minutes on two CPU cores."""
    return VLMoConfig(**{**_TINY, "image_size": 32, "drop_path": 0.0, **changes})


def small(**changes: Any) -> VLMoConfig:
    """A VLMo between tiny and base for a user's own data: half the width of base."""
    return VLMoConfig(**{"dim": 384, "heads": 6, **changes})


def beit3_base(**changes: Any) -> BEiT3Config:
    """The published BEiT-3 base; its embedding has at least as many rows as that has."""
    from vlmo.model.beit3 import BEiT3Config  # imports torch, which vlmo recipes does not need

    rows = max(BEiT3Config.vocab_size, changes.get("vocab_size", 0))
    return BEiT3Config.base(**{**changes, "vocab_size": rows})


def beit3_large(**changes: Any) -> BEiT3Config:
    """The published BEiT-3 large."""
    return beit3_base(**{**dict(dim=1024, depth=24, heads=16), **changes})


def beit3_tiny(**changes: Any) -> BEiT3Config:
    """A BEiT-3 for digit scenes that trains in minutes on two CPU cores."""
    from vlmo.model.beit3 import BEiT3Config

    sizes = {name: _TINY[name] for name in ("dim", "depth", "heads", "mlp_ratio", "patch_size")}
    return BEiT3Config(**{**sizes, "image_size": 32, "drop_path": 0.0, **changes})


BEIT3_SIZES = {"beit3_base": beit3_base, "beit3_large": beit3_large, "beit3_tiny": beit3_tiny}
BEIT3_LOSSES = ("irtr", "vqa", "nlvr2")  # the losses that BEiT-3 has
SIZES: dict[str, Callable[..., VLMoConfig | BEiT3Config]] = {
    "base": VLMoConfig.base,
    "base_plus": VLMoConfig.base_plus,
    "large": VLMoConfig.large,
    "small": small,
    "tiny": tiny,
    **BEIT3_SIZES,
}
SCHEDULES = ("linear", "cosine")
CONTRASTS = ("itc", "irtr")  # losses that compare the pairs of a batch
_FLOAT32_MAX = 3.4e38


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


# The condition on a number, and its description.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        (
            "lr",
            "batch_size",
            "steps",
            "epochs",
            "image_size",
            "text_capacity",
            "head_lr_scale",
            "clip_norm",
            "layer_decay",
        ),
        (_positive, "positive and finite"),
    ),
    **dict.fromkeys(
        ("warmup", "itc_grad_scale", "min_lr"), (_not_negative, "finite and at least 0")
    ),
    **dict.fromkeys(("warmup_share", "weight_decay"), (lambda v: 0 <= v <= 1, "within [0, 1]")),
    **dict.fromkeys(("drop_path", "beta2"), (lambda v: 0 <= v < 1, "within [0, 1)")),
    "mask_share": (lambda v: 0 < v <= 1, "within (0, 1]"),
    "text_length": (lambda v: v >= 3, "at least 3: [CLS], a token, [SEP]"),
    "max_logit_scale": (lambda v: 1 <= v < math.inf, "finite and at least 1"),
}


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of training one model in one stage.

    Attributes:
        name: name of the recipe.
        stage: one of ``STAGES``; also the task for which data are opened and evaluated.
        size: size of the model, a key of ``SIZES``.
        lr: peak learning rate.
        batch_size: samples per step, in total over all GPUs and micro-batches.
        steps: length of the training in steps, or None if ``epochs`` is given.
        epochs: length in passes over the data, or None if ``steps`` is given.
        warmup: number of warm-up steps, or None if ``warmup_share`` is given.
        warmup_share: warm-up steps as a share of all steps.
        image_size: side of the pictures in pixels.
        text_length: tokens per text, including [CLS] and [SEP].
        text_capacity: longest text that the relative position table has rows for.
        drop_path: stochastic depth rate of the last block, and dropout rate of the text embedding.
        weight_decay: for the parameters that have weight decay.
        head_lr_scale: factor of ``lr`` for the classifier of VQA or NLVR2.
        layer_decay: factor of ``lr`` from each layer of BEiT-3 to the one below it.
        beta2: decay of AdamW's second moments.
        schedule: how the learning rate falls after the warm-up, one of ``SCHEDULES``.
        min_lr: learning rate at the end of a cosine.
        clip_norm: largest norm of the gradient, or None for no clipping, as in unilm.
        trained: parameters whose names contain one of these are trained; None for all.
        initial_from: origin of the initial weights: a recipe, "BEiT", or None for random weights.
        datasets: which of unilm's data sets to use, or None for the task's only one.
        mask_share: share of the words to predict; None without masking.
        official_masking: choose words as unilm does, which may choose none
            (:func:`vlmo.data.mask_whole_words`).
        itc_grad_scale: factor of the gradient of image-text contrast. unilm gathers features
            without their gradient, so its factor is 1 / GPUs, 1/64 for the published base model; 1
            gives the gradient of the loss that the paper states.
        max_logit_scale: upper bound of the contrastive logit scale (1 / temperature), 100 in CLIP;
            None for no bound, as in unilm.
        official_batches: draw batches at random, as unilm does, so that a batch may contain several
            captions of the same picture, which then count as negatives; otherwise it never does
            (:class:`vlmo.data.GlobalBatches`).
        losses: out of :data:`vlmo.model.config.TASKS`; None for those of the stage.
        separate_attention: text and image have their own attention below the vision-language
            experts (ablation, Table 1 of the supplement).
        wide_start: initialise the blocks with a wider distribution than unilm, as width 96
            requires.
        source: see the description of this module.
    """

    name: str
    stage: str
    size: str
    lr: float
    batch_size: int
    steps: int | None = None
    epochs: int | None = None
    warmup: int | None = None
    warmup_share: float | None = None
    image_size: int = 224
    text_length: int = 40
    text_capacity: int = 196
    drop_path: float = 0.1
    weight_decay: float = 0.01
    head_lr_scale: float = 1.0
    layer_decay: float = 1.0
    beta2: float = 0.98
    schedule: str = "linear"
    min_lr: float = 0.0
    clip_norm: float | None = None
    trained: tuple[str, ...] | None = None
    initial_from: str | None = None
    datasets: tuple[str, ...] | None = None
    mask_share: float | None = None
    official_masking: bool = False
    itc_grad_scale: float = 1.0
    max_logit_scale: float | None = None
    official_batches: bool = False
    losses: tuple[str, ...] | None = None
    separate_attention: bool = False
    wide_start: bool = False
    source: str = "supplement"

    def __post_init__(self):
        known_of = {"stage": STAGES, "size": tuple(SIZES), "schedule": SCHEDULES}
        for name, known in known_of.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} is not one of {known}")
        for pair in (("steps", "epochs"), ("warmup", "warmup_share")):
            given = [getattr(self, name) for name in pair]
            if (given[0] is None) == (given[1] is None):
                raise ValueError(f"{pair[0]}, {pair[1]}: {given[0]}, {given[1]} is not one of both")
        self._check_numbers()

        masks = bool({"mlm", "textmlm"} & set(self.tasks))
        if (self.mask_share is not None) != masks:
            raise ValueError(
                f"mask_share: {self.mask_share} does not suit {', '.join(self.tasks)}, which "
                f"{'predict masked words' if masks else 'mask nothing'}"
            )
        if self.official_masking and not masks:
            raise ValueError(f"official_masking: {', '.join(self.tasks)} mask nothing")
        contrasts = bool(set(self.tasks) & set(CONTRASTS))
        if self.max_logit_scale is not None and not contrasts:
            raise ValueError(
                f"max_logit_scale: {', '.join(self.tasks)} have no logit scale, only "
                f"{' and '.join(CONTRASTS)} have"
            )
        if self.itc_grad_scale != 1 and not contrasts:
            raise ValueError(f"itc_grad_scale: {', '.join(self.tasks)} have no contrast")
        self._check_model()

    def _check_model(self) -> None:
        """Raise ValueError for what the model of this size does not have."""
        if not self.is_beit3:
            if self.layer_decay != 1:
                raise ValueError(f"layer_decay: {self.layer_decay} is for BEiT-3, not for VLMo")
            return
        lacking = [task for task in self.tasks if task not in BEIT3_LOSSES]
        if lacking:
            raise ValueError(
                f"size: {self.size!r} is a BEiT-3, which has no {' or '.join(lacking)} for the "
                f"stage {self.stage!r}; its losses are {', '.join(BEIT3_LOSSES)}"
            )
        if self.itc_grad_scale != 1 or self.separate_attention:
            name = "separate_attention" if self.separate_attention else "itc_grad_scale"
            raise ValueError(f"{name}: is for VLMo only, not for BEiT-3")

    def _check_numbers(self) -> None:
        for name, (within, wanted) in _RANGES.items():
            value = getattr(self, name)
            # Comparisons with NaN are false.
            if value is not None and not within(value):
                raise ValueError(f"{name}: {value} is not {wanted}")
        if self.min_lr and (self.schedule != "cosine" or self.min_lr > self.lr):
            raise ValueError(
                f"min_lr: {self.min_lr} does not suit a {self.schedule} schedule from {self.lr}"
            )
        # The first steps of AdamW are up to ten times the learning rate, in float32.
        if not 10 * self.lr * max(self.head_lr_scale, 1.0) < _FLOAT32_MAX:
            raise ValueError(f"lr: {self.lr} is too large for float32")
        if self.batch_size < 2 and set(self.tasks) & {*CONTRASTS, "itm"}:
            raise ValueError(
                f"batch_size: {self.batch_size} is too small for {', '.join(self.tasks)}, which "
                "compare a pair with the others of its batch: at least 2 are needed"
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The losses, as in :attr:`VLMoConfig.tasks`."""
        return self.losses or TASKS_OF[self.stage]

    @property
    def is_beit3(self) -> bool:
        """Whether the model is a BEiT-3."""
        return self.size in BEIT3_SIZES

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; steps and epochs are exclusive, as are both warm-ups."""
        for one, other in (("steps", "epochs"), ("warmup", "warmup_share")):
            for name, opposite in ((one, other), (other, one)):
                if changes.get(name) is not None:
                    changes.setdefault(opposite, None)
        if changes.get("text_length") is not None:  # the table must have rows for it
            longest = max(self.text_capacity, changes["text_length"])
            changes.setdefault("text_capacity", longest)
        return dataclasses.replace(self, **changes)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Number of steps of the whole training."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * steps_per_epoch

    def warmup_steps(self, total: int) -> int:
        """Number of warm-up steps, for ``total`` steps."""
        if self.warmup is not None:
            return self.warmup
        assert self.warmup_share is not None
        return int(self.warmup_share * total)

    def config(self, **changes: Any) -> VLMoConfig | BEiT3Config:
        """Configuration of the model; ``changes`` come from data and run, as ``vocab_size``."""
        fields: dict[str, Any] = dict(
            tasks=self.tasks,
            image_size=self.image_size,
            max_text_length=self.text_length,
            drop_path=self.drop_path,
        )
        if not self.is_beit3:
            fields |= dict(
                text_capacity=self.text_capacity,
                itc_grad_scale=self.itc_grad_scale,
                separate_attention=self.separate_attention,
            )
        return SIZES[self.size](**{**fields, **changes})

    def trains(self, parameter: str) -> bool:
        """Whether the parameter with this name is trained."""
        return self.trained is None or any(part in parameter for part in self.trained)


def recipe(name: str) -> Recipe:
    """The recipe with a name.

    Raises:
        ValueError: there is no such recipe; the message suggests the closest names.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else "see vlmo recipes"
        raise ValueError(f"recipe: {name!r} is unknown; {hint}")
    return RECIPES[name]


def _pretraining() -> Iterator[Recipe]:
    text = functools.partial(
        Recipe,
        stage="textmlm",
        batch_size=1024,
        warmup=2500,
        text_length=196,
        trained=TEXT_PARTS,
        initial_from="BEiT",
        datasets=("wikibk",),
        mask_share=0.15,
    )
    yield text("textmlm_base", size="base", lr=2e-4, steps=500_000)
    yield text("textmlm_base_code", size="base", lr=2e-4, steps=200_000, source="code")
    yield text("textmlm_base_plus", size="base_plus", lr=2e-4, steps=200_000, source="code")
    # The supplement gives the steps, and unilm has no configuration: use the learning rate of the
    # next stage.
    yield text("textmlm_large", size="large", lr=5e-5, steps=200_000)
    for size, lr in (("base", 2e-4), ("base_plus", 1e-4), ("large", 5e-5)):
        yield Recipe(
            f"pretrain_{size}",
            "pretrain",
            size,
            lr,
            1024,
            steps=200_000,
            warmup=2500,
            initial_from=f"textmlm_{size}",
            datasets=PRETRAINING_DATA,
            mask_share=0.15,
            source="code" if size == "base_plus" else "supplement",
        )


def _classification() -> Iterator[Recipe]:
    tuned = functools.partial(Recipe, batch_size=128, epochs=10, warmup_share=0.1)
    vqa = functools.partial(tuned, stage="vqa", image_size=480, drop_path=0.15, head_lr_scale=20.0)
    yield vqa("vqa_base", size="base", lr=3e-5, initial_from="pretrain_base")
    yield vqa(
        "vqa_base_plus",
        size="base_plus",
        lr=3e-5,
        initial_from="pretrain_base_plus",
        source="code",
    )
    yield vqa("vqa_large", size="large", lr=1.5e-5, initial_from="pretrain_large")
    yield vqa(
        "vqa_large_768", size="large", lr=1.5e-5, image_size=768, initial_from="pretrain_large"
    )
    nlvr2 = functools.partial(tuned, stage="nlvr2", image_size=384)
    yield nlvr2("nlvr2_base", size="base", lr=5e-5, initial_from="pretrain_base")
    yield nlvr2(
        "nlvr2_base_plus",
        size="base_plus",
        lr=3e-5,
        drop_path=0.2,
        initial_from="pretrain_base_plus",
        source="code",
    )
    yield nlvr2("nlvr2_large", size="large", lr=3e-5, drop_path=0.15, initial_from="pretrain_large")
    for name, lr in (("nlvr2_base_ablation", 5e-5), ("nlvr2_base_ablation_1e-4", 1e-4)):
        yield nlvr2(name, size="base", lr=lr, image_size=224, initial_from="pretrain_base")


def _retrieval() -> Iterator[Recipe]:
    tuned = functools.partial(Recipe, stage="retrieval", image_size=384, drop_path=0.2)
    paper = functools.partial(tuned, batch_size=2048, warmup_share=0.1)
    code = functools.partial(tuned, batch_size=3072, source="code")
    rates = {"base": 3e-5, "base_plus": 3e-5, "large": 2e-5}

    coco = dict(datasets=("coco",))
    for size, lr, epochs in (("base", 2e-5, 20), ("large", 1e-5, 10)):
        start = f"pretrain_{size}"
        name = f"coco_retrieval_{size}"
        found = paper(name, size=size, lr=lr, epochs=epochs, initial_from=start, **coco)
        yield found
        yield found.replace(name=f"coco_rerank_{size}", losses=RERANK_LOSSES, source="own")
    for size, lr in rates.items():
        name = f"coco_retrieval_{size}" + ("" if size == "base_plus" else "_code")
        start = f"pretrain_{size}"
        yield code(name, size=size, lr=lr, steps=3000, warmup=300, initial_from=start, **coco)

    flickr: dict[str, Any] = dict(datasets=("f30k",))
    for size in ("base", "large"):
        flickr |= dict(
            initial_from=f"coco_retrieval_{size}", drop_path=0.15 if size == "base" else 0.2
        )
        found = paper(f"flickr30k_retrieval_{size}", size=size, lr=1e-5, epochs=40, **flickr)
        yield found
        yield found.replace(
            name=f"flickr30k_rerank_{size}",
            losses=RERANK_LOSSES,
            initial_from=f"coco_rerank_{size}",
            source="own",
        )
    for size, lr in rates.items():
        plus = size == "base_plus"
        name = f"flickr30k_retrieval_{size}" + ("" if plus else "_code")
        start = "pretrain_base_plus" if plus else f"coco_retrieval_{size}_code"
        flickr |= dict(initial_from=start, drop_path=0.15 if size == "base" else 0.2)
        yield code(name, size=size, lr=lr, steps=1500, warmup=150, **flickr)
    yield paper(
        "flickr30k_retrieval_base_ablation",
        size="base",
        lr=5e-5,
        batch_size=1024,
        epochs=10,
        image_size=224,
        drop_path=0.15,
        initial_from="pretrain_base",
        datasets=("f30k",),
    )


def _beit3() -> Iterator[Recipe]:
    """Fine-tuning of BEiT-3, with the options of the commands in unilm's ``beit3/get_started``."""
    tuned = functools.partial(
        Recipe, text_length=64, schedule="cosine", min_lr=1e-6, initial_from="BEiT-3", source="code"
    )
    # AdamW's second beta is unilm's default, except for VQA.
    decayed = functools.partial(tuned, beta2=0.999, drop_path=0.2)
    retrieval = functools.partial(
        decayed, stage="retrieval", batch_size=3072, image_size=384, weight_decay=0.05
    )
    for size, decay, vqa_lr, vqa_drop_path, nlvr2_lr, lr in (
        ("base", 0.65, 3e-5, 0.1, 7e-4, 2e-4),
        ("large", 0.85, 2e-5, 0.15, 3e-4, 5e-5),
    ):
        model = f"beit3_{size}"
        yield tuned(
            f"beit3_vqa_{size}",
            "vqa",
            model,
            vqa_lr,
            128,
            epochs=10,
            warmup_share=0.1,
            image_size=480,
            drop_path=vqa_drop_path,
            head_lr_scale=20.0,
        )
        yield decayed(
            f"beit3_nlvr2_{size}",
            "nlvr2",
            model,
            nlvr2_lr,
            256,
            epochs=20,
            warmup_share=0.25,
            layer_decay=decay,
            weight_decay=0.2,
        )
        yield retrieval(
            f"beit3_coco_retrieval_{size}",
            size=model,
            lr=lr,
            epochs=15,
            warmup_share=0.2,
            layer_decay=decay,
            datasets=("coco",),
        )
        yield retrieval(
            f"beit3_flickr30k_retrieval_{size}",
            size=model,
            lr=1e-4 if size == "base" else lr,
            epochs=20,
            warmup_share=0.25,
            layer_decay=decay,
            datasets=("f30k",),
        )


def _own() -> Iterator[Recipe]:
    """Recipes for a user's own data, thousands to a few million pairs, on one GPU."""
    own = functools.partial(
        Recipe, size="small", batch_size=256, warmup_share=0.05, clip_norm=1.0, source="own"
    )
    masked = functools.partial(own, mask_share=0.15)
    yield masked("textmlm_small", stage="textmlm", lr=5e-4, epochs=10)
    yield masked("pretrain_small", stage="pretrain", lr=5e-4, epochs=30)
    tuned = functools.partial(own, initial_from="pretrain_small", epochs=10)
    yield tuned("vqa_small", stage="vqa", lr=1e-4, head_lr_scale=10.0)
    yield tuned("nlvr2_small", stage="nlvr2", lr=1e-4)
    yield tuned("retrieval_small", stage="retrieval", lr=1e-4)
    yield tuned("rerank_small", stage="retrieval", lr=1e-4, losses=RERANK_LOSSES)


def _digits() -> Iterator[Recipe]:
    digits = functools.partial(
        Recipe,
        size="tiny",
        lr=1e-3,
        batch_size=64,
        warmup_share=0.06,
        image_size=32,
        text_length=12,
        text_capacity=12,
        drop_path=0.0,
        clip_norm=1.0,
        wide_start=True,
        source="own",
    )
    masked = functools.partial(digits, mask_share=0.25)  # captions are short
    yield masked("digits_textmlm", stage="textmlm", steps=300)
    yield masked("digits_pretrain", stage="pretrain", steps=1200, initial_from="digits_textmlm")
    yield masked("digits_demo", stage="pretrain", steps=1000, text_length=8, text_capacity=8)
    tuned = functools.partial(digits, initial_from="digits_pretrain", lr=5e-4, steps=500)
    # At 5e-4, two of five runs of NLVR2 made all features equal and stayed at chance level.
    longer = functools.partial(tuned, lr=3e-4, steps=1500, warmup_share=0.3, head_lr_scale=3.0)
    yield longer("digits_vqa", stage="vqa")
    yield longer("digits_nlvr2", stage="nlvr2")
    yield tuned("digits_retrieval", stage="retrieval")
    yield tuned("digits_rerank", stage="retrieval", losses=RERANK_LOSSES)
    beit3 = functools.partial(digits, size="beit3_tiny")
    yield beit3("digits_beit3_retrieval", stage="retrieval", steps=1500)
    longer = functools.partial(longer, size="beit3_tiny", initial_from="digits_beit3_retrieval")
    yield longer("digits_beit3_vqa", stage="vqa")
    yield longer("digits_beit3_nlvr2", stage="nlvr2")


RECIPES: dict[str, Recipe] = {
    found.name: found
    for group in (_pretraining, _classification, _retrieval, _beit3, _own, _digits)
    for found in group()
}


def show_recipes(console: Console) -> None:
    """Print the recipes as a table, without wrapping its lines."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    columns = (
        "recipe",
        "lr",
        "batch",
        "length",
        "warm-up",
        "pixels",
        "drop path",
        "from",
        "source",
    )
    for name in columns:
        table.add_column(name, no_wrap=True)
    stage = None
    for entry in RECIPES.values():
        if stage not in (None, entry.stage) and entry.source != "own":
            table.add_section()
        stage = entry.stage
        length = f"{entry.epochs} epochs" if entry.steps is None else f"{entry.steps:,} steps"
        share = entry.warmup_share
        warmup = f"{entry.warmup:,}" if share is None else f"{100 * share:.0f} %"
        pixels = "-" if entry.stage == "textmlm" else str(entry.image_size)
        numbers = (f"{entry.lr:g}", str(entry.batch_size), length, warmup, pixels)
        origin = entry.initial_from or "-"
        table.add_row(entry.name, *numbers, f"{entry.drop_path:g}", origin, entry.source)
    unlimited = console.options.update(max_width=1000)
    console.width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    console.print(table)
