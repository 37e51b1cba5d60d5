"""``vlmo evaluate``: the metrics of a trained model on a data set."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from vlmo.checkpoint import config_of
from vlmo.commands.outputs import check_outputs
from vlmo.data import BadSample, TextTokenizer, open_data
from vlmo.evaluation import check_task, evaluate
from vlmo.files import write_json
from vlmo.loading import check_words, load_model, weights_of
from vlmo.machine import versions
from vlmo.model import VLMo
from vlmo.placement import chosen_dtype, require_backend
from vlmo.training.parallel import is_first, joined_group


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        model: checkpoint or run folder.
        task: of :func:`vlmo.evaluation.evaluate`.
        data: source for :func:`vlmo.data.open_data`.
        split: "train", "val" or "test".
        datasets: of the official data; None for the task's.
        vocabulary: vocab.txt; None for that of the run folder.
        answers: JSON list of VQA's answers; None for those of the run folder, else of the data.
        image_size: in pixels; None for the model's.
        rerank: candidates that the fusion encoder scores anew, 0 for none.
        batch_size: samples at a time on each process.
        workers: processes that make samples, for each that evaluates.
        device: name for :func:`vlmo.placement.chosen_device`.
        dtype: name for :func:`vlmo.placement.chosen_dtype`.
        backend: of every operation; None for the first that can run.
        output: JSON file for the metrics; None for none.
        predictions: file for the answers; None for none.
        on_bad_sample: "error" or "skip", of :func:`vlmo.evaluation.evaluate`.
    """

    model: Path
    task: str
    data: str
    split: str = "test"
    datasets: tuple[str, ...] | None = None
    vocabulary: Path | None = None
    answers: Path | None = None
    image_size: int | None = None
    rerank: int = 0
    batch_size: int = 64
    workers: int = 0
    device: str = "auto"
    dtype: str = "auto"
    backend: str | None = None
    output: Path | None = None
    predictions: Path | None = None
    on_bad_sample: str = "error"


def run(settings: Settings, console: Console) -> dict[str, float]:
    """Evaluate, alone or as one of torchrun's processes; the first one prints and writes.

    Raises:
        ValueError, OSError, NotImplementedError: what a user can mend; nothing has been written.
        FloatingPointError: the model's outputs are NaN or infinite.
    """
    check_outputs(
        {"output": settings.output, "predictions": settings.predictions},
        given={
            "model": settings.model,
            "vocab": settings.vocabulary,
            "answers": settings.answers,
            "data": None if settings.data == "digits" else Path(settings.data),
        },
    )
    if settings.answers is not None and settings.task != "vqa":
        raise ValueError(f"answers: {settings.answers} does not suit {settings.task}, only vqa")
    with joined_group(settings.device) as device:
        autocast = chosen_dtype(settings.dtype, device)
        require_backend(settings.backend, device, autocast)
        metrics = _metrics(settings, device, autocast)
        if is_first():
            _report(settings, metrics, console)
        return metrics


def _metrics(
    settings: Settings, device: torch.device, autocast: torch.dtype | None
) -> dict[str, float]:
    size = {} if settings.image_size is None else {"image_size": settings.image_size}
    weights = weights_of(settings.model)
    config = config_of(weights, **size)
    check_task(config, settings.task, rerank=settings.rerank, predictions=settings.predictions)
    model, vocabulary, answers, digests = load_model(
        settings.model,
        vocabulary=settings.vocabulary,
        answers=settings.answers,
        kernels=settings.backend,
        **size,
    )
    if vocabulary is None:
        raise ValueError(
            f"vocab: {settings.model} has no vocab.txt beside it; for the published models it is "
            "that of bert-base-uncased"
        )
    dataset = open_data(
        settings.data,
        settings.task,
        settings.split,
        image_size=model.config.image_size,
        answers=answers if settings.task == "vqa" else None,
        datasets=settings.datasets,
    )
    if settings.task == "vqa":
        check_words(
            f"data: {settings.data}",
            dataset.answers or [],
            "answers",
            (model.config.vqa_labels, digests.answers),
            weights,
        )
    try:
        return _evaluated(settings, model.to(device), dataset, vocabulary, autocast)
    except BadSample as error:
        raise ValueError(f"{error}; --on-bad-sample skip leaves out what cannot be read") from error


def _evaluated(
    settings: Settings,
    model: VLMo,
    dataset: Dataset,
    vocabulary: Tokenizer,
    autocast: torch.dtype | None,
) -> dict[str, float]:
    return evaluate(
        model,
        dataset,
        TextTokenizer(vocabulary, model.config.max_text_length),
        settings.task,
        batch_size=settings.batch_size,
        rerank=settings.rerank,
        workers=settings.workers,
        autocast=autocast,
        predictions=settings.predictions,
        on_bad_sample=settings.on_bad_sample,
    )


def _report(settings: Settings, metrics: Mapping[str, float], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(settings.task)
    table.add_column(Text(f"{settings.data}, {settings.split}"), justify="right")
    for name, value in metrics.items():
        table.add_row(name, str(value) if isinstance(value, int) else f"{value:.4f}")
    if metrics.keys() - {"skipped"}:
        console.print(table)
    else:
        told = "The split has no answers: there is nothing to measure."
        console.print(told, style="yellow")
    if settings.output is not None:
        given = {
            name: os.fspath(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(settings).items()
        }
        content: dict[str, Any] = {"metrics": dict(metrics), **given, "versions": versions()}
        write_json(settings.output, content)
    written = [str(p) for p in (settings.output, settings.predictions) if p is not None]
    if written:
        console.print(f"Written: {', '.join(written)}", markup=False)
