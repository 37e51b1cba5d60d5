"""Recall on hand-made scores; re-ranking against brute force on a tiny model."""

import math

import pytest
import torch

from vlmo import VLMo, VLMoConfig
from vlmo.retrieval import Directions, Gallery, chance, dual_scores, encode, recall_at, rerank

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
    return Gallery(pixels, ids, masks, IMAGE_OF_TEXT, prepare=lambda x: x.float() / 255)


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
    recall = recall_at(scores, IMAGE_OF_TEXT, (1, 2, 3))
    assert recall.image == pytest.approx({1: 2 / 5, 2: 3 / 5, 3: 4 / 5})
    # Image 0: text 0 shares its 0.9 with the wrong text 4; image 1: after text 4; image 3: text 4
    # is first although its other text is far behind. Image 2 has no text and is no query.
    assert recall.text == pytest.approx({1: 1 / 3, 2: 1.0, 3: 1.0})


@pytest.mark.parametrize("value", [0.0, math.nan, -math.inf])
def test_scores_without_information_recall_nothing(value):
    recall = recall_at(torch.full((5, 4), value), IMAGE_OF_TEXT, (1, 3))
    assert recall.image == {1: 0.0, 3: 0.0}
    assert recall.text[1] == 0.0


def test_recall_of_each_direction_uses_its_own_scores():
    right = torch.eye(3)
    recall = recall_at(Directions(right, right.flip(0)), torch.arange(3), (1,))
    assert recall.image == {1: 1.0}
    assert recall.text == pytest.approx({1: 1 / 3})


def test_recall_in_chunks_is_the_same(monkeypatch):
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
    whole = recall_at(scores, IMAGE_OF_TEXT)
    monkeypatch.setattr("vlmo.retrieval._CELLS", 1)
    assert recall_at(scores, IMAGE_OF_TEXT) == whole


@pytest.mark.parametrize(
    "image_of_text",
    [torch.arange(4), torch.tensor([0, 0, 1, 3, 4]), torch.tensor([0, 0, 1, 3, -1])],
)
def test_recall_refuses_a_relation_that_does_not_fit(image_of_text):
    with pytest.raises(ValueError, match="image_of_text"):
        recall_at(torch.zeros(5, 4), image_of_text)


def test_chance_is_the_recall_of_random_scores():
    expected = chance(IMAGE_OF_TEXT, 4, (1, 2))
    assert expected.image == {1: 1 / 4, 2: 2 / 4}
    # Images 0 and 3 have 2 of the 5 texts, image 1 has one.
    assert expected.text == pytest.approx(
        {1: (2 / 5 + 1 / 5 + 2 / 5) / 3, 2: (0.7 + 0.4 + 0.7) / 3}
    )
    generator = torch.Generator().manual_seed(3)
    drawn = [
        recall_at(torch.rand(5, 4, generator=generator), IMAGE_OF_TEXT, (2,)) for _ in range(2000)
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
    scores = dual_scores(model, gallery)
    model.train()
    actual = rerank(model, gallery, scores, k=2, scale=scale, batch_size=3)
    assert model.training, "rerank must leave the mode as it was"

    model.eval()
    expected = torch.empty(5, 4)
    with torch.no_grad():
        for text in range(5):
            for image in range(4):
                pixels = gallery.images[image : image + 1].float() / 255
                ids, masks = (t[text : text + 1] for t in (gallery.text_ids, gallery.text_masks))
                logits = model.itm_score(model.fuse(ids, masks, pixels).pooled)
                expected[text, image] = logits[0, 1] + scale * scores[text, image]
    for found, dim in ((actual.image, 1), (actual.text, 0)):
        candidates = found.isfinite()
        best = scores.topk(2, dim=dim).indices
        assert torch.equal(candidates, torch.zeros(5, 4).scatter(dim, best, 1.0).bool())
        torch.testing.assert_close(found[candidates], expected[candidates])
        assert found[~candidates].eq(-math.inf).all()


def test_rerank_scales_the_old_score_only(model, gallery):
    scores = dual_scores(model, gallery)
    plain, scaled = (rerank(model, gallery, scores, k=2, scale=scale) for scale in (1.0, 5.0))
    for one, other in zip(plain, scaled, strict=True):
        candidates = one.isfinite()
        assert torch.equal(candidates, other.isfinite())
        torch.testing.assert_close(other[candidates], (one + 4 * scores)[candidates])


def test_rerank_fuses_only_candidates_and_each_pair_once(model, gallery, monkeypatch):
    fused = []
    fuse = model.fuse

    def counting(text_ids, text_mask, image):
        fused.extend(zip(text_ids.tolist(), image.flatten(1).sum(1).tolist(), strict=True))
        return fuse(text_ids, text_mask, image)

    monkeypatch.setattr(model, "fuse", counting)
    scores = dual_scores(model, gallery)
    found = rerank(model, gallery, scores, k=1)
    assert len(fused) == int((found.image.isfinite() | found.text.isfinite()).sum())


def test_rerank_takes_more_candidates_than_there_are(model, gallery):
    found = rerank(model, gallery, dual_scores(model, gallery), k=100)
    assert found.image.isfinite().all()
    assert found.text.isfinite().all()


def test_rerank_refuses_bad_arguments(model, gallery):
    with pytest.raises(ValueError, match="k: 0"):
        rerank(model, gallery, torch.zeros(5, 4), k=0)
    with pytest.raises(ValueError, match=r"scores: shape \(4, 5\)"):
        rerank(model, gallery, torch.zeros(4, 5), k=1)
