"""All stages and tasks on digit scenes: what the paper's ablations show, in small.

    python benchmarks/digit_tasks.py WORK_FOLDER [--only beit3]

Pre-trains and fine-tunes a model of half a million parameters by the digit recipes of
vlmo.training.recipes, with three seeds, and writes benchmarks/results/digits.{json,md,png}: shared
against separate attention (Table 1 of the supplement), the dual encoder against re-ranking (its
Table 2), image-text contrast alone against all three losses, and VLMo beside BEiT-3. Runs are kept
in WORK_FOLDER, and the same command continues after an interruption. With --only, the runs of one
variant replace those in digits.json, and the others stay as they are there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
CANDIDATES = 32  # of Table 2
COMMAND = "python benchmarks/digit_tasks.py"


class Run(NamedTuple):
    """A training run.

    Attributes:
        variant: variant of the pre-training: "all", "separate" or "itc"; or "beit3", which has
            none.
        recipe: name of a recipe in vlmo.training.recipes.
        seed: seed of all random numbers.
    """

    variant: str
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.recipe}-{self.seed}"


VARIANTS: dict[str, dict[str, Any]] = {
    "all": {},
    "separate": {"separate_attention": True},
    "itc": {"losses": ("itc",)},
    "beit3": {},
}
TUNED = {
    "all": ("digits_retrieval", "digits_rerank", "digits_vqa", "digits_nlvr2"),
    "separate": ("digits_retrieval", "digits_nlvr2"),
    "itc": ("digits_nlvr2",),
}
Row = tuple[str, str, str, tuple[str, ...]]  # label, variant, recipe, metrics
# Title, corresponding result of the paper, rows.
TABLES: list[tuple[str, str, list[Row]]] = [
    (
        "All tasks from one pre-training",
        "Base in the paper: VQA 76.64 (test-dev), NLVR2 83.34 (test-P), Flickr30k TR@1 92.3 and "
        "IR@1 79.3.",
        [
            ("visual questions", "all", "digits_vqa", ("vqa_score",)),
            ("statements on two images", "all", "digits_nlvr2", ("accuracy",)),
            ("retrieval, dual encoder", "all", "digits_retrieval", ("tr@1", "ir@1")),
        ],
    ),
    (
        "Shared against separate attention (supplement, Table 1)",
        "Paper, shared against separate: NLVR2 test-P 80.31 and 78.95; Flickr30k TR 95.17 and "
        "94.63, IR 87.25 and 86.88.",
        [
            (label, variant, recipe, metrics)
            for recipe, metrics in (
                ("digits_nlvr2", ("accuracy",)),
                ("digits_retrieval", ("tr@1", "ir@1")),
            )
            for label, variant in (("shared", "all"), ("separate", "separate"))
        ],
    ),
    (
        "Dual encoder against re-ranking (supplement, Table 2)",
        "Paper, large on Flickr30k: TR@1 95.3 and IR@1 84.5 of the dual encoder, 97.7 and 87.8 "
        "re-ranked.",
        [
            ("dual encoder", "all", "digits_rerank", ("tr@1", "ir@1")),
            ("re-ranked", "all", "digits_rerank", ("reranked_tr@1", "reranked_ir@1")),
        ],
    ),
    (
        "Losses of pre-training",
        "Paper, NLVR2 test-P: 73.75 after ITC alone, 80.31 after ITC, ITM and MLM.",
        [
            ("ITC alone", "itc", "digits_nlvr2", ("accuracy",)),
            ("ITC + ITM + MLM", "all", "digits_nlvr2", ("accuracy",)),
        ],
    ),
    (
        "VLMo and BEiT-3",
        "Published base models, VLMo and BEiT-3 (unilm): VQA 76.64 and 77.65 (test-dev), Flickr30k "
        "TR@1 92.3 and 96.3, IR@1 79.3 and 86.2. The recipes here differ in more than the model: "
        "VLMo is pre-trained, and then fine-tuned on each task; BEiT-3 is trained on retrieval "
        "from random weights, and then fine-tuned on questions.",
        [
            (model, variant, f"{prefix}_{task}", metrics)
            for task, metrics in (("vqa", ("vqa_score",)), ("retrieval", ("tr@1", "ir@1")))
            for model, variant, prefix in (
                ("VLMo", "all", "digits"),
                ("BEiT-3", "beit3", "digits_beit3"),
            )
        ],
    ),
]
TITLES = {
    "vqa_score": "VQA",
    "accuracy": "NLVR2",
    "tr@1": "TR@1",
    "ir@1": "IR@1",
    "reranked_tr@1": "TR@1",
    "reranked_ir@1": "IR@1",
}


def origin(run: Run) -> Run | None:
    """The run whose weights another run starts from; None if it starts from random ones."""
    if run.recipe in ("digits_textmlm", "digits_beit3_retrieval"):
        return None
    if run.variant == "beit3":
        return run._replace(recipe="digits_beit3_retrieval")
    if run.recipe != "digits_pretrain":
        return run._replace(recipe="digits_pretrain")
    # The losses of pre-training do not affect earlier stages.
    return Run("separate" if run.variant == "separate" else "all", "digits_textmlm", run.seed)


def train(run: Run, work: Path) -> dict[str, Any]:
    """Train and evaluate on the test split; results that already exist are read."""
    import torch
    from rich.console import Console

    from vlmo.data import digit_tokenizer, open_data
    from vlmo.files import write_json
    from vlmo.run_folder import load_model
    from vlmo.tasks.evaluation import evaluate
    from vlmo.training import Settings
    from vlmo.training import train as train_by
    from vlmo.training.recipes import recipe

    folder = work / run.name
    record = folder / "test.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    pretrains = run.recipe == "digits_pretrain"
    changes = VARIANTS[run.variant]
    if not pretrains:
        changes = {name: value for name, value in changes.items() if name != "losses"}
    chosen = recipe(run.recipe).replace(**changes)
    start_from = origin(run)
    settings = Settings(
        recipe=chosen,
        data="digits",
        output=folder,
        initial=None if start_from is None else work / start_from.name,
        seed=run.seed,
        board=False,
    )
    start = time.perf_counter()
    train_by(settings, Console(quiet=True))
    seconds = time.perf_counter() - start
    tokenizer = digit_tokenizer(chosen.text_length)
    metrics = evaluate(
        load_model(folder).model,
        open_data("digits", chosen.stage, "test", image_size=chosen.image_size),
        tokenizer,
        chosen.stage,
        rerank=CANDIDATES if run.recipe == "digits_rerank" else 0,
    )
    result = {**run._asdict(), "seconds": seconds, "metrics": metrics}
    write_json(record, result)
    print(run.name, f"{seconds:.0f} s", {k: round(v, 4) for k, v in metrics.items()}, flush=True)
    return result


def stages() -> Iterator[list[Run]]:
    """Groups of independent runs; each group depends on the one before."""
    groups: list[dict[str, tuple[str, ...]]] = [
        {"all": ("digits_textmlm",), "separate": ("digits_textmlm",)},
        dict.fromkeys(TUNED, ("digits_pretrain",)),
        TUNED,
        {"beit3": ("digits_beit3_retrieval",)},
        {"beit3": ("digits_beit3_vqa",)},
    ]
    for group in groups:
        yield [
            Run(variant, name, seed)
            for variant, names in group.items()
            for name in names
            for seed in SEEDS
        ]


def spread(results: list[dict[str, Any]], row: Row, metric: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds, in percent."""
    _, variant, recipe, _ = row
    values = [
        100 * result["metrics"][metric]
        for result in results
        if (result["variant"], result["recipe"]) == (variant, recipe)
    ]
    return statistics.mean(values), statistics.stdev(values)


def report(results: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    minutes = sum(result["seconds"] for result in results) / 60
    seeds = ", ".join(map(str, SEEDS))
    lines = [
        "# All stages and tasks on digit scenes",
        "",
        f"`{COMMAND} WORK_FOLDER` wrote this from {len(results)} trainings on one CPU core "
        f"each, {minutes:.0f} minutes in all. Percent on the test split, mean and standard "
        f"deviation over the seeds {seeds}; chance is 50 for statements (NLVR2) and 0.4 for TR@1 "
        "and IR@1. Scenes and recipes are ours and small (docs/data.md, `vlmo recipes`): the "
        "paper's numbers stand beside them for the direction of an effect, not for its size.",
        "",
    ]
    for title, paper, rows in TABLES:
        names = list(dict.fromkeys(TITLES[metric] for row in rows for metric in row[3]))
        lines += [
            f"## {title}",
            "",
            "| | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        merged: dict[str, dict[str, str]] = {}
        for row in rows:
            for metric in row[3]:
                mean, deviation = spread(results, row, metric)
                merged.setdefault(row[0], {})[TITLES[metric]] = f"{mean:.1f} +- {deviation:.1f}"
        lines += [
            f"| {label} | " + " | ".join(found.get(name, "") for name in names) + " |"
            for label, found in merged.items()
        ]
        lines += ["", paper, ""]
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Each comparison as bars with every seed as a dot."""
    from vlmo.plotting import pyplot, save_figure

    figure, axes = pyplot().subplots(1, len(TABLES), figsize=(3.3 * len(TABLES), 3.6), sharey=True)
    colours = ("#1f77b4", "#d62728", "#2ca02c")
    for axis, (title, _, rows) in zip(axes, TABLES, strict=True):
        bars = [(row, metric) for row in rows for metric in row[3]]
        labels = list(dict.fromkeys(row[0] for row, _ in bars))
        for place, (row, metric) in enumerate(bars):
            mean, _ = spread(results, row, metric)
            values = [
                100 * result["metrics"][metric]
                for result in results
                if (result["variant"], result["recipe"]) == row[1:3]
            ]
            axis.bar(place, mean, color=colours[labels.index(row[0])], alpha=0.6, width=0.8)
            axis.plot([place] * len(values), values, ".", color="black", markersize=4)
        axis.set_xticks(
            range(len(bars)),
            [f"{row[0]}\n{TITLES[metric]}" for row, metric in bars],
            fontsize=7,
            rotation=60,
            ha="right",
            rotation_mode="anchor",
        )
        axis.set_title(title.split(" (")[0], fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("percent of the test split, from 40")
    axes[0].set_ylim(40, 100)
    save_figure(figure, path, dpi=130, bbox_inches="tight")


def kept(path: Path, only: str | None, versions: dict[str, str]) -> list[dict[str, Any]]:
    """The runs of a record that stay if only one variant is run.

    Raises:
        ValueError: they are of other versions of the software, so a page would compare both.
    """
    if only is None:
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["versions"] != versions:
        raise ValueError(f"{path}: its runs are of {record['versions']}, not {versions}: run all")
    return [run for run in record["runs"] if run["variant"] != only]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder of the runs; it may hold some already")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    # The others share runs that they start from.
    parser.add_argument("--only", choices=["beit3"], help="variant to run; others stay as they are")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from vlmo.device import versions
    from vlmo.files import replacing, write_json

    results = kept(RESULTS / "digits.json", arguments.only, versions())
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for runs in stages():
            chosen = [run for run in runs if arguments.only in (None, run.variant)]
            futures = [pool.submit(train, run, arguments.work) for run in chosen]
            results += [future.result() for future in futures]
    record = {"command": COMMAND, "versions": versions(), "runs": results}
    write_json(RESULTS / "digits.json", record)
    with replacing(RESULTS / "digits.md") as temporary:
        temporary.write_text(report(results), encoding="utf-8")
    draw(results, RESULTS / "digits.png")
    print(report(results))


if __name__ == "__main__":
    main()
