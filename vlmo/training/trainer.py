"""Runs a training from its first step, or from a saved state, to its last step."""

from __future__ import annotations

import math
import resource
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from vlmo.checkpoint.io import save_checkpoint
from vlmo.data import BadSample, GlobalBatches, loader, to_device
from vlmo.device import chosen_dtype, require_backend
from vlmo.distributed import rank, world_size
from vlmo.files import write_json
from vlmo.kernels.target import describe
from vlmo.model.flops import step_flops
from vlmo.model.models import Config, Model, build, inner
from vlmo.run_folder import WEIGHTS
from vlmo.tasks.evaluation import evaluate
from vlmo.tasks.inference import device_of
from vlmo.training.bad_samples import SPARES, BadSamples, add_to_list, write_list
from vlmo.training.lock import FolderLock
from vlmo.training.logs import RunLog, why_no_board
from vlmo.training.optimizer import adamw, clip_gradients, cosine_schedule, linear_schedule
from vlmo.training.parallel import (
    Agreement,
    check_way,
    highest,
    is_first,
    joined_group,
    objects_of_ranks,
    on_first,
    wrapped,
)
from vlmo.training.progress import Display
from vlmo.training.recipes import CONTRASTS
from vlmo.training.record import RECIPE
from vlmo.training.setup import (
    BEST,
    METRICS,
    FirstSamples,
    Materials,
    Settings,
    fingerprint,
    freeze,
    new_model,
    prepare,
    write_folder,
)
from vlmo.training.state import STATE, Training, restore, save_state
from vlmo.training.step import SCALES, backward
from vlmo.training.stopping import Interrupted, StopRequest, stop_requests

# Batches that are prepared ahead when ranks agree one step later: all ranks can then end together
# if one of them cannot prepare its batch.
_AHEAD = 2
_BAD = 1000  # reason to stop: a bad sample; larger than any signal's number
_SKIP_HINT = "repair the file, remove its record, or give --on-bad-sample skip"
# The metric that selects the best validation, and whether larger is better.
JUDGED_BY = {
    "retrieval": ("mean_recall", True),
    "vqa": ("vqa_score", True),
    "nlvr2": ("accuracy", True),
    "pretrain": ("loss", False),
    "textmlm": ("mlm_loss", False),
}


def train(settings: Settings, console: Console) -> dict[str, float]:
    """Run the whole training; on every rank if torchrun has started several.

    If the folder holds a training.pt of the same training, the training resumes from it.

    Returns:
        The metrics of the last validation, equal on all ranks; empty without validation.

    Raises:
        ValueError, NotImplementedError, ImportError: the options are incompatible or cannot run.
        OSError: a file is missing or cannot be written, or another training uses the folder; a
            saved state stays unchanged.
        FloatingPointError: a loss or weight is not finite; a saved state stays unchanged.
        Interrupted: a signal was received; the state is saved.
    """
    lock = FolderLock(settings.output)
    try:
        with joined_group(settings.device) as device:
            return _train(settings, console, device, lock)
    finally:
        lock.release()


def _train(
    settings: Settings, console: Console, device: torch.device, lock: FolderLock
) -> dict[str, float]:
    check_way(settings.parallel)
    autocast = chosen_dtype(settings.dtype, device)
    require_backend(settings.backend, device, autocast)
    if not is_first():
        console = Console(quiet=True)
    exists = on_first(settings.output.is_dir)
    if exists and not settings.dry_run:  # its content must not change after it is read
        lock.take()
    materials = prepare(settings, console)
    if materials.state is None:
        model = new_model(settings, materials.config, console)
    else:
        done, total = materials.step, materials.total
        told = f"Resuming from {settings.output / STATE}: step {done} of {total}"
        console.print(told, markup=False)
        model = build(materials.config)
    run = Run(settings, materials, model.to(device), autocast, console)
    if settings.dry_run:
        return run.try_out()
    lock.take()
    try:
        run.begin(new=not exists)
        with stop_requests() as request:
            return run.to_the_end(request)
    finally:
        run.close()


class Run:
    """The part of one process in a training.

    Args:
        settings: options of the command line.
        materials: data, tokenizer, configuration and state of the training.
        model: on the device, with the initial weights.
        autocast: dtype of the matrix products; None for that of the weights.
        console: for messages.
    """

    def __init__(
        self,
        settings: Settings,
        materials: Materials,
        model: Model,
        autocast: torch.dtype | None,
        console: Console,
    ):
        self.settings, self.materials, self.console = settings, materials, console
        self.recipe, self.autocast = settings.recipe, autocast
        self.device = device_of(model)
        freeze(model, self.recipe)
        count = sum(parameter.numel() for parameter in model.parameters())
        module = wrapped(model, settings.parallel).train()
        optimizer = adamw(
            module,
            lr=self.recipe.lr,
            weight_decay=self.recipe.weight_decay,
            head_lr_scale=self.recipe.head_lr_scale,
            layer_decay=self.recipe.layer_decay,
            beta2=self.recipe.beta2,
        )
        schedule = self._schedule(optimizer)
        scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.training = Training(module, optimizer, schedule, scaler)
        if materials.state is not None:
            restore(materials.state, self.training)
        if materials.removed:  # the remaining samples have new numbers
            self.training.bad, self.training.fewer = {}, None
        self._bad = BadSamples(self.training.bad, materials.bearable)
        self._bad.check()
        self._loader = self._batches()
        self._source: Iterator[dict[str, Any]] = iter(())
        self._held: deque[dict[str, Any] | BadSample] = deque()
        self._log: RunLog | None = None
        self._agreement = Agreement()
        self._clock = time.perf_counter()
        self._since = self.training.step
        self._flops, self._rate = 0, 0.0
        self._describe(count)

    def _schedule(self, optimizer: Optimizer) -> LambdaLR:
        recipe, total = self.recipe, self.materials.total
        warmup = recipe.warmup_steps(total)
        if recipe.schedule == "linear":
            return linear_schedule(optimizer, warmup=warmup, total=total)
        least = recipe.min_lr / recipe.lr
        return cosine_schedule(optimizer, warmup=warmup, total=total, least=least)

    def begin(self, *, new: bool) -> None:
        """Write the files that a run's folder holds from the start.

        Args:
            new: the folder was just created.

        Raises:
            OSError: a file cannot be written, or another training has started in the folder
                meanwhile.
            ValueError: a log in the folder is damaged.
        """
        on_first(lambda: self._begin(new))

    def _begin(self, new: bool) -> None:
        folder = self.settings.output
        if new and ((folder / STATE).exists() or (folder / RECIPE).exists()):
            raise OSError(f"output: another training has begun in {folder} in the meantime")
        reason = why_no_board() if self.settings.board else None
        if reason is not None:
            told = f"No TensorBoard log: {reason}"
            self.console.print(told, style="yellow", markup=False)
        board = self.settings.board and reason is None
        # The row of a pending validation is not in the logs yet.
        step = self.training.step - (self.training.pending is not None)
        self._log = RunLog(folder, step, board=board)
        write_list(folder, self.training.bad)
        write_folder(self.settings, self.materials)

    def to_the_end(self, request: StopRequest) -> dict[str, float]:
        """Execute all remaining steps, then write the weights and the last metrics."""
        training, total = self.training, self.materials.total
        with Display(self.console, training.step, total) as display:
            if training.pending is not None:
                self._validate_pending(display)
                self._save()
            elif training.step < total:
                self._try_validation()
            self._source = iter(self._loader)
            for _ in range(_AHEAD if world_size() > 1 else 1):
                self._fetch()
            stop = highest(self._own_stop(request))
            while training.step < total and not stop:
                losses = self._step(self._take())
                self._fetch()
                stop = self._agreement.highest(self._own_stop(request))
                self._after(losses, display, stop)
            if stop == _BAD:
                raise self._ended_by_bad_samples()
            if stop:
                raise Interrupted(
                    f"stopped by signal {stop} after step {training.step} of {total}; the same "
                    "command resumes from there",
                    stop,
                )
        self._finish()
        return training.metrics or {}

    def try_out(self) -> dict[str, float]:
        """Dry run: execute one step, if any remain, and discard it; returns an empty dictionary.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        if self.training.step == self.materials.total:
            self.console.print("Nothing is left to train.")
            return {}
        self._try_validation()
        self._source = iter(self._loader)
        self._fetch()
        if isinstance(self._held[0], BadSample):
            raise self._held[0]
        losses = self._step(self._take())
        values = {name: float(value) for name, value in losses.items()}
        self._require_finite(values["loss"], thoroughly=False)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
        memory = self._machine()["memory_gib"]
        self.console.print(
            f"A step works: {shown}; {memory:.2f} GiB of memory on a process. Nothing was written.",
            highlight=False,
        )
        return {}

    def close(self) -> None:
        """Close the logs."""
        self._agreement.close()
        if self._log is not None:
            self._log.close()

    def _batches(self) -> Any:
        data, recipe, keys = cast(Any, self.materials.data), self.recipe, self.materials.keys
        skips = self.materials.bearable is not None
        batches = GlobalBatches(
            len(data),
            recipe.batch_size,
            rank=rank(),
            world_size=world_size(),
            seed=self.settings.seed,
            first_step=self.training.step,
            steps=self.materials.total - self.training.step,
            keys=keys,
            groups=None if keys is None else getattr(data, "groups", None),
            spares=SPARES if skips else 0,
        )
        return loader(
            data,
            batches,
            self.materials.tokenizer,
            mask_share=recipe.mask_share,
            workers=self.settings.workers,
            official_masking=recipe.official_masking,
            on_bad="replace" if skips else "error",
        )

    def _fetch(self) -> None:
        """Load one more batch if any remain, or hold the error that prevents it."""
        try:
            self._held.append(next(self._source))
        except BadSample as error:
            self._held.append(error)
        except StopIteration:
            pass

    def _take(self) -> dict[str, Any]:
        """The batch of the next step, on the device."""
        batch = self._held.popleft()
        assert not isinstance(batch, BadSample)
        self._bad.note(self.training.step + 1, batch.pop("bad_samples", ()))
        return to_device(batch, self.device)

    def _own_stop(self, request: StopRequest) -> int:
        """This rank's reason to stop: a signal, a batch that cannot be read, or 0."""
        bad = any(isinstance(batch, BadSample) for batch in self._held)
        return max(request.number, _BAD if bad else 0)

    def _ended_by_bad_samples(self) -> ValueError:
        """Save the state and return the error that ends the training on all ranks."""
        faults = []
        for number, batch in enumerate(self._held, self.training.step + 1):
            if isinstance(batch, BadSample):
                faults.append(str(batch))
                self._bad.note(number, [(batch.index, str(batch))])
        self._list_bad_samples()
        self._save()
        told = next(fault for found in objects_of_ranks(faults) for fault in found)
        if self.materials.bearable is None:
            told += f"; {_SKIP_HINT}"
        return ValueError(
            f"{told}; step {self.training.step} is saved, and the same command resumes from there"
        )

    def _step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Execute one step; the returned losses stay on the device."""
        training = self.training
        training.optimizer.zero_grad(set_to_none=True)
        losses = backward(
            training.model,
            batch,
            micro_batch=self.settings.micro_batch,
            scaler=training.scaler,
            autocast=self.autocast,
            seed=(self.settings.seed, training.step),
        )
        if self.recipe.clip_norm is not None:
            training.scaler.unscale_(training.optimizer)
            clip_gradients(training.model.parameters(), self.recipe.clip_norm)
        self._rate = training.optimizer.param_groups[0]["lr"]
        training.scaler.step(training.optimizer)
        training.scaler.update()
        training.schedule.step()
        self._bound_scales()
        training.step += 1
        self._flops += step_flops(
            self.materials.config,
            batch["text_lengths"].tolist(),
            words=len(batch.get("mlm_tokens", ())),
            others=self.recipe.batch_size - len(batch["text_ids"]),
            trains=self.recipe.trains,
        ).total
        return losses

    def _bound_scales(self) -> None:
        if self.recipe.max_logit_scale is not None:
            with torch.no_grad():
                for scale in self._scales().values():
                    scale.clamp_(max=math.log(self.recipe.max_logit_scale))

    def _scales(self) -> dict[str, nn.Parameter]:
        """The learned logarithms of the contrastive logit scales, by name."""
        if not set(self.recipe.tasks) & set(CONTRASTS):
            return {}
        return {
            name: p for name, p in inner(self.training.model).named_parameters() if name in SCALES
        }

    def _after(self, losses: dict[str, torch.Tensor], display: Display, stop: int) -> None:
        """Write logs, validate and save the state if they are due after a step."""
        training, settings = self.training, self.settings
        step = training.step
        last = step == self.materials.total
        evaluates = self.materials.validation is not None and (
            last or bool(settings.evaluate_every and step % settings.evaluate_every == 0)
        )
        saves = last or bool(stop) or step % settings.save_every == 0
        logs = last or evaluates or step % settings.log_every == 0
        if not (saves or logs):
            return
        values = {name: float(value) for name, value in losses.items()}  # waits for the device
        self._require_finite(values["loss"], saves or evaluates)
        if self.materials.bearable is not None:
            for entry in self._list_bad_samples():
                told = f"Left out sample {entry['sample']}: {entry['reason']}"
                self.console.print(told, style="yellow", markup=False, highlight=False)
        if logs:
            row: dict[str, Any] = {"step": step, "samples": step * self.recipe.batch_size}
            row |= {"lr": self._rate, **values}
            row |= {name: math.exp(scale.item()) for name, scale in self._scales().items()}
            if self.materials.bearable is not None:
                row["bad_samples"] = self._bad.until(step)
            machine = self._machine()
            if evaluates:  # save first, so that a failing validation loses nothing
                training.pending = {"row": row, "machine": machine}
                self._save()
                if not stop:
                    self._validate_pending(display)
            else:
                self._write(row, machine, display)
        if saves and not (evaluates and stop):
            self._save()
        if evaluates or saves:  # whose time is not part of the step time
            self._start_clock()
        if self.materials.bearable is not None:
            self._check_bad_samples(saved=saves or evaluates)

    def _write(self, row: dict[str, Any], machine: dict[str, float], display: Display) -> None:
        """Write a row of the logs and show it."""
        if self._log is not None:
            self._log.write(row, machine)
        display.show(row, machine)

    def _save(self) -> None:
        if self._log is not None:
            self._log.sync()
        save_state(self.settings.output / STATE, self.training, self.materials.run)

    def _list_bad_samples(self) -> list[dict[str, Any]]:
        """Add all ranks' bad samples since the last call to the file; returns them."""
        new, data = self._bad.gather(), self.materials.data
        if new:
            on_first(lambda: add_to_list(self.settings.output, new))
            bad = [*self.training.bad]
            self.training.fewer = on_first(lambda: fingerprint(data, without=bad))
        return new

    def _check_bad_samples(self, saved: bool) -> None:
        """End a training with too many bad samples; it can be resumed with a higher limit."""
        try:
            self._bad.check()
        except ValueError:
            if not saved:
                self._save()
            raise

    def _require_finite(self, loss: float, thoroughly: bool) -> None:
        fault = None if math.isfinite(loss) else f"the loss is {loss}"
        if fault is None and thoroughly and not _all_finite(self.training.model):
            fault = "a weight is not finite"
        if fault is not None:
            raise FloatingPointError(
                f"step {self.training.step}: {fault}; what was saved before is as it was"
            )

    def _try_validation(self) -> None:
        """Validate on a few samples, so that faults appear before the training, not after it."""
        data = self.materials.validation
        if data is not None:
            try:
                self._evaluate(FirstSamples(data, 4 * world_size()))
            except BadSample as error:
                raise ValueError(f"validation: {error}; {_SKIP_HINT}") from error

    def _evaluate(self, data: Dataset) -> dict[str, float]:
        return evaluate(
            self.training.model,
            data,
            self.materials.tokenizer,
            self.recipe.stage,
            batch_size=self.settings.evaluation_batch,
            workers=self.settings.workers,
            autocast=self.autocast,
            on_bad_sample="error" if self.materials.bearable is None else "skip",
        )

    def _validate_pending(self, display: Display) -> None:
        """Run the pending validation and write its row of the logs; the state was saved before.

        Raises:
            ValueError, OSError: the validation's error, with a hint that it can be repeated.
        """
        training = self.training
        assert training.pending is not None
        try:
            row = training.pending["row"] | self._validate()
        except (ValueError, OSError) as error:
            kind = OSError if isinstance(error, OSError) else ValueError
            hint = f"; {_SKIP_HINT}" if isinstance(error, BadSample) else ""
            raise kind(
                f"validation after step {training.step}: {error}{hint}; the training is saved, and "
                "the same command tries the validation again"
            ) from error
        machine, training.pending = training.pending["machine"], None
        self._write(row, machine, display)

    def _validate(self) -> dict[str, float]:
        """Metrics of the val split for a row; saves the weights if they are the best so far."""
        data, training = self.materials.validation, self.training
        if data is None:  # the option was changed when the run was resumed
            return {}
        training.metrics = self._evaluate(data)
        name, more = JUDGED_BY[self.recipe.stage]
        value = training.metrics.get(name)
        row = {f"val_{key}": metric for key, metric in training.metrics.items()}
        if value is None:
            return row
        best = training.best
        if not best or (value > best["value"] if more else value < best["value"]):
            training.best = {"step": training.step, "metric": name, "value": value}
            self._save_weights(BEST)
        return row | {"val_best": training.best["value"]}

    def _finish(self) -> None:
        """Write the weights, and the metrics of the last and of the best validation."""
        training = self.training
        if self.materials.validation is not None and training.metrics is None:
            self._validate()  # an older run whose state lacks the metrics
        self._save_weights(WEIGHTS)
        if is_first():
            facts = {"recipe": self.recipe.name, "step": training.step}
            content = {**facts, "validation": training.metrics or {}, "best": training.best}
            write_json(self.settings.output / METRICS, content)
        told = f"Written to {self.settings.output}: {WEIGHTS}, {METRICS}"
        self.console.print(told, markup=False)

    def _save_weights(self, name: str) -> None:
        model = _whole(self.training.model, self.materials.config)
        if is_first():
            digests = {key: self.materials.run[key] for key in ("vocabulary", "answers")}
            save_checkpoint(model, self.settings.output / name, **digests)

    def _machine(self) -> dict[str, float]:
        """Times since the clock was started, and memory."""
        now, step = time.perf_counter(), self.training.step
        seconds, steps = max(now - self._clock, 1e-9), step - self._since
        flops = self._flops
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self.device)
        else:
            memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._start_clock()
        parts, rows = self._parts
        return {
            "seconds_per_step": seconds / steps,
            "samples_per_second": steps * self.recipe.batch_size / seconds,
            "tflops": flops / seconds / 1e12,
            "memory_gib": memory / 2**30,
            "parts": parts,
            "micro_batch": rows,
        }

    def _start_clock(self) -> None:
        self._clock, self._since, self._flops = time.perf_counter(), self.training.step, 0

    @property
    def _parts(self) -> tuple[int, int]:
        """Number of micro-batches in a process's share of a batch, and the rows of each."""
        share = self.recipe.batch_size // world_size()
        rows = self.settings.micro_batch or share
        return share // rows, rows

    def _describe(self, parameters: int) -> None:
        recipe, processes = self.recipe, world_size()
        parts, rows = self._parts
        dtype = str(self.autocast or torch.float32).removeprefix("torch.")
        self.console.print(
            f"{recipe.name}: {parameters:,} parameters in {dtype} on {processes} x "
            f"{describe(self.device)}; {self.materials.run['samples']:,} samples, batches of "
            f"{recipe.batch_size} (processes x parts x rows: {processes} x {parts} x {rows}), "
            f"{self.materials.total:,} steps",
            highlight=False,
        )


def _whole(model: nn.Module, config: Config) -> nn.Module:
    """The unsharded model for :func:`save_checkpoint`; a collective call."""
    if not isinstance(model, FSDPModule):
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if not is_first():
        return model
    with torch.device("meta"):
        plain = build(config)
    plain.load_state_dict(state, assign=True)
    return plain


def _all_finite(model: nn.Module) -> bool:
    """Whether all weights are finite on all ranks."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    with torch.no_grad():
        finite = torch.stack([part.isfinite().all() for part in parts]).all().float()
    if world_size() > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)
