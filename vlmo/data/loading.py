"""Batches for the model: tokenised, masked, stacked, loaded by workers, moved to the device.

A data set gives one dictionary per sample; which keys it holds depends on the task:

- image, or image_0 and image_1: uint8 [3, S, S]
- text: str
- answers: int, 1 for a true statement and 0 for a false one (nlvr2)
- answer_labels, answer_scores: ids and soft scores of the right answers (vqa)
- image_id, question_id, identifier, table_name: what the source calls the sample
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from vlmo.data.draws import Draw
from vlmo.data.masking import IGNORE, mask_whole_words
from vlmo.data.samples import BadSample
from vlmo.data.tokenizer import TextTokenizer

HOST_KEYS = ("text_lengths", "mlm_tokens")  # read on the CPU, to lay out a packed batch
ON_BAD = ("error", "replace", "leave_out")  # what becomes of a sample that cannot be read


def collate(
    samples: Sequence[Mapping[str, Any]],
    tokenizer: TextTokenizer,
    *,
    mask_share: float | None = None,
    official_masking: bool = False,
    seeds: Sequence[int] | None = None,
    answers: int | None = None,
) -> dict[str, Any]:
    """A batch of B samples.

    Args:
        samples: as listed in this module's description; all of them hold the same keys.
        tokenizer: sets the length T.
        mask_share: share of the words to mask; None for no masked copy.
        official_masking: see :func:`mask_whole_words`.
        seeds: of each sample, for masking; None for 0.
        answers: number A of the answers of vqa.

    Returns:
        On the CPU, text_ids and text_masks int64 [B, T]; text_lengths int64 [B]; image, image_0,
        image_1 uint8 [B, 3, S, S]; vqa_targets float32 [B, A]; answers int64 [B]; the other keys
        as lists of B. With masking text_ids_mlm and text_labels_mlm int64 [B, T], and mlm_tokens
        int64 [M]: the flat places row * T + column of the labels that are not -100.

    Raises:
        ValueError: no samples, an answer's id is not below A, or A is missing.
    """
    if not samples:
        raise ValueError("samples: none were given")
    columns = {name: [sample[name] for sample in samples] for name in samples[0]}
    batch: dict[str, Any] = {}
    if "answer_labels" in columns:
        right, scores = columns.pop("answer_labels"), columns.pop("answer_scores")
        batch["vqa_targets"] = _soft_targets(right, scores, answers)
    for name, values in columns.items():
        if isinstance(values[0], Tensor):
            batch[name] = torch.stack(values)
        else:
            batch[name] = torch.tensor(values) if name == "answers" else values
    batch |= tokenizer.encode(columns["text"])
    batch["text_lengths"] = batch["text_masks"].sum(1)
    if mask_share is not None:
        batch["text_ids_mlm"], labels = mask_whole_words(
            batch["text_ids"],
            tokenizer,
            mask_share,
            seeds=[0] * len(samples) if seeds is None else seeds,
            official=official_masking,
        )
        batch["text_labels_mlm"] = labels
        batch["mlm_tokens"] = (labels.flatten() != IGNORE).nonzero()[:, 0]
    return batch


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with its tensors on the device, but ``HOST_KEYS``; nothing waits for the copies."""
    return {
        name: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and name not in HOST_KEYS
        else value
        for name, value in batch.items()
    }


class Batches(Protocol):
    """Which samples make up this rank's batches, as :class:`vlmo.data.GlobalBatches` tells."""

    size: int  # of the data set

    def __iter__(self) -> Iterator[list[Draw]]: ...


def loader(
    dataset: Dataset,
    batches: Batches,
    tokenizer: TextTokenizer,
    *,
    mask_share: float | None = None,
    workers: int = 0,
    official_masking: bool = False,
    on_bad: str = "error",
) -> DataLoader:
    """Batches of :func:`collate`, in the order of ``batches``.

    They are the same for any number of workers. With a CUDA device they lie in pinned memory.

    With "replace" and "leave_out" every batch has ``bad_samples`` as well, a list of pairs (index,
    reason) of the samples that could not be read, most often empty.

    Args:
        dataset: takes a :class:`Draw` as index, and raises :class:`BadSample` for what it cannot
            read.
        batches: this rank's shares of the global batches.
        tokenizer: sets the length T.
        mask_share: share of the words to mask; None for no masked copy.
        workers: processes that make samples; 0 for none.
        official_masking: see :func:`mask_whole_words`.
        on_bad: what becomes of a sample that cannot be read. "error": the error is raised.
            "replace": the first of the draw's ``spares`` that can be read takes its place, with
            the same seed. "leave_out": the batch lacks it, and a batch of nothing but such samples
            has no key but ``bad_samples``.

    Raises:
        ValueError: negative ``workers``, ``batches`` of another number of samples, or an unknown
            ``on_bad``.

    While it is read, errors of the data set come up as they are, also from workers:

        BadSample: with "error" a sample that cannot be read, with "replace" one whose spares are
            all bad.
        ChildProcessError: a worker was killed, or there is no memory left that is shared with it.
    """
    size = len(cast(Sized, dataset))
    if batches.size != size:
        raise ValueError(f"batches: of {batches.size} samples, the data set has {size}")
    if workers < 0:
        raise ValueError(f"workers: {workers} is negative")
    if on_bad not in ON_BAD:
        raise ValueError(f"on_bad: {on_bad!r} is not one of {ON_BAD}")
    names = getattr(dataset, "answers", None)
    function = functools.partial(
        collate,
        tokenizer=tokenizer,
        mask_share=mask_share,
        official_masking=official_masking,
        answers=None if names is None else len(names),
    )
    return guarded_loader(
        _Made(dataset, function, on_bad),
        collate=None,
        batch_sampler=cast(Any, batches),  # yields lists; needs nothing else
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def guarded_loader(
    dataset: Dataset,
    *,
    collate: Callable[[Any], Any] | None = default_collate,
    **options: Any,
) -> DataLoader:
    """A DataLoader through which errors of the data set come up as they are, also from workers.

    Args:
        dataset: map-style.
        collate: makes a batch of a list of samples; None for none.
        options: of :class:`torch.utils.data.DataLoader`.

    Raises:
        ChildProcessError: while it is read: a worker was killed, or there is no memory left that
            is shared with it.
    """
    return _Loader(
        _Guarded(dataset, collate or _as_it_is),
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        # Of nothing that is used here; without one, every epoch would advance torch's own.
        generator=torch.Generator(),
        **options,
    )


def worker_failure(error: RuntimeError) -> ChildProcessError | None:
    """What torch says about a worker that was killed, in a sentence; None for other errors.

    torch raises it in the main process, wherever that happens to be.
    """
    message = str(error)
    if "Too many open files" in message:
        return ChildProcessError(
            "workers: too many files are open; raise the limit (ulimit -n), or use fewer workers"
        )
    told = re.match(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is )?([^.]*)", message)
    if told is None:
        return None
    if "Bus error" in message:
        return _no_shared_memory()
    return ChildProcessError(
        f"workers: process {told[1]}, which made samples, {told[2]}: most often because the memory "
        "is used up; use fewer workers or smaller batches"
    )


class _Failure:
    """An error of a worker, on its way to the main process."""

    def __init__(self, error: Exception):
        self.error, self.trace = _portable(error), traceback.format_exc()

    def reraise(self) -> NoReturn:
        if isinstance(self.error, (BadSample, ChildProcessError)):
            raise self.error
        raise self.error from RuntimeError(f"in a worker:\n{self.trace}")


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one with its text."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # whatever the constructor of a foreign class does
        pass
    return (OSError if isinstance(error, OSError) else ValueError)(str(error))


class _Loader(DataLoader):
    """Raises the errors of workers as they were, without torch's own words around them."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _checked(super().__iter__())


class _Guarded(Dataset):
    """Samples and batches of a data set, or a :class:`_Failure` of the worker that reads them."""

    def __init__(self, dataset: Dataset, collate: Callable[[Any], Any]):
        self.dataset, self._collate = dataset, collate

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, item: Any) -> Any:
        return self._guarded(self.dataset.__getitem__, item)

    def __getitems__(self, items: Sequence[Any]) -> Any:
        return self._guarded(self._batch, items)

    def _batch(self, items: Sequence[Any]) -> Any:
        if hasattr(self.dataset, "__getitems__"):
            return self._collate(self.dataset.__getitems__(items))
        return self._collate([self.dataset[item] for item in items])

    @staticmethod
    def _guarded(function: Callable[[Any], Any], items: Any) -> Any:
        if get_worker_info() is None:
            return function(items)
        try:
            return _shared(function(items))
        except (ValueError, OSError, NotImplementedError, ImportError) as error:
            return _Failure(error)


def _checked(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        while (batch := _next(batches)) is not None:
            if isinstance(batch, _Failure):
                break
            if isinstance(batch, dict) and "bad_samples" in batch:  # pinning makes lists of tuples
                batch["bad_samples"] = [(index, reason) for index, reason in batch["bad_samples"]]
            yield batch
    finally:
        # Ends the workers now. An error would keep it alive, and fork it into the next workers.
        del batches
    if batch is not None:
        batch.reraise()


def _next(batches: Iterator[Any]) -> Any:
    """A batch, an error of a worker, or None at the end."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        failure = worker_failure(error)
        if failure is None:
            raise
        # Without its traceback, which keeps the workers.
        return _Failure(failure)


class _Made(Dataset):
    """Whole batches, made where the samples are read.

    Args:
        dataset: of samples.
        function: from samples and their seeds to a batch.
        on_bad: of :func:`loader`.
    """

    def __init__(self, dataset: Dataset, function: Callable[..., dict[str, Any]], on_bad: str):
        self.dataset, self._function, self._on_bad = dataset, function, on_bad

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitems__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        bad: list[tuple[int, str]] = []
        samples, seeds = self._samples(draws, bad)
        batch = self._function(samples, seeds=seeds) if samples or not bad else {}
        return batch if self._on_bad == "error" else batch | {"bad_samples": bad}

    def _samples(
        self, draws: Sequence[Draw], bad: list[tuple[int, str]]
    ) -> tuple[list[dict[str, Any]], list[int]]:
        """Samples with their seeds; what cannot be read is added to ``bad``."""
        if hasattr(self.dataset, "__getitems__"):
            try:
                return list(self.dataset.__getitems__(draws)), [draw.seed for draw in draws]
            except BadSample:
                if self._on_bad == "error":
                    raise
        found = [(self._sample(draw, bad), draw.seed) for draw in draws]
        kept = [(sample, seed) for sample, seed in found if sample is not None]
        return [sample for sample, _ in kept], [seed for _, seed in kept]

    def _sample(self, draw: Draw, bad: list[tuple[int, str]]) -> dict[str, Any] | None:
        """The sample of a draw, or what takes its place; None if it is left out."""
        faults = []
        for index in (draw.index, *(draw.spares if self._on_bad == "replace" else ())):
            found = self._attempt(Draw(index, draw.seed))
            if not isinstance(found, BadSample):
                return found
            bad.append((index, str(found)))
            faults.append(found)
        if self._on_bad == "leave_out":
            return None
        fault, *others = faults
        rest = f"the {len(others)} in its place are bad too" if others else "none is left instead"
        message = f"{fault} (sample {draw.index}; {rest})"
        raise BadSample(message, draw.index, fault.file, fault.row)

    def _attempt(self, draw: Draw) -> dict[str, Any] | BadSample:
        try:
            return self.dataset[cast(int, draw)]
        except BadSample as error:
            if self._on_bad == "error":
                raise
            return error


def _as_it_is(batch: Any) -> Any:
    return batch


def _shared(batch: Any) -> Any:
    """Tensors in the memory that the processes share: here, where its end can be told.

    torch would do it while the batch is sent, in a thread whose errors nobody sees.
    """
    try:
        for value in batch.values() if isinstance(batch, dict) else (batch,):
            if isinstance(value, Tensor):
                value.share_memory_()
    except RuntimeError as error:
        raise worker_failure(error) or _no_shared_memory() from error
    return batch


def _no_shared_memory() -> ChildProcessError:
    return ChildProcessError(
        "workers: the memory that processes share (/dev/shm) is full; make it larger (docker run "
        "--shm-size), or use fewer workers or smaller batches"
    )


def _start_worker(worker: int) -> None:
    # The tokenizer would warn of the threads that a forked process does not have.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _soft_targets(
    labels: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], answers: int | None
) -> Tensor:
    """Scores float32 [B, answers] of the answers that are right, 0 for the others."""
    if answers is None:
        raise ValueError("answers: their number is needed for samples with answer_labels")
    targets = torch.zeros(len(labels), answers)
    rows = [row for row, found in enumerate(labels) for _ in found]
    places = torch.tensor([label for found in labels for label in found], dtype=torch.int64)
    if len(places) and not 0 <= int(places.min()) <= int(places.max()) < answers:
        raise ValueError(f"answer_labels: {places.tolist()} are not within 0..{answers - 1}")
    values = torch.tensor([score for found in scores for score in found], dtype=torch.float32)
    targets[torch.tensor(rows, dtype=torch.int64), places] = values
    return targets
