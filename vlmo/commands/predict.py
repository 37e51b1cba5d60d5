"""``vlmo predict``: what a trained model says about images and texts."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from vlmo.commands.outputs import check_outputs
from vlmo.commands.records import STANDARD, Record, given_records, reader, to_json
from vlmo.files import replacing
from vlmo.predictor import Predictor

_CHUNK = 256  # records at a time, whose pictures are in memory


@dataclass(frozen=True)
class Settings:
    """What the command line decides.

    Attributes:
        model: checkpoint or run folder.
        images: of one record: one image, or the two of NLVR2.
        texts: one record each, with the same images.
        input: file of records instead, see :func:`vlmo.commands.records.reader`.
        output: .jsonl file for the predictions; None or "-" for standard output.
        embeddings: .npz file for the unit vectors of the dual encoder; None for none.
        top: answers to each question.
        vocabulary: as of :meth:`vlmo.Predictor.load`, and so are the others.
    """

    model: Path
    images: tuple[Path, ...] = ()
    texts: tuple[str, ...] = ()
    input: Path | None = None
    output: Path | None = None
    embeddings: Path | None = None
    top: int = 1
    vocabulary: Path | None = None
    answers: Path | None = None
    batch_size: int = 64
    device: str = "auto"
    dtype: str = "auto"
    backend: str | None = None


@dataclass
class _Failures:
    """Records whose images cannot be read."""

    records: int = 0
    places: dict[str, str] = field(default_factory=dict)  # of the bad ones, with the reasons

    def say(self) -> None:
        """On standard error, in one line."""
        place, reason = next(iter(self.places.items()))
        count = f"{len(self.places)} of {self.records} records"
        print(f"vlmo: {count} have an error, the first is {place}: {reason}", file=sys.stderr)


class _Seen(NamedTuple):
    """A record and its images ``[S, S, 3]`` uint8; or why one of them cannot be read."""

    record: Record
    images: list[np.ndarray]
    error: str | None


def run(settings: Settings) -> int:
    """Write embeddings, if they are asked for, and predictions, unless only embeddings are.

    Every record is checked before the model is loaded. A prediction is one JSON object: the record,
    and under ``prediction`` what the model has a head for: ``similarity`` (cosine), ``match``
    (probability), ``answers`` (with probabilities), and of two images ``true`` (probability). A
    record of a file whose image cannot be read has an ``error`` instead. Embeddings are arrays
    ``image`` and ``text``, of which row n belongs to record n; their records may be images or texts
    alone. A row of zeros stands for an image that cannot be read; an array ``error`` of texts then
    tells which these are.

    Returns:
        The number of records whose images cannot be read, which standard error tells as well.

    Raises:
        ValueError: records that say too little, or as :class:`vlmo.Predictor`.
        FloatingPointError: the model's outputs are NaN or infinite.
        OSError: a file cannot be read or written.
    """
    records = _records(settings)
    kinds = _checked(records())
    if settings.embeddings is not None:
        _check_alike(kinds)
    predictor = Predictor.load(
        settings.model,
        vocabulary=settings.vocabulary,
        answers=settings.answers,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
        batch_size=settings.batch_size,
    )
    predicts = settings.embeddings is None or settings.output is not None
    if predicts:
        _check_heads(predictor, kinds)
    found = _Failures()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*: the text is blank")  # told already
        if settings.embeddings is not None:
            with replacing(settings.embeddings) as temporary:
                arrays: dict[str, Any] = _embed(
                    predictor, _seen(predictor, records(), settings, found)
                )
                np.savez(temporary, **arrays)
        if predicts:
            found = _Failures()
            with _opened(settings.output) as stream:
                for chunk in _seen(predictor, records(), settings, found):
                    for line in _lines(predictor, chunk, settings.top):
                        stream.write(f"{line}\n")
    if found.places:
        found.say()
    return len(found.places)


def _records(settings: Settings) -> Callable[[], Iterator[Record]]:
    """What gives the records, as often as it is called; everything but them is checked."""
    if (settings.input is None) == (not settings.images and not settings.texts):
        raise ValueError("input: give either --input, or --image and --text")
    if len(settings.images) > 2:
        raise ValueError(f"image: {len(settings.images)} images are more than two")
    if settings.embeddings is not None and settings.embeddings.suffix != ".npz":
        raise ValueError(f"embeddings: {settings.embeddings} does not end in .npz")
    files = {
        name: None if path == STANDARD else path
        for name, path in (("input", settings.input), ("output", settings.output))
    }
    check_outputs(
        {"output": files["output"], "embeddings": settings.embeddings},
        given={
            "model": settings.model,
            "input": files["input"],
            "vocab": settings.vocabulary,
            "answers": settings.answers,
        },
    )
    if files["input"] is None:
        for image in settings.images:
            if not image.exists():
                raise FileNotFoundError(f"image: {image} does not exist")
    if settings.input is not None:
        return reader(settings.input)
    return lambda: given_records(settings.images, settings.texts)


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
    predictor: Predictor, records: Iterator[Record], settings: Settings, found: _Failures
) -> Iterator[list[_Seen]]:
    """Records with their images, decoded once for all heads, a few at a time."""
    while chunk := list(itertools.islice(records, _CHUNK)):
        paths = [path for record in chunk for path in record.images]
        images = iter(predictor.read_images(paths))
        seen = []
        for record in chunk:
            own = [next(images) for _ in record.images]
            bad = next((image for image in own if isinstance(image, Exception)), None)
            if bad is not None and settings.input is None:
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


def _lines(predictor: Predictor, chunk: list[_Seen], top: int) -> Iterator[str]:
    """The records with their predictions or errors, as JSON."""
    said = iter(_predict(predictor, [seen for seen in chunk if seen.error is None], top))
    for record, _, error in chunk:
        added = {"prediction": next(said)} if error is None else {"error": error}
        yield to_json(record.given | added)


def _predict(predictor: Predictor, chunk: list[_Seen], top: int) -> list[dict[str, Any]]:
    """What the heads of the model say about each record."""
    said: list[dict[str, Any]] = [{} for _ in chunk]
    for count, say in ((1, _say_of_one), (2, _say_of_two)):
        rows = [n for n, seen in enumerate(chunk) if len(seen.images) == count]
        columns = say(predictor, [chunk[n] for n in rows], top) if rows else {}
        for name, values in columns.items():
            for row, value in zip(rows, values, strict=True):
                said[row][name] = value
    return said


def _say_of_one(predictor: Predictor, chunk: list[_Seen], top: int) -> dict[str, list[Any]]:
    """What is said of one image and a text, one value for each record."""
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


def _embed(predictor: Predictor, chunks: Iterator[list[_Seen]]) -> dict[str, np.ndarray]:
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
    arrays = {name: np.concatenate(parts) for name, parts in found.items() if parts}
    return arrays | ({"error": np.array(errors)} if any(errors) else {})


@contextlib.contextmanager
def _opened(path: Path | None) -> Iterator[TextIO]:
    if path is None or path == STANDARD:
        if isinstance(sys.stdout, io.TextIOWrapper):  # JSON is UTF-8, whatever the locale
            sys.stdout.reconfigure(encoding="utf-8", newline="\n")
        yield sys.stdout
        return
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as stream,
    ):
        yield stream
