"""What a training is made of, checked before anything is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from rich.console import Console
from torch.utils.data import Dataset

from vlmo.checkpoint import load_checkpoint
from vlmo.config import VLMoConfig
from vlmo.data import TextTokenizer, digit_tokenizer, has_splits, load_vocabulary, open_data
from vlmo.data.sources import holds_arrow
from vlmo.distributed import world_size
from vlmo.files import write_json
from vlmo.loading import ANSWERS, VOCABULARY, WEIGHTS, read_answers
from vlmo.machine import versions
from vlmo.model import VLMo
from vlmo.objectives import unused_parameters
from vlmo.recipes import Recipe
from vlmo.training.initial import start_wide
from vlmo.training.state import differences, load_state

STATE, RECIPE, METRICS = "training.pt", "recipe.json", "metrics.json"
# Temporary names of vlmo.files.replacing.
_UNFINISHED = re.compile(
    r"\.(training|model|best|log|recipe|vocab|answers|metrics)\.\d+-[0-9a-f]{8}\.\w+"
)


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        recipe: with the user's changes.
        data: source for :func:`vlmo.data.open_data`.
        output: folder of the run; made if missing.
        datasets: of the official data; None for the recipe's.
        vocabulary: vocab.txt; None for that of ``initial`` or of the run, or of digit scenes.
        initial: checkpoint or run folder to start from.
        skip: prefixes of keys of ``initial`` that are not loaded.
        answers: JSON file with a list of VQA's answers; None for those of the data.
        answer_minimum: of :func:`vlmo.data.open_data`.
        seed: of weights, order, augmentation, masks, negatives and stochastic depth.
        micro_batch: rows at a time on each process; None for all.
        device: name for :func:`vlmo.placement.chosen_device`.
        dtype: name for :func:`vlmo.placement.chosen_dtype`.
        backend: of every operation; None for the first that can run.
        parallel: "ddp" or "fsdp", see :func:`vlmo.training.parallel.wrapped`.
        checkpointing: see :class:`vlmo.VLMoConfig`.
        workers: processes that make samples, for each process that trains.
        log_every: steps between two rows of the logs.
        save_every: steps between two saved states.
        evaluate_every: steps between two validations; 0 for none at all, None for one at the end
            if the data have a val split.
        evaluation_batch: samples at a time of a validation.
        board: write TensorBoard's log.
    """

    recipe: Recipe
    data: str
    output: Path
    datasets: tuple[str, ...] | None = None
    vocabulary: Path | None = None
    initial: Path | None = None
    skip: tuple[str, ...] = ()
    answers: Path | None = None
    answer_minimum: int = 1
    seed: int = 1
    micro_batch: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str | None = None
    parallel: str = "ddp"
    checkpointing: bool = False
    workers: int = 0
    log_every: int = 10
    save_every: int = 1000
    evaluate_every: int | None = None
    evaluation_batch: int = 64
    board: bool = True


class Materials(NamedTuple):
    """What a training is made of.

    Attributes:
        tokenizer: of the recipe's text length.
        data: to train on.
        validation: None if there is to be none.
        config: of the model.
        total: steps of the whole training.
        run: what must be the same for a training to go on, see
            :func:`vlmo.training.state.differences`.
        state: of the run that goes on, None for a new one.
    """

    tokenizer: TextTokenizer
    data: Dataset
    validation: Dataset | None
    config: VLMoConfig
    total: int
    run: dict[str, Any]
    state: dict[str, Any] | None


def prepare(settings: Settings, console: Console) -> Materials:
    """Open and check everything; nothing is written.

    Raises:
        ValueError: what does not fit together, or a folder with another training.
        OSError: a file is missing.
    """
    recipe = settings.recipe
    check_batch(recipe.batch_size, world_size(), settings.micro_batch)
    for name in ("log_every", "save_every", "evaluation_batch"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: {getattr(settings, name)} is not positive")
    if settings.output.exists() and not settings.output.is_dir():
        raise NotADirectoryError(f"output: {settings.output} exists and is no folder")
    given = None if settings.answers is None else read_answers(settings.answers)
    data = _open(settings, "train", given)
    tokenizer = _tokenizer(settings)
    answers = getattr(data, "answers", None) if recipe.stage == "vqa" else None
    _check_vocabulary(settings, tokenizer)
    _check_answers(settings, answers)
    validation = _validation(settings, answers, console)
    config = recipe.config(
        vocab_size=tokenizer.vocab_size,
        vqa_labels=len(answers) if answers else VLMoConfig.vqa_labels,
        kernels=settings.backend,
        checkpointing=settings.checkpointing,
    )
    samples = len(cast(Sized, data))
    run = {
        "recipe": _as_json(dataclasses.asdict(recipe)),
        "seed": settings.seed,
        "samples": samples,
        "vocabulary": _digest(tokenizer.tokens(range(tokenizer.vocab_size))),
        "answers": answers and _digest(answers),
    }
    total = recipe.total_steps(samples // recipe.batch_size)
    if recipe.warmup_steps(total) > total:
        raise ValueError(f"warmup: {recipe.warmup_steps(total)} exceeds the {total} steps")
    state = _earlier(settings.output, run)
    return Materials(tokenizer, data, validation, config, total, run, state)


def check_batch(batch_size: int, processes: int, micro_batch: int | None) -> None:
    """Raise ValueError unless processes and parts divide a batch evenly; names all numbers."""
    share, rest = divmod(batch_size, processes)
    if rest:
        raise ValueError(f"batch_size: {batch_size} is not a multiple of {processes} processes")
    if micro_batch is not None and (micro_batch < 1 or share % micro_batch):
        raise ValueError(
            f"micro_batch: {micro_batch} does not divide the {share} rows of a process (batch_size "
            f"{batch_size} over {processes} processes)"
        )


def new_model(settings: Settings, config: VLMoConfig, console: Console) -> VLMo:
    """The model that a new training starts from, on the CPU; equal on all ranks."""
    torch.manual_seed(settings.seed)
    model = VLMo(config)
    if settings.recipe.wide_start:
        start_wide(model)
    path = _weights(settings.initial)
    if path is not None:
        console.print(str(load_checkpoint(model, path, skip=settings.skip)), highlight=False)
    elif settings.recipe.initial_from is not None:
        origin = settings.recipe.initial_from
        console.print(
            f"[yellow]Random weights: no --init, and this recipe starts from {origin}.[/]"
        )
    return model


class FirstSamples(Dataset):
    """The first samples of a data set, to try something on.

    Args:
        dataset: of :func:`vlmo.data.open_data`.
        count: at most so many.
    """

    def __init__(self, dataset: Dataset, count: int):
        self._dataset = cast(Any, dataset)
        self._count = min(count, len(self._dataset))
        self.answers = getattr(dataset, "answers", None)
        if hasattr(dataset, "image_ids"):
            self.image_ids = self._dataset.image_ids[: self._count]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: Any) -> dict[str, Any]:
        return self._dataset[item]

    def text(self, index: int) -> str:
        """Of a sample."""
        return self._dataset.text(index)


def freeze(model: VLMo, recipe: Recipe) -> None:
    """Leave a gradient to what the recipe trains and the losses reach."""
    unused = unused_parameters(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(recipe.trains(name) and name not in unused)


def write_folder(settings: Settings, materials: Materials) -> None:
    """Make the run's folder and write what does not change: recipe, vocabulary, answers.

    What a killed process has left half written is removed.

    Raises:
        OSError: it cannot be written.
    """
    settings.output.mkdir(parents=True, exist_ok=True)
    for path in settings.output.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink()
    names = ("data", "datasets", "initial", "dtype", "parallel", "micro_batch")
    facts = {name: getattr(settings, name) for name in names}
    facts["initial"] = None if settings.initial is None else str(settings.initial)
    content = {"run": materials.run, **facts, "processes": world_size(), "versions": versions()}
    write_json(settings.output / RECIPE, content)
    materials.tokenizer.save_vocabulary(settings.output / VOCABULARY)
    if materials.run["answers"]:
        write_json(settings.output / ANSWERS, list(cast(Any, materials.data).answers))


def _tokenizer(settings: Settings) -> TextTokenizer:
    length = settings.recipe.text_length
    if settings.vocabulary is not None:
        return TextTokenizer(load_vocabulary(settings.vocabulary), length)
    if settings.data == "digits":
        return digit_tokenizer(length)
    for folder in (settings.output, settings.initial):
        if folder is not None and (folder / VOCABULARY).is_file():
            return TextTokenizer(load_vocabulary(folder / VOCABULARY), length)
    raise ValueError(
        "vocab: a vocab.txt is needed, for the published models that of bert-base-uncased"
    )


def _open(settings: Settings, split: str, answers: list[str] | None) -> Dataset:
    recipe = settings.recipe
    datasets = settings.datasets
    if datasets is None and holds_arrow(settings.data):
        datasets = recipe.datasets
    return open_data(
        settings.data,
        recipe.stage,
        split,
        image_size=recipe.image_size,
        train=split == "train",
        answers=answers,
        datasets=datasets,
        answer_minimum=settings.answer_minimum,
    )


def _validation(settings: Settings, answers: list[str] | None, console: Console) -> Dataset | None:
    if settings.evaluate_every == 0:
        return None
    try:
        if not has_splits(settings.data):
            raise ValueError(f"data: {settings.data} has one split only, which is trained on")
        return _open(settings, "val", answers)
    except (FileNotFoundError, ValueError) as error:
        if settings.evaluate_every is not None:
            raise
        console.print(f"[yellow]No validation: {error}[/]")
        return None


def _check_vocabulary(settings: Settings, tokenizer: TextTokenizer) -> None:
    """Ids that mean other words would not be noticed."""
    path = settings.initial and settings.initial / VOCABULARY
    if path is None or not path.is_file():
        return
    before = TextTokenizer(load_vocabulary(path), settings.recipe.text_length)
    tokens = [found.tokens(range(found.vocab_size)) for found in (before, tokenizer)]
    if tokens[0] != tokens[1]:
        raise ValueError(f"vocab: it is not {path}, with which the model of --init was trained")


def _check_answers(settings: Settings, answers: list[str] | None) -> None:
    """A head for other answers, or for the same in another order, must not be taken over."""
    if answers is None or settings.initial is None or "vqa_classifier." in settings.skip:
        return
    path = settings.initial / ANSWERS
    if path.is_file() and read_answers(path) != answers:
        raise ValueError(
            f"init: {path} is not the list of these data; give it as --answers, or leave the head "
            "out with --skip vqa_classifier."
        )


def _weights(initial: Path | None) -> Path | None:
    if initial is None or not initial.is_dir():
        return initial
    if not (initial / WEIGHTS).is_file():
        raise FileNotFoundError(f"init: {initial} has no {WEIGHTS}")
    return initial / WEIGHTS


def _earlier(folder: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The state to go on from, None in a new folder; raises if it is another training's."""
    state = None
    if (folder / STATE).exists():
        state = load_state(folder / STATE)
        before = state["run"]
    elif (folder / RECIPE).exists():
        before = json.loads((folder / RECIPE).read_text(encoding="utf-8"))["run"]
    else:
        return None
    found = differences(before, run)
    if found:
        raise ValueError(f"output: {folder} is of another training ({'; '.join(found)})")
    return state


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _digest(words: list[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]
