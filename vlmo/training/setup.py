"""Prepares a training and checks everything before any file is written."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from rich.console import Console
from torch.utils.data import Dataset

from vlmo.checkpoint.io import load_checkpoint
from vlmo.data import (
    DigitScenes,
    TextTokenizer,
    digit_tokenizer,
    has_splits,
    load_vocabulary,
    open_data,
)
from vlmo.data.sources import holds_arrow
from vlmo.device import versions
from vlmo.distributed import world_size
from vlmo.files import write_json
from vlmo.model.config import VLMoConfig
from vlmo.model.models import Config, Model, answers_head, build
from vlmo.run_folder import (
    ANSWERS,
    RECIPE,
    VOCABULARIES,
    WEIGHTS,
    check_finite,
    digest,
    digests_of,
    read_answers,
    vocabulary_in,
)
from vlmo.tasks.losses import unused_parameters
from vlmo.training.bad_samples import FILE, bearable
from vlmo.training.initial import start_wide
from vlmo.training.logs import LINES, TABLE
from vlmo.training.parallel import on_first
from vlmo.training.recipes import Recipe
from vlmo.training.record import identity, length, write_record
from vlmo.training.resume import earlier, initial_weights, resumed, weights_file
from vlmo.training.state import STATE

METRICS, BEST = "metrics.json", "best.safetensors"
_RESULTS = (WEIGHTS, BEST, METRICS, TABLE, LINES, FILE)  # files that only a training writes
RUN_FILES = (*_RESULTS, STATE, RECIPE, *VOCABULARIES, ANSWERS)
# Names of the temporary files of vlmo.files.replacing.
_UNFINISHED = re.compile(
    r"\.(training|model|best|log|recipe|vocab|tokenizer|answers|metrics|bad_samples)\.\d+-[0-9a-f]{8}\.\w+"
)
_LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Attributes:
        recipe: with the user's changes.
        data: source for :func:`vlmo.data.open_data`.
        output: folder of the run; created if missing.
        datasets: which of unilm's data sets to use; None for those of the recipe.
        vocabulary: file for :func:`vlmo.data.load_vocabulary`; None for that of the
            run or of ``initial``, or of digit scenes.
        initial: checkpoint or run folder to start from.
        skip: prefixes of keys of ``initial`` that are not loaded.
        answers: JSON file with a list of VQA's answers; None for those of the data.
        answer_minimum: see :func:`vlmo.data.open_data`.
        seed: determines weights, order, augmentation, masks, negatives and stochastic depth.
        micro_batch: rows per forward and backward pass on each process; None for all rows.
        device: name for :func:`vlmo.device.chosen_device`.
        dtype: name for :func:`vlmo.device.chosen_dtype`.
        backend: backend of every operation; None for the first that can run.
        parallel: "ddp" or "fsdp", see :func:`vlmo.training.parallel.wrapped`.
        checkpointing: see :class:`vlmo.VLMoConfig`.
        workers: number of data loading workers for each training process.
        log_every: steps between two rows of the logs.
        save_every: steps between two saved states.
        evaluate_every: steps between two validations; 0 for no validation, None for one at the end
            if the data have a val split.
        evaluation_batch: batch size of the validation.
        board: write TensorBoard's log.
        on_bad_sample: what to do with a sample that cannot be read, in training and validation:
            "error", "skip" or "skip:N", see :func:`vlmo.training.bad_samples.bearable`.
        dry_run: check everything, execute one step and write nothing.
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
    on_bad_sample: str = "error"
    dry_run: bool = False


class Materials(NamedTuple):
    """Everything that a training needs, checked.

    Attributes:
        tokenizer: with the recipe's text length.
        data: training data.
        keys: one per sample; the samples of a batch have different keys. None for random batches.
        validation: validation data; None for no validation.
        config: configuration of the model.
        total: number of steps of the whole training.
        run: what must be equal for a training to be resumed, see
            :func:`vlmo.training.record.identity`.
        state: state of the run that is resumed; None for a new run.
        bearable: number of bad samples that may be left out; None if the first one ends the
            training.
    """

    tokenizer: TextTokenizer
    data: Dataset
    keys: Sequence[Hashable] | None
    validation: Dataset | None
    config: Config
    total: int
    run: dict[str, Any]
    state: dict[str, Any] | None
    bearable: int | None

    @property
    def step(self) -> int:
        """Number of steps done."""
        return 0 if self.state is None else self.state["step"]

    @property
    def removed(self) -> list[dict[str, Any]]:
        """Bad samples of the resumed run, if they have since been removed from the data."""
        if self.state is None or self.state["run"]["samples"] == self.run["samples"]:
            return []
        return list(self.state["bad"].values())


def prepare(settings: Settings, console: Console) -> Materials:
    """Open and check everything; writes nothing.

    Raises:
        ValueError: options or data are incompatible, or the folder holds another training.
        OSError: a file is missing.
    """
    recipe = settings.recipe
    check_batch(recipe.batch_size, world_size(), settings.micro_batch)
    _check_numbers(settings)
    _check_effects(settings)
    if settings.output.exists() and not settings.output.is_dir():
        raise NotADirectoryError(f"output: {settings.output} exists and is no folder")
    given = None if settings.answers is None else read_answers(settings.answers)
    data = _open(settings, "train", given)
    tokenizer = _tokenizer(settings)
    samples = len(cast(Sized, data))
    limit = bearable(settings.on_bad_sample, samples)
    keys = getattr(data, "keys", None)
    if not recipe.official_batches:
        _check_keys(keys, recipe.batch_size, samples)
    answers = getattr(data, "answers", None) if recipe.stage == "vqa" else None
    state, before = earlier(settings.output)
    initial = initial_weights(settings.initial, settings.skip, before, anew=state is None)
    digests = digest(tokenizer.tokens(range(tokenizer.vocab_size))), answers and digest(answers)
    validation = _validation(settings, answers, console)
    config = recipe.config(
        vocab_size=tokenizer.vocab_size,
        vqa_labels=len(answers) if answers else VLMoConfig.vqa_labels,
        kernels=settings.backend,
        checkpointing=settings.checkpointing,
    )
    if state is None:
        _check_initial(settings, answers_head(config), *digests)
    run = identity(
        recipe,
        seed=settings.seed,
        samples=samples,
        data=on_first(lambda: fingerprint(data)),
        vocabulary=digests[0],
        answers=digests[1],
        initial=initial,
    )
    if before is not None:
        repeats = keys is not None and not isinstance(data, DigitScenes)
        run = resumed(settings.output, before, run, state, repeats, console)
    if state is None:
        _check_folder(settings, tokenizer, answers, known=before is not None)
    total = length(run)
    if recipe.warmup_steps(total) > total:
        raise ValueError(f"warmup: {recipe.warmup_steps(total)} exceeds the {total} steps")
    keys = None if recipe.official_batches else keys
    return Materials(tokenizer, data, keys, validation, config, total, run, state, limit)


def fingerprint(data: Dataset, *, without: Sequence[int] = ()) -> str | None:
    """Fingerprint of a data set, optionally without some samples; None if it cannot provide one."""
    if without:
        left = getattr(data, "without", None)
        return None if left is None else left(without).fingerprint()
    tell = getattr(data, "fingerprint", None)
    return None if tell is None else tell()


def check_batch(batch_size: int, processes: int, micro_batch: int | None) -> None:
    """Raise ValueError unless processes and micro-batches divide a batch evenly."""
    share, rest = divmod(batch_size, processes)
    if rest:
        raise ValueError(f"batch_size: {batch_size} is not a multiple of {processes} processes")
    if micro_batch is not None and (micro_batch < 1 or share % micro_batch):
        raise ValueError(
            f"micro_batch: {micro_batch} does not divide the {share} rows of a process (batch_size "
            f"{batch_size} over {processes} processes)"
        )


def _check_numbers(settings: Settings) -> None:
    for name in ("log_every", "save_every", "evaluation_batch"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name}: {getattr(settings, name)} is not positive")
    for name in ("evaluate_every", "workers"):
        if (getattr(settings, name) or 0) < 0:
            raise ValueError(f"{name}: {getattr(settings, name)} is negative")
    if not 0 <= settings.seed <= _LARGEST_SEED:
        raise ValueError(f"seed: {settings.seed} is not within 0..{_LARGEST_SEED}")


def _check_effects(settings: Settings) -> None:
    """Raise ValueError for options that would have no effect."""
    if settings.skip and settings.initial is None:
        raise ValueError(f"skip: {list(settings.skip)} only goes with --init")
    stage = settings.recipe.stage
    if settings.answers is not None and stage != "vqa":
        raise ValueError(f"answers: {settings.answers} does not suit {stage}, only vqa")
    if settings.answer_minimum > 1:
        if stage != "vqa" or settings.data == "digits" or holds_arrow(settings.data):
            raise ValueError("answer_minimum: only suits own data for vqa")
        if settings.answers is not None:
            raise ValueError("answer_minimum: does not go with --answers, which lists them")


def _check_folder(
    settings: Settings, tokenizer: TextTokenizer, answers: Sequence[str] | None, *, known: bool
) -> None:
    """Prevent a new training from overwriting the content of its folder.

    Args:
        settings: options of the command line.
        tokenizer: tokenizer of the training.
        answers: answers of the training.
        known: whether the folder already has the record of this training.

    Raises:
        ValueError: the folder holds weights without a training state, or files of something else.
    """
    folder = settings.output
    for name in (WEIGHTS, BEST) if known else _RESULTS:
        # A training that was killed at its start leaves empty logs.
        if (folder / name).exists() and (folder / name).stat().st_size:
            raise ValueError(
                f"output: {folder} holds {name} but no {STATE} to go on from, and a training that "
                "begins would replace it; move it away, or choose another folder"
            )
    tokens = tokenizer.tokens(range(tokenizer.vocab_size))
    digests = {**dict.fromkeys(VOCABULARIES, digest(tokens)), ANSWERS: answers and digest(answers)}
    for name, ours in digests.items():
        if not known and ours and _digest_of_file(folder / name) not in (None, ours):
            raise ValueError(
                f"output: {folder} holds another {name}, which the training would replace; move it "
                "away, or choose another folder"
            )


def _check_keys(keys: Sequence[Hashable] | None, batch_size: int, samples: int) -> None:
    if keys is None or batch_size > samples:
        return
    different = len(np.unique(np.asarray(keys)))
    if batch_size > different:
        raise ValueError(
            f"batch_size: {batch_size} exceeds the {different} different pictures of the data; a "
            "batch holds only one caption of each picture, unless --official-batches allows "
            "more"
        )


def new_model(settings: Settings, config: Config, console: Console) -> Model:
    """The model that a new training starts from, on the CPU; equal on all ranks."""
    torch.manual_seed(settings.seed)
    model = build(config)
    if settings.recipe.wide_start:
        start_wide(model)
    path = weights_file(settings.initial)
    if path is not None:
        report = load_checkpoint(model, path, skip=settings.skip)
        console.print(str(report), markup=False, highlight=False)
        check_finite(model, str(path))
    elif settings.recipe.initial_from is not None:
        origin = settings.recipe.initial_from
        console.print(
            f"Random weights: no --init, and this recipe starts from {origin}.", style="yellow"
        )
    return model


class FirstSamples(Dataset):
    """The first samples of a data set, for a trial run.

    Args:
        dataset: from :func:`vlmo.data.open_data`.
        count: largest number of samples.
    """

    def __init__(self, dataset: Dataset, count: int):
        self._dataset = cast(Any, dataset)
        self._count = min(count, len(self._dataset))
        self.answers = getattr(dataset, "answers", None)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: Any) -> dict[str, Any]:
        return self._dataset[item]

    def text(self, index: int) -> str:
        """The text of a sample."""
        return self._dataset.text(index)

    @property
    def image_ids(self) -> Sequence[Hashable]:
        """Image ids of the first samples, for tasks that have them: not every data set does."""
        return self._dataset.image_ids[: self._count]


def freeze(model: Model, recipe: Recipe) -> None:
    """Require gradients only for parameters that the recipe trains and that affect its losses."""
    unused = unused_parameters(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(recipe.trains(name) and name not in unused)


def write_folder(settings: Settings, materials: Materials) -> None:
    """Write the files of the run's folder that do not change: recipe, vocabulary, answers.

    Incomplete files of a killed process are removed.

    Raises:
        OSError: a file cannot be written.
    """
    for path in settings.output.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            path.unlink()
    names = ("data", "datasets", "skip", "dtype", "parallel", "micro_batch", "on_bad_sample")
    facts = {name: getattr(settings, name) for name in names}
    facts["initial"] = None if settings.initial is None else str(settings.initial)
    facts |= {"processes": world_size(), "versions": versions()}
    if materials.removed:
        facts["removed"] = materials.removed
    if materials.step < materials.total:
        write_record(settings.output, materials.run, facts, step=materials.step)
    materials.tokenizer.save_vocabulary(settings.output / materials.tokenizer.file_name)
    if materials.run["answers"]:
        write_json(settings.output / ANSWERS, list(cast(Any, materials.data).answers))


def _tokenizer(settings: Settings) -> TextTokenizer:
    length = settings.recipe.text_length
    if settings.vocabulary is not None:
        return TextTokenizer(load_vocabulary(settings.vocabulary), length)
    if settings.data == "digits":
        return digit_tokenizer(length)
    for folder in (settings.output, settings.initial):
        found = None if folder is None else vocabulary_in(folder)
        if found is not None:
            return TextTokenizer(load_vocabulary(found), length)
    raise ValueError(
        "vocab: a vocabulary is needed (--vocab): the vocab.txt of bert-base-uncased for the "
        "published models of VLMo, beit3.spm for those of BEiT-3, or your own, which vlmo vocab "
        "learns from the data"
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
            raise ValueError(
                f"data: {settings.data} has one split only, which is used for training"
            )
        return _open(settings, "val", answers)
    except (FileNotFoundError, ValueError) as error:
        if settings.evaluate_every is not None:
            raise
        console.print(f"No validation: {error}", style="yellow", markup=False)
        return None


def _check_initial(settings: Settings, head: str, vocabulary: str, answers: str | None) -> None:
    """Reject initial weights whose token ids or answers have other meanings.

    Both the metadata of the checkpoint and the files of a run's folder are checked. ``head`` is the
    prefix of the names of the parameters of the classifier of answers.
    """
    given, path = settings.initial, weights_file(settings.initial)
    if given is None or path is None:
        return
    known = digests_of(path)
    words = {known.vocabulary, *(_digest_of_file(given / name) for name in VOCABULARIES)} - {None}
    if words - {vocabulary}:
        raise ValueError(f"vocab: is not the vocabulary that {given} (--init) was trained with")
    lists = {known.answers, _digest_of_file(given / ANSWERS)} - {None}
    if answers is not None and head not in settings.skip and lists - {answers}:
        raise ValueError(
            f"init: {given} was trained with other answers than those of the data, or with the "
            "same in another order; give its list as --answers, or start with a new head by "
            f"--skip {head}"
        )


def _digest_of_file(path: Path) -> str | None:
    """Digest of a vocabulary or answers.json; None if there is no such file."""
    if not path.is_file():
        return None
    if path.name == ANSWERS:
        return digest(read_answers(path))
    words = load_vocabulary(path).get_vocab()
    return digest(sorted(words, key=words.__getitem__))
