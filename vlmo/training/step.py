"""Forward and backward pass of one training step, on any number of ranks and micro-batches.

A global batch that does not fit in memory is computed in micro-batches, but contrast and hard
negatives span all of it: the unimodal streams of every micro-batch are computed first without a
gradient, the loss of all streams gives the gradient of each, and the micro-batches then run again
one after another with these gradients (GradCache, Gao et al. 2021). unilm, the reference
implementation, instead reduces the contrastive batch to one micro-batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from vlmo import distributed
from vlmo.model.models import Model, inner
from vlmo.model.packed import Streams
from vlmo.tasks.losses import Whole, compute_losses, contrast, masked_tokens
from vlmo.tasks.negatives import PendingNegatives

Batch = Mapping[str, Any]

SCALES = ("logit_scale", "logit_vl_scale")  # parameters of the contrastive loss outside the streams


def backward(
    wrapped: nn.Module,
    batch: Batch,
    *,
    micro_batch: int | None = None,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    seed: tuple[int, int] = (0, 0),
) -> dict[str, Tensor]:
    """Accumulate the gradient of the global batch's loss in ``.grad``.

    Args:
        wrapped: a :class:`vlmo.VLMo` or :class:`vlmo.model.beit3.BEiT3`, or a wrapper around one:
            DistributedDataParallel, FSDP2, torch.compile, PEFT.
        batch: this rank's rows of the global batch, on the device; every rank has the same number
            of rows.
        micro_batch: rows of a micro-batch; None for all rows at once.
        scaler: loss scaler, for float16.
        autocast: dtype of the forward pass, None for that of the parameters.
        seed: seed of the run, and number of the step. All randomness of the step (hard negatives,
            stochastic depth, dropout) follows from it, the rank and the micro-batch; torch's own
            generators are seeded from it.

    Returns:
        Every loss of the global batch, detached, equal on all ranks, not scaled.

    Raises:
        ValueError: ``micro_batch`` does not divide the number of rows.
    """
    rows = len(batch["text_ids"])
    size = rows if micro_batch is None else micro_batch
    if not 1 <= size <= rows or rows % size:
        raise ValueError(f"micro_batch: {size} does not divide the {rows} rows of a rank")
    model = inner(wrapped)
    device = batch["text_ids"].device
    generator = torch.Generator(device).manual_seed(_mix(*seed))

    def forward(number: int, **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(_mix(*seed, distributed.rank(), number))
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return wrapped(compute_losses, parts[number], **options)

    parts = split(batch, size)
    wholes: list[Whole | None] = [None]
    if len(parts) > 1:
        streams = []
        if {"itc", "irtr"} & set(model.config.tasks):
            with torch.no_grad():
                streams = [Streams(**forward(n, streams_only=True)) for n in range(len(parts))]
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            wholes = list(_wholes(model, batch, streams, len(parts), generator))
    losses: dict[str, Tensor] = {}
    for number, whole in enumerate(wholes):
        with _sync_if(wrapped, number == len(parts) - 1):
            output = forward(number, whole=whole, generator=generator)
            loss = output["loss"] / len(parts)
            (loss if scaler is None else scaler.scale(loss)).backward()
        for name, value in output.items():
            if name.endswith("loss"):
                losses[name] = losses.get(name, 0) + value.detach().float() / len(parts)
    _average_what_is_whole(wrapped)
    values = distributed.mean_over_ranks(torch.stack(list(losses.values())))
    return dict(zip(losses, values.unbind(), strict=True))


def split(batch: Batch, size: int) -> list[dict[str, Any]]:
    """Split a batch into micro-batches of ``size`` rows."""
    rows = len(batch["text_ids"])
    if size == rows:
        return [dict(batch)]
    parts = []
    for start in range(0, rows, size):
        part = {name: value[start : start + size] for name, value in batch.items()}
        if "mlm_tokens" in batch:
            tokens, length = batch["mlm_tokens"], batch["text_labels_mlm"].shape[1]
            inside = (tokens >= start * length) & (tokens < (start + size) * length)
            part["mlm_tokens"] = tokens[inside] - start * length
        parts.append(part)
    return parts


def _wholes(
    model: Model, batch: Batch, streams: list[Streams], count: int, generator: torch.Generator
) -> Iterator[Whole]:
    """The :class:`Whole` of each of ``count`` micro-batches; ``streams`` are those of all."""
    device = batch["text_ids"].device
    words = torch.zeros((), device=device)
    if "text_labels_mlm" in batch:
        words = torch.full((), len(masked_tokens(batch)) / count, device=device)
    words = distributed.mean_over_ranks(words)
    if not streams:
        yield from (Whole(words, {}) for _ in range(count))
        return
    leaves = Streams._make(
        None if values[0] is None else torch.cat(values).float().requires_grad_()
        for values in zip(*streams, strict=True)
    )
    output = contrast(model, leaves)
    losses = {name: loss for name, loss in output.items() if name.endswith("_loss")}
    used: list[Tensor] = [leaf for leaf in leaves if leaf is not None]
    scales = [p for name, p in model.named_parameters() if name in SCALES]
    gradients = torch.autograd.grad(
        torch.stack(list(losses.values())).sum(), [*used, *scales], allow_unused=True
    )
    negatives: list = [None] * count
    if "itm" in model.config.tasks:
        logits = output["itc_i2t_logits"], output["itc_t2i_logits"]
        negatives = PendingNegatives(*logits, batch, generator).parts(count)
    detached = {name: loss.detach() for name, loss in losses.items()}
    chunks = [gradient.chunk(count) for gradient in gradients[: len(used)]]
    of_scales = list(zip(scales, gradients[len(used) :], strict=True))
    for number in range(count):
        own = [chunk[number] for chunk in chunks]

        def surrogate(streams: Streams, own: list[Tensor] = own) -> Tensor:
            pairs = zip((v for v in streams if v is not None), own, strict=True)
            terms = [count * (value.float() * g).sum() for value, g in pairs]
            terms += [scale * g for scale, g in of_scales if g is not None]
            return torch.stack(terms).sum()

        yield Whole(words, detached, surrogate, negatives[number])


@contextlib.contextmanager
def _sync_if(wrapped: nn.Module, last: bool) -> Iterator[None]:
    """Average gradients over ranks only in the last micro-batch."""
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
        yield
    elif isinstance(wrapped, DistributedDataParallel) and not last:
        with wrapped.no_sync():
            yield
    else:
        yield


def _average_what_is_whole(wrapped: nn.Module) -> None:
    """Average the gradients of scalars (the logit scales), which FSDP2 does not handle."""
    if isinstance(wrapped, FSDPModule):
        for parameter in wrapped.parameters():
            if parameter.grad is not None and not isinstance(parameter, DTensor):
                dist.all_reduce(parameter.grad)
                parameter.grad /= distributed.world_size()


def _mix(*numbers: int) -> int:
    """Combine several numbers to one seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
