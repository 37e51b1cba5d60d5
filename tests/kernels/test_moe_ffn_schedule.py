"""The order of moe_ffn's tickets: the model is correct, matches the kernels, and fills a GPU."""

from __future__ import annotations

import heapq
import itertools
import json
import runpy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from modelled.schedule import Banded, Piece, Split, in_waves, replay_split
from vlmo.kernels.moe_ffn.rows import Rows
from vlmo.kernels.moe_ffn.schedule import choose_band, replay
from vlmo.kernels.moe_ffn.triton import arguments as host
from vlmo.kernels.moe_ffn.triton.backward_weights import Work, find_range, find_work
from vlmo.kernels.moe_ffn.triton.device import locate
from vlmo.kernels.moe_ffn.triton.tiles import Tile

MODEL_FILE = Path(__file__).parents[2] / "benchmarks" / "modelled" / "moe_ffn_schedule.py"

BANDED = [
    Banded(1, 1, (0, 1, 1)),
    Banded(1, 5, (2, 3, 1)),
    Banded(3, 2, (1, 2)),
    Banded(7, 2, (0, 3, 2)),
    Banded(7, 3, (2, 0, 3, 1)),
    Banded(8, 4, (0, 3, 0, 0)),
    Banded(9, 20, (1, 4, 2, 1)),
    Banded(10, 1, (0, 2, 1, 0)),
]
banded = st.builds(
    Banded,
    st.integers(1, 40),
    st.integers(1, 50),
    st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any).map(tuple),
)
# (tiles, steps) of each expert
splits = st.builds(
    lambda experts, workers, overhead: Split(
        tuple(tiles for tiles, _ in experts),
        tuple(steps for _, steps in experts),
        workers,
        overhead,
    ),
    st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(0, 4),
)


def test_banded_order_is_as_its_docstring_says():
    drawn = [
        *[(0, 0, 0), (0, 1, 0)],
        *[(0, 2, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)],
        *[(1, 2, 0), (1, 2, 1)],
    ]
    assert list(Banded(3, 2, (1, 2))) == drawn


@given(banded)
@settings(deadline=None)
def test_banded_tickets_are_all_tasks_each_once(schedule):
    tasks = list(schedule)
    assert [schedule.locate(ticket) for ticket in range(schedule.total)] == tasks
    assert Counter(tasks) == Counter(
        (phase, tile, part)
        for phase, count in enumerate(schedule.tasks)
        for tile in range(schedule.tiles)
        for part in range(count)
    )
    with pytest.raises(IndexError, match=f"ticket: {schedule.total} is outside"):
        schedule.locate(schedule.total)


@given(banded, st.integers(1, 9))
@settings(deadline=None)
def test_replay_agrees_with_a_simulation_by_events(schedule, workers):
    costs = (1, 3, 8, 2)[: len(schedule.tasks)]
    played = replay(schedule, workers, costs)
    assert played.makespan == simulate(schedule, workers, costs)
    work = schedule.tiles * sum(c * n for c, n in zip(costs, schedule.tasks, strict=True))
    assert played.busy == pytest.approx(work / (workers * played.makespan))
    assert played.busy + played.waiting <= 1 + 1e-9


def test_ticket_taken_ahead_costs_a_fifth():
    """Why a kernel should take a ticket only when it is done with the last one."""
    schedule, costs = Banded(64, 22, (12, 3)), (12, 48)
    ahead, later = (simulate(schedule, 132, costs, ahead=ahead) for ahead in (True, False))
    assert later == replay(schedule, 132, costs).makespan
    assert 0.78 < later / ahead < 0.82


def simulate(schedule, workers, costs, ahead=False) -> float:
    """Makespan, found event by event, in which workers may hold the next ticket as they work."""
    tickets = iter(schedule)
    held = [[task] if ahead and (task := next(tickets, None)) else [] for _ in range(workers)]
    done: Counter = Counter()
    parked: dict = {}
    now = 0.0
    events = [(0.0, worker, None) for worker in range(workers)]
    while events:
        now, worker, finished = heapq.heappop(events)
        if finished is not None:
            key = finished[:2]
            done[key] += 1
            if done[key] == schedule.tasks[finished.phase]:
                for other, task in parked.pop(key, ()):
                    heapq.heappush(events, (now + costs[task.phase], other, task))
        if (following := next(tickets, None)) is not None:
            held[worker].append(following)
        if not held[worker]:
            continue
        task = held[worker].pop(0)
        before = max((p for p in range(task.phase) if schedule.tasks[p]), default=None)
        if before is not None and done[before, task.tile] < schedule.tasks[before]:
            parked.setdefault((before, task.tile), []).append((worker, task))
        else:
            heapq.heappush(events, (now + costs[task.phase], worker, task))
    assert not parked and sum(done.values()) == schedule.total
    return now


def test_replay_finds_a_wait_for_a_later_ticket():
    class Reversed(Banded):
        def runs(self):
            return reversed(list(super().runs()))

    with pytest.raises(AssertionError):
        replay(Reversed(6, 2, (0, 2, 1)), 4, (0, 1, 1))


@pytest.mark.parametrize("tiles", [1, 2, 22, 64, 65, 66, 300])
@pytest.mark.parametrize("tasks", [(0, 12, 3), (8, 16, 4), (8, 12, 0, 0), (0, 1, 0)])
def test_chosen_band_is_no_worse_than_the_usual_one(tiles, tasks):
    costs = (2, 15, 51, 2)[: len(tasks)]
    band = choose_band(tiles, tasks, 132, costs)
    longest = max((c, n) for c, n in zip(costs, tasks, strict=True) if n)[1]
    usual = Banded(tiles, 132 // (2 * longest), tasks)
    assert 1 <= band <= tiles or band == usual.band
    chosen = Banded(tiles, band, tasks)
    assert replay(chosen, 132, costs).makespan <= replay(usual, 132, costs).makespan


@given(splits)
@settings(deadline=None)
def test_split_covers_every_step_once(split):
    found = [piece for ticket in range(split.total) for piece in split.pieces(ticket)]
    steps = Counter((p.expert, p.tile, step) for p in found for step in range(p.first, p.last))
    assert steps == Counter(
        (expert, tile, step)
        for expert, (tiles, each) in enumerate(zip(split.tiles, split.steps, strict=True))
        for tile in range(tiles)
        for step in range(each)
    )
    whole = found[: sum(split.whole)]
    assert all(p.first == 0 and p.last == split.steps[p.expert] for p in whole)


@given(splits)
@settings(deadline=None)
def test_owner_waits_for_earlier_tickets_which_have_just_its_missing_steps(split):
    ticket_of = {split.share_of(ticket): ticket for ticket in range(split.total)}
    waited_for: Counter = Counter()
    partial: Counter = Counter()
    for ticket in range(split.total):
        pieces = split.pieces(ticket)
        assert all(piece.first == 0 for piece in pieces[1:])  # one partial tile at most
        partial[ticket] += any(piece.first for piece in pieces)
        for piece in pieces:
            if piece.first:
                continue
            end = piece.last
            for share in split.peers(split.share_of(ticket), piece):
                peer = ticket_of[share]
                assert peer < ticket
                waited_for[peer] += 1
                follower = split.pieces(peer)[0]
                assert follower == Piece(piece.expert, piece.tile, end, follower.last)
                end = follower.last
            assert end == split.steps[piece.expert]
    assert +waited_for == +partial  # no partial tile is left over
    played = replay_split(split, overhead=1, addition=2)
    assert played.busy + played.waiting <= 1 + 1e-9


@pytest.mark.parametrize(
    ("split", "share", "makespan"),
    [
        (Split((8, 4), (5, 3), 4, 0), 0, 13),  # nothing is left to share
        (Split((0, 3), (9, 4), 4, 0), 3, 3 + 1 + 2 + 1),  # an owner has 3 of 4 steps
        (Split((1, 0), (3, 9), 8, 0), 1, 1 + 1 + 2 * 2),  # fewer steps than workers
        (Split((0, 0), (1, 1), 4, 0), 0, 0),
    ],
)
def test_replay_of_a_split(split, share, makespan):
    overhead = 0 if share == 0 else 1
    assert split.share == share
    assert replay_split(split, overhead, addition=2).makespan == makespan


def test_replay_of_a_split_finds_a_wait_for_a_later_ticket():
    class Forwards(Split):
        def share_of(self, ticket):
            return ticket - sum(self.whole)

    with pytest.raises(AssertionError):
        replay_split(Forwards((3,), (4,), 4, 0), 0, 0)


def test_separate_launches_run_in_waves():
    assert in_waves([(5, 10.0), (4, 2.5), (0, 7.0)], workers=4) == 22.5


@triton.jit
def dump_tasks(OUT, tiles, band, total, C: tl.constexpr):
    for ticket in range(total):
        phase, tile, part = locate(ticket, tiles, band, C)
        tl.store(OUT + 3 * ticket, phase)
        tl.store(OUT + 3 * ticket + 1, tile)
        tl.store(OUT + 3 * ticket + 2, part)


@triton.jit
def dump_pieces(OUT, COUNT, total, rows, C: tl.constexpr, W: tl.constexpr):
    """[share or -1, share's length, expert, tile, first, last] of every piece."""
    count = 0
    for ticket in range(total):
        position, stop, number, share = find_range(ticket, rows, C, W)
        while position < stop:
            expert, tile, step, last, _, position = find_work(position, stop, rows, C, W)
            if step < last:
                line = OUT + 6 * count
                tl.store(line, number)
                tl.store(line + 1, share)
                tl.store(line + 2, expert)
                tl.store(line + 3, tile)
                tl.store(line + 4, step)
                tl.store(line + 5, last)
                count += 1
    tl.store(COUNT, count)


@pytest.fixture
def gpu_or_interpreter() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def config(experts: int, **changes) -> host.Config:
    tile = Tile(32, 64, 32, 4, 1)
    made = host.make_config(64, (64,) * experts, "none", "gelu", "ieee", False, tile)
    return made._replace(**changes)


@pytest.mark.parametrize("schedule", BANDED, ids=str)
def test_kernels_find_the_same_task(schedule, gpu_or_interpreter):
    out = torch.full((schedule.total, 3), -1, dtype=torch.int32, device=gpu_or_interpreter)
    of_kernel = config(2, tasks=schedule.tasks)
    dump_tasks[(1,)](out, schedule.tiles, schedule.band, schedule.total, of_kernel)
    assert [tuple(line) for line in out.tolist()] == list(schedule)


@dataclass(frozen=True)
class Weights:
    """Tiles and tokens of each expert."""

    w1_tiles: tuple[int, ...]
    w2_tiles: tuple[int, ...]
    tokens: tuple[int, ...]
    workers: int


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(
    "weights",
    [
        Weights((4, 4), (3, 3), (96, 320), 5),
        Weights((0, 6), (0, 6), (64, 130), 5),  # a frozen expert
        Weights((2, 2, 2), (0, 2, 2), (0, 40, 70), 3),  # an empty one, still to be zeroed
        Weights((1,), (0,), (64,), 7),  # fewer steps than workers
        Weights((4, 8), (4, 0), (50, 100), 4),  # nothing to share
        Weights((2, 2), (1, 1), (640, 32), 4),  # a tile of many shares
    ],
    ids=str,
)
def test_kernels_find_the_same_pieces(weights, indexed, gpu_or_interpreter):
    experts = len(weights.tokens)
    compiled = config(experts)
    tiles = tuple(a + b for a, b in zip(weights.w1_tiles, weights.w2_tiles, strict=True))
    steps = tuple(max(-(-count // compiled.block_k), 1) for count in weights.tokens)
    split = Split(tiles, steps, weights.workers)
    nothing: dict[str, Any] = dict.fromkeys(Work._fields, ())
    work = Work(**nothing)._replace(
        w1_tiles=weights.w1_tiles,
        w2_tiles=weights.w2_tiles,
        whole=split.whole,
        workers=weights.workers,
    )
    if indexed:
        ends = itertools.accumulate(weights.tokens, initial=0)
        offsets = torch.tensor(list(ends), dtype=torch.int32, device=gpu_or_interpreter)
        rows = Rows(None, None, 0, 0, offsets, offsets)  # tokens are not read here
    else:
        rows = Rows((0,) * experts, weights.tokens, 1, sum(weights.tokens), None, None)
    passed = host.passed(rows)

    expected = [
        (share if share < weights.workers else -1, split.share, *piece)
        for ticket in range(split.total)
        for share in (split.share_of(ticket),)
        for piece in split.pieces(ticket)
    ]
    out = torch.full((len(expected) + 9, 6), -7, dtype=torch.int32, device=gpu_or_interpreter)
    count = torch.zeros(1, dtype=torch.int32, device=gpu_or_interpreter)
    dump_pieces[(1,)](out, count, split.total, passed, compiled, work)
    assert [tuple(line) for line in out[: count.item()].tolist()] == expected


@pytest.fixture(scope="module")
def model() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(MODEL_FILE.parent)
        return SimpleNamespace(**runpy.run_path(str(MODEL_FILE)))


@pytest.fixture(scope="module")
def rows(model):
    return model.model()


def test_committed_table_is_what_the_model_gives(model, rows):
    file = model.RESULTS / "moe_ffn_schedule"
    assert file.with_suffix(".md").read_text() == model.markdown(rows)
    assert file.with_suffix(".json").read_text() == model.as_json(rows)
    assert len(json.loads(model.as_json(rows))["rows"]) == len(rows) == 2 * 2 * 3 * 3


def test_one_launch_uses_the_gpu(rows):
    """Where tiles cost nothing but their main loop."""
    used = {row[:4]: row.ideal.ours for row in rows}
    for split in ("40:197", "50:50", "5:55:40"):
        assert used["forward", "base", "8k", split] >= 0.95
    assert min(fraction for key, fraction in used.items() if key[0] == "forward") >= 0.95
    assert min(fraction for key, fraction in used.items() if key[0] != "forward") >= 0.96


# Where one tile width suits both products of separate launches exactly.
LOST = {("forward", "base", "8k", "50:50")}


def test_one_launch_is_at_least_as_fast_as_the_best_loop(rows):
    """With the overhead of tiles."""
    assert {row[:4] for row in rows if row.speedup < 0.995} <= LOST
    weights_of_base = [row for row in rows if row[:2] == ("weight gradients", "base")]
    assert min(row.speedup for row in weights_of_base) > 1.1
    forward = [row for row in rows if row.kernel == "forward"]
    assert all(row.usual.ours > row.usual.loop - 1e-9 for row in forward)
