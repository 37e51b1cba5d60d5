"""``vlmo train``: run a recipe, with overrides of its settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmo.commands.options import (
    BackendOption,
    DataAnswersOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    limit_spinning,
    plain_console,
    stopping_exits,
)

_OF_RECIPE = "the recipe's"  # shown as the default of options that change the recipe
# The options that change the recipe; the others are fields of vlmo.training.Settings.
_CHANGES = (
    *("size", "steps", "epochs", "warmup", "lr", "weight_decay", "batch_size", "image_size"),
    *("text_length", "mask_share", "drop_path", "clip_norm", "itc_grad_scale", "max_logit_scale"),
    *("layer_decay", "separate_attention", "official_masking", "official_batches"),
)


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe; `vlmo recipes` lists them.")],
    data: DataOption,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Output folder; a run that it already holds is resumed.",
            show_default="runs/RECIPE",
        ),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            "--init",
            help="Checkpoint file or run folder with the initial weights.",
            show_default="random weights",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Checkpoint key prefix to skip when loading --init; may be repeated.",
            show_default="none",
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            "--vocab",
            help="Vocabulary: vocab.txt, or a SentencePiece model (.spm).",
            show_default="that of the run or of --init",
        ),
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            help="Official data set to train on (coco, vg, ...); may be repeated.",
            show_default="the recipe's",
        ),
    ] = None,
    answers: DataAnswersOption = None,
    answer_minimum: Annotated[
        int,
        typer.Option(
            min=1,
            help="Your own VQA data: leave out answers that are the most frequent answer of fewer "
            "questions than this (9 for VQAv2).",
        ),
    ] = 1,
    on_bad_sample: Annotated[
        str,
        typer.Option(
            help="Unreadable images and texts. error: stop at the first one. skip: replace them, "
            "and stop after 1 % of the samples (at least 10). skip:N: stop after N."
        ),
    ] = "error",
    size: Annotated[
        str | None,
        typer.Option(
            help="Model size: tiny, small, base, base_plus or large of VLMo; beit3_tiny, "
            "beit3_base or beit3_large of BEiT-3.",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Total number of steps; may be raised when resuming.",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Total number of epochs; may be raised when resuming.",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(
            min=0, help="Linear warm-up steps of the learning rate.", show_default=_OF_RECIPE
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default=_OF_RECIPE)
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="Weight decay, 0 to 1; biases and most norms are exempt.", show_default=_OF_RECIPE
        ),
    ] = None,
    layer_decay: Annotated[
        float | None,
        typer.Option(
            help="Factor of the learning rate from each layer of BEiT-3 to the one below it.",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Global batch size: samples per step over all processes.",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width of the images in pixels.", show_default=_OF_RECIPE
        ),
    ] = None,
    text_length: Annotated[
        int | None,
        typer.Option(
            min=3,
            help="Maximum number of tokens of a text, including [CLS] and [SEP].",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    mask_share: Annotated[
        float | None,
        typer.Option(help="Fraction of the tokens that MLM masks.", show_default=_OF_RECIPE),
    ] = None,
    drop_path: Annotated[
        float | None,
        typer.Option(
            help="Stochastic depth rate of the last block; it grows linearly over the blocks, "
            "from 0 in the first.",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    clip_norm: Annotated[
        float | None,
        typer.Option(help="Maximum gradient norm (clipping).", show_default=_OF_RECIPE),
    ] = None,
    itc_grad_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor on the gradient of the contrastive loss; 1 / GPUs reproduces unilm, the "
            "reference implementation (docs/training.md).",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    max_logit_scale: Annotated[
        float | None,
        typer.Option(
            help="Upper bound of the logit scale (1 / temperature) of the contrastive loss; CLIP "
            "uses 100.",
            show_default="no bound",
        ),
    ] = None,
    separate_attention: Annotated[
        bool,
        typer.Option(
            "--separate-attention", help="Use separate attention weights for text and image."
        ),
    ] = False,
    official_masking: Annotated[
        bool,
        typer.Option("--official-masking", help="Choose masked tokens as unilm does."),
    ] = False,
    official_batches: Annotated[
        bool,
        typer.Option(
            "--official-batches",
            help="Draw batches at random, as unilm does: captions of one image may then be "
            "negatives of each other.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of weights, data order, augmentation and masks.")
    ] = 1,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Samples per process that are computed at a time; the gradient stays that of the "
            "whole batch.",
            show_default="all",
        ),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing",
            help="Activation checkpointing: recompute activations in the backward pass.",
        ),
    ] = False,
    parallel: Annotated[
        Literal["ddp", "fsdp"],
        typer.Option(help="DistributedDataParallel, or FSDP2 (sharded weights)."),
    ] = "ddp",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Data loader processes of each training process.")
    ] = 0,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between log entries.")] = 10,
    save_every: Annotated[
        int, typer.Option(min=1, help="Steps between saved training states.")
    ] = 1000,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps between validations; 0 for none.", show_default="only at the end"
        ),
    ] = None,
    evaluation_batch: Annotated[
        int, typer.Option(min=1, help="Batch size of the validation.")
    ] = 64,
    board: Annotated[
        bool,
        typer.Option("--tensorboard/--no-tensorboard", help="Also write a TensorBoard log."),
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, run one step, and write nothing."),
    ] = False,
) -> None:
    """Train a model with a recipe, in one process or under torchrun (docs/training.md).

    Exits with status 1 if the loss or a weight is not finite. On SIGTERM or SIGINT the training
    state is saved and the exit status is 143 or 130; the same command then resumes the run.
    """
    options: dict[str, Any] = dict(locals())
    limit_spinning()
    from vlmo.training.recipes import recipe as recipe_of

    given = {name: options.pop(name) for name in _CHANGES}
    changes = {k: v for k, v in given.items() if v is not None and v is not False}
    options |= {
        "recipe": recipe_of(recipe).replace(**changes),
        "output": output or Path("runs") / recipe,
        "datasets": tuple(datasets) if datasets else None,
        "skip": tuple(skip or ()),
        "dtype": dtype or "auto",
    }
    with stopping_exits():
        from vlmo.training import Settings
        from vlmo.training import train as run

        run(Settings(**options), plain_console())
