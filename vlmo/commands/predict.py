"""``vlmo predict``: predictions of a trained model for images and texts."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TextIO

import typer

from vlmo.commands.options import (
    AnswersOption,
    BackendOption,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    VocabularyOption,
    limit_spinning,
    not_finite_exits,
)

if TYPE_CHECKING:
    import numpy as np

    from vlmo.commands.records import Record
    from vlmo.predictor import Predictor

STANDARD = Path("-")  # standard input or output
_CHUNK = 256  # records at a time, whose pictures are in memory


def predict(
    model: ModelArgument,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file; repeat it for a statement about a pair.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="Caption, question or statement; may be repeated.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(
            help="Records of images and texts (.jsonl, .json, .csv, .tsv); - is standard input."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help=".jsonl file to write.", show_default="standard output")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(
            help=".npz file to write the embeddings of images and texts to.", show_default="none"
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Number of answers per question.")] = 1,
    vocabulary: VocabularyOption = None,
    answers: AnswersOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size.")] = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = None,
    backend: BackendOption = None,
) -> None:
    """Predict similarity, match, answers or truth, depending on the heads of the model.

    See docs/prediction.md. Exits with status 1 if an image of a record is unreadable, or if
    outputs are NaN or infinite.
    """
    limit_spinning()
    from vlmo.commands.outputs import check_outputs
    from vlmo.commands.records import given_records, reader
    from vlmo.predictor import Predictor

    images, texts = tuple(image or ()), tuple(text or ())
    if (input is None) == (not images and not texts):
        raise ValueError("input: give either --input, or --image and --text")
    if len(images) > 2:
        raise ValueError(f"image: {len(images)} images are more than two")
    if embeddings is not None and embeddings.suffix != ".npz":
        raise ValueError(f"embeddings: {embeddings} does not end in .npz")
    source, target = (None if path == STANDARD else path for path in (input, output))
    check_outputs(
        {"output": target, "embeddings": embeddings},
        given={"model": model, "input": source, "vocab": vocabulary, "answers": answers},
    )
    for path in images if source is None else ():
        if not path.exists():
            raise FileNotFoundError(f"image: {path} does not exist")

    # Every record is checked before the model is loaded.
    records = (lambda: given_records(images, texts)) if input is None else reader(input)
    kinds = _checked(records())
    if embeddings is not None:
        _check_alike(kinds)
    with not_finite_exits(), warnings.catch_warnings():
        predictor = Predictor.load(
            model,
            vocabulary=vocabulary,
            answers=answers,
            device=device,
            dtype=dtype or "auto",
            backend=backend,
            batch_size=batch_size,
        )
        predicts = embeddings is None or output is not None
        if predicts:
            _check_heads(predictor, kinds)
        found = _Failures()
        warnings.filterwarnings("ignore", message=r".*: the text is blank")  # told already
        if embeddings is not None:
            seen = _seen(predictor, records(), found, tolerant=input is not None)
            _write_embeddings(predictor, seen, embeddings)
        if predicts:
            found = _Failures()
            seen = _seen(predictor, records(), found, tolerant=input is not None)
            _write_predictions(predictor, seen, target, top)
    if found.places:
        found.say()
        raise typer.Exit(1)


@dataclass
class _Failures:
    """Records whose images are unreadable."""

    records: int = 0
    places: dict[str, str] = field(default_factory=dict)  # of the bad ones, with the reasons

    def say(self) -> None:
        """Print the number of unreadable images on standard error."""
        place, reason = next(iter(self.places.items()))
        count = f"{len(self.places)} of {self.records} records"
        print(f"vlmo: {count} have an error, the first is {place}: {reason}", file=sys.stderr)


class _Seen(NamedTuple):
    """A record and its images ``[S, S, 3]`` uint8; or why one of them cannot be read."""

    record: Record
    images: list[np.ndarray]
    error: str | None


def _checked(records: Iterator[Record]) -> dict[tuple[int, bool], str]:
    """The kinds of records there are, with the place of the first of each; all have been read."""
    kinds: dict[tuple[int, bool], str] = {}
    blank: list[str] = []
    for record in records:
        kinds.setdefault(record.kind, record.place)
        if record.text is not None and not record.text.strip():
            blank.append(record.place)
    if blank:
        more = f", and those of {len(blank) - 1} more records" if blank[1:] else ""
        print(f"vlmo: {blank[0]}: the text is blank{more}", file=sys.stderr)
    return kinds


def _seen(
    predictor: Predictor, records: Iterator[Record], found: _Failures, *, tolerant: bool
) -> Iterator[list[_Seen]]:
    """Records with their images, decoded once for all heads, a few at a time.

    An image that cannot be read is noted if ``tolerant``, and ends the command otherwise.
    """
    while chunk := list(itertools.islice(records, _CHUNK)):
        paths = [path for record in chunk for path in record.images]
        images = iter(predictor.read_images(paths))
        seen = []
        for record in chunk:
            own = [next(images) for _ in record.images]
            bad = next((image for image in own if isinstance(image, Exception)), None)
            if bad is not None and not tolerant:
                raise bad
            good = [image for image in own if not isinstance(image, Exception)]
            reason = None if bad is None else _reason(bad)
            seen.append(_Seen(record, good, reason))
            if reason is not None:
                found.places[record.place] = reason
        found.records += len(chunk)
        yield seen


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _write_predictions(
    predictor: Predictor, chunks: Iterator[list[_Seen]], path: Path | None, top: int
) -> None:
    """Write one JSON object for each record: the record with a ``prediction`` or an ``error``.

    A prediction has what the model has a head for: ``similarity`` (cosine), ``match``
    (probability), ``answers`` (with probabilities), and of two images ``true`` (probability).
    """
    with _opened(path) as stream:
        for chunk in chunks:
            for line in _lines(predictor, chunk, top):
                stream.write(f"{line}\n")


def _lines(predictor: Predictor, chunk: list[_Seen], top: int) -> Iterator[str]:
    """The records with their predictions or errors, as JSON."""
    from vlmo.commands.records import to_json

    said = iter(_predict(predictor, [seen for seen in chunk if seen.error is None], top))
    for record, _, error in chunk:
        added = {"prediction": next(said)} if error is None else {"error": error}
        yield to_json(record.given | added)


def _predict(predictor: Predictor, chunk: list[_Seen], top: int) -> list[dict[str, Any]]:
    """The predictions of the model's heads for each record."""
    said: list[dict[str, Any]] = [{} for _ in chunk]
    for count, say in ((1, _say_of_one), (2, _say_of_two)):
        rows = [n for n, seen in enumerate(chunk) if len(seen.images) == count]
        columns = say(predictor, [chunk[n] for n in rows], top) if rows else {}
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                said[row][name] = value
    return said


def _say_of_one(predictor: Predictor, chunk: list[_Seen], top: int) -> dict[str, list[Any]]:
    """The predictions for pairs of an image and a text, one value per record."""
    images, texts = [seen.images[0] for seen in chunk], _texts(chunk)
    columns: dict[str, list[Any]] = {}
    if predictor.has("itc", "irtr"):
        cosines = predictor.embed_images(images) * predictor.embed_texts(texts)
        columns["similarity"] = cosines.sum(1).tolist()
    if predictor.has("itm"):
        columns["match"] = predictor.match(images, texts).tolist()
    if predictor.has("vqa"):
        answers = predictor.answer_all(images, texts, top)
        columns["answers"] = [[answer._asdict() for answer in row] for row in answers]
    return columns


def _say_of_two(predictor: Predictor, chunk: list[_Seen], top: int) -> dict[str, list[Any]]:
    first, second = ([seen.images[n] for seen in chunk] for n in range(2))
    return {"true": predictor.judge(first, second, _texts(chunk)).tolist()}


def _texts(chunk: list[_Seen]) -> list[str]:
    return [seen.record.text for seen in chunk if seen.record.text is not None]


def _check_heads(predictor: Predictor, kinds: dict[tuple[int, bool], str]) -> None:
    wanted = {}
    if predictor.has("itc", "irtr", "itm", "vqa"):
        wanted[1] = "an image and a text"
    if predictor.has("nlvr2"):
        wanted[2] = "two images and a text"
    heads = ", ".join(predictor.model.config.tasks)
    for (images, has_text), place in kinds.items():
        if not has_text or images not in wanted:
            needed = " or ".join(wanted.values()) or "other things"
            raise ValueError(f"{place}: the model's heads ({heads}) need {needed}")


def _check_alike(kinds: dict[tuple[int, bool], str]) -> None:
    for n, ((images, has_text), place) in enumerate(kinds.items()):
        if n or images == 2 or not (images or has_text):
            raise ValueError(f"{place}: embeddings need an image, a text or both in every record")


def _write_embeddings(predictor: Predictor, chunks: Iterator[list[_Seen]], path: Path) -> None:
    """Write arrays ``image`` and ``text``, of which row n belongs to record n.

    A row of zeros stands for an image that cannot be read; an array ``error`` of texts then tells
    which these are.
    """
    import numpy as np

    from vlmo.files import replacing

    with replacing(path) as temporary:
        found: dict[str, list[np.ndarray]] = {"image": [], "text": []}
        errors: list[str] = []
        for chunk in chunks:
            errors += [seen.error or "" for seen in chunk]
            if chunk[0].record.images:
                rows = [n for n, seen in enumerate(chunk) if seen.error is None]
                vectors = np.zeros((len(chunk), predictor.model.config.dim), np.float32)
                vectors[rows] = predictor.embed_images([chunk[n].images[0] for n in rows]).numpy()
                found["image"].append(vectors)
            if chunk[0].record.text is not None:
                found["text"].append(predictor.embed_texts(_texts(chunk)).numpy())
        arrays: dict[str, Any] = {
            name: np.concatenate(parts) for name, parts in found.items() if parts
        }
        if any(errors):
            arrays["error"] = np.array(errors)
        np.savez(temporary, **arrays)


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    from vlmo.files import replacing

    if path is None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # JSON is UTF-8, whatever the locale
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        yield sys.stdout
        return
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as stream,
    ):
        yield stream
