"""Global batches, the shares of ranks, and the batches of the loaders."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from vlmo.data import (
    HOST_KEYS,
    BadSample,
    DigitScenes,
    Draw,
    GlobalBatches,
    collate,
    digit_tokenizer,
    loader,
    mask_whole_words,
    to_device,
)
from vlmo.data.draws import hashed, uniform
from vlmo.data.loading import worker_failure


def first(count: int, batches: GlobalBatches) -> list[list[Draw]]:
    return list(itertools.islice(batches, count))


@settings(max_examples=60, deadline=None)
@given(
    ranks=st.integers(1, 5),
    share=st.integers(1, 4),
    extra=st.integers(0, 40),
    seed=st.integers(0, 2**40),
    start=st.integers(0, 30),
    keyed=st.booleans(),
)
def test_batches_depend_on_the_step_alone(ranks, share, extra, seed, start, keyed):
    batch_size = ranks * share
    size = batch_size + extra
    keys = [n % max(batch_size, size // 2) for n in range(size)] if keyed else None
    options = {"seed": seed, "keys": keys, "groups": keys and [key // 3 for key in keys]}
    whole = first(start + 5, GlobalBatches(size, batch_size, **options))
    assert first(5, GlobalBatches(size, batch_size, first_step=start, **options)) == whole[start:]
    shares = [
        first(start + 5, GlobalBatches(size, batch_size, rank=n, world_size=ranks, **options))
        for n in range(ranks)
    ]
    assert [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)] == whole
    assert all(len(batch) == batch_size for batch in whole)


@settings(max_examples=40, deadline=None)
@given(batch_size=st.integers(1, 9), extra=st.integers(0, 30), seed=st.integers(0, 2**40))
def test_epochs_are_permutations(batch_size, extra, seed):
    size = batch_size + extra
    batches = GlobalBatches(size, batch_size, seed=seed)
    assert batches.steps_per_epoch == size // batch_size
    drawn = first(3 * batches.steps_per_epoch, batches)
    for epoch in range(3):
        part = drawn[epoch * batches.steps_per_epoch : (epoch + 1) * batches.steps_per_epoch]
        rows = [draw.index for batch in part for draw in batch]
        assert len(set(rows)) == len(rows) == batches.steps_per_epoch * batch_size
        assert set(rows) <= set(range(size))


def test_epochs_and_seeds_differ():
    batches = first(8, GlobalBatches(64, 16))
    orders = [
        [draw.index for batch in part for draw in batch] for part in (batches[:4], batches[4:])
    ]
    assert orders[0] != orders[1]
    assert first(4, GlobalBatches(64, 16, seed=1)) != batches[:4]
    seeds = [draw.seed for batch in batches for draw in batch]
    assert len(set(seeds)) == len(seeds)


@settings(max_examples=40, deadline=None)
@given(
    kinds=st.integers(2, 20),
    size=st.integers(20, 60),
    grouped=st.booleans(),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_equal_keys_never_share_a_batch(kinds, size, grouped, seed, data):
    keys = [row % kinds for row in range(size)]
    groups = [key // 4 for key in keys] if grouped else None
    batch_size = data.draw(st.integers(1, kinds))
    batches = GlobalBatches(size, batch_size, seed=seed, keys=keys, groups=groups)
    drawn = first(2 * batches.steps_per_epoch, batches)
    for batch in drawn:
        assert len({keys[draw.index] for draw in batch}) == batch_size


def test_keyed_epochs_leave_little_out():
    """1,024 scenes of 550 meanings: few of them come twice in an epoch, or not at all."""
    scenes = DigitScenes("train", 1024)
    batches = GlobalBatches(1024, 64, keys=scenes.keys, groups=scenes.groups)
    for epoch in range(3):
        drawn = first(16, GlobalBatches(1024, 64, first_step=16 * epoch, **keyed(scenes)))
        rows = [draw.index for batch in drawn for draw in batch]
        assert len(set(rows)) > 0.95 * len(rows)
    partners = [
        sum(count // 2 for count in np.unique(groups_of(batch, scenes), return_counts=True)[1])
        for batch in first(100, batches)
    ]
    assert np.mean(partners) > 24, "most rows of 64 must come with one of their group"


def keyed(scenes: DigitScenes) -> dict[str, Any]:
    return {"keys": scenes.keys, "groups": scenes.groups}


def groups_of(batch: list[Draw], scenes: DigitScenes) -> list[int]:
    assert scenes.groups is not None
    return [scenes.groups[draw.index] for draw in batch]


def test_rows_are_drawn_about_equally_often_with_keys():
    keys = [row % 10 for row in range(40)]
    batches = GlobalBatches(40, 6, keys=keys, groups=[key // 2 for key in keys])
    rows = [draw.index for batch in first(200, batches) for draw in batch]
    counts = np.bincount(rows, minlength=40)
    assert counts.min() > 20 and counts.max() < 40  # 30 each


def digest(batches: list[list[Draw]]) -> str:
    rows = [(draw.index, draw.seed) for batch in batches for draw in batch]
    return hashlib.sha256(np.array(rows, dtype="<i8").tobytes()).hexdigest()[:16]


def test_batches_are_those_of_earlier_versions():
    """A run goes on with the batches that it began with."""
    scenes = DigitScenes("train", 1024)
    batches = GlobalBatches(1024, 64, seed=3, **keyed(scenes))
    assert digest(first(40, batches)) == "dca19a77b48c6a03"
    later = GlobalBatches(1024, 64, seed=3, first_step=20, **keyed(scenes))
    assert digest(first(20, later)) == "d23f298535992b84"
    scenes = DigitScenes("train", 300, task="retrieval")
    assert digest(first(40, GlobalBatches(300, 100, **keyed(scenes)))) == "711596f901e0a5df"
    assert digest(first(40, GlobalBatches(1000, 48, seed=5))) == "57e87c5c156acc1a"


def test_every_row_comes_before_any_comes_again():
    """Five captions of each picture: an epoch of few repeats, and none of a picture in a batch."""
    keys = np.repeat(np.arange(40), 5)
    drawn = first(10 * 6, GlobalBatches(200, 20, keys=keys))
    assert all(len({keys[draw.index] for draw in batch}) == 20 for batch in drawn)
    rows = np.array([draw.index for batch in drawn for draw in batch])
    assert np.bincount(rows, minlength=200).max() <= 7  # 6 each
    assert len(set(rows[:180])) > 170


def test_a_picture_that_most_rows_show_is_in_every_batch_once():
    keys = np.where(np.arange(1000) < 600, 0, np.arange(1000))
    for batch in first(50, GlobalBatches(1000, 50, keys=keys)):
        assert sum(keys[draw.index] == 0 for draw in batch) == 1


def test_keys_of_any_kind_make_the_same_batches():
    keys = [n // 3 for n in range(60)]
    kinds: list[Any] = [
        keys,
        np.array(keys),
        np.array(keys, np.int32),
        [f"{key}.jpg" for key in keys],
    ]
    drawn = [first(9, GlobalBatches(60, 8, keys=kind)) for kind in kinds]
    assert all(batches == drawn[0] for batches in drawn)


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.integers(4, 40),
    size=st.integers(40, 300),
    ranks=st.integers(1, 2),
    spares=st.integers(1, 4),
    keyed=st.booleans(),
    start=st.integers(0, 20),
)
def test_spares_have_other_keys_than_the_global_batch(kinds, size, ranks, spares, keyed, start):
    keys = np.arange(size) % kinds if keyed else np.arange(size)
    options = {"keys": keys if keyed else None, "seed": 3, "spares": spares}
    (whole,) = first(1, GlobalBatches(size, 4, first_step=start, **options))
    shares = [
        first(1, GlobalBatches(size, 4, rank=n, world_size=ranks, first_step=start, **options))[0]
        for n in range(ranks)
    ]
    assert [*itertools.chain(*shares)] == whole
    assert first(start + 1, GlobalBatches(size, 4, **options))[-1] == whole
    taken = {keys[draw.index] for draw in whole}
    chosen = [keys[spare] for draw in whole for spare in draw.spares]
    assert not taken & set(chosen)
    for draw in whole:
        assert len(set(keys[list(draw.spares)])) == len(draw.spares)
    free = min(kinds, size) - 4 if keyed else size - 4
    if free >= 4 * spares:
        assert len(set(chosen)) == len(chosen) == 4 * spares
    else:
        assert set(chosen) == set(keys) - taken


def test_spares_change_nothing_else():
    plain, spared = GlobalBatches(5000, 8), GlobalBatches(5000, 8, spares=3)
    for one, two in zip(first(5, plain), first(5, spared), strict=True):
        assert one == [Draw(draw.index, draw.seed) for draw in two]
        spares = [spare for draw in two for spare in draw.spares]
        assert len(set(spares) | {draw.index for draw in one}) == 8 * 4
    assert all(draw.spares == () for draw in first(1, plain)[0])


def test_steps_end_the_batches():
    batches = GlobalBatches(10, 4, first_step=3, steps=5)
    assert list(batches) == first(8, GlobalBatches(10, 4))[3:]
    assert len(batches) == 5
    with pytest.raises(TypeError, match="steps"):
        len(GlobalBatches(10, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"batch_size": 21}, "batch_size: 21 exceeds the 20 samples"),
        ({"world_size": 3}, "batch_size: 4 is not a multiple of 3 ranks"),
        ({"world_size": 0}, "rank: 0 is not within 0"),
        ({"world_size": 2, "rank": 2}, r"rank: 2 is not within 0..1"),
        ({"seed": -1}, "seed: -1"),
        ({"first_step": -1}, "first_step: -1"),
        ({"steps": -2}, "steps: -2"),
        ({"spares": -1}, "spares: -1"),
        ({"keys": [1, 2]}, "keys: 2 of them"),
        ({"keys": range(20), "groups": [1]}, "groups: 1 of them"),
        ({"groups": range(20)}, "groups: given without keys"),
        ({"keys": [1, 2] * 10}, "batch_size: 4 exceeds the 2 different keys"),
        (
            {"keys": [1, 2] * 10},
            "same picture would be in a batch twice.* --official-batches allows it",
        ),
    ],
)
def test_sampler_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        GlobalBatches(**({"size": 20, "batch_size": 4} | options))


def same(one: dict, two: dict) -> bool:
    assert one.keys() == two.keys()
    return all(
        torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
        for name, value in one.items()
    )


def make_loader(workers: int, **options) -> DataLoader:
    scenes = DigitScenes("train", 64)
    batches = GlobalBatches(64, 8, seed=3, steps=6, **options)
    return loader(scenes, batches, digit_tokenizer(8), mask_share=0.25, workers=workers)


def test_workers_change_nothing():
    alone, helped = list(make_loader(0)), list(make_loader(2))
    assert len(alone) == 6
    for one, two in zip(alone, helped, strict=True):
        assert same(one, two)


@pytest.mark.heavy
def test_a_spawned_worker_changes_nothing():
    spawned = make_loader(1)
    spawned.multiprocessing_context = "spawn"
    for one, two in zip(make_loader(0), spawned, strict=True):
        assert same(one, two)


def test_ranks_see_the_rows_of_one_process():
    """Masks as well: they are those of the sample, not of its place in a batch."""
    whole = list(make_loader(0))
    shares = [list(make_loader(0, rank=rank, world_size=2)) for rank in (0, 1)]
    for batch, left, right in zip(whole, *shares, strict=True):
        for name in ("image", "text_ids_mlm", "text_labels_mlm", "text_lengths"):
            assert torch.equal(torch.cat([left[name], right[name]]), batch[name])


def test_loading_leaves_torch_s_own_generator_alone():
    before = torch.get_rng_state()
    next(iter(make_loader(0)))
    assert torch.equal(torch.get_rng_state(), before)


def test_batch_holds_what_the_model_reads():
    batch = next(iter(make_loader(0)))
    assert batch["image"].shape == (8, 3, 32, 32)
    assert batch["image"].dtype == torch.uint8
    assert torch.equal(batch["text_lengths"], batch["text_masks"].sum(1))
    hidden = batch["text_labels_mlm"] != -100
    assert hidden.any(1).all()
    assert torch.equal(batch["text_labels_mlm"][hidden], batch["text_ids"][hidden])
    assert torch.equal(batch["text_ids_mlm"][~hidden], batch["text_ids"][~hidden])
    places = batch["mlm_tokens"]
    assert torch.equal(places // 8, hidden.nonzero()[:, 0])
    assert torch.equal(places % 8, hidden.nonzero()[:, 1])
    assert len(batch["text"]) == len(batch["image_id"]) == 8


def test_soft_targets():
    samples: list[dict[str, Any]] = [
        {"text": "a", "answer_labels": [2, 0], "answer_scores": [0.3, 1.0]},
        {"text": "b", "answer_labels": [], "answer_scores": []},
    ]
    batch = collate(samples, digit_tokenizer(8), answers=3)
    assert torch.equal(batch["vqa_targets"], torch.tensor([[1.0, 0, 0.3], [0, 0, 0]]))
    assert "answer_labels" not in batch
    with pytest.raises(ValueError, match=r"\[2, 0\] are not within 0..1"):
        collate(samples, digit_tokenizer(8), answers=2)
    with pytest.raises(ValueError, match="answers"):
        collate(samples, digit_tokenizer(8))
    with pytest.raises(ValueError, match="samples"):
        collate([], digit_tokenizer(8))


def test_some_tensors_stay_on_the_host():
    batch = next(iter(make_loader(0)))
    moved = to_device(batch, "meta")
    for name, value in moved.items():
        if torch.is_tensor(value):
            assert (value.device.type == "cpu") == (name in HOST_KEYS), name
    assert moved["text"] == batch["text"]


def test_loader_checks_its_arguments():
    scenes, tokenizer = DigitScenes("val", 10), digit_tokenizer(8)
    with pytest.raises(ValueError, match="of 12 samples, the data set has 10"):
        loader(scenes, GlobalBatches(12, 2), tokenizer)
    with pytest.raises(ValueError, match="workers: -1"):
        loader(scenes, GlobalBatches(10, 2), tokenizer, workers=-1)


class Plain(Dataset):
    """A data set that knows nothing of fetching many samples at once."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, draw: Draw) -> dict:
        return {"text": f"{draw.index}", "seed": draw.seed}


def test_any_map_style_data_set_will_do():
    batch = next(iter(loader(Plain(), GlobalBatches(4, 4), digit_tokenizer(8))))
    assert sorted(batch["text"]) == ["0", "1", "2", "3"]
    assert len(set(batch["seed"])) == 4


class Faulty(Dataset):
    """Texts of which some cannot be read."""

    def __init__(self, bad: set[int], error: type[Exception] = BadSample):
        self.bad, self.error = bad, error

    def __len__(self) -> int:
        return 40

    def __getitem__(self, draw: Draw) -> dict:
        if draw.index in self.bad:
            if self.error is BadSample:
                raise BadSample(f"data.jsonl, row {draw.index}: is bad", draw.index, "data.jsonl")
            raise self.error(f"sample {draw.index} is wrong")
        return {"text": f"{draw.index}", "seed": draw.seed}


class FaultyTogether(Faulty):
    """The same, fetched many at a time."""

    def __getitems__(self, draws: list[Draw]) -> list[dict]:
        return [self[draw] for draw in draws]


def texts(dataset: Dataset, on_bad: str, workers: int = 0, **options) -> list[dict]:
    batches = GlobalBatches(40, 8, **({"steps": 5} | options))
    return list(loader(dataset, batches, digit_tokenizer(8), workers=workers, on_bad=on_bad))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Faulty, FaultyTogether])
def test_a_bad_sample_is_an_error_with_its_own_words(workers, kind):
    with pytest.raises(BadSample) as caught:
        texts(kind({7}), "error", workers)
    assert str(caught.value) == "data.jsonl, row 7: is bad"
    assert (caught.value.index, caught.value.file, caught.value.row) == (7, "data.jsonl", None)
    assert "bad_samples" not in texts(kind(set()), "error", workers)[0]


@pytest.mark.parametrize("kind", [Faulty, FaultyTogether])
def test_bad_samples_are_replaced_alike_by_ranks_workers_and_resumed_runs(kind):
    bad = {3, 11, 12, 13, 30}
    options: dict[str, Any] = {"spares": 3, "seed": 1}
    whole = texts(kind(bad), "replace", **options)
    draws = first(5, GlobalBatches(40, 8, **options))
    for batch, drawn in zip(whole, draws, strict=True):
        tried = [[draw.index, *draw.spares] for draw in drawn]
        chosen = [next(n for n in indices if n not in bad) for indices in tried]
        assert batch["text"] == [str(index) for index in chosen]
        assert batch["seed"] == [draw.seed for draw in drawn]
        passed = [n for indices in tried for n in itertools.takewhile(bad.__contains__, indices)]
        assert batch["bad_samples"] == [(n, f"data.jsonl, row {n}: is bad") for n in passed]
    assert {n for batch in whole for n, _ in batch["bad_samples"]} == bad
    for one, two in zip(whole, texts(kind(bad), "replace", 2, **options), strict=True):
        assert same(one, two)
    shares = [texts(kind(bad), "replace", rank=n, world_size=2, **options) for n in (0, 1)]
    for batch, left, right in zip(whole, *shares, strict=True):
        for name in ("text", "seed", "bad_samples"):
            assert left[name] + right[name] == batch[name]
    later = texts(kind(bad), "replace", first_step=3, **options | {"steps": 2})
    assert all(map(same, whole[3:], later))


def test_a_bad_sample_without_a_good_spare_is_an_error():
    with pytest.raises(BadSample, match=r"row \d+: is bad \(sample \d+; the 2 in its place"):
        texts(Faulty(set(range(40))), "replace", spares=2)
    with pytest.raises(BadSample, match=r"row 7: is bad \(sample 7; none is left instead\)"):
        texts(Faulty({7}), "replace")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Faulty, FaultyTogether])
def test_bad_samples_are_left_out(workers, kind):
    drawn = first(5, GlobalBatches(40, 8))
    bad = {draw.index for draw in drawn[0]} | {drawn[1][2].index}
    batches = texts(kind(bad), "leave_out", workers)
    assert batches[0] == {
        "bad_samples": [(n, f"data.jsonl, row {n}: is bad") for n, *_ in drawn[0]]
    }
    assert batches[1]["text"] == [str(n) for n, *_ in drawn[1] if n not in bad]
    assert batches[1]["text_ids"].shape == (7, 8)
    assert [n for n, _ in batches[1]["bad_samples"]] == [drawn[1][2].index]
    assert all(batch["bad_samples"] == [] for batch in batches[2:])
    assert to_device(batches[0], "cpu") == batches[0]


def test_an_unknown_way_with_bad_samples():
    with pytest.raises(ValueError, match="on_bad: 'skip' is not one of"):
        texts(Faulty(set()), "skip")


class Odd(OSError):
    """An error that pickle cannot make again."""

    def __init__(self, one: str, *, other: int = 0):
        super().__init__(one + "!", other)

    def __str__(self) -> str:
        return f"odd: {self.args[0]}"


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        (ValueError, ValueError),
        (FileNotFoundError, FileNotFoundError),
        (json.JSONDecodeError, ValueError),
        (NotImplementedError, NotImplementedError),
        (Odd, OSError),
    ],
)
def test_errors_of_workers_keep_their_words(raised, caught):
    error: Any = raised if raised is not json.JSONDecodeError else lambda text: raised(text, "x", 0)
    with pytest.raises(caught) as alone:
        texts(Faulty({7}, error), "error")
    with pytest.raises(caught) as helped:
        texts(Faulty({7}, error), "replace", 1)
    assert str(helped.value) == str(alone.value)
    assert "sample 7 is wrong" in str(helped.value)
    assert "__getitem__" in str(helped.value.__cause__), "where it was raised"


class Deadly(Faulty):
    def __getitem__(self, draw: Draw) -> dict:
        if draw.index in self.bad:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(draw)


def test_a_killed_worker_is_told_in_a_sentence():
    with pytest.raises(
        ChildProcessError, match=r"process \d+, which made samples, (killed|exited)"
    ):
        texts(Deadly(set(range(40))), "error", 1)


def test_full_shared_memory_is_told_in_a_sentence(monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # in the forked worker as well
    with pytest.raises(ChildProcessError, match=r"workers: .* \(/dev/shm\) is full"):
        texts(Faulty(set()), "error", 1)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "DataLoader worker (pid 12) is killed by signal: Killed. ",
            "process 12, which .*: Killed",
        ),
        (
            "DataLoader worker (pid(s) 12, 13) exited unexpectedly",
            "process 12, 13, .* unexpectedly",
        ),
        ("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible", "/dev/shm"),
        ("Too many open files. Communication with the workers is no longer", "ulimit -n"),
        ("Caught RuntimeError in DataLoader worker process 0.", None),
        ("CUDA error: out of memory", None),
    ],
)
def test_what_torch_says_of_dead_workers(message, told):
    failure = worker_failure(RuntimeError(message))
    if told is None:
        assert failure is None
    else:
        assert failure is not None
        with pytest.raises(OSError, match=told):
            raise failure


def test_masks_of_a_row_are_its_own():
    tokenizer = digit_tokenizer(8)
    texts = ["a one left of two fives", "only a six", "two threes above a nine"] * 500
    ids = tokenizer.encode(texts)["text_ids"]
    seeds = hashed(np.arange(1500))
    masked, labels = mask_whole_words(ids, tokenizer, 0.25, seeds=seeds)
    some = [700, 3, 1499]
    again = mask_whole_words(ids[some], tokenizer, 0.25, seeds=seeds[some])
    assert torch.equal(masked[some], again[0])
    assert torch.equal(labels[some], again[1])
    chosen = labels != -100
    share = [chosen[0::3, column].double().mean() for column in range(1, 7)]
    assert share == pytest.approx([2 / 6] * 6, abs=0.08)
    assert (masked == tokenizer.mask_id)[chosen].double().mean() == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match="seeds: 2 of them"):
        mask_whole_words(ids, tokenizer, seeds=[1, 2])


def test_drawn_numbers_are_uniform_and_their_own():
    numbers = uniform(hashed(np.arange(2000)), 3, 40)
    assert numbers.shape == (3, 2000, 40)
    assert 0 <= numbers.min() < 1e-4 and 0.9999 < numbers.max() < 1
    counts = np.histogram(numbers, 20, (0, 1))[0] / numbers.size
    assert counts == pytest.approx(np.full(20, 0.05), abs=0.002)
    for axis in range(3):
        ahead, behind = np.delete(numbers, 0, axis), np.delete(numbers, -1, axis)
        assert abs(np.corrcoef(ahead.ravel(), behind.ravel())[0, 1]) < 0.01
    assert (uniform([5, 9], 2, 7) == uniform([9, 5], 3, 30)[:2, ::-1, :7]).all()


def test_seeds_tell_combinations_apart():
    grid = np.arange(50)
    seeds = hashed(grid[:, None, None], grid[:, None], grid)
    assert len(np.unique(seeds)) == 50**3
    assert seeds.min() >= 0
    assert hashed(1, 2) != hashed(2, 1)
    assert hashed(7).shape == ()
