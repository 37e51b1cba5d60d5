"""``vlmo vocab``: a vocabulary learned from the texts of any data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmo.commands.options import DataArgument, DatasetsOption, Split, Task, plain_console


def vocab(
    data: DataArgument,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("vocab.txt"),
    task: Annotated[Task, typer.Option(help="Task of the data, whose texts are read.")] = (
        "pretrain"
    ),
    split: Annotated[Split, typer.Option(help="Split whose texts are read.")] = "train",
    datasets: DatasetsOption = None,
    size: Annotated[int, typer.Option(min=6, help="Most tokens of the vocabulary.")] = 8000,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Learn a WordPiece vocabulary from the texts of your own data."""
    from vlmo.commands.outputs import check_outputs, path_of_data
    from vlmo.data import TextTokenizer, open_data, texts_of, train_wordpiece

    if output.exists() and not force:
        raise FileExistsError(f"output: {output} exists; --force replaces it")
    check_outputs({"output": output}, given={"data": path_of_data(data)})
    opened = open_data(data, task, split, image_size=32, datasets=datasets or None)
    tokenizer = TextTokenizer(train_wordpiece(texts_of(opened), size), 3)
    tokenizer.save_vocabulary(output)
    plain_console().print(
        f"{output}: {tokenizer.vocab_size} tokens, learned from {len(opened)} texts",
        highlight=False,
        soft_wrap=True,
    )
