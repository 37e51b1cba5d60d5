"""Recall for given scores; re-ranking compared with brute force on a tiny model."""

import dataclasses
import math

import pytest
import torch

from vlmo import VLMo, VLMoConfig
from vlmo.tasks import retrieval
from vlmo.tasks.retrieval import (
    Embeddings,
    Gallery,
    Shortlist,
    Shortlists,
    chance,
    encode,
    recall_at,
    rerank,
    shortlist,
)

# Two captions of image 0, one of image 1, none of image 2, two of image 3.
IMAGE_OF_TEXT = torch.tensor([0, 0, 1, 3, 3])


@pytest.fixture(scope="module")
def model() -> VLMo:
    torch.manual_seed(0)
    config = VLMoConfig(
        dim=32,
        depth=2,
        heads=2,
        vl_start=1,
        image_size=16,
        patch_size=8,
        max_text_length=5,
        text_capacity=5,
        vocab_size=30,
        drop_path=0.5,
    )
    model = VLMo(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 30, (5, 5), generator=generator)
    lengths = torch.tensor([[5], [3], [4], [5], [2]])
    masks = (torch.arange(5) < lengths).long()
    pixels = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return Gallery(pixels, ids, masks, IMAGE_OF_TEXT)


def embeddings(scores: torch.Tensor) -> Embeddings:
    """Embeddings of which these ``[J, I]`` are the cosines."""
    return Embeddings(torch.eye(scores.shape[1]), scores)


def test_recall_of_several_captions_per_image():
    scores = torch.tensor(
        [
            [0.9, 0.1, 0.2, 0.3],  # image 0 first
            [0.5, 0.6, 0.7, 0.1],  # image 0 third
            [0.8, 0.7, 0.1, 0.2],  # image 1 second
            [0.1, 0.2, 0.3, 0.4],  # image 3 first
            [0.9, 0.8, 0.7, 0.6],  # image 3 last
        ]
    )
    recall = recall_at(embeddings(scores), IMAGE_OF_TEXT, (1, 2, 3))
    assert recall.image == pytest.approx({1: 2 / 5, 2: 3 / 5, 3: 4 / 5})
    # Image 0: text 0 shares its 0.9 with the wrong text 4; image 1: after text 4; image 3: text 4
    # is first although its other text is far behind. Image 2 has no text and is no query.
    assert recall.text == pytest.approx({1: 1 / 3, 2: 1.0, 3: 1.0})


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf])
def test_scores_without_information_recall_nothing(value):
    recall = recall_at(embeddings(torch.full((5, 4), value)), IMAGE_OF_TEXT, (1, 3))
    assert recall.image == {1: 0.0, 3: 0.0}
    assert recall.text[1] == 0.0


def test_recall_on_shortlists_uses_the_scores_of_each_direction():
    image = Shortlist(torch.tensor([[0, 2], [1, 0], [0, 1]]), torch.tensor([[2.0, 1.0]] * 3))
    text = Shortlist(torch.tensor([[1, 0], [2, 1], [2, 0]]), torch.tensor([[2.0, 1.0]] * 3))
    recall = recall_at(Shortlists(image, text), torch.arange(3), (1, 2, 10))
    # Image 2 is not on text 2's list, so that no k finds it.
    assert recall.image == pytest.approx({1: 2 / 3, 2: 2 / 3, 10: 2 / 3})
    assert recall.text == pytest.approx({1: 1 / 3, 2: 1.0, 10: 1.0})
    assert recall.mean == pytest.approx((3 * 2 / 3 + 1 / 3 + 2) / 6)


def test_recall_in_chunks_is_the_same(monkeypatch):
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    whole = recall_at(embeddings(scores), IMAGE_OF_TEXT)
    lists = shortlist(embeddings(scores), 3)
    monkeypatch.setattr("vlmo.tasks.retrieval._CELLS", 1)
    assert recall_at(embeddings(scores), IMAGE_OF_TEXT) == whole
    for chunked, list_ in zip(shortlist(embeddings(scores), 3), lists, strict=True):
        assert torch.equal(chunked.rows, list_.rows)


def test_shortlists_of_everything_recall_what_embeddings_do():
    found = embeddings(torch.randn(5, 4, generator=torch.Generator().manual_seed(2)))
    assert recall_at(shortlist(found, 100), IMAGE_OF_TEXT) == recall_at(found, IMAGE_OF_TEXT)


def test_best_of_a_shortlist_are_in_the_order_of_their_scores():
    found = Shortlist(torch.tensor([[4, 7, 2]]), torch.tensor([[0.1, 0.3, 0.2]]))
    assert found.best(2).tolist() == [[7, 2]]
    assert found.best(9).tolist() == [[7, 2, 4]]


@pytest.mark.parametrize(
    "image_of_text",
    [torch.arange(4), torch.tensor([0, 0, 1, 3, 4]), torch.tensor([0, 0, 1, 3, -1])],
)
def test_recall_refuses_a_relation_that_does_not_fit(image_of_text):
    with pytest.raises(ValueError, match="image_of_text"):
        recall_at(embeddings(torch.zeros(5, 4)), image_of_text)


def test_chance_is_the_recall_of_random_scores():
    expected = chance(IMAGE_OF_TEXT, 4, (1, 2))
    assert expected.image == {1: 1 / 4, 2: 2 / 4}
    # Images 0 and 3 have 2 of the 5 texts, image 1 has one.
    assert expected.text == pytest.approx(
        {1: (2 / 5 + 1 / 5 + 2 / 5) / 3, 2: (0.7 + 0.4 + 0.7) / 3}
    )
    generator = torch.Generator().manual_seed(3)
    drawn = [
        recall_at(embeddings(torch.rand(5, 4, generator=generator)), IMAGE_OF_TEXT, (2,))
        for _ in range(2000)
    ]
    for direction in ("image", "text"):
        mean = sum(getattr(recall, direction)[2] for recall in drawn) / len(drawn)
        assert mean == pytest.approx(getattr(expected, direction)[2], abs=0.02)


def test_embeddings_do_not_depend_on_the_batch_size(model, gallery):
    whole, single = encode(model, gallery), encode(model, gallery, batch_size=1)
    for one, other in zip(whole, single, strict=True):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(one.norm(dim=1), torch.ones(len(one)))


@pytest.mark.parametrize("scale", [1.0, 17.0])
def test_rerank_equals_brute_force_on_candidates_only(model, gallery, scale):
    found = encode(model, gallery)
    scores = found.text @ found.image.T
    lists = shortlist(found, 2)
    model.train()
    actual = rerank(model, gallery, lists, scale=scale, batch_size=3)
    assert model.training, "rerank must leave the mode as it was"

    model.eval()
    expected = torch.empty(5, 4)
    with torch.no_grad():
        for text in range(5):
            for image in range(4):
                pixels = gallery.images[image : image + 1]
                ids, masks = (t[text : text + 1] for t in (gallery.text_ids, gallery.text_masks))
                logits = model.itm_score(model.fuse(ids, masks, pixels).pooled)
                expected[text, image] = logits[0, 1] + scale * scores[text, image]
    for reranked, before, wanted, old in (
        (actual.image, lists.image, expected, scores),
        (actual.text, lists.text, expected.T, scores.T),
    ):
        assert torch.equal(before.rows, old.topk(2, dim=1).indices)
        assert torch.equal(reranked.rows, before.rows)
        torch.testing.assert_close(reranked.scores, wanted.gather(1, before.rows))


def test_rerank_fuses_only_candidates_and_each_pair_once(model, gallery, monkeypatch):
    fused: list[tuple] = []
    match = retrieval.matching_logits

    def counting(model, texts, pixels, images):
        words = torch.split(texts.ids, texts.lengths.tolist())
        shown = pixels.flatten(1).long().sum(1).tolist()
        fused.extend((t.tolist(), shown[i]) for t, i in zip(words, images, strict=True))
        return match(model, texts, pixels, images)

    monkeypatch.setattr(retrieval, "matching_logits", counting)
    lists = shortlist(encode(model, gallery), 1)
    rerank(model, gallery, lists)
    pairs = {(text, image) for text, image in enumerate(lists.image.rows[:, 0].tolist())}
    pairs |= {(text, image) for image, text in enumerate(lists.text.rows[:, 0].tolist())}
    assert len(fused) == len(pairs)
    assert len({str(pair) for pair in fused}) == len(pairs)


class Decoded(torch.utils.data.Dataset):
    """Images that are made when they are asked for."""

    def __init__(self, images: torch.Tensor):
        self.images = images
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        self.asked.append(index)
        return self.images[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_can_come_from_a_data_set(model, gallery, workers):
    decoded = Decoded(gallery.images)
    other = dataclasses.replace(gallery, images=decoded)
    found, expected = (encode(model, g, workers=workers) for g in (other, gallery))
    assert torch.equal(found.image, expected.image)
    lists = shortlist(found, 3)
    again, whole = (
        rerank(model, g, lists, workers=workers, batch_size=4) for g in (other, gallery)
    )
    assert torch.equal(again.image.scores, whole.image.scores)
    assert torch.equal(again.text.scores, whole.text.scores)


def test_an_image_is_fetched_once_for_all_its_pairs_of_a_batch(model, gallery):
    decoded = Decoded(gallery.images)
    other = dataclasses.replace(gallery, images=decoded)
    lists = shortlist(encode(model, gallery), 5)
    rerank(model, other, lists)
    assert decoded.asked == [0, 1, 2, 3]


def test_fetching_leaves_the_random_numbers_alone(model, gallery):
    state = torch.get_rng_state()
    rerank(model, gallery, shortlist(encode(model, gallery), 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_bad_arguments_are_refused(model, gallery):
    found = encode(model, gallery)
    with pytest.raises(ValueError, match="k: 0"):
        shortlist(found, 0)
    with pytest.raises(ValueError, match="shortlists: 4 queries of image are not 5"):
        rerank(model, gallery, Shortlists(*reversed(shortlist(found, 1))))
    with pytest.raises(ValueError, match="batch_size: 0"):
        encode(model, gallery, batch_size=0)
    with pytest.raises(ValueError, match="0 images and 5 texts"):
        dataclasses.replace(gallery, images=gallery.images[:0])
    with pytest.raises(ValueError, match="image_of_text"):
        dataclasses.replace(gallery, image_of_text=IMAGE_OF_TEXT + 1)
    with pytest.raises(ValueError, match="text_masks"):
        dataclasses.replace(gallery, text_masks=gallery.text_masks[:, :3])
