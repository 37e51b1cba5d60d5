"""Evaluation of all tasks: metrics on a whole data set, and prediction files for benchmarks.

With a process group the ranks share the work; no sample is counted twice, and the metrics are equal
on every rank and for any number of ranks.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Dataset

from vlmo.data import Draw, TextTokenizer, loader, to_device
from vlmo.data.draws import hashed
from vlmo.distributed import rank
from vlmo.files import replacing
from vlmo.model.layout import text_lengths
from vlmo.model.models import Config, Model, fits_vocabulary, inner, name_of
from vlmo.model.vlmo import VLMo
from vlmo.tasks import losses
from vlmo.tasks.gallery import gallery_of as gallery_of
from vlmo.tasks.gallery import readable_gallery
from vlmo.tasks.inference import (
    device_of,
    evaluating,
    even_batches,
    objects_of_all,
    own_share,
    precision,
)
from vlmo.tasks.losses import Batch, Whole
from vlmo.tasks.negatives import Negatives, draw_negatives
from vlmo.tasks.retrieval import Gallery, Recall, encode, recall_at, shortlist
from vlmo.tasks.retrieval import rerank as rerank_lists

TASKS = ("retrieval", "vqa", "nlvr2", "pretrain", "textmlm")
MASK_SHARE = 0.15  # of the words, as in training
ON_BAD_SAMPLE = ("error", "skip")
SPLITS = ("train", "val", "dev", "test", "test1", "test2")  # in the names of NLVR2's samples

_NEEDED = {  # at least one of these heads
    "retrieval": ("itc", "irtr"),
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "pretrain": ("itc", "irtr", "mlm"),
    "textmlm": ("mlm", "textmlm"),
}
_TOLD = 10  # number of reasons that are shown for samples left out
_LABELLED = "labelled"  # share of the questions that have an answer
_NAME_OF = {"vqa": "question_id", "nlvr2": "identifier"}  # a sample's name in prediction files

Sums = dict[str, tuple[Tensor, float]]  # sum of each metric over a batch, and the number of rows


class Measured(NamedTuple):
    """Results for a batch of B rows.

    Attributes:
        sums: sum of each metric, with the number of rows to divide it by.
        chosen: ``[B]`` int64, the answer predicted for each row.
    """

    sums: Sums
    chosen: Tensor | None = None


def evaluate(
    model: torch.nn.Module,
    dataset: Dataset,
    tokenizer: TextTokenizer,
    task: str,
    *,
    batch_size: int = 64,
    rerank: int = 0,
    workers: int = 0,
    autocast: torch.dtype | None = None,
    predictions: str | os.PathLike[str] | None = None,
    on_bad_sample: str = "error",
) -> dict[str, float]:
    """Compute the metrics of a model on a data set; shares are between 0 and 1.

    ==========  ==================================================================================
    retrieval   ``tr@k`` (texts of an image) and ``ir@k`` (images of a text), k = 1, 5, 10, by the
                dual encoder's cosines among all images and texts; ``mean_recall`` of the six. With
                ``rerank``, the same of the re-ranked candidates as ``reranked_...``
    vqa         ``vqa_score``: mean soft score of the likeliest answer; ``vqa_loss``. Neither where
                no question has an answer
    nlvr2       ``accuracy``, ``nlvr2_loss``; where samples are of several splits by their
                ``table_name`` or ``identifier``, also ``dev_accuracy``, ``test1_accuracy``, ...
    pretrain    of the model's tasks: ``itc_loss``, ``itc_i2t_accuracy``, ``itc_t2i_accuracy``,
                ``itc_vl_i2t_accuracy``, ``itc_vl_t2i_accuracy``; ``irtr_loss``,
                ``irtr_i2t_accuracy``, ``irtr_t2i_accuracy``; ``itm_loss``, ``itm_accuracy``;
                ``mlm_loss``, ``mlm_accuracy``; ``loss``, the sum of the losses
    textmlm     ``mlm_loss``, ``mlm_accuracy``
    ==========  ==================================================================================

    The names are those of unilm, the reference implementation (``set_metrics``), where it has such
    a metric; losses have the weights of training. The contrastive loss and its hard negatives are
    computed within one batch, so their values depend on ``batch_size``; masks and negatives are the
    same on every run.

    Args:
        model: a :class:`vlmo.VLMo` or :class:`vlmo.model.beit3.BEiT3`, or one wrapped in
            DistributedDataParallel or FSDP2; its mode (training or evaluation) is restored.
        dataset: from :func:`vlmo.data.open_data`, opened for this task and without augmentation.
        tokenizer: with the model's text length.
        task: one of ``TASKS``.
        batch_size: samples per batch on one rank.
        rerank: candidates of each query that the fusion encoder re-scores (retrieval), 0 for none;
            32 in Table 2 of the supplement.
        workers: processes that load samples, on each rank.
        autocast: dtype of the model's matrix products; None for that of the parameters.
        predictions: file for the answers, in the format of the benchmark's server. vqa: JSON, a
            list of ``{"question_id": ..., "answer": ...}``; nlvr2: lines of ``identifier,True``.
        on_bad_sample: what to do with a sample that cannot be read. "error": raise the error.
            "skip": leave it out of metrics and predictions; ``skipped`` is the number of samples
            left out, and standard error lists them. In retrieval, an image that cannot be read
            excludes its texts as well.

    Raises:
        ValueError: the task is unknown, the data set is empty, the model lacks a head, answers or
            vocabulary differ in number from those of the model, samples lack the names that
            ``predictions`` needs, or no sample can be read.
        vlmo.data.BadSample: a sample cannot be read, with "error".
        FloatingPointError: the model's outputs are NaN or infinite.
        OSError: ``predictions`` cannot be written.
    """
    plain = inner(model)
    check_task(plain.config, task, rerank=rerank, predictions=predictions)
    _check_data(plain.config, dataset, tokenizer, task)
    if on_bad_sample not in ON_BAD_SAMPLE:
        raise ValueError(f"on_bad_sample: {on_bad_sample!r} is not one of {ON_BAD_SAMPLE}")
    skips = on_bad_sample == "skip"
    if task == "retrieval":
        gallery, bad = readable_gallery(dataset, tokenizer, workers=workers, skips=skips)
        options = {"batch_size": batch_size, "workers": workers, "autocast": autocast}
        return _retrieval(plain, gallery, rerank, options) | _left_out(bad, "samples")
    batches = _Batches(len(cast(Sized, dataset)), batch_size, shuffled=task == "pretrain")
    if task == "pretrain" and "itm" in plain.config.tasks:
        _check_negatives(batches)
    loaded = loader(
        dataset,
        batches,
        tokenizer,
        mask_share=MASK_SHARE if task in ("pretrain", "textmlm") else None,
        workers=workers,
        on_bad="leave_out" if skips else "error",
    )
    found = _found(plain, task, batches, loaded, autocast, predictions is not None)
    bad = [pair for batch in found for pair in batch.bad]
    if len(bad) == batches.size:
        raise ValueError(f"dataset: no sample can be read, the first because of {bad[0][1]}")
    totals = torch.tensor([batch.table for batch in found if batch.table], dtype=torch.float64)
    names = next(batch.metrics for batch in found if batch.table)
    result = _finished(
        {
            name: total / rows
            for name, (total, rows) in zip(names, totals.sum(0).tolist(), strict=True)
            if rows
        }
    )
    _require_finite(*(torch.tensor(value) for value in result.values()))
    if predictions is not None:
        lost = [_name_of(dataset, index, task) for index, _ in bad]
        if rank() == 0:
            _write(predictions, task, dataset, [pair for batch in found for pair in batch.given])
            if lost:
                listed = ", ".join(map(str, lost))
                print(f"vlmo: {predictions} lacks {len(lost)} samples: {listed}", file=sys.stderr)
    return result | _left_out(bad, "samples")


class _Found(NamedTuple):
    """Results of a batch as plain numbers, which ranks can exchange.

    Attributes:
        metrics: names of the metrics.
        table: sum and rows of each metric; empty if no sample of the batch can be read.
        given: names and answers of the samples, if they are to be written.
        bad: number of each sample that is left out, and the reason.
    """

    metrics: list[str]
    table: list[list[float]]
    given: list[tuple[Any, int]]
    bad: list[tuple[int, str]]


def _found(
    model: Model,
    task: str,
    batches: _Batches,
    loaded: Iterable[dict[str, Any]],
    autocast: torch.dtype | None,
    names_them: bool,
) -> list[_Found]:
    """The results of all ranks, batch by batch."""
    device, measure = device_of(model), _MEASURES[task]
    fewest = 2 if task == "pretrain" and "itm" in model.config.tasks else 1
    measured: list[tuple[Measured, list[Any]] | None] = []
    bad: list[list[tuple[int, str]]] = []
    kept = None
    with torch.no_grad(), evaluating(model) as run, precision(device, autocast):
        for number, batch in zip(batches.own, loaded, strict=True):
            bad.append(batch.pop("bad_samples", []))
            rows = len(batch.get("text_ids", ()))
            if rows < fewest:
                read = set(batches.every[number]) - {index for index, _ in bad[-1]}
                bad[-1] += [(index, "is left without a negative in its batch") for index in read]
                measured.append(None)
                continue
            kept = to_device(batch, device)
            result = run(measure, kept, number)
            measured.append((result, _names(batch, task) if names_them else []))
        if isinstance(model, FSDPModule):  # its forward is a collective call
            if kept is None:
                raise ValueError(f"dataset: no sample of rank {rank()} can be read: {bad[0][0][1]}")
            for number in range(measured.count(None)):
                run(measure, kept, number)
    own = []
    for entry, left_out in zip(measured, bad, strict=True):
        if entry is None:
            own.append(_Found([], [], [], left_out))
            continue
        (sums, chosen), names = entry
        answers = chosen.tolist() if chosen is not None and names_them else []
        given = list(zip(names, answers, strict=True))
        own.append(_Found(list(sums), _table(sums).tolist(), given, left_out))
    return objects_of_all(own, len(batches.every))


def _left_out(bad: Sequence[tuple[int, str]], what: str) -> dict[str, int]:
    """The metric ``skipped`` if any samples are left out; the first rank reports them on stderr."""
    if bad and rank() == 0:
        print(f"vlmo: {len(bad)} {what} cannot be read and are left out:", file=sys.stderr)
        reasons = list(dict.fromkeys(reason for _, reason in bad))  # once per picture
        for reason in reasons[:_TOLD]:
            print(f"  {reason}", file=sys.stderr)
        if len(reasons) > _TOLD:
            print(f"  and {len(reasons) - _TOLD} more", file=sys.stderr)
    return {"skipped": len(bad)} if bad else {}


def _require_finite(*outputs: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in outputs):
        raise FloatingPointError(
            "the model's outputs are NaN or infinite, so that nothing can be measured; float16 "
            "overflows where float32 and bfloat16 do not"
        )


def _name_of(dataset: Any, index: int, task: str) -> Any:
    """The name, in the file of answers, of a sample whose picture cannot be read."""
    try:
        return dataset.fields(index)[_NAME_OF[task]]
    except (AttributeError, KeyError, ValueError, OSError):
        return f"sample {index}"


class _Batches:
    """Every sample once, in batches, of which this rank yields its share.

    Attributes:
        every: the rows of all batches.
        own: numbers of this rank's batches, see :func:`own_share`.
    """

    def __init__(self, size: int, batch_size: int, *, shuffled: bool):
        self.size = size
        order = torch.arange(size)
        if shuffled:  # captions of one image are adjacent, and would be false negatives
            order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        self.every = even_batches(order.tolist(), batch_size)
        self.own = own_share(len(self.every))

    def __len__(self) -> int:
        return len(self.own)

    def __iter__(self) -> Iterator[list[Draw]]:
        for number in self.own:
            rows = self.every[number]
            yield [*map(Draw, rows, hashed(rows).tolist())]


def _retrieval(
    model: Model, gallery: Gallery, candidates: int, options: dict[str, Any]
) -> dict[str, float]:
    embeddings = encode(model, gallery, **options)
    _require_finite(*embeddings)
    result = _named(recall_at(embeddings, gallery.image_of_text))
    if candidates:
        lists = rerank_lists(
            cast(VLMo, model), gallery, shortlist(embeddings, candidates), **options
        )
        _require_finite(lists.image.scores, lists.text.scores)
        fused = _named(recall_at(lists, gallery.image_of_text))
        result |= {f"reranked_{name}": value for name, value in fused.items()}
    return result


def _named(recall: Recall) -> dict[str, float]:
    named = {f"tr@{k}": value for k, value in recall.text.items()}
    named |= {f"ir@{k}": value for k, value in recall.image.items()}
    return named | {"mean_recall": recall.mean}


def _vqa(model: Model, batch: Batch, number: int) -> Measured:
    output = losses.vqa(model, batch, model.embed_image(batch["image"]))
    targets, rows = output["vqa_targets"], len(batch["text_ids"])
    best = output["vqa_logits"].argmax(1)
    sums: Sums = {
        "vqa_score": (targets.gather(1, best[:, None]).sum(), rows),
        "vqa_loss": (output["vqa_loss"] * rows, rows),
        _LABELLED: (targets.any(1).sum(), rows),
    }
    return Measured(sums, best)


def _nlvr2(model: Model, batch: Batch, number: int) -> Measured:
    output = losses.nlvr2(model, batch)
    best, rows = output["nlvr2_logits"].argmax(1), len(batch["text_ids"])
    right = best == output["nlvr2_labels"]
    sums: Sums = {
        "accuracy": (right.sum(), rows),
        "nlvr2_loss": (output["nlvr2_loss"] * rows, rows),
    }
    names = batch.get("table_name", batch.get("identifier"))
    if names is not None:
        splits = [re.split("[-_]", str(name)) for name in names]
        for split in SPLITS:
            inside = torch.tensor([split in parts for parts in splits], device=right.device)
            sums[f"{split}_accuracy"] = ((right & inside).sum(), int(inside.sum()))
    return Measured(sums, best)


def _text_mlm(model: Model, batch: Batch, number: int) -> Measured:
    return Measured(_words(losses.text_mlm(cast(VLMo, model), batch, _alone(batch)), batch))


def _pretrain(model: Model, batch: Batch, number: int) -> Measured:
    tasks, rows = model.config.tasks, len(batch["text_ids"])
    full = cast(VLMo, model)  # in tasks that BEiT-3 does not have
    patches = model.embed_image(batch["image"])
    sums: Sums = {}
    if {"itc", "irtr"} & set(tasks):
        streams, _ = losses.encode_streams(model, batch, patches)
        logits = model.logit_scale.exp() * streams.image @ streams.text.T
        loss, accuracies = _contrast(logits)
        if "irtr" in tasks:
            sums |= {"irtr_loss": (loss * rows, rows)}
            sums |= {f"irtr_{name}": (right, rows) for name, right in accuracies.items()}
        if "itc" in tasks:
            assert streams.vl_image is not None and streams.vl_text is not None
            vl_logits = full.logit_vl_scale.exp() * streams.vl_image @ streams.vl_text.T
            vl_loss, vl_accuracies = _contrast(vl_logits)
            sums |= {"itc_loss": (0.5 * (loss + vl_loss) * rows, rows)}
            sums |= {f"itc_{name}": (right, rows) for name, right in accuracies.items()}
            sums |= {f"itc_vl_{name}": (right, rows) for name, right in vl_accuracies.items()}
    if "itm" in tasks:
        output = losses.itm(full, batch, patches, _negatives(logits, batch, number))
        right = (output["itm_logits"].argmax(1) == output["itm_labels"]).sum()
        sums |= {"itm_loss": (output["itm_loss"] * rows, rows), "itm_accuracy": (right, 3 * rows)}
    if "mlm" in tasks:
        sums |= _words(losses.mlm(full, batch, patches, _alone(batch)), batch)
    return Measured(sums)


def _contrast(logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of image-to-text logits ``[B, B]``, and the accuracy of both directions."""
    logits = logits.float()
    label = torch.arange(len(logits), device=logits.device)
    loss = (F.cross_entropy(logits, label) + F.cross_entropy(logits.T, label)) / 2
    return loss, {
        "i2t_accuracy": (logits.argmax(1) == label).sum(),
        "t2i_accuracy": (logits.argmax(0) == label).sum(),
    }


def _negatives(logits: Tensor, batch: Batch, number: int) -> Negatives:
    """Hard negatives within this batch, drawn reproducibly."""
    generator = torch.Generator(logits.device).manual_seed(number)
    images, texts = draw_negatives(logits.T, generator), draw_negatives(logits, generator)
    lengths = text_lengths(batch)[texts.cpu()]
    return Negatives(batch["text_ids"][texts], lengths, images.cpu(), batch["image"][:0])


def _alone(batch: Batch) -> Whole:
    """The batch is all there is, whatever other ranks have."""
    words = len(losses.masked_tokens(batch))
    return Whole(torch.tensor(float(words), device=batch["text_ids"].device), {})


def _words(output: losses.Output, batch: Batch) -> Sums:
    right = (output["mlm_logits"].argmax(1) == output["mlm_labels"]).sum()
    words = len(output["mlm_labels"])
    return {"mlm_loss": (output["mlm_loss"] * words, words), "mlm_accuracy": (right, words)}


_MEASURES: dict[str, Callable[[Model, Batch, int], Measured]] = {
    "vqa": _vqa,
    "nlvr2": _nlvr2,
    "pretrain": _pretrain,
    "textmlm": _text_mlm,
}


def _table(sums: Sums) -> Tensor:
    """Sum and rows of each metric, ``[M, 2]`` float64."""
    totals = torch.stack([total.double() for total, _ in sums.values()])
    rows = torch.tensor([rows for _, rows in sums.values()], dtype=torch.float64)
    return torch.stack([totals, rows.to(totals.device)], dim=1)


def _finished(result: dict[str, float]) -> dict[str, float]:
    """The result without uninformative metrics, and with the sum of the losses."""
    if result.pop(_LABELLED, 1.0) == 0:
        return {}
    of_splits = [f"{split}_accuracy" for split in SPLITS if f"{split}_accuracy" in result]
    if len(of_splits) == 1:
        del result[of_splits[0]]
    losses = [value for name, value in result.items() if name.endswith("_loss")]
    return {"loss": sum(losses), **result} if len(losses) > 1 else result


def check_task(
    config: Config,
    task: str,
    *,
    rerank: int = 0,
    predictions: str | os.PathLike[str] | None = None,
) -> None:
    """Raise ValueError if :func:`evaluate` cannot run a task with a model, whatever the data."""
    if task not in TASKS:
        raise ValueError(f"task: {task!r} is not one of {TASKS}")
    if rerank < 0 or (rerank and task != "retrieval"):
        raise ValueError(f"rerank: {rerank} candidates cannot be re-ranked for task {task!r}")
    needed = _NEEDED[task]
    if not set(needed) & set(config.tasks):
        raise ValueError(
            f"task: {task!r} needs a head of {' or '.join(needed)}, the model has {config.tasks} "
            f"({name_of(config)})"
        )
    if task == "pretrain" and "itm" in config.tasks and "itc" not in config.tasks:
        raise ValueError(f"task: itm needs itc, which weighs its negatives, not {config.tasks}")
    if rerank and "itm" not in config.tasks:
        raise ValueError(
            f"rerank: needs the head of itm, the model has {config.tasks} ({name_of(config)})"
        )
    if predictions is not None and task not in _NAME_OF:
        raise ValueError(f"predictions: task {task!r} has none, only {sorted(_NAME_OF)}")


def _check_data(config: Config, dataset: Any, tokenizer: TextTokenizer, task: str) -> None:
    if not len(dataset):
        raise ValueError("dataset: holds no sample")
    if not fits_vocabulary(config, tokenizer.vocab_size):
        raise ValueError(
            f"tokenizer: has {tokenizer.vocab_size} tokens, the model has {config.vocab_size}"
        )
    if task == "vqa" and len(dataset.answers) != config.vqa_labels:
        count = len(dataset.answers)
        raise ValueError(f"dataset: has {count} answers, the model has {config.vqa_labels}")


def _check_negatives(batches: _Batches) -> None:
    smallest = min(map(len, batches.every))
    if smallest < 2:
        raise ValueError(
            f"batch_size: image-text matching has no negatives in a batch of {smallest} sample"
        )


def _names(batch: Mapping[str, Any], task: str) -> list[Any]:
    name = _NAME_OF[task]
    if name not in batch:
        raise ValueError(f"predictions: the samples have no {name}")
    return batch[name]


def _write(
    path: str | os.PathLike[str], task: str, dataset: Any, pairs: Sequence[tuple[Any, int]]
) -> None:
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        if task == "vqa":
            rows = [{"question_id": n, "answer": dataset.answers[answer]} for n, answer in pairs]
            json.dump(rows, stream, allow_nan=False)
        else:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerows((name, bool(answer)) for name, answer in pairs)
