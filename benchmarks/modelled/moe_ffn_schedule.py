"""Model, not a measurement: how well moe_ffn's launches fill a GPU, compared with a loop of GEMMs.

    python benchmarks/modelled/moe_ffn_schedule.py

writes ``benchmarks/results/moe_ffn_schedule.md`` and ``.json``. No GPU is needed.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from schedule import Banded, Split, in_waves, replay_split
from vlmo.files import replacing
from vlmo.kernels.moe_ffn.schedule import TILE_OVERHEAD, choose_band, replay

MULTIPROCESSORS = 132  # H100 SXM, with one program on each
SIZES = {"base": (768, 3072), "large": (1024, 4096)}  # D, F
TOKENS = {"8k": 8192, "32k": 32768, "128k": 131072}
SPLITS = {"40:197": (40, 197), "50:50": (50, 50), "5:55:40": (5, 55, 40)}

ROWS, COLUMNS, DEPTH = 128, 256, 64  # of a tile, and of one step of its main loop
LOOP_COLUMNS = (256, 192, 128)  # tile widths from which the loop chooses for each product
OVERHEAD = TILE_OVERHEAD

RESULTS = Path(__file__).parent.parent / "results"

Product = tuple[int, int, int]  # rows, columns, depth of a matrix product


class Used(NamedTuple):
    """Fraction of the multiprocessors' time spent in main loops on actual rows."""

    ours: float
    loop: float  # all launches with our tile
    best_loop: float  # each launch with its best tile


class Row(NamedTuple):
    """A line of the table."""

    kernel: str
    size: str
    tokens: str
    split: str
    band: int | None  # row tiles per band; None without bands
    ideal: Used  # without overhead per tile
    usual: Used  # with OVERHEAD
    speedup: float  # over the best loop, with OVERHEAD


class Contest(NamedTuple):
    """Makespans of our launch, without and with overhead, and the products of the loop."""

    band: int | None
    ideal: float
    usual: float
    products: list[Product]


def model() -> list[Row]:
    """All rows of the table."""
    return [
        Row(kernel, size, tokens, split, *compare(*contest(*SIZES[size], counts)))
        for kernel, contest in (("forward", forward), ("weight gradients", weight_gradients))
        for size in SIZES
        for tokens in TOKENS
        for split in SPLITS
        if (counts := divide(TOKENS[tokens], SPLITS[split]))
    ]


def divide(tokens: int, split: Sequence[int]) -> list[int]:
    """Number of tokens of each expert."""
    ends = [round(tokens * sum(split[:i]) / sum(split)) for i in range(len(split) + 1)]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def forward(dim: int, hidden: int, counts: Sequence[int]) -> Contest:
    tiles = sum(-(-count // ROWS) for count in counts)
    tasks = -(-hidden // COLUMNS), -(-dim // COLUMNS)

    def costs(overhead: int) -> tuple[int, int]:
        return -(-dim // DEPTH) + overhead, -(-hidden // DEPTH) + overhead

    schedule = Banded(tiles, choose_band(tiles, tasks, MULTIPROCESSORS, costs(OVERHEAD)), tasks)
    ideal, usual = (replay(schedule, MULTIPROCESSORS, costs(o)).makespan for o in (0, OVERHEAD))
    products = [p for count in counts for p in ((count, hidden, dim), (count, dim, hidden))]
    return Contest(schedule.band, ideal, usual, products)


def weight_gradients(dim: int, hidden: int, counts: Sequence[int]) -> Contest:
    tiles = tiles_of((hidden, dim, 0), COLUMNS) + tiles_of((dim, hidden, 0), COLUMNS)
    steps = tuple(-(-count // DEPTH) for count in counts)
    split = Split((tiles,) * len(counts), steps, MULTIPROCESSORS)
    ideal, usual = (replay_split(split, o, addition=o).makespan for o in (0, OVERHEAD))
    products = [p for count in counts for p in ((hidden, dim, count), (dim, hidden, count))]
    return Contest(None, ideal, usual, products)


def compare(
    band: int | None, ideal: float, usual: float, products: list[Product]
) -> tuple[int | None, Used, Used, float]:
    """The figures of a row, from a contest."""
    steps = sum(m * n * k for m, n, k in products) / (ROWS * COLUMNS * DEPTH)
    used = []
    for ours, overhead in ((ideal, 0), (usual, OVERHEAD)):
        loop = loop_makespan(products, (COLUMNS,), overhead)
        best = loop_makespan(products, LOOP_COLUMNS, overhead)
        used.append(Used(*(steps / (MULTIPROCESSORS * time) for time in (ours, loop, best))))
    best_case, usual_case = used
    return band, best_case, usual_case, usual_case.ours / usual_case.best_loop


def loop_makespan(products: list[Product], choices: Sequence[int], overhead: int) -> float:
    """Makespan of consecutive launches, each with the best of some tile widths.

    In favour of the loop, a narrower tile has the full rate and a proportionally smaller overhead.
    """
    return sum(
        min(
            in_waves(
                [(tiles_of(p, columns), (-(-p[2] // DEPTH) + overhead) * columns / COLUMNS)],
                MULTIPROCESSORS,
            )
            for columns in choices
        )
        for p in products
    )


def tiles_of(product: Product, columns: int) -> int:
    return -(-product[0] // ROWS) * -(-product[1] // columns)


_TILES = ", ".join(f"{ROWS} x {columns}" for columns in LOOP_COLUMNS)
INTRODUCTION = f"""\
# How well moe_ffn's launches fill a GPU: MODELLED

No GPU was involved. `python benchmarks/modelled/moe_ffn_schedule.py` replays the ticket order of
the kernels (`kernels/moe_ffn/schedule.py`) on {MULTIPROCESSORS} multiprocessors, one program on
each. Tiles are ideal: each step of a main loop, {ROWS} x {COLUMNS} x {DEPTH}, takes as long as any
other; memory and launches cost nothing. A program takes a ticket when it is done with its last one.

The percentages are main-loop steps of real rows / (multiprocessors x makespan). Rows that pad an
expert's last tile, waits, idle time and the overhead of tiles all count as waste. The first number
is without overhead: the fraction of what the tile allows. In the second, starting and ending a tile
or a piece of one costs {OVERHEAD} steps, and so does adding a partial tile: 100 % is out of reach.

- one launch: `moe_ffn`, with the band (in row tiles) that the launcher chooses.
- loop: a launch for each product of each expert, one after the other, with the same tile.
- best loop: each of these launches with the best of the tiles {_TILES}.
  Narrow tiles are granted the full rate, and an overhead that shrinks with them. No sum is split.
- faster: the best loop's time / ours, with overhead.

Not modelled: norms, which both need; the loop's own pass for the activation and the gaps between
its launches; sums for biases. The backward by rows has the same products as the forward, if the
pre-activation was saved, and with them the forward's figures.
"""


def markdown(rows: Sequence[Row]) -> str:
    return "\n".join([INTRODUCTION, *_lines(rows)])


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    for kernel in dict.fromkeys(row.kernel for row in rows):
        yield f"## {kernel.capitalize()}\n"
        yield "| size | tokens | split | band | one launch | loop | best loop | faster |"
        yield "|---|---|---|---|---|---|---|---|"
        for row in (row for row in rows if row.kernel == kernel):
            fractions = (
                f"{100 * ideal:.1f} / {100 * usual:.1f} %"
                for ideal, usual in zip(row.ideal, row.usual, strict=True)
            )
            band = "" if row.band is None else str(row.band)
            cells = row.size, row.tokens, row.split, band, *fractions, f"{row.speedup:.2f} x"
            yield f"| {' | '.join(cells)} |"
        yield ""


def as_json(rows: Sequence[Row]) -> str:
    table = [
        row._asdict()
        | {name: _rounded(getattr(row, name)._asdict()) for name in ("ideal", "usual")}
        | {"speedup": round(row.speedup, 4)}
        for row in rows
    ]
    constants = {
        "multiprocessors": MULTIPROCESSORS,
        "tile": [ROWS, COLUMNS, DEPTH],
        "loop_columns": LOOP_COLUMNS,
        "overhead": OVERHEAD,
    }
    return json.dumps({"kind": "modelled", **constants, "rows": table}, indent=1) + "\n"


def _rounded(fractions: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in fractions.items()}


def main() -> None:
    rows = model()
    RESULTS.mkdir(exist_ok=True)
    for suffix, text in (("md", markdown(rows)), ("json", as_json(rows))):
        with replacing(RESULTS / f"moe_ffn_schedule.{suffix}") as path:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
