"""Digit scenes: captions and answers match the images, and splits share no scans."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmo import VLMo, VLMoConfig
from vlmo.data import (
    ANSWERS,
    DigitScenes,
    Draw,
    Scene,
    TextTokenizer,
    collate,
    digit_tokenizer,
    open_data,
    retrieval_gallery,
    train_wordpiece,
)
from vlmo.data.digits.language import all_meanings, all_texts, captions
from vlmo.data.digits.scans import load_scans, split_scans
from vlmo.data.samples import SPLITS
from vlmo.run_folder import digest
from vlmo.tasks.losses import compute_losses

WORDS = "zero one two three four five six seven eight nine".split()
NUMBER = {word: n for n, word in enumerate(WORDS)}
NUMBER |= {"a": 1, "an": 1}
LONGEST_TEXT = 12
FIRST_TEST_SCANS = [465, 757, 1704]
GROUP = r"(a|an|two) (\w+)"
SAMPLE_KEYS = {
    "textmlm": {"text"},
    "pretrain": {"image", "text", "image_id"},
    "retrieval": {"image", "text", "image_id"},
    "vqa": {"image", "text", "answer_labels", "answer_scores", "question_id"},
    "nlvr2": {"image_0", "image_1", "text", "answers", "identifier"},
}


def digit_named(word: str) -> int:
    """Class of a digit's name in the singular or plural."""
    return WORDS.index({"sixes": "six"}.get(word, word if word in WORDS else word[:-1]))


def boxes(scene: Scene, digit: int) -> list[tuple[int, int, int, int]]:
    """(top, left, bottom, right) of the digits of one class."""
    size = scene.digit_size
    return [
        (top, left, top + size, left + size)
        for member, (top, left) in zip(scene.digits, scene.positions, strict=True)
        if member == digit
    ]


def related(scene: Scene, first: int, relation: str, second: int) -> bool:
    """Whether every digit of one class stands in a relation to every one of another class."""
    if relation in ("right of", "below"):
        opposite = {"right of": "left of", "below": "above"}[relation]
        return related(scene, second, opposite, first)
    start, end = (1, 3) if relation == "left of" else (0, 2)
    pairs = list(itertools.product(boxes(scene, first), boxes(scene, second)))
    return bool(pairs) and all(one[end] <= other[start] for one, other in pairs)


def caption_holds(scene: Scene, text: str) -> bool:
    """Truth of a caption, from the positions and the classes of the scans alone."""
    relation = re.fullmatch(rf"{GROUP} (left of|right of|above|below) {GROUP}", text)
    if relation is None:
        word = re.fullmatch(r"only an? (\w+)|an? (\w+) and nothing else", text)
        assert word
        return scene.digits == (digit_named(word[1] or word[2]),)
    count_1, word_1, where, count_2, word_2 = relation.groups()
    first, second = digit_named(word_1), digit_named(word_2)
    listed = [first] * NUMBER[count_1] + [second] * NUMBER[count_2]
    return sorted(listed) == sorted(scene.digits) and related(scene, first, where, second)


def expected_answer(scene: Scene, question: str) -> str:
    """The answer, from the positions and the classes of the scans alone."""
    if question == "which digit is shown?":
        (digit,) = scene.digits
        return WORDS[digit]
    if match := re.fullmatch(r"how many (\w+) are there\?", question):
        return WORDS[scene.digits.count(digit_named(match[1]))]
    if match := re.fullmatch(r"is there an? (\w+)\?", question):
        return "yes" if digit_named(match[1]) in scene.digits else "no"
    where = r"(left of|right of|above|below)"
    if match := re.fullmatch(rf"what is {where} the (\w+)\?", question):
        other = digit_named(match[2])
        (digit,) = {d for d in scene.digits if d != other and related(scene, d, match[1], other)}
        return WORDS[digit]
    match = re.fullmatch(rf"(?:is|are) the (\w+) {where} the (\w+)\?", question)
    assert match
    holds = related(scene, digit_named(match[1]), match[2], digit_named(match[3]))
    return "yes" if holds else "no"


def statement_holds(left: Scene, right: Scene, text: str) -> bool:
    """Truth of a statement about two scenes."""
    if match := re.fullmatch(r"the (left|right) image shows (.+)", text):
        return caption_holds(left if match[1] == "left" else right, match[2])
    patterns = {
        r"both images contain": 2,
        r"exactly one image contains": 1,
        r"neither image contains": 0,
    }
    for pattern, images in patterns.items():
        if match := re.fullmatch(rf"{pattern} an? (\w+)", text):
            digit = digit_named(match[1])
            return (digit in left.digits) + (digit in right.digits) == images
    raise AssertionError(f"unknown statement {text!r}")


@pytest.fixture(scope="module")
def scenes() -> DigitScenes:
    return DigitScenes("train", 4096)


def test_splits_share_no_scan_and_hold_all():
    parts = {split: np.concatenate(split_scans(split)) for split in SPLITS}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    # Equal pixels under two numbers would be the same leak.
    pixels, _ = load_scans()
    assert len(np.unique(pixels.reshape(len(pixels), -1), axis=0)) == len(pixels)
    for split, share in (("train", 0.7), ("val", 0.15), ("test", 0.15)):
        assert len(parts[split]) / 1797 == pytest.approx(share, abs=0.005)


def test_splits_are_stratified_and_fixed():
    _, classes = load_scans()
    for split in SPLITS:
        by_class = split_scans(split)
        assert all((classes[members] == digit).all() for digit, members in enumerate(by_class))
    assert [split_scans("test")[digit][0] for digit in (0, 4, 9)] == FIRST_TEST_SCANS
    with pytest.raises(ValueError, match="'dev'"):
        split_scans("dev")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("task", ["pretrain", "nlvr2"])
def test_scenes_use_scans_of_their_split(split, task):
    allowed = set(np.concatenate(split_scans(split)).tolist())
    data = DigitScenes(split, 500, task=task)
    used = {
        scan
        for image in range(len(data._tables))
        for row in range(len(data))
        for scan in data.scene(row, image).scans
    }
    assert used <= allowed
    assert len(used) > 0.5 * min(len(allowed), 500)


@pytest.mark.parametrize("task", ["pretrain", "vqa", "nlvr2"])
def test_samples_depend_on_index_and_seed_only(task):
    short, long = DigitScenes("val", 20, task=task), DigitScenes("val", 50, task=task)
    other = DigitScenes("val", 20, task=task, seed=1)
    for index in range(20):
        one, two = short[index], long[index]
        assert one.keys() == two.keys()
        for name, value in one.items():
            same = torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name]
            assert same, name
    assert [short.text(n) for n in range(20)] != [other.text(n) for n in range(20)]
    with pytest.raises(IndexError, match="20 of 20"):
        short[20]


def test_no_two_splits_or_images_repeat():
    first = {split: DigitScenes(split, 200).images(range(200)) for split in SPLITS}
    flat = torch.cat(list(first.values())).flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(flat)


def test_every_true_caption_is_given_and_no_other(scenes):
    texts = {text for meaning in all_meanings() for text in captions(meaning)}
    assert len(texts) == 2 * len(all_meanings()) == 1100
    seen: dict[Any, Scene] = {}
    for row in range(len(scenes)):
        seen.setdefault(scenes.scene(row).key, scenes.scene(row))
    assert len(seen) > 500
    for scene in itertools.islice(seen.values(), 120):
        assert {text for text in texts if caption_holds(scene, text)} == set(scene.captions())


def test_training_captions_are_true(scenes):
    for row in range(1000):
        scene = scenes.scene(row)
        assert scenes.text(row) in scene.captions()
        assert caption_holds(scene, scenes.text(row))
    canonical = [scenes.text(row) == scenes.scene(row).captions()[0] for row in range(1000)]
    assert 0.4 < np.mean(canonical) < 0.6


def test_evaluation_uses_the_canonical_caption():
    data = DigitScenes("val", 200)
    assert all(data.text(row) == data.scene(row).captions()[0] for row in range(200))


def test_classes_are_those_of_the_scans(scenes):
    _, classes = load_scans()
    for row in range(200):
        scene = scenes.scene(row)
        assert scene.digits == tuple(classes[list(scene.scans)])
        assert len(set(scene.scans)) == len(scene.scans)
        shown = [digit for count, digit in scene.key.groups for _ in range(count)]
        assert list(scene.digits) == shown


def test_scene_kinds_have_their_shares(scenes):
    sizes = np.bincount([len(scenes.scene(row).digits) for row in range(len(scenes))], minlength=4)
    assert sizes[1:] / len(scenes) == pytest.approx([0.1, 0.4, 0.5], abs=0.03)


@settings(max_examples=15, deadline=None)
@given(
    image_size=st.integers(4, 10).map(lambda n: 8 * n),
    share=st.floats(0, 1),
    displacement=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    split=st.sampled_from(SPLITS),
)
def test_digits_lie_inside_and_apart(image_size, share, displacement, seed, split):
    digit_size = image_size // 4 + 1 + int(share * (image_size // 4 - 1))
    jitter = int(displacement * ((image_size // 2 - digit_size) // 2))
    sizes = {"image_size": image_size, "digit_size": digit_size, "jitter": jitter}
    data = DigitScenes(split, 8, seed=seed, **sizes)
    for row in range(8):
        scene = data.scene(row)
        covered = np.zeros((image_size, image_size), dtype=int)
        for top, left in scene.positions:
            assert 0 <= min(top, left) <= max(top, left) <= image_size - digit_size
            covered[top : top + digit_size, left : left + digit_size] += 1
        assert covered.max() == 1
        assert all(caption_holds(scene, text) for text in scene.captions())
        picture = data[row]["image"]
        assert (picture[0][torch.from_numpy(covered == 0)] == scene.background).all()


def test_images_are_the_scans():
    """Halved, a digit is its own scan, blurred by the resizing, and none of the 1,796 others."""
    data = DigitScenes("test", 50, digit_size=16)
    blurred = np.pad(load_scans()[0].astype(float), ((0, 0), (1, 1), (1, 1)), mode="edge")
    for axis in (1, 2):
        before, same, after = (np.take(blurred, range(n, n + 8), axis) for n in range(3))
        blurred = 0.125 * before + 0.75 * same + 0.125 * after
    for row in range(50):
        scene, image = data.scene(row), data[row]["image"]
        grey = image[1].float()
        for scan, (top, left) in zip(scene.scans, scene.positions, strict=True):
            drawn = grey[top : top + 16, left : left + 16].reshape(8, 2, 8, 2).mean((1, 3)).numpy()
            distance = np.abs(drawn - np.maximum(blurred, scene.background)).mean((1, 2))
            assert distance.argmin() == scan
            assert distance[scan] < 5


@pytest.mark.parametrize("image_size", [32, 40, 64, 224])
def test_images_are_in_range_and_not_trivial(image_size):
    data = DigitScenes("train", 64, image_size=image_size)
    images = data.images(range(64))
    assert images.shape == (64, 3, image_size, image_size)
    assert images.dtype == torch.uint8
    assert (images.float().flatten(1).std(1) > 12).all()
    assert images.amax((1, 2, 3)).min() > 190
    assert data[0]["image"].is_contiguous()


def test_jitter_reaches_all_places_around_the_centre():
    data = DigitScenes("train", 300, jitter=1)
    offsets = {place % 16 for row in range(300) for place in sum(data.scene(row).positions, ())}
    assert offsets == {0, 1, 2}
    still = DigitScenes("train", 300)
    assert {p % 16 for row in range(300) for p in sum(still.scene(row).positions, ())} == {1}


def test_gallery_meanings_are_unique_and_captions_exclusive():
    gallery = retrieval_gallery("test", 256)
    scenes = [gallery.scene(row) for row in range(len(gallery))]
    assert len({scene.key for scene in scenes}) == 256
    for row, scene in enumerate(scenes[:100]):
        true = [n for n in range(256) if caption_holds(scene, gallery.text(n))]
        assert true == [row]
    assert len(retrieval_gallery("val", 550)) == 550
    with pytest.raises(ValueError, match="550"):
        retrieval_gallery("val", 551)


def test_all_questions_have_the_right_answer(scenes):
    for row in range(150):
        scene = scenes.scene(row)
        asked = scene.questions()
        assert len({question.text for question in asked}) == len(asked) >= 21
        for question in asked:
            assert question.answer == expected_answer(scene, question.text), question.text


def test_vqa_answers_are_right_and_balanced():
    data = DigitScenes("train", 6000, task="vqa")
    answers: dict[str, list[str]] = {}
    for row in range(len(data)):
        text, answer = data.text(row), ANSWERS[data.target(row)]
        assert answer == expected_answer(data.scene(row), text), text
        opening = re.match(r"how many|is there|what|which|is|are", text)
        assert opening
        answers.setdefault(opening[0], []).append(answer)
    for words in ("is", "are", "is there"):
        share = float(np.mean([answer == "yes" for answer in answers[words]]))
        assert 0.44 < share < 0.56, words
    for words, options in (("how many", 3), ("what", 10), ("which", 10)):
        counts = np.unique(answers[words], return_counts=True)[1]
        assert len(counts) == options
        share, total = 1 / options, counts.sum()
        noise = np.sqrt(share * (1 - share) / total)
        assert counts.max() / total < share + 4 * noise, words


def test_vqa_questions_do_not_give_their_answers_away():
    """The most frequent answer to each exact question is right little more often than chance."""
    data = DigitScenes("train", 20000, task="vqa")
    by_text: dict[str, list[int]] = {}
    for row in range(len(data)):
        by_text.setdefault(data.text(row), []).append(data.target(row))
    often = {text: found for text, found in by_text.items() if len(found) >= 100}
    assert len(often) >= 20
    for text, found in often.items():
        share = np.bincount(found).max() / len(found)
        assert share < (0.5 if text.startswith("how many") else 0.68), text


def test_nlvr2_labels_are_right_and_balanced():
    data = DigitScenes("train", 6000, task="nlvr2")
    labels: dict[str, list[int]] = {}
    for row in range(len(data)):
        text, label = data.text(row), data.target(row)
        assert statement_holds(data.scene(row, 0), data.scene(row, 1), text) == bool(label), text
        labels.setdefault(" ".join(text.split()[:2]), []).append(label)
    assert np.mean([label for found in labels.values() for label in found]) == 0.5
    assert len(labels) == 5
    assert all(0.45 < np.mean(found) < 0.55 for found in labels.values())


def test_pretraining_has_no_target():
    with pytest.raises(ValueError, match="'pretrain' has no targets"):
        DigitScenes("train", 4).target(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "'dev'"),
        ({"size": 0}, "size: 0"),
        ({"image_size": 24}, "image_size: 24"),
        ({"image_size": 36}, "image_size: 36"),
        ({"task": "caption"}, "'caption'"),
        ({"digit_size": 17}, "digit_size: 17 is not within 9..16"),
        ({"digit_size": 8}, "digit_size: 8"),
        ({"jitter": 2}, "jitter: 2 is not within 0..1"),
        ({"task": "nlvr2", "distinct": True}, "distinct"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(**options)


def test_meaning_ids_are_the_keys(scenes):
    pairs = {(n, scenes.scene(row).key) for row, n in enumerate(scenes.keys)}
    assert len(pairs) == len({n for n, _ in pairs}) == len({key for _, key in pairs})
    groups = {(n, frozenset(scenes.scene(row).digits)) for row, n in enumerate(scenes.groups)}
    assert len(groups) == len({n for n, _ in groups}) == len({digits for _, digits in groups}) == 55


def test_tokenizer_knows_every_text():
    texts = list(dict.fromkeys(all_texts()))
    tokenizer = digit_tokenizer(16)
    encoded = tokenizer.encode(texts)
    assert not (encoded["text_ids"] == tokenizer.unk_id).any()
    # Every word is one token, and [CLS] and [SEP] are two.
    words = [len(text.replace("?", " ?").split()) + 2 for text in texts]
    assert encoded["text_masks"].sum(1).tolist() == words
    assert max(words) == LONGEST_TEXT


def test_drawn_texts_are_among_all_texts():
    known = set(all_texts())
    for task in ("pretrain", "vqa", "nlvr2"):
        data = DigitScenes("train", 500, task=task)
        assert {data.text(row) for row in range(500)} <= known


def test_vocabulary_is_what_is_learnt_from_all_texts():
    """Runs record a digest of it, so it must never change."""
    learnt = TextTokenizer(train_wordpiece(all_texts(), vocab_size=256), 16)
    assert digit_tokenizer()._tokens == learnt._tokens
    assert digest(learnt._tokens) == "f291b24d1174af00"


@pytest.mark.parametrize(
    ("task", "goal"), [("vqa", "vqa"), ("nlvr2", "nlvr2"), ("retrieval", "irtr")]
)
def test_batches_feed_the_model(task, goal):
    """What collate gives is what the objectives read."""
    tokenizer = digit_tokenizer(12)
    data = DigitScenes("train", 8, task=task)
    config = VLMoConfig(
        dim=16,
        depth=2,
        heads=2,
        vl_start=1,
        image_size=32,
        patch_size=8,
        max_text_length=12,
        vocab_size=tokenizer.vocab_size,
        vqa_labels=len(ANSWERS),
        tasks=(goal,),
    )
    model = VLMo(config)
    batch = collate([data[i] for i in range(8)], tokenizer, answers=len(ANSWERS))
    assert model(compute_losses, batch)["loss"].isfinite()
    if task == "vqa":
        assert [ANSWERS[n] for n in batch["vqa_targets"].argmax(1)] == [
            ANSWERS[data.target(row)] for row in range(8)
        ]
        assert (batch["vqa_targets"].sum(1) == 1).all()


def test_captions_without_paraphrase_are_canonical():
    data = DigitScenes("train", 200, paraphrase=False)
    assert all(data.text(row) == data.scene(row).captions()[0] for row in range(200))
    free = DigitScenes("train", 200)
    assert any(free.text(row) != data.text(row) for row in range(200))
    assert [free.scene(row) for row in range(9)] == [data.scene(row) for row in range(9)]


def test_text_only_samples_are_captions():
    data = DigitScenes("val", 50, task="textmlm")
    assert data[7] == {"text": DigitScenes("val", 50)[7]["text"]}


@pytest.mark.parametrize("task", ["textmlm", "pretrain", "retrieval", "vqa", "nlvr2"])
@pytest.mark.parametrize(("split", "size"), [("train", 16384), ("val", 512), ("test", 1024)])
def test_scenes_are_a_source(task, split, size):
    data = open_data("digits", task, split, image_size=32, train=split == "train")
    gallery = task == "retrieval" and split != "train"
    assert len(data) == (256 if gallery else size)
    assert data.answers == (list(ANSWERS) if task == "vqa" else None)
    sample = data[Draw(5, seed=7)]
    assert sample.keys() == SAMPLE_KEYS[task]
    assert sample["text"] == data.text(5) == data[5]["text"]
    for name in sample.keys() & {"image", "image_0", "image_1"}:
        assert (sample[name].dtype, sample[name].shape) == (torch.uint8, (3, 32, 32))
    if gallery:
        assert data.keys is not None and len(set(data.keys)) == 256
        assert data.image_ids == [data[row]["image_id"] for row in range(256)]


def test_source_arguments_are_checked():
    arguments: dict[str, Any]
    arguments = {"source": "digits", "task": "pretrain", "split": "val", "image_size": 32}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"task": "caption"}, "task: 'caption'"),
        ({"split": "dev"}, "split: 'dev'"),
        ({"task": "vqa", "answers": ["yes"]}, r"answers: \['yes'\]"),
        ({"datasets": ["coco"]}, r"datasets: \['coco'\]"),
        ({"image_size": 20}, "image_size: 20"),
    ]
    for changes, message in cases:
        with pytest.raises(ValueError, match=message):
            open_data(**(arguments | changes))
