"""Batches for the model: tokenised, masked, stacked, loaded by workers, moved to the device.

A data set returns one dictionary per sample; its keys depend on the task:

- image, or image_0 and image_1: uint8 [3, S, S]
- text: str
- answers: int, 1 for a true statement and 0 for a false one (nlvr2)
- answer_labels, answer_scores: ids and soft scores of the right answers (vqa)
- image_id, question_id, identifier, table_name: identities of the sample in its source
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

HOST_KEYS = ("text_lengths", "mlm_tokens")  # stay on the CPU to lay out packed batches
ON_BAD = ("error", "replace", "leave_out")  # what to do with a sample that cannot be read


def collate(
    samples: Sequence[Mapping[str, Any]],
    tokenizer: TextTokenizer,
    *,
    mask_share: float | None = None,
    official_masking: bool = False,
    seeds: Sequence[int] | None = None,
    answers: int | None = None,
) -> dict[str, Any]:
    """Make a batch of B samples.

    Args:
        samples: as listed in this module's description; all of them have the same keys.
        tokenizer: its ``max_length`` is the length T.
        mask_share: share of the words to mask; None for no masked copy.
        official_masking: see :func:`mask_whole_words`.
        seeds: one per sample, for masking; None for 0.
        answers: number A of answers in the vocabulary of vqa.

    Returns:
        On the CPU: text_ids and text_masks int64 [B, T]; text_lengths int64 [B]; image, image_0,
        image_1 uint8 [B, 3, S, S]; vqa_targets float32 [B, A]; answers int64 [B]; the other keys as
        lists of B. With masking also text_ids_mlm and text_labels_mlm int64 [B, T], and mlm_tokens
        int64 [M]: the flat positions row * T + column of the labels that are not -100.

    Raises:
        ValueError: there are no samples, an answer id is not below A, or A is missing.
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
    """Copy the batch's tensors to the device, except ``HOST_KEYS``; the copies are asynchronous."""
    return {
        name: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and name not in HOST_KEYS
        else value
        for name, value in batch.items()
    }


class Batches(Protocol):
    """The samples of this rank's batches, see :class:`vlmo.data.GlobalBatches`."""

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
    """Load batches of :func:`collate`, in the order of ``batches``.

    The batches do not depend on the number of workers. With a CUDA device they are in pinned
    memory.

    With "replace" and "leave_out" every batch also has the key ``bad_samples``: a list of pairs
    (index, reason) of the samples that could not be read, which is usually empty.

    Args:
        dataset: takes a :class:`Draw` as index, and raises :class:`BadSample` for a sample that it
            cannot read.
        batches: this rank's shares of the global batches.
        tokenizer: its ``max_length`` is the length T.
        mask_share: share of the words to mask; None for no masked copy.
        workers: number of processes that prepare samples; 0 for the calling process.
        official_masking: see :func:`mask_whole_words`.
        on_bad: what to do with a sample that cannot be read. "error": raise the error. "replace":
            use the first of the draw's ``spares`` that can be read, with the same seed.
            "leave_out": omit it from the batch; if no sample of a batch can be read, its only key
            is ``bad_samples``.

    Raises:
        ValueError: ``workers`` is negative, ``batches`` is for another number of samples, or
            ``on_bad`` is unknown.

    Iterating raises the errors of the data set unchanged, also those from workers:

        BadSample: with "error", a sample cannot be read; with "replace", none of its spares can be
            read either.
        ChildProcessError: a worker was killed, or no shared memory is left.
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
        batch_sampler=cast(Any, batches),  # yields lists, which is all that DataLoader needs
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )


def guarded_loader(
    dataset: Dataset,
    *,
    collate: Callable[[Any], Any] | None = default_collate,
    **options: Any,
) -> DataLoader:
    """A DataLoader whose iteration raises the data set's errors unchanged, also those from workers.

    Args:
        dataset: map-style.
        collate: makes a batch of a list of samples; None for single samples.
        options: arguments of :class:`torch.utils.data.DataLoader`.

    Raises:
        ChildProcessError: while iterating: a worker was killed, or no shared memory is left.
    """
    return _Loader(
        _Guarded(dataset, collate or _as_it_is),
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        # Its numbers are not used; without a generator, every epoch would advance torch's default
        # one.
        generator=torch.Generator(),
        **options,
    )


def worker_failure(error: RuntimeError) -> ChildProcessError | None:
    """Translate torch's error about a killed worker; None for other errors.

    torch raises this error in the main process, wherever that happens to be executing.
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
    """Carries an error from a worker to the main process."""

    def __init__(self, error: Exception):
        self.error, self.trace = _portable(error), traceback.format_exc()

    def reraise(self) -> NoReturn:
        if isinstance(self.error, (BadSample, ChildProcessError)):
            raise self.error
        raise self.error from RuntimeError(f"in a worker:\n{self.trace}")


def _portable(error: Exception) -> Exception:
    """The error itself if it can be pickled, otherwise one with the same text."""
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # the constructor of a third-party class may raise anything
        pass
    return (OSError if isinstance(error, OSError) else ValueError)(str(error))


class _Loader(DataLoader):
    """A DataLoader that raises the errors of workers unchanged, without torch's wrapper text."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _checked(super().__iter__())


class _Guarded(Dataset):
    """Returns samples and batches of a data set, or a :class:`_Failure` where reading raises."""

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
        # End the workers now. The error would keep the iterator alive and fork it into the next
        # workers.
        del batches
    if batch is not None:
        batch.reraise()


def _next(batches: Iterator[Any]) -> Any:
    """The next batch, the error of a worker, or None at the end."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        failure = worker_failure(error)
        if failure is None:
            raise
        # Drop the traceback, which keeps the workers alive.
        return _Failure(failure)


class _Made(Dataset):
    """Returns whole batches, collated in the process that reads the samples.

    Args:
        dataset: map-style data set of samples.
        function: makes a batch from samples and their seeds.
        on_bad: see :func:`loader`.
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
        """The samples and their seeds; those that cannot be read are appended to ``bad``."""
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
        """The sample of a draw or its replacement; None if it is left out."""
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
    """Move a batch's tensors to shared memory here, where running out of it can be reported.

    torch would do this while it sends the batch, in a thread whose errors are not raised.
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
    # Otherwise the tokenizer warns that its threads do not exist in a forked process.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _soft_targets(
    labels: Sequence[Sequence[int]], scores: Sequence[Sequence[float]], answers: int | None
) -> Tensor:
    """Soft targets float32 [B, answers]: the scores of the right answers, 0 for all others."""
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
