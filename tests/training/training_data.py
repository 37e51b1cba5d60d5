"""Small training data from every kind of source, for tests."""

import json
from pathlib import Path

from PIL import Image

from test_data_arrow import PAIRS, QUESTIONS, STATEMENTS, TEXTS, write
from vlmo.data import digit_tokenizer

TASKS = ("textmlm", "pretrain", "retrieval", "vqa", "nlvr2")
# Task and source; a .txt file holds texts alone, or the captions of the picture beside it.
SOURCES = [(task, source) for task in TASKS for source in ("records", "arrow")]
SOURCES += [(task, "texts") for task in ("textmlm", "pretrain", "retrieval")]

_ARROW = {
    "textmlm": (TEXTS, [f"wikibk_train_{n}" for n in range(50)], ["wikibk_val_0"]),
    "pretrain": (
        PAIRS,
        ["coco_caption_karpathy_train", "coco_caption_karpathy_restval"],
        ["coco_caption_karpathy_val"],
    ),
    "retrieval": (PAIRS, ["f30k_caption_karpathy_train"], ["f30k_caption_karpathy_val"]),
    "vqa": (QUESTIONS, ["vqav2_train", "vqav2_trainable_val"], ["vqav2_rest_val"]),
    "nlvr2": (STATEMENTS, ["nlvr2_train"], ["nlvr2_dev", "nlvr2_test1"]),
}
DATASETS = {"pretrain": ("coco",)}  # of the Arrow files, if not all are written


def make(folder: Path, task: str, source: str, *, validation: bool = True, count: int = 6) -> Path:
    """Write training data of about ``count`` samples; returns the argument for ``--data``.

    A vocab.txt is written beside the folder.
    """
    folder.mkdir(parents=True)
    digit_tokenizer(12).save_vocabulary(folder.parent / "vocab.txt")
    splits = ("train", "val") if validation else ("train",)
    if source == "arrow":
        columns, train, val = _ARROW[task]
        write(folder, columns, *train, *(val if validation else ()))
    elif source == "records":
        for split in splits:
            _records(folder, task, split, count)
    else:
        for split in splits:
            _texts(folder, task, split, count)
    return folder


def _records(folder: Path, task: str, split: str, count: int) -> None:
    """Write a .jsonl file of ``count`` records, each with its own picture."""
    lines = []
    for number in range(count):
        picture = _picture(folder, f"{split}{number}.png", number)
        label = ("two", "three")[number % 2]
        record = {
            "textmlm": {"text": f"a {label} left of a five"},
            "pretrain": {"image": picture, "caption": f"a {label} above a five"},
            "retrieval": {"image": picture, "caption": f"a {label} above a five"},
            "vqa": {"image": picture, "question": "how many?", "answer": label},
            "nlvr2": {
                "image_0": picture,
                "image_1": picture,
                "statement": f"both show a {label}",
                "label": bool(number % 2),
            },
        }[task]
        lines.append(json.dumps(record) + "\n")
    (folder / f"{split}.jsonl").write_text("".join(lines))


def _texts(folder: Path, task: str, split: str, count: int) -> None:
    lines = [f"a two left of {n} fives\n" for n in ("one", "two", "three") * count][:count]
    if task == "textmlm":
        (folder / f"{split}.txt").write_text("".join(lines))
        return
    (folder / split).mkdir()
    for number, line in enumerate(lines):
        _picture(folder, f"{split}/{number}.png", number)
        (folder / split / f"{number}.txt").write_text(line)


def _picture(folder: Path, name: str, number: int) -> str:
    Image.new("RGB", (40, 30), (20 * number, 255 - 20 * number, 90)).save(folder / name)
    return name


def damage(path: Path) -> None:
    """Truncate a picture file."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
