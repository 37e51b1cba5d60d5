"""``vlmo demo``: check the kernels, train a small VLMo on digit scenes, search pictures with it.

The demo is also a test: :func:`run` returns what failed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vlmo import VLMo
from vlmo.data import DigitScenes, TextTokenizer, digit_tokenizer, retrieval_gallery
from vlmo.demo.figures import draw_losses, draw_retrieval
from vlmo.device import autocast_dtype, chosen_device, require_backend, show_machine
from vlmo.files import write_json
from vlmo.kernels import use_backend
from vlmo.kernels.target import devices
from vlmo.run_folder import load_model
from vlmo.tasks.retrieval import (
    Embeddings,
    Gallery,
    Recall,
    Shortlist,
    Shortlists,
    chance,
    encode,
    recall_at,
    rerank,
    shortlist,
)
from vlmo.testing import Parity, check_backends
from vlmo.training import Settings as TrainingSettings
from vlmo.training import train
from vlmo.training.logs import TABLE, read_table
from vlmo.training.recipes import recipe

RECIPE = recipe("digits_demo")
GALLERY = 256
CANDIDATES = 16
SCALES = (1.0, 2.0, 4.0)  # candidates for the cosine's weight, times the temperature
FARTHER_THAN_CHANCE = 5  # multiple of chance level that recall must reach
SHOWN, SHOWN_WRONG = 2, 4  # first queries in the figure, and first errors of the dual encoder


@dataclass(frozen=True)
class Settings:
    """The options of the command line.

    Attributes:
        output: folder for the results; created if missing.
        seed: determines data, weights and training.
        device: "auto", "cpu" or "cuda".
        backend: backend of every operation; None for the first that can run.
        steps: number of training steps instead of the recipe's; the model is then not checked.
    """

    output: Path
    seed: int = 0
    device: str = "auto"
    backend: str | None = None
    steps: int | None = None


def run(settings: Settings, console: Console) -> list[str]:
    """Run the whole demo; returns one sentence for each check that failed.

    Raises:
        ValueError: the device or the backend does not exist.
        NotImplementedError: the requested backend cannot run here.
        OSError: the output folder cannot be created or written.
        ImportError: an extra of ``vlmo[demo]`` is missing.
    """
    device = chosen_device(settings.device)
    require_backend(settings.backend, device, autocast_dtype(device))
    settings.output.mkdir(parents=True, exist_ok=True)
    console.rule("This machine")
    show_machine(console)
    with use_backend(settings.backend):
        console.rule("Kernels against float64")
        failures = _check_kernels(settings, device, console)
        console.rule("Training")
        model, tokenizer = _train(settings, console)
        model.to(device)
        console.rule("Retrieval on held-out pictures")
        failures += _search(model, tokenizer, settings, console)
    for failure in failures:
        console.print(f"[bold red]FAILED[/] {escape(failure)}")
    if not failures and settings.steps is None:
        console.print("[bold green]All checks passed.[/]")
    return failures


def _check_kernels(settings: Settings, device: torch.device, console: Console) -> list[str]:
    # Everything that this machine can run, unless the user has restricted it.
    where = devices() if settings.device == "auto" else [device]
    rows = list(check_backends(where, backend=settings.backend, seed=settings.seed))
    table = Table(
        box=box.SIMPLE_HEAD,
        # Show all columns on a terminal of 80 characters.
        padding=0,
        show_edge=False,
        caption="Largest errors against float64; for gradients, of the one nearest to its limit.",
        caption_justify="left",
    )
    for column in ("operation", "backend", "device", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("output\nerror", "\neager", "gradient\nerror", "\neager", "\nok"):
        table.add_column(column, no_wrap=True, justify="right")
    for row in rows:
        errors = (
            value
            for worst in (row.output, row.worst_gradient)
            for value in (worst.actual, worst.eager)
        )
        table.add_row(
            row.operation,
            row.backend,
            str(row.device),
            str(row.dtype).removeprefix("torch."),
            *(f"{value:.1e}" for value in errors),
            "[green]yes[/]" if row.ok else "[bold red]NO[/]",
        )
    console.print(table)
    return [_inexact(row) for row in rows if not row.ok]


def _inexact(row: Parity) -> str:
    worst = row.output if not row.output.ok else row.worst_gradient
    return (
        f"{row.operation} on {row.backend}, {row.device}, {row.dtype}: error {worst.actual:.2e} of "
        f"{worst.name} exceeds {worst.allowed:.2e}."
    )


def _train(settings: Settings, console: Console) -> tuple[VLMo, TextTokenizer]:
    """Train a model with the recipe; an interrupted training is resumed."""
    steps = settings.steps or RECIPE.total_steps(0)
    chosen = RECIPE.replace(steps=steps)
    folder = settings.output / f"run-{steps}-steps-seed-{settings.seed}"
    train(
        TrainingSettings(
            chosen,
            data="digits",
            output=folder,
            seed=settings.seed,
            device=settings.device,
            backend=settings.backend,
            log_every=max(1, steps // 100),
            evaluate_every=0,
            board=False,
        ),
        console,
    )
    columns, rows = read_table(folder / TABLE)
    losses = [{name: float(row[name]) for name in columns if row[name]} for row in rows]
    draw_losses(settings.output / "loss.png", losses)
    console.print(f"losses, mean of the last tenth of the steps: {_summary(losses)}")
    return load_model(folder).model, digit_tokenizer(chosen.text_length)


def _summary(rows: Sequence[Mapping[str, float]]) -> str:
    tail = rows[-max(1, len(rows) // 10) :]
    names = [name for name in tail[-1] if name.endswith("_loss")]
    means = {name: sum(row[name] for row in tail) / len(tail) for name in names}
    return ", ".join(f"{name.removesuffix('_loss')} {mean:.3f}" for name, mean in means.items())


def _search(
    model: VLMo, tokenizer: TextTokenizer, settings: Settings, console: Console
) -> list[str]:
    pairs, gallery = _gallery("test", tokenizer, settings.seed)
    _, held_out = _gallery("val", tokenizer, settings.seed)
    scale = _choose_scale(model, held_out)
    embeddings, candidates, reranked = _ranked(model, gallery, scale)
    console.print(f"Weight of the cosine beside the matching logit, by the val split: {scale:.0f}")
    guess = chance(gallery.image_of_text, GALLERY)
    dual = recall_at(embeddings, gallery.image_of_text)
    fused = recall_at(reranked, gallery.image_of_text)
    console.print(_recall_table(guess, dual, fused))
    failures = [] if settings.steps is not None else judge(guess, dual, fused)
    if settings.steps is not None:
        console.print("[yellow]--steps was given: the recall above is not judged.[/]")
    captions = [pairs.text(row) for row in range(GALLERY)]
    recalls = (guess, dual, fused)
    _write_results(settings, captions, gallery, candidates, reranked, scale, recalls, failures)
    told = f"written to {settings.output}: " + ", ".join(_RESULTS)
    console.print(told, markup=False)
    return failures


def _gallery(split: str, tokenizer: TextTokenizer, seed: int) -> tuple[DigitScenes, Gallery]:
    pairs = retrieval_gallery(split, GALLERY, seed=seed)
    texts = tokenizer.encode([pairs.text(row) for row in range(GALLERY)])
    images, image_of_text = pairs.images(range(GALLERY)), torch.arange(GALLERY)
    gallery = Gallery(images=images, image_of_text=image_of_text, **texts)
    return pairs, gallery


def _ranked(
    model: VLMo, gallery: Gallery, scale: float
) -> tuple[Embeddings, Shortlists, Shortlists]:
    """Embeddings, the candidates of the dual encoder, and the re-ranked candidates."""
    # As in training, so that a backend requested by name gets the dtype that it was checked for.
    dtype = autocast_dtype(next(model.parameters()).device)
    embeddings = encode(model, gallery, autocast=dtype)
    candidates = shortlist(embeddings, CANDIDATES)
    reranked = rerank(model, gallery, candidates, scale=scale, batch_size=512, autocast=dtype)
    return embeddings, candidates, reranked


def _choose_scale(model: VLMo, gallery: Gallery) -> float:
    """Choose the weight of the cosine relative to the matching logit that is best on ``gallery``.

    At the temperature of the contrastive loss both are log-odds, but the calibration of the
    matching head differs between trainings.
    """
    _, candidates, matched = _ranked(model, gallery, scale=0.0)
    temperature = float(model.logit_scale.detach().exp())

    def recalled(scale: float) -> float:
        fused = (
            Shortlist(logits.rows, logits.scores + scale * cosines.scores)
            for logits, cosines in zip(matched, candidates, strict=True)
        )
        return recall_at(Shortlists(*fused), gallery.image_of_text).mean

    return max((factor * temperature for factor in SCALES), key=recalled)


_RESULTS = ("retrieval.png", "retrieval.json", "loss.png")


def judge(guess: Recall, dual: Recall, fused: Recall) -> list[str]:
    """One sentence for each result that is below its threshold; empty if all are good."""
    failures = []
    for name, recall in (("dual encoder", dual), ("fusion encoder", fused)):
        for direction, found, by_chance in (
            ("text to image", recall.image[1], guess.image[1]),
            ("image to text", recall.text[1], guess.text[1]),
        ):
            if not found >= FARTHER_THAN_CHANCE * by_chance:
                failures.append(
                    f"R@1 of the {name}, {direction}, is {found:.1%}, less than "
                    f"{FARTHER_THAN_CHANCE} times chance ({by_chance:.1%})."
                )
    if fused.mean < dual.mean:
        failures.append(
            f"Re-ranking lowers the mean recall from {dual.mean:.1%} to {fused.mean:.1%}."
        )
    return failures


def _recall_table(guess: Recall, dual: Recall, fused: Recall) -> Table:
    table = Table(
        title=f"Recall among {GALLERY} pairs, in percent", title_justify="left", box=box.SIMPLE_HEAD
    )
    for column in ("find", "by"):
        table.add_column(column)
    for k in guess.image:
        table.add_column(f"R@{k}", justify="right")
    methods = {
        "chance": guess,
        "dual encoder": dual,
        f"top {CANDIDATES} re-ranked": fused,
    }
    for title, direction in (("the image of a text", "image"), ("the text of an image", "text")):
        table.add_section()
        for n, (name, recall) in enumerate(methods.items()):
            values = (f"{100 * value:.1f}" for value in getattr(recall, direction).values())
            table.add_row("" if n else title, name, *values)
    return table


def _write_results(
    settings: Settings,
    captions: Sequence[str],
    gallery: Gallery,
    candidates: Shortlists,
    reranked: Shortlists,
    scale: float,
    recalls: tuple[Recall, Recall, Recall],
    failures: Sequence[str],
) -> None:
    draw_retrieval(
        settings.output / "retrieval.png",
        captions,
        gallery.images[:, 0],
        candidates.image,
        reranked.image,
        queries=_shown(candidates.image),
    )
    named = dict(zip(("chance", "dual_encoder", "reranked"), recalls, strict=True))
    metrics = {
        "settings": asdict(settings) | {"output": os.fspath(settings.output)},
        "recall": {
            name: {"text_to_image": recall.image, "image_to_text": recall.text}
            for name, recall in named.items()
        },
        "candidates": CANDIDATES,
        "cosine_weight": scale,
        "gallery": GALLERY,
        "judged": settings.steps is None,
        "failures": list(failures),
    }
    write_json(settings.output / "retrieval.json", metrics)


def _shown(candidates: Shortlist) -> list[int]:
    """The first queries, and the first of the others whose top-ranked image is wrong."""
    best = candidates.best(1)[:, 0].cpu()
    wrong = (best != torch.arange(len(best))).nonzero()[:, 0].tolist()
    return [*range(SHOWN), *[query for query in wrong if query >= SHOWN][:SHOWN_WRONG]]
