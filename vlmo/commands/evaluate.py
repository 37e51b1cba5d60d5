"""``vlmo evaluate``: compute the metrics of a trained model on a data set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmo.commands.options import (
    AnswersOption,
    BackendOption,
    DataOption,
    DatasetsOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    Split,
    Task,
    VocabularyOption,
    limit_spinning,
    not_finite_exits,
    plain_console,
)


def evaluate(
    model: ModelArgument,
    task: Annotated[Task, typer.Argument(help="Task to evaluate.")],
    data: DataOption,
    split: Annotated[Split, typer.Option(help="Split to evaluate on.")] = "test",
    datasets: DatasetsOption = None,
    rerank: Annotated[
        int,
        typer.Option(
            min=0,
            help="Candidates that the fusion encoder re-ranks (32 in the paper); 0 disables it.",
        ),
    ] = 0,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=1, help="Height and width of the images in pixels.", show_default="the model's"
        ),
    ] = None,
    vocabulary: VocabularyOption = None,
    answers: AnswersOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of each process.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Data loader processes of each process.")] = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    backend: BackendOption = None,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write the metrics to.", show_default="none")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="Submission file to write (JSON for vqa, CSV for nlvr2).", show_default="none"
        ),
    ] = None,
    on_bad_sample: Annotated[
        Literal["error", "skip"],
        typer.Option(help="Stop at an unreadable sample, or skip it."),
    ] = "error",
) -> None:
    """Evaluate a model on a data set, in one process or under torchrun (docs/prediction.md).

    Exits with status 1 if outputs of the model are NaN or infinite.
    """
    options = locals() | {"dtype": dtype or "auto", "datasets": datasets or None}
    limit_spinning()
    from vlmo.checkpoint.io import model_config_of
    from vlmo.commands.outputs import check_outputs, path_of_data
    from vlmo.data import BadSample, TextTokenizer, open_data
    from vlmo.device import chosen_dtype, require_backend
    from vlmo.run_folder import check_words, load_model, weights_of
    from vlmo.tasks.evaluation import check_task
    from vlmo.tasks.evaluation import evaluate as measure
    from vlmo.training.parallel import is_first, joined_group

    read = {"model": model, "vocab": vocabulary, "answers": answers, "data": path_of_data(data)}
    check_outputs({"output": output, "predictions": predictions}, given=read)
    if answers is not None and task != "vqa":
        raise ValueError(f"answers: {answers} does not suit {task}, only vqa")
    size = {} if image_size is None else {"image_size": image_size}
    with not_finite_exits(), joined_group(device) as place:
        autocast = chosen_dtype(options["dtype"], place)
        require_backend(backend, place, autocast)
        weights = weights_of(model)
        config = model_config_of(weights, **size)
        check_task(config, task, rerank=rerank, predictions=predictions)
        loaded = load_model(model, vocabulary=vocabulary, answers=answers, kernels=backend, **size)
        if loaded.vocabulary is None:
            raise ValueError(
                f"vocab: {model} has no vocabulary beside it; for the published models it is the "
                "vocab.txt of bert-base-uncased, for those of BEiT-3 beit3.spm"
            )
        dataset = open_data(
            *(data, task, split),
            image_size=config.image_size,
            answers=loaded.answers if task == "vqa" else None,
            datasets=options["datasets"],
        )
        if task == "vqa":
            expected = config.vqa_labels, loaded.digests.answers
            check_words(f"data: {data}", dataset.answers or [], "answers", expected, weights)
        try:
            metrics = measure(
                loaded.model.to(place),
                dataset,
                TextTokenizer(loaded.vocabulary, config.max_text_length),
                task,
                batch_size=batch_size,
                rerank=rerank,
                workers=workers,
                autocast=autocast,
                predictions=predictions,
                on_bad_sample=on_bad_sample,
            )
        except BadSample as error:
            hint = "--on-bad-sample skip leaves out what cannot be read"
            raise ValueError(f"{error}; {hint}") from error
        if is_first():
            _report(metrics, options, plain_console())


def _report(metrics: Mapping[str, float], options: Mapping[str, Any], console: Console) -> None:
    """Print the metrics, and write them to a file together with the arguments of the command."""
    from vlmo.device import versions
    from vlmo.files import write_json

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(options["task"])
    table.add_column(Text(f"{options['data']}, {options['split']}"), justify="right")
    for name, value in metrics.items():
        table.add_row(name, str(value) if isinstance(value, int) else f"{value:.4f}")
    if metrics.keys() - {"skipped"}:
        console.print(table)
    else:
        told = "The split has no answers: there is nothing to measure."
        console.print(told, style="yellow")
    if options["output"] is not None:
        given = {k: os.fspath(v) if isinstance(v, Path) else v for k, v in options.items()}
        write_json(options["output"], {"metrics": dict(metrics), **given, "versions": versions()})
    written = [str(options[name]) for name in ("output", "predictions") if options[name]]
    if written:
        console.print(f"Written: {', '.join(written)}", markup=False)
