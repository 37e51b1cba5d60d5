"""A training from the first step, or from where it was stopped, to its last."""

from __future__ import annotations

import math
import resource
import time
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from vlmo.checkpoint import save_checkpoint
from vlmo.data import GlobalBatches, loader, to_device
from vlmo.distributed import rank, world_size
from vlmo.evaluation import evaluate
from vlmo.files import write_json
from vlmo.flops import step_flops
from vlmo.kernels.target import describe
from vlmo.loading import WEIGHTS
from vlmo.model import VLMo
from vlmo.placement import chosen_dtype, require_backend
from vlmo.step import backward
from vlmo.training.logs import RunLog, has_board
from vlmo.training.optimizer import adamw, clip_gradients, linear_schedule
from vlmo.training.parallel import Agreement, check_way, is_first, joined_group, wrapped
from vlmo.training.progress import Display
from vlmo.training.setup import (
    METRICS,
    STATE,
    FirstSamples,
    Materials,
    Settings,
    freeze,
    new_model,
    prepare,
    write_folder,
)
from vlmo.training.state import Training, restore, save_state
from vlmo.training.stopping import Interrupted, StopRequest, stop_requests

BEST = "best.safetensors"
# What a validation is judged by, and whether more is better.
JUDGED_BY = {
    "retrieval": ("mean_recall", True),
    "vqa": ("vqa_score", True),
    "nlvr2": ("accuracy", True),
    "pretrain": ("loss", False),
    "textmlm": ("mlm_loss", False),
}


def train(settings: Settings, console: Console) -> dict[str, float]:
    """The whole training; on every rank if torchrun has started several.

    A folder that holds a training.pt of the same training goes on from there.

    Returns:
        The last validation's metrics, the same on all ranks; empty without one.

    Raises:
        ValueError, NotImplementedError, ImportError: what was asked for does not fit or cannot run.
        OSError: a file is missing or cannot be written; a saved state stays as it was.
        FloatingPointError: a loss or the weights are not finite; a saved state stays as it was.
        Interrupted: a signal came; the state is saved.
    """
    with joined_group(settings.device) as device, stop_requests() as request:
        check_way(settings.parallel)
        autocast = chosen_dtype(settings.dtype, device)
        require_backend(settings.backend, device, autocast)
        if not is_first():
            console = Console(quiet=True)
        materials = prepare(settings, console)
        if materials.state is None:
            model = new_model(settings, materials.config, console)
        else:
            done, total = materials.state["step"], materials.total
            console.print(f"Going on from {settings.output / STATE}: step {done} of {total}")
            model = VLMo(materials.config)
        run = Run(settings, materials, model.to(device), autocast, console)
        if is_first():
            write_folder(settings, materials)
        try:
            return run.to_the_end(request)
        finally:
            run.close()


class Run:
    """One process's part in a training.

    Args:
        settings: of the command line.
        materials: of the training.
        model: on the device, with the weights to start from.
        autocast: dtype of the products, None for the weights' own.
        console: to speak on.
    """

    def __init__(
        self,
        settings: Settings,
        materials: Materials,
        model: VLMo,
        autocast: torch.dtype | None,
        console: Console,
    ):
        self.settings, self.materials, self.console = settings, materials, console
        self.recipe, self.autocast = settings.recipe, autocast
        self.device = model.transformer.cls_token.device
        freeze(model, self.recipe)
        count = sum(parameter.numel() for parameter in model.parameters())
        module = wrapped(model, settings.parallel).train()
        optimizer = adamw(
            module,
            lr=self.recipe.lr,
            weight_decay=self.recipe.weight_decay,
            head_lr_scale=self.recipe.head_lr_scale,
        )
        warmup = self.recipe.warmup_steps(materials.total)
        schedule = linear_schedule(optimizer, warmup=warmup, total=materials.total)
        scaler = torch.amp.GradScaler(self.device.type, enabled=autocast == torch.float16)
        self.training = Training(module, optimizer, schedule, scaler)
        if materials.state is not None:
            restore(materials.state, self.training)
        self._loader = self._batches()
        self.metrics: dict[str, float] = {}
        self._log: RunLog | None = None
        self._agreement = Agreement()
        self._clock = time.perf_counter()
        self._since = self.training.step
        self._flops, self._rate = 0, 0.0
        self._describe(count)

    def to_the_end(self, request: StopRequest) -> dict[str, float]:
        """All steps that are left, then the weights and the last metrics."""
        training, total = self.training, self.materials.total
        if is_first():
            board = self.settings.board and has_board()
            if self.settings.board and not board:
                self.console.print("[yellow]No TensorBoard log: pip install tensorboard[/]")
            self._log = RunLog(self.settings.output, training.step, board=board)
        self._try_validation()
        with Display(self.console, training.step, total) as display:
            batches = iter(self._loader)
            while training.step < total:
                losses = self._step(to_device(next(batches), self.device))
                stop = self._agreement.highest(request.number)
                self._after(losses, display, stop)
                if stop:
                    raise Interrupted(
                        f"stopped by signal {stop} after step {training.step} of {total}; the same "
                        "command goes on from there",
                        stop,
                    )
        self._finish()
        return self.metrics

    def close(self) -> None:
        """Close the logs."""
        self._agreement.close()
        if self._log is not None:
            self._log.close()

    def _batches(self) -> Any:
        data, recipe = cast(Any, self.materials.data), self.recipe
        batches = GlobalBatches(
            len(data),
            recipe.batch_size,
            rank=rank(),
            world_size=world_size(),
            seed=self.settings.seed,
            first_step=self.training.step,
            steps=self.materials.total - self.training.step,
            keys=getattr(data, "keys", None),
            groups=getattr(data, "groups", None),
        )
        return loader(
            data,
            batches,
            self.materials.tokenizer,
            mask_share=recipe.mask_share,
            workers=self.settings.workers,
            official_masking=recipe.official_masking,
        )

    def _step(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One step; its losses stay on the device."""
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
        training.step += 1
        self._flops += step_flops(
            self.materials.config,
            batch["text_lengths"].tolist(),
            words=len(batch.get("mlm_tokens", ())),
            others=self.recipe.batch_size - len(batch["text_ids"]),
            trains=self.recipe.trains,
        ).total
        return losses

    def _after(self, losses: dict[str, torch.Tensor], display: Display, stop: int) -> None:
        """Logs, validation and state, where they are due."""
        step, settings = self.training.step, self.settings
        last = step == self.materials.total
        evaluates = self.materials.validation is not None and (
            last or (settings.evaluate_every and step % settings.evaluate_every == 0)
        )
        saves = last or bool(stop) or step % settings.save_every == 0
        logs = last or evaluates or step % settings.log_every == 0
        if not (saves or logs):
            return
        values = {name: float(value) for name, value in losses.items()}  # waits for the device
        self._require_finite(values["loss"], saves)
        if logs:
            row: dict[str, Any] = {"step": step, "samples": step * self.recipe.batch_size}
            row |= {"lr": self._rate, **values}
            machine = self._machine()
            if evaluates:
                row |= self._validate()
            if self._log is not None:
                self._log.write(row, machine)
            display.show(row, machine)
        if saves:
            if self._log is not None:
                self._log.sync()
            save_state(settings.output / STATE, self.training, self.materials.run)
        if evaluates or saves:  # which are not the training's own time
            self._start_clock()

    def _require_finite(self, loss: float, thoroughly: bool) -> None:
        fault = None if math.isfinite(loss) else f"the loss is {loss}"
        if fault is None and thoroughly and not _all_finite(self.training.model):
            fault = "a weight is not finite"
        if fault is not None:
            raise FloatingPointError(
                f"step {self.training.step}: {fault}; what was saved before is as it was"
            )

    def _try_validation(self) -> None:
        """Validate on a few samples: what is wrong with it is told now, not after the training."""
        data = self.materials.validation
        if data is not None and self.training.step < self.materials.total:
            self._evaluate(FirstSamples(data, 4 * world_size()))

    def _evaluate(self, data: Dataset) -> dict[str, float]:
        return evaluate(
            self.training.model,
            data,
            self.materials.tokenizer,
            self.recipe.stage,
            batch_size=self.settings.evaluation_batch,
            workers=self.settings.workers,
            autocast=self.autocast,
        )

    def _validate(self) -> dict[str, float]:
        """Metrics of the val split for a row; keeps the weights if they are the best so far."""
        data = self.materials.validation
        assert data is not None
        self.metrics = self._evaluate(data)
        name, more = JUDGED_BY[self.recipe.stage]
        value = self.metrics.get(name)
        row = {f"val_{key}": metric for key, metric in self.metrics.items()}
        if value is None:
            return row
        best = self.training.best
        if not best or (value > best["value"] if more else value < best["value"]):
            self.training.best = {"step": self.training.step, "metric": name, "value": value}
            self._save_weights(BEST)
        return row | {"val_best": self.training.best["value"]}

    def _finish(self) -> None:
        """The weights, and the metrics of the last validation and of the best one."""
        if self.materials.validation is not None and not self.metrics:
            self._validate()  # the last one was lost with a process that was ended after it
        self._save_weights(WEIGHTS)
        if is_first():
            facts = {"recipe": self.recipe.name, "step": self.training.step}
            content = {**facts, "validation": self.metrics, "best": self.training.best}
            write_json(self.settings.output / METRICS, content)
        self.console.print(f"Written to {self.settings.output}: {WEIGHTS}, {METRICS}")

    def _save_weights(self, name: str) -> None:
        model = _whole(self.training.model, self.materials.config)
        if is_first():
            save_checkpoint(model, self.settings.output / name)

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
        return {
            "seconds_per_step": seconds / steps,
            "samples_per_second": steps * self.recipe.batch_size / seconds,
            "tflops": flops / seconds / 1e12,
            "memory_gib": memory / 2**30,
        }

    def _start_clock(self) -> None:
        self._clock, self._since, self._flops = time.perf_counter(), self.training.step, 0

    def _describe(self, parameters: int) -> None:
        recipe, processes = self.recipe, world_size()
        share = recipe.batch_size // processes
        parts = share // (self.settings.micro_batch or share)
        dtype = str(self.autocast or torch.float32).removeprefix("torch.")
        self.console.print(
            f"{recipe.name}: {parameters:,} parameters in {dtype} on {processes} x "
            f"{describe(self.device)}; {self.materials.run['samples']:,} samples, batches of "
            f"{recipe.batch_size} ({processes} x {parts} x {share // parts} rows), "
            f"{self.materials.total:,} steps",
            highlight=False,
        )


def _whole(model: nn.Module, config: Any) -> nn.Module:
    """What :func:`save_checkpoint` can write on the first rank; every rank calls this."""
    if not isinstance(model, FSDPModule):
        return model
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if not is_first():
        return model
    with torch.device("meta"):
        plain = VLMo(config)
    plain.load_state_dict(state, assign=True)
    return plain


def _all_finite(model: nn.Module) -> bool:
    """Whether every weight on every rank is finite."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    with torch.no_grad():
        finite = torch.stack([part.isfinite().all() for part in parts]).all().float()
    if world_size() > 1:
        dist.all_reduce(finite, dist.ReduceOp.MIN)
    return bool(finite)
