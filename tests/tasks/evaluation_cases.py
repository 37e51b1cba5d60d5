"""Tiny models and data sets for every evaluation task."""

import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlmo import VLMo, VLMoConfig
from vlmo.data import ANSWERS, BadSample, Draw, digit_tokenizer, open_data
from vlmo.tasks.evaluation import evaluate
from vlmo.training.parallel import WAYS, wrapped

TOKENIZER = digit_tokenizer(12)
TINY = VLMoConfig(
    dim=24,
    depth=3,
    heads=2,
    vl_start=2,
    image_size=32,
    patch_size=16,
    max_text_length=12,
    text_capacity=12,
    vocab_size=TOKENIZER.vocab_size,
    drop_path=0.5,
    vqa_labels=len(ANSWERS),
)
HEADS = {
    "retrieval": ("itc", "itm"),
    "vqa": ("vqa",),
    "nlvr2": ("nlvr2",),
    "pretrain": ("mlm", "itc", "itm"),
    "textmlm": ("textmlm",),
}


class First(torch.utils.data.Dataset):
    """The first samples of a data set, with some of their keys changed."""

    def __init__(self, dataset, size: int, **changes):
        self.dataset, self.size, self.changes = dataset, size, changes
        self.answers = dataset.answers

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, item) -> dict:
        index = Draw.of(item).index
        changed = {name: values[index] for name, values in self.changes.items()}
        return self.dataset[item] | changed


class Damaged(First):
    """Samples, some of which cannot be read."""

    bad: tuple[int, ...] = ()

    def __getitem__(self, item) -> dict:
        index = Draw.of(item).index
        if index in self.bad:
            raise BadSample(f"picture {index} is damaged", index)
        return super().__getitem__(item)

    def fields(self, index: int) -> dict:
        return {name: values[index] for name, values in self.changes.items()}


def damaged(task: str, *bad: int, size: int = 11, **changes) -> Damaged:
    """:func:`digits` without the pictures of some samples."""
    dataset = Damaged(open_data("digits", task, "val", image_size=32), size, **changes)
    dataset.bad = bad
    return dataset


def digits(task: str, size: int = 11, **changes) -> First:
    """The first scenes of the validation split."""
    return First(open_data("digits", task, "val", image_size=32), size, **changes)


def model_of(tasks: tuple[str, ...], seed: int = 0, **changes) -> VLMo:
    """A model whose outputs differ from sample to sample."""
    torch.manual_seed(seed)
    model = VLMo(TINY.replace(tasks=tasks, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


def results(wrap, folder: Path, size: int = 11) -> dict[str, dict[str, float]]:
    """Metrics of every task, and the prediction files."""
    found = {}
    for task, tasks in HEADS.items():
        options: dict[str, Any] = {"batch_size": 4}
        if task in ("vqa", "nlvr2"):
            options["predictions"] = folder / task
        if task == "retrieval":
            options["rerank"] = 3
        model = wrap(model_of(tasks))
        found[task] = evaluate(model, digits(task, size), TOKENIZER, task, **options)
        # The whole second batch, and one sample more; or nothing of two samples.
        options = {name: value for name, value in options.items() if name != "predictions"}
        found[f"damaged {task}"] = evaluate(
            *(model, damaged(task, 3, 4, 5, 6, 8, size=size), TOKENIZER, task),
            **options,
            on_bad_sample="skip",
        )
    return found


def main(folder: Path) -> None:
    """Evaluate everything in a process group; each rank saves its results."""
    dist.init_process_group("gloo")
    for name in WAYS:
        mine = folder / name
        mine.mkdir(exist_ok=True)
        found = {
            str(size): results(functools.partial(wrapped, way=name), mine, size) for size in (11, 2)
        }
        (mine / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
