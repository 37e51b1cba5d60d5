"""``vlmo train``: a recipe, with the user's changes, and where and how to train by it."""

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

_OF_RECIPE = "the recipe's"  # shown as the default of what changes the recipe
# The options that change the recipe; the others are fields of vlmo.training.Settings.
_CHANGES = (
    *("size", "steps", "epochs", "warmup", "lr", "weight_decay", "batch_size", "image_size"),
    *("text_length", "mask_share", "drop_path", "clip_norm", "itc_grad_scale", "max_logit_scale"),
    *("separate_attention", "official_masking", "official_batches"),
)


def train(
    recipe: Annotated[str, typer.Argument(help="One of the names that vlmo recipes lists.")],
    data: DataOption,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; a training in it is resumed.", show_default="runs/RECIPE"
        ),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(
            "--init",
            help="Checkpoint, or folder of a run, to start from.",
            show_default="random weights",
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Prefix of keys that are not loaded from --init; may be repeated.",
            show_default="none",
        ),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        typer.Option(
            "--vocab", help="Vocabulary, a vocab.txt.", show_default="that of the run or of --init"
        ),
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            help="Official data sets to train on; may be repeated.",
            show_default="the recipe's",
        ),
    ] = None,
    answers: DataAnswersOption = None,
    answer_minimum: Annotated[
        int,
        typer.Option(
            min=1, help="Your own VQA data: keep what is the major answer of this many questions."
        ),
    ] = 1,
    on_bad_sample: Annotated[
        str,
        typer.Option(
            help="What to do about a damaged picture or text: error; skip (up to 1 % of the "
            "samples, or 10 if that is more); skip:N (up to N)."
        ),
    ] = "error",
    size: Annotated[
        str | None,
        typer.Option(
            help="Size of the model: tiny, small, base, base_plus or large.",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps in all; may be raised when resuming.", show_default=_OF_RECIPE
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Epochs in all; may be raised when resuming.", show_default=_OF_RECIPE
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, help="Warm-up steps, until --lr is reached.", show_default=_OF_RECIPE),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default=_OF_RECIPE)
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(help="0 to 1; not applied to biases and most norms.", show_default=_OF_RECIPE),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Samples per step, over all processes.", show_default=_OF_RECIPE),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images in pixels.", show_default=_OF_RECIPE),
    ] = None,
    text_length: Annotated[
        int | None,
        typer.Option(
            min=3, help="Most tokens of a text, with [CLS] and [SEP].", show_default=_OF_RECIPE
        ),
    ] = None,
    mask_share: Annotated[
        float | None,
        typer.Option(help="Share of the tokens that MLM masks.", show_default=_OF_RECIPE),
    ] = None,
    drop_path: Annotated[
        float | None,
        typer.Option(help="Stochastic depth rate of the last block.", show_default=_OF_RECIPE),
    ] = None,
    clip_norm: Annotated[
        float | None,
        typer.Option(help="Clip the gradient to this norm.", show_default=_OF_RECIPE),
    ] = None,
    itc_grad_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor of the gradient of the contrastive loss; in the official code it is "
            "1 / GPUs (docs/training.md).",
            show_default=_OF_RECIPE,
        ),
    ] = None,
    max_logit_scale: Annotated[
        float | None,
        typer.Option(
            help="Upper bound of 1 / temperature in the contrastive loss (100 in CLIP).",
            show_default="no bound",
        ),
    ] = None,
    separate_attention: Annotated[
        bool,
        typer.Option("--separate-attention", help="Separate attention weights for text and image."),
    ] = False,
    official_masking: Annotated[
        bool,
        typer.Option("--official-masking", help="Choose masked tokens as the official code does."),
    ] = False,
    official_batches: Annotated[
        bool,
        typer.Option(
            "--official-batches",
            help="Random batches: captions of the same picture may be each other's negatives.",
        ),
    ] = False,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of weights, order, augmentation and masks.")
    ] = 1,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Rows at a time on each process.", show_default="all"),
    ] = None,
    checkpointing: Annotated[
        bool,
        typer.Option(
            "--checkpointing", help="Recompute activations in the backward to save memory."
        ),
    ] = False,
    parallel: Annotated[
        Literal["ddp", "fsdp"], typer.Option(help="DistributedDataParallel, or FSDP2 (shards).")
    ] = "ddp",
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Loader processes of each training process.")
    ] = 0,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between rows of the logs.")] = 10,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between saved states.")] = 1000,
    evaluate_every: Annotated[
        int | None,
        typer.Option(
            min=0, help="Steps between validations; 0 for none.", show_default="only at the end"
        ),
    ] = None,
    evaluation_batch: Annotated[
        int, typer.Option(min=1, help="Samples at a time in validations.")
    ] = 64,
    board: Annotated[
        bool,
        typer.Option("--tensorboard/--no-tensorboard", help="Write a TensorBoard log as well."),
    ] = True,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, run one step, and write nothing."),
    ] = False,
) -> None:
    """Train a model by a recipe, alone or under torchrun (docs/training.md).

    Exits with 1 if the loss or a weight is no longer finite. After SIGTERM or SIGINT the state is
    saved and the status is 143 or 130; the same command then resumes the training.
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
