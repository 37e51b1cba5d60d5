"""``vlmo vocab``: train a WordPiece vocabulary on the texts of a data source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlmo.commands.options import DataArgument, DatasetsOption, Split, Task, plain_console


def vocab(
    data: DataArgument,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("vocab.txt"),
    task: Annotated[Task, typer.Option(help="Task to open the data for.")] = ("pretrain"),
    split: Annotated[Split, typer.Option(help="Split whose texts are used.")] = "train",
    datasets: DatasetsOption = None,
    size: Annotated[
        int, typer.Option(min=6, help="Maximum number of tokens in the vocabulary.")
    ] = 8000,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Train a WordPiece vocabulary on the texts of your own data."""
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
