"""Global batches, their shares, and what the loaders make of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from vlmo.data import (
    HOST_KEYS,
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


def keyed(scenes: DigitScenes) -> dict[str, list[int]]:
    return {"keys": scenes.keys, "groups": scenes.groups}


def groups_of(batch: list[Draw], scenes: DigitScenes) -> list[int]:
    return [scenes.groups[draw.index] for draw in batch]


def test_rows_are_drawn_about_equally_often_with_keys():
    keys = [row % 10 for row in range(40)]
    batches = GlobalBatches(40, 6, keys=keys, groups=[key // 2 for key in keys])
    rows = [draw.index for batch in first(200, batches) for draw in batch]
    counts = np.bincount(rows, minlength=40)
    assert counts.min() > 20 and counts.max() < 40  # 30 each


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
        ({"keys": [1, 2]}, "keys: 2 of them"),
        ({"keys": range(20), "groups": [1]}, "groups: 1 of them"),
        ({"groups": range(20)}, "groups: given without keys"),
        ({"keys": [1, 2] * 10}, "batch_size: 4 exceeds the 2 different keys"),
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
    samples = [
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
