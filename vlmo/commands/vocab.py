"""``vlmo vocab``: a vocabulary learned from the texts of any data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vlmo.commands.outputs import check_outputs
from vlmo.data import TextTokenizer, open_data, texts_of, train_wordpiece


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        data: source for :func:`vlmo.data.open_data`.
        output: vocab.txt to write.
        task: whose texts are read: captions, questions, statements or texts.
        split: of the data.
        datasets: of the official data; None for those of the task.
        size: number of tokens, at most.
        force: replace ``output`` if it exists.
    """

    data: str
    output: Path
    task: str
    split: str
    datasets: tuple[str, ...] | None
    size: int
    force: bool


def run(settings: Settings, console: Console) -> None:
    """Learn a vocabulary and write it.

    Raises:
        OSError: the output exists, or cannot be written.
        ValueError: the data cannot be read, or have more characters than the vocabulary has room.
    """
    output = settings.output
    if output.exists() and not settings.force:
        raise FileExistsError(f"output: {output} exists; --force replaces it")
    data_path = None if settings.data == "digits" else Path(settings.data)
    check_outputs({"output": output}, given={"data": data_path})
    data = open_data(
        settings.data, settings.task, settings.split, image_size=32, datasets=settings.datasets
    )
    tokenizer = TextTokenizer(train_wordpiece(texts_of(data), settings.size), 3)
    tokenizer.save_vocabulary(output)
    console.print(
        f"{output}: {tokenizer.vocab_size} tokens, learned from {len(data)} texts",
        highlight=False,
        soft_wrap=True,
    )
