"""The command line: ``vlmo`` or ``python -m vlmo``."""

from __future__ import annotations

import contextlib
import enum
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from vlmo import __version__

# The commands import what they need, so that --help does not wait for torch.

app = typer.Typer(
    help="Fused kernels for multiway transformers, and the VLMo model on top of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

# What a user can cause and mend; anything else is a defect and keeps its traceback.
_USER_ERRORS = (ValueError, NotImplementedError, OSError, ImportError)


class Device(str, enum.Enum):
    """Where to run; auto is the GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(str, enum.Enum):
    """Of the operands of matrix products."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class Task(str, enum.Enum):
    """What a model can be judged by."""

    retrieval = "retrieval"
    vqa = "vqa"
    nlvr2 = "nlvr2"
    pretrain = "pretrain"
    textmlm = "textmlm"


class Split(str, enum.Enum):
    """A split of the data."""

    train = "train"
    val = "val"
    test = "test"


class OnBadSample(str, enum.Enum):
    """What evaluation does about a sample that cannot be read."""

    error = "error"
    skip = "skip"


class Parallel(str, enum.Enum):
    """DistributedDataParallel or FSDP2."""

    ddp = "ddp"
    fsdp = "fsdp"


RECIPES_OWN = "the recipe's"  # what options of train show as their default

# What several commands ask for.
DataOption = Annotated[
    str, typer.Option(help="digits, a folder of Arrow files, or your own data (docs/data.md).")
]
ModelArgument = Annotated[Path, typer.Argument(help="Checkpoint, or folder of a run.")]
VocabularyOption = Annotated[
    Path | None, typer.Option(help="vocab.txt of the model.", show_default="that of the run folder")
]
AnswersOption = Annotated[
    Path | None,
    typer.Option(help="JSON list of the VQA answers.", show_default="that of the run folder"),
]
DeviceOption = Annotated[Device, typer.Option(help="Where to run.")]
DtypeOption = Annotated[
    Dtype | None,
    typer.Option(
        help="Dtype of the matrix products.", show_default="float32 on a CPU, 16 bits on a GPU"
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option(
        help="Kernels: cuda, triton, cpu or reference.", show_default="the first that can run"
    ),
]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"vlmo {__version__}")
        raise typer.Exit


def _console() -> Console:
    """Says names of files and texts of errors as they are: they may look like markup."""
    return Console(markup=False, emoji=False)


@contextlib.contextmanager
def _ends_of_training() -> Iterator[None]:
    """Report a training that ended early in one line, and exit.

    The status is 128 plus the number of the signal that stopped it, or 1 if a loss or a weight was
    not finite.
    """
    try:
        from vlmo.training import Interrupted

        try:
            yield
        except Interrupted as stop:
            print(f"vlmo: {stop}", file=sys.stderr)
            raise typer.Exit(128 + stop.number) from stop
    except KeyboardInterrupt as stop:
        print("vlmo: stopped at once; what was saved before is as it was", file=sys.stderr)
        raise typer.Exit(130) from stop
    except FloatingPointError as error:
        print(f"vlmo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Fused kernels for multiway transformers, and the VLMo model on top of them."""


@app.command()
def info() -> None:
    """Show versions, devices, built kernels, and what can run here."""
    from vlmo.machine import show_machine

    show_machine(Console())


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("vlmo-demo"),
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Train for this many steps; the results are then not judged.",
            show_default="those of the recipe digits_demo",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Random seed of data, weights and training.")
    ] = 0,
    device: DeviceOption = Device.auto,
    backend: BackendOption = None,
) -> None:
    """Check the kernels, train a small VLMo, and search pictures with it.

    Exits with status 1 if a kernel exceeds its error bound, if retrieval is not far above chance,
    or if re-ranking lowers the recall. After Ctrl-C the training is saved, the status is 130, and
    the same command continues it.
    """
    # GNU OpenMP reads this when torch is loaded: how long its threads spin for work before they
    # sleep. Left to spin, a step takes forty times as long when another program has one of two
    # cores; put to sleep at once (OMP_WAIT_POLICY=passive), three times as long when none has.
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")
    from vlmo.demo import Settings, run

    settings = Settings(output, seed=seed, device=device.value, backend=backend, steps=steps)
    with _ends_of_training():
        failures = run(settings, Console())
    if failures:
        raise typer.Exit(1)


@app.command()
def recipes() -> None:
    """List the recipes of vlmo train."""
    from vlmo.recipes import show_recipes

    show_recipes(Console())


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="One of the names that vlmo recipes lists.")],
    data: DataOption,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; a training in it is resumed.", show_default="runs/RECIPE"
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Checkpoint, or folder of a run, to start from.", show_default="random weights"
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Prefix of keys that are not loaded from --init; may be repeated.",
            show_default="none",
        ),
    ] = None,
    vocab: Annotated[
        Path | None,
        typer.Option(help="Vocabulary, a vocab.txt.", show_default="that of the run or of --init"),
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(
            help="Official data sets to train on; may be repeated.",
            show_default="the recipe's",
        ),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="JSON list of the VQA answers.", show_default="those of the data"),
    ] = None,
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
            show_default=RECIPES_OWN,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps in all; may be raised when resuming.", show_default=RECIPES_OWN
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Epochs in all; may be raised when resuming.", show_default=RECIPES_OWN
        ),
    ] = None,
    warmup: Annotated[
        int | None,
        typer.Option(min=0, help="Warm-up steps, until --lr is reached.", show_default=RECIPES_OWN),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default=RECIPES_OWN)
    ] = None,
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="0 to 1; not applied to biases and most norms.", show_default=RECIPES_OWN
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Samples per step, over all processes.", show_default=RECIPES_OWN),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images in pixels.", show_default=RECIPES_OWN),
    ] = None,
    text_length: Annotated[
        int | None,
        typer.Option(
            min=3, help="Most tokens of a text, with [CLS] and [SEP].", show_default=RECIPES_OWN
        ),
    ] = None,
    mask_share: Annotated[
        float | None,
        typer.Option(help="Share of the tokens that MLM masks.", show_default=RECIPES_OWN),
    ] = None,
    drop_path: Annotated[
        float | None,
        typer.Option(help="Stochastic depth rate of the last block.", show_default=RECIPES_OWN),
    ] = None,
    clip_norm: Annotated[
        float | None,
        typer.Option(help="Clip the gradient to this norm.", show_default=RECIPES_OWN),
    ] = None,
    itc_grad_scale: Annotated[
        float | None,
        typer.Option(
            help="Factor of the gradient of the contrastive loss; in the official code it is "
            "1 / GPUs (docs/training.md).",
            show_default=RECIPES_OWN,
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
        Parallel, typer.Option(help="DistributedDataParallel, or FSDP2 (shards).")
    ] = Parallel.ddp,
    device: DeviceOption = Device.auto,
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
    tensorboard: Annotated[bool, typer.Option(help="Write a TensorBoard log as well.")] = True,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything, run one step, and write nothing."),
    ] = False,
) -> None:
    """Train a model by a recipe, alone or under torchrun (docs/training.md).

    Exits with 1 if the loss or a weight is no longer finite. After SIGTERM or SIGINT the state is
    saved and the status is 143 or 130; the same command then resumes the training.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as in demo
    from vlmo.recipes import recipe as recipe_of

    changes = dict(
        size=size,
        steps=steps,
        epochs=epochs,
        warmup=warmup,
        lr=lr,
        weight_decay=weight_decay,
        batch_size=batch_size,
        image_size=image_size,
        text_length=text_length,
        mask_share=mask_share,
        drop_path=drop_path,
        clip_norm=clip_norm,
        itc_grad_scale=itc_grad_scale,
        max_logit_scale=max_logit_scale,
        separate_attention=separate_attention or None,
        official_masking=official_masking or None,
        official_batches=official_batches or None,
    )
    chosen = recipe_of(recipe).replace(**{k: v for k, v in changes.items() if v is not None})
    with _ends_of_training():
        from vlmo.training import Settings
        from vlmo.training import train as run

        settings = Settings(
            chosen,
            data,
            output or Path("runs") / recipe,
            datasets=tuple(datasets) if datasets else None,
            vocabulary=vocab,
            initial=init,
            skip=tuple(skip or ()),
            answers=answers,
            answer_minimum=answer_minimum,
            seed=seed,
            micro_batch=micro_batch,
            device=device.value,
            dtype=dtype.value if dtype else "auto",
            backend=backend,
            parallel=parallel.value,
            checkpointing=checkpointing,
            workers=workers,
            log_every=log_every,
            save_every=save_every,
            evaluate_every=evaluate_every,
            evaluation_batch=evaluation_batch,
            board=tensorboard,
            on_bad_sample=on_bad_sample,
            dry_run=dry_run,
        )
        run(settings, _console())


@app.command()
def vocab(
    data: Annotated[
        str,
        typer.Argument(help="digits, a folder of Arrow files, or your own data (docs/data.md)."),
    ],
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("vocab.txt"),
    task: Annotated[
        Task, typer.Option(help="Task of the data, whose texts are read.")
    ] = Task.pretrain,
    split: Annotated[Split, typer.Option(help="Split whose texts are read.")] = Split.train,
    datasets: Annotated[
        list[str] | None,
        typer.Option(help="Official data sets.", show_default="those of the task"),
    ] = None,
    size: Annotated[int, typer.Option(min=6, help="Most tokens of the vocabulary.")] = 8000,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Learn a WordPiece vocabulary from the texts of your own data."""
    from vlmo.commands.vocab import Settings, run

    chosen = tuple(datasets) if datasets else None
    run(Settings(data, output, task.value, split.value, chosen, size, force), _console())


@app.command()
def check(
    data: Annotated[
        str,
        typer.Argument(help="digits, a folder of Arrow files, or your own data (docs/data.md)."),
    ],
    task: Annotated[
        Task | None,
        typer.Option(
            help="Task that the data are for.", show_default="every task that the data serve"
        ),
    ] = None,
    split: Annotated[
        Split | None, typer.Option(help="Check only this split.", show_default="all that there are")
    ] = None,
    datasets: Annotated[
        list[str] | None,
        typer.Option(help="Official data sets.", show_default="those of the task"),
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option(help="JSON list of the VQA answers.", show_default="those of the data"),
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help=".jsonl file for the file, row and reason of each.")
    ] = None,
) -> None:
    """Read every text and every picture of some data once, and list those that cannot be read.

    Exits with status 1 if there are any.
    """
    from vlmo.commands.check import Settings, run

    settings = Settings(
        data,
        task.value if task else None,
        split=split.value if split else None,
        datasets=tuple(datasets) if datasets else None,
        answers=answers,
        workers=workers,
        output=output,
    )
    if run(settings, _console()):
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: ModelArgument,
    task: Annotated[Task, typer.Argument(help="What to measure.")],
    data: DataOption,
    split: Annotated[Split, typer.Option(help="Split of the data.")] = Split.test,
    datasets: Annotated[
        list[str] | None,
        typer.Option(help="Official data sets.", show_default="those of the task"),
    ] = None,
    rerank: Annotated[
        int,
        typer.Option(
            min=0, help="Candidates that the fusion encoder re-ranks (32 in the paper); 0 for none."
        ),
    ] = 0,
    image_size: Annotated[
        int | None,
        typer.Option(min=1, help="Side of the images in pixels.", show_default="the model's"),
    ] = None,
    vocab: VocabularyOption = None,
    answers: AnswersOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time on each process.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes of each process.")] = 0,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file for the metrics.", show_default="none")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="File of answers to submit (JSON of vqa, CSV of nlvr2).", show_default="none"
        ),
    ] = None,
    on_bad_sample: Annotated[
        OnBadSample, typer.Option(help="Stop at a sample that cannot be read, or skip it.")
    ] = OnBadSample.error,
) -> None:
    """Measure a model on a data set, alone or under torchrun (docs/prediction.md).

    Exits with 1 if the model's outputs are NaN or infinite.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as in demo
    from vlmo.commands.evaluate import Settings, run

    settings = Settings(
        model,
        task.value,
        data,
        split=split.value,
        datasets=tuple(datasets) if datasets else None,
        vocabulary=vocab,
        answers=answers,
        image_size=image_size,
        rerank=rerank,
        batch_size=batch_size,
        workers=workers,
        device=device.value,
        dtype=dtype.value if dtype else "auto",
        backend=backend,
        output=output,
        predictions=predictions,
        on_bad_sample=on_bad_sample.value,
    )
    try:
        run(settings, _console())
    except FloatingPointError as error:
        print(f"vlmo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.command()
def predict(
    model: ModelArgument,
    image: Annotated[
        list[Path] | None, typer.Option(help="An image; give two for a statement about a pair.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Caption, question or statement; may be repeated.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="Records of images and texts, .jsonl, .json, .csv or .tsv; - is standard input."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help=".jsonl file.", show_default="standard output")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help=".npz file for unit vectors of images and texts.", show_default="none"),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of answers to a question.")] = 1,
    vocab: VocabularyOption = None,
    answers: AnswersOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 64,
    device: DeviceOption = Device.auto,
    dtype: DtypeOption = None,
    backend: BackendOption = None,
) -> None:
    """Predict similarity, match, answers or truth of images and texts, by the model's heads.

    See docs/prediction.md. Exits with 1 if an image of a record cannot be read, or if outputs are
    NaN or infinite.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as in demo
    from vlmo.commands.predict import Settings, run

    settings = Settings(
        model,
        images=tuple(image or ()),
        texts=tuple(text or ()),
        input=input,
        output=output,
        embeddings=embeddings,
        top=top,
        vocabulary=vocab,
        answers=answers,
        batch_size=batch_size,
        device=device.value,
        dtype=dtype.value if dtype else "auto",
        backend=backend,
    )
    try:
        failures = run(settings)
    except FloatingPointError as error:
        print(f"vlmo: {error}", file=sys.stderr)
        raise typer.Exit(1) from error
    if failures:
        raise typer.Exit(1)


@app.command()
def tune(
    dim: Annotated[
        int | None, typer.Option(min=1, help="Model dimension.", show_default="768")
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(min=1, help="Hidden width of an expert.", show_default="3072")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the batch.", show_default="32768")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Tokens of each expert in one sequence.", show_default="40:197"),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of weights and activations.", show_default="bfloat16")
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Table to write; rows of other GPUs in it are kept.")
    ] = Path("vlmo-tiles.json"),
    quick: Annotated[bool, typer.Option("--quick", help="Try the likeliest tiles only.")] = False,
) -> None:
    """Search the tile shapes of moe_ffn's Triton kernels on this GPU and write them to a file.

    The variable VLMO_TILES makes the library use the file. Without a GPU, TRITON_INTERPRET=1 runs
    the search at a tiny size, as a check of itself: its times mean nothing.
    """
    from vlmo.tune import parse_problem, tune

    given = dict(dim=dim, hidden=hidden, tokens=tokens, split=split, dtype=dtype and dtype.value)
    problem = parse_problem({name: value for name, value in given.items() if value is not None})
    tune(problem, output, _console(), quick=quick)


bench_app = typer.Typer(pretty_exceptions_enable=False)
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
def bench(
    context: typer.Context,
    suite: Annotated[
        list[str] | None, typer.Option(help="moe_ffn, attention or model.", show_default="all")
    ] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Only cases in it.", show_default="all")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(help="base or large.", show_default="all")
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(help="Only this one; vlmo for all of ours.", show_default="all"),
    ] = None,
    device: DeviceOption = Device.auto,
    minutes: Annotated[
        float | None,
        typer.Option(
            help="What would end later is left out.", show_default="4.5 on a CPU, 20 on a GPU"
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("vlmo-bench"),
    commit: Annotated[
        str | None, typer.Option(help="Of what is measured.", show_default="ask git")
    ] = None,
    pictures: Annotated[bool, typer.Option(help="Draw the results (needs matplotlib).")] = True,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes: see that everything runs.")
    ] = False,
    modelled: Annotated[
        str | None, typer.Option(help="Show the modelled figures of v100 instead.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Compute the modelled figures anew, in minutes.")
    ] = False,
) -> None:
    """Measure the operations and the model here, beside peers and the roof (docs/performance.md).

    Nothing is timed that has not been held against float64: exits with 1 if one of this library's
    own contenders was not exact or failed. Each of --suite, --dtype, --size and --contender may be
    repeated.
    """
    if context.invoked_subcommand is not None:
        return
    if again and modelled is None:
        raise ValueError("again: only goes with --modelled")
    if modelled is not None:
        from vlmo.bench.modelled import show

        show(modelled, Console(), again=again)
        return
    if smoke:
        os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as in demo
    from vlmo.commands.bench import Settings, run

    settings = Settings(
        output,
        suites=tuple(suite or ()),
        dtypes=tuple(name.value for name in dtype or ()),
        sizes=tuple(size or ()),
        contenders=tuple(contender or ()),
        device=device.value,
        minutes=minutes,
        smoke=smoke,
        draws=pictures,
        commit=commit,
        command=shlex.join(["vlmo", *sys.argv[1:]]),
    )
    if run(settings, Console()).defects:
        raise typer.Exit(1)


@bench_app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="JSON file of vlmo bench.")],
    after: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Show what is faster, slower or the same in the second of two reports."""
    from vlmo.commands.bench import run_compare

    run_compare(before, after, Console())


def _lack_of_memory(error: BaseException) -> str | None:
    """What to say of an error if memory was lacking; None for another error."""
    reason = next(iter(str(error).splitlines()), "")
    # NumPy and Python, torch on the CPU, torch on a GPU.
    torch_s = "can't allocate memory" in reason or type(error).__name__ == "OutOfMemoryError"
    if not isinstance(error, MemoryError) and not torch_s:
        return None
    return f"there is not enough memory: {reason or 'no more can be had'}"


def main() -> None:
    """Console entry point: errors a user can mend are one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be in its encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app()
    except _USER_ERRORS as error:
        _fail(error)
    except (RuntimeError, MemoryError) as error:
        # torch raises it wherever the main process is when a worker dies.
        from vlmo.data import worker_failure

        worker = worker_failure(error) if isinstance(error, RuntimeError) else None
        failure = worker or _lack_of_memory(error)
        if failure is None:
            raise
        _fail(failure)


def _fail(message: object) -> NoReturn:
    print(f"vlmo: {message}", file=sys.stderr)
    sys.exit(2)
