"""A step of every task on this rank's share of a batch; rank 0 saves the results."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from test_step import CONFIGS, batch_of, model_of
from vlmo import distributed
from vlmo.tasks import losses
from vlmo.training import step
from vlmo.training.parallel import wrapped

ROWS = 8


def freeze_unused(model):
    unused = losses.unused_parameters(model.config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in unused)


def wrap(model, how):
    freeze_unused(model)
    return wrapped(model, how)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(output: Path) -> None:
    """Run on one rank of a group."""
    dist.init_process_group("gloo")
    size = ROWS // distributed.world_size()
    results = {}
    for name, config in CONFIGS.items():
        share = step.split(batch_of(ROWS), size)[distributed.rank()]
        for how in ("ddp", "fsdp"):
            for micro_batch in (size, size // 2):
                model = model_of(config)
                module = wrap(model, how)
                losses = step.backward(module, share, micro_batch=micro_batch, seed=(1, 2))
                # Reading a sharded gradient is a collective operation.
                grads = {
                    n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None
                }
                results[name, how, micro_batch] = losses, grads
    if distributed.rank() == 0:
        torch.save(results, output)
    dist.destroy_process_group()
