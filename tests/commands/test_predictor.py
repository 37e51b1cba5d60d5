"""Predictions, compared with direct calls of the model, and rejected input."""

import io
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation_cases import TINY, TOKENIZER, model_of
from vlmo import Predictor, save_checkpoint
from vlmo.data import ANSWERS, load_vocabulary, train_wordpiece
from vlmo.model.layout import Packed
from vlmo.run_folder import load_model

ALL = ("itc", "itm", "vqa", "nlvr2")
TEXTS = ["a one", "two fives left of a one", "a three above a seven", "a nine", "a two"]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    TOKENIZER.save_vocabulary(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    """Five pictures of different sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(32, 32), (40, 25), (17, 60), (32, 32), (90, 80)]):
        pixels = random.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    return paths


@pytest.fixture(scope="module")
def predictor(vocabulary) -> Predictor:
    return Predictor(model_of(ALL), load_vocabulary(vocabulary), list(ANSWERS), batch_size=2)


@pytest.fixture(scope="module")
def run_folder(vocabulary, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save_checkpoint(model_of(ALL), folder / "model.safetensors")
    (folder / "vocab.txt").write_bytes(vocabulary.read_bytes())
    (folder / "answers.json").write_text(json.dumps(ANSWERS))
    return folder


def pixels_of(paths: list[Path]) -> torch.Tensor:
    """uint8 [n, 3, 32, 32], resized as Pillow does."""
    resized = [np.array(Image.open(p).resize((32, 32), Image.Resampling.BICUBIC)) for p in paths]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2)


def pooled(predictor: Predictor, images: torch.Tensor, texts: list[str], image_type: int = 1):
    words = TOKENIZER.encode(texts)
    return predictor.model.fuse(*words.values(), images, image_type=image_type).pooled


@torch.no_grad()
def test_embeddings_are_those_of_the_model(predictor, pictures):
    expected = predictor.model.encode_image(pixels_of(pictures)).embedding
    torch.testing.assert_close(predictor.embed_images(pictures), expected)
    words = predictor.model.encode_text(*TOKENIZER.encode(TEXTS).values()).embedding
    torch.testing.assert_close(predictor.embed_texts(TEXTS), words)
    torch.testing.assert_close(predictor.similarity(pictures, TEXTS[:2]), words[:2] @ expected.T)


def test_images_in_every_form_are_the_same(predictor, pictures):
    paths = pictures[:2]
    expected = predictor.embed_images(paths)
    opened = [Image.open(path) for path in paths]
    arrays = [np.array(image) for image in opened]
    for images in ([*map(str, paths)], opened, arrays, iter(paths)):
        assert torch.equal(predictor.embed_images(images), expected)
    for image in (paths[0], opened[0], arrays[0], arrays[0][None]):
        torch.testing.assert_close(predictor.embed_images(image), expected[:1])


def test_files_and_their_bytes_are_images_as_well(predictor, pictures):
    paths = pictures[:2]
    expected = predictor.embed_images(paths)
    contents = [path.read_bytes() for path in paths]
    with open(paths[0], "rb") as first, open(paths[1], "rb") as second:
        for images in (contents, [first, io.BytesIO(contents[1])], np.array([*map(str, paths)])):
            assert torch.equal(predictor.embed_images(images), expected)
        second.seek(0)
        for image in (contents[1], second, np.array(str(paths[1]))):
            torch.testing.assert_close(predictor.embed_images(image), expected[1:])
    with open(paths[0], encoding="latin-1") as text, pytest.raises(ValueError, match="for bytes"):
        predictor.embed_images(text)
    with pytest.raises(ValueError, match=r"images\[1\]: is not an image of a known format"):
        predictor.embed_images([contents[0], b"no picture"])


def test_an_image_that_is_opened_but_not_read_may_come_often(predictor, pictures):
    """Pillow reads it when it is first used, by as many threads as decode."""
    expected = predictor.embed_images([pictures[4]] * 8)
    with Image.open(pictures[4]) as image:
        assert torch.equal(predictor.embed_images([image] * 8), expected)


def test_arrays_of_any_strides_are_their_pixels(predictor):
    pixels = np.random.default_rng(2).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    flipped = pixels[::-1, ::2, ::-1]
    expected = predictor.embed_images(np.ascontiguousarray(flipped))
    assert torch.equal(predictor.embed_images(flipped), expected)
    grey = pixels[..., :1]
    expected = predictor.embed_images(grey[..., 0])
    assert torch.equal(predictor.embed_images(grey), expected)
    assert torch.equal(predictor.embed_images(grey[None]), expected)


def test_texts_in_every_form_are_the_same(predictor):
    said = TEXTS[:2]
    expected = predictor.embed_texts(said)
    forms = [tuple(said), iter(said), (text for text in said), np.array(said)]
    forms += [np.array(said, dtype=object), dict.fromkeys(said).keys(), [np.str_(t) for t in said]]
    for texts in forms:
        assert torch.equal(predictor.embed_texts(texts), expected)
    for text in (said[0], np.str_(said[0]), np.array(said[0]), [said[0]]):
        torch.testing.assert_close(predictor.embed_texts(text), expected[:1])
    assert predictor.embed_texts(np.array([], dtype=str)).shape == (0, TINY.dim)


def test_texts_of_a_series_are_its_values(predictor):
    """pandas has no part in our tests: what counts is that iterating gives the values."""

    class Series:
        def __init__(self, values):
            self.values = values

        def __getitem__(self, key):
            raise KeyError(key)  # by label

        def __len__(self):
            return len(self.values)

        def __iter__(self):
            return iter(self.values)

    assert torch.equal(predictor.embed_texts(Series(TEXTS)), predictor.embed_texts(TEXTS))


def test_a_blank_text_is_taken_with_a_warning(predictor):
    with pytest.warns(UserWarning, match=r"texts\[1\]: the text is blank"):
        found = predictor.embed_texts(["a one", "  "])
    assert found.shape == (2, TINY.dim)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts: None is neither"),
        (3, "texts: 3 is neither"),
        (b"a one", "texts: b'a one' is not a text; decode"),
        (["a", b"a one"], r"texts\[1\]: b'a one' is not a text; decode"),
        (np.array([b"a one"]), r"texts: an array of \|S5 \(1,\) is neither"),
        (["a", None], r"texts\[1\]: None is not a text"),
        (["a", float("nan")], r"texts\[1\]: nan is not a text"),
        (["a", ["b"]], r"texts\[1\]: list is not a text"),
        (np.array([["a"]]), r"texts: an array of <U1 \(1, 1\)"),
        (np.zeros(2), r"texts: an array of float64 \(2,\)"),
        ({"a": 1}, "texts: a dict has no fixed order"),
        ({"a"}, "texts: a set has no fixed order"),
        (["a", "b\ud800"], r"texts\[1\]: 'b\\ud800' is not valid Unicode: surrogates"),
    ],
)
def test_what_is_no_text_is_refused(predictor, texts, message):
    with pytest.raises(ValueError, match=message):
        predictor.embed_texts(texts)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "images: None is neither"),
        ([None], r"images\[0\]: None is neither"),
        (torch.zeros(3, 4, 4), "images: tensors are not taken"),
        (torch.tensor(3), "images: tensors are not taken"),
        (np.zeros((0, 0), np.uint8), r"images: \(0, 0\) is an empty image"),
        (np.zeros((0, 4, 3), np.uint8), r"images: \(0, 4, 3\) is an empty image"),
        (np.zeros((2, 4, 0, 3), np.uint8), r"images\[0\]: \(4, 0, 3\) is an empty image"),
        (Image.new("RGB", (0, 3)), r"images: \(0, 3\) is an empty image"),
        (np.zeros((3, 4, 5), np.uint8), r"images: uint8 \(3, 4, 5\) is not uint8 \[H, W\]"),
        (np.zeros((4, 4), bool), r"images: bool \(4, 4\) is not"),
        (np.zeros((4, 4, 3), np.int64), r"images: int64"),
        (np.array(3, np.uint8), r"images: uint8 \(\) is not"),
        ({"a.png"}, "images: a set has no fixed order"),
        ([["a.png"]], r"images\[0\]: list is neither"),
    ],
)
def test_what_is_no_image_is_refused(predictor, images, message):
    with pytest.raises(ValueError, match=message):
        predictor.embed_images(images)


def test_no_images_are_no_images(predictor):
    assert predictor.embed_images(np.zeros((0, 4, 4, 3), np.uint8)).shape == (0, TINY.dim)


def test_one_question_is_about_one_image(predictor, pictures):
    [expected] = predictor.answer(pictures[0], "a one")
    assert predictor.answer([pictures[0]], ["a one"]) == [expected]
    for image, question, counts in (
        (pictures[:2], "a one", "2 images and 1 questions"),
        (pictures[0], TEXTS[:3], "1 images and 3 questions"),
        ([], "a one", "0 images and 1 questions"),
    ):
        with pytest.raises(ValueError, match=rf"answer: {counts} .*answer_all\(\) takes several"):
            predictor.answer(image, question)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("itc_image_proj", lambda p, i: p.embed_images(i)),
        ("itc_text_proj", lambda p, i: p.rank(TEXTS, i)),
        ("itm_score", lambda p, i: p.match(i, TEXTS)),
        ("itm_score", lambda p, i: p.rank(TEXTS, i, rerank=5)),
        ("vqa_classifier.3", lambda p, i: p.answer_all(i, TEXTS)),
        ("nlvr2_classifier.3", lambda p, i: p.judge(i, i, TEXTS)),
    ],
)
def test_outputs_that_are_not_finite_are_an_error(vocabulary, pictures, name, call):
    """Finite weights whose products overflow, as those of float16 may."""
    predictor = Predictor(model_of(ALL), load_vocabulary(vocabulary), ANSWERS, batch_size=2)
    with torch.no_grad():
        for parameter in predictor.model.get_submodule(name).parameters():
            parameter.fill_(3e38)
    with pytest.raises(FloatingPointError, match=r"NaN or infinite, first in row 0$"):
        call(predictor, pictures)


def test_vocabulary_and_answers_are_of_the_models_number(vocabulary):
    other = train_wordpiece(["a"], 6)
    with pytest.raises(ValueError, match="vocabulary: has 6 tokens, the model has"):
        Predictor(model_of(ALL), other)
    with pytest.raises(ValueError, match="answers: 1 were given, the model has 12"):
        Predictor(model_of(ALL), load_vocabulary(vocabulary), ["yes"])


def attended(monkeypatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Values and outputs ``[N, H, K]`` of every attention to come."""
    seen, attend = [], Packed.attend

    def watched(self, qkv, table, backend):
        out = attend(self, qkv, table, backend)
        seen.append((qkv[:, 2], out))
        return out

    monkeypatch.setattr(Packed, "attend", watched)
    return seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"relative_position_bias": False, "absolute_position": True},
        {"separate_attention": True},
    ],
    ids=["relative", "absolute", "separate"],
)
@pytest.mark.parametrize("given", ["both", "image", "text"])
def test_attention_maps_are_those_of_the_model(vocabulary, pictures, monkeypatch, changes, given):
    model = model_of(ALL, **changes)
    predictor = Predictor(model, load_vocabulary(vocabulary), batch_size=2)
    image, text = pictures[1] if given != "text" else None, "a one" if given != "image" else None
    seen = attended(monkeypatch)
    found = predictor.attention(image, text)
    words = [] if text is None else ["[CLS]", "a", "one", "[SEP]"]
    assert (found.words, found.grid) == (words, 0 if image is None else 2)
    length = len(words) + (0 if image is None else 5)
    assert found.weights.shape == (TINY.depth, TINY.heads, length, length)
    assert found.weights.dtype == torch.float32
    torch.testing.assert_close(found.weights.sum(3), torch.ones(found.weights.shape[:3]))
    assert len(seen) == TINY.depth
    for weights, (values, out) in zip(found.weights, seen, strict=True):
        torch.testing.assert_close(torch.einsum("hqn,nhk->qhk", weights, values), out)
    if given == "both":  # the very pass that matching makes
        expected = [out for _, out in seen]
        seen.clear()
        predictor.match(image, text)
        for (_, out), before in zip(seen, expected, strict=True):
            torch.testing.assert_close(out, before)
    for layer in (1, -1):
        alone = predictor.attention(image, text, layer=layer)
        assert torch.equal(alone.weights, found.weights[layer])


def test_attention_is_of_one_image_and_one_text(predictor, pictures):
    for image, text in ((pictures[:2], "a"), (None, None), (pictures[0], ["a", "b"])):
        with pytest.raises(ValueError, match="attention: takes an image, a text or one of each"):
            predictor.attention(image, text)
    with pytest.raises(ValueError, match=r"layer: 3 is not within -3\.\.2"):
        predictor.attention(pictures[0], "a", layer=3)


def test_grey_pictures_have_three_equal_channels(predictor):
    grey = np.random.default_rng(1).integers(0, 256, (20, 30), dtype=np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=2)
    assert torch.equal(predictor.embed_images(grey), predictor.embed_images(colour))


def test_transparent_pictures_are_the_same_from_a_file_and_in_memory(predictor, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    image.save(tmp_path / "a.png")
    assert torch.equal(predictor.embed_images(tmp_path / "a.png"), predictor.embed_images(image))


@torch.no_grad()
def test_matching_is_the_probability_of_the_fusion_encoder(predictor, pictures):
    images = pixels_of(pictures)
    expected = predictor.model.itm_score(pooled(predictor, images, TEXTS)).softmax(1)[:, 1]
    torch.testing.assert_close(predictor.match(pictures, TEXTS), expected)
    one = predictor.match(pictures[1], TEXTS)
    wanted = predictor.model.itm_score(pooled(predictor, images[[1] * 5], TEXTS)).softmax(1)[:, 1]
    torch.testing.assert_close(one, wanted)
    torch.testing.assert_close(
        predictor.match(pictures, TEXTS[0])[3:4], predictor.match(pictures[3], TEXTS[0])
    )


@torch.no_grad()
def test_answers_are_the_likeliest_of_the_classifier(predictor, pictures):
    logits = predictor.model.vqa_classifier(pooled(predictor, pixels_of(pictures), TEXTS))
    best = logits.sigmoid().topk(3)
    found = predictor.answer_all(pictures, TEXTS, top=3)
    assert [[a.text for a in row] for row in found] == [
        [ANSWERS[n] for n in row] for row in best.indices.tolist()
    ]
    values = torch.tensor([[a.probability for a in row] for row in found])
    torch.testing.assert_close(values, best.values)
    [alone] = predictor.answer(pictures[2], TEXTS[2])
    assert alone.text == found[2][0].text
    assert alone.probability == pytest.approx(found[2][0].probability, rel=1e-4)
    assert len(predictor.answer(pictures[0], TEXTS[0], top=100)) == len(ANSWERS)


@torch.no_grad()
def test_judgement_is_the_probability_of_true(predictor, pictures):
    images, others = pixels_of(pictures), pixels_of(pictures[::-1])
    both = [pooled(predictor, images, TEXTS), pooled(predictor, others, TEXTS, image_type=2)]
    expected = predictor.model.nlvr2_classifier(torch.cat(both, 1)).softmax(1)[:, 1]
    torch.testing.assert_close(predictor.judge(pictures, pictures[::-1], TEXTS), expected)
    one = predictor.judge(pictures[0], pictures[4], TEXTS)
    assert float(one[0]) == pytest.approx(float(expected[0]), rel=1e-4)


def test_ranking_is_by_cosine_or_re_ranked(predictor, pictures):
    cosines = predictor.similarity(pictures, TEXTS)
    best = cosines.topk(2)
    found = predictor.rank(TEXTS, pictures, k=2)
    assert [[hit.image for hit in row] for row in found] == best.indices.tolist()
    scores = torch.tensor([[hit.score for hit in row] for row in found])
    torch.testing.assert_close(scores, best.values)

    for options in ({}, {"rerank": 100}):  # more than there are
        assert [len(row) for row in predictor.rank(TEXTS, pictures, k=100, **options)] == [5] * 5

    reranked = predictor.rank(TEXTS, pictures, k=5, rerank=5)
    with torch.no_grad():
        logits = torch.stack(
            [
                predictor.model.itm_score(pooled(predictor, pixels_of(pictures), [text] * 5))
                for text in TEXTS
            ]
        )
    expected = (logits[..., 1] + cosines).sort(dim=1, descending=True)
    assert [[hit.image for hit in row] for row in reranked] == expected.indices.tolist()
    scores = torch.tensor([[hit.score for hit in row] for row in reranked])
    torch.testing.assert_close(scores, expected.values)


def test_nothing_gives_nothing(predictor, pictures):
    dim = TINY.dim
    assert predictor.embed_images([]).shape == (0, dim)
    assert predictor.embed_texts([]).shape == (0, dim)
    assert predictor.similarity([], TEXTS).shape == (5, 0)
    assert predictor.match([], []).shape == (0,)
    assert predictor.match(pictures[0], []).shape == (0,)
    assert predictor.judge([], [], []).shape == (0,)
    assert predictor.answer_all([], []) == []
    assert predictor.rank([], pictures) == []
    assert predictor.rank(TEXTS[:2], []) == [[], []]


def test_a_long_text_loses_its_end_with_a_warning(predictor):
    long = " ".join(["two fives left of a one"] * 3)
    with pytest.warns(UserWarning, match="has 20 tokens, the model reads the first 12"):
        cut = predictor.embed_texts([long, "a one"])
    # [CLS] and [SEP] leave room for ten words.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(predictor.embed_texts([" ".join(long.split()[:10]), "a one"]), cut)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, i: p.match(i, TEXTS[:2]), "5 images, 2 texts: are not one for each other"),
        (lambda p, i: p.answer(i[0], "a", top=0), "top: 0"),
        (lambda p, i: p.judge(i, i[:3], TEXTS), "5 images_0, 3 images_1, 5 statements"),
        (lambda p, i: p.rank(TEXTS, i, k=3, rerank=2), "rerank: 2 candidates are fewer than k: 3"),
        (lambda p, i: p.rank(TEXTS, i, k=0), "k: 0"),
        (lambda p, i: p.embed_images(np.zeros((4, 4, 3))), "float64"),
        (lambda p, i: p.embed_images(np.zeros((4, 4, 2), np.uint8)), r"\(4, 4, 2\)"),
        (lambda p, i: p.embed_images([torch.zeros(3, 4, 4)]), r"images\[0\]: Tensor is neither"),
    ],
)
def test_bad_arguments_are_refused(predictor, pictures, call, message):
    with pytest.raises(ValueError, match=message):
        call(predictor, pictures)


def test_images_that_cannot_be_read_are_named(predictor, tmp_path):
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"damaged\.jpg"):
        predictor.embed_images([damaged])
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        predictor.embed_images([tmp_path / "missing.jpg"])


@pytest.mark.parametrize(
    ("heads", "call", "message"),
    [
        (("vqa",), lambda p: p.embed_texts("a"), "embed_texts: .* no head of itc or irtr, .* vqa"),
        (("vqa",), lambda p: p.embed_images([]), "embed_images"),
        (("irtr",), lambda p: p.match([], []), "match: .* no head of itm, it has those of irtr"),
        (("irtr",), lambda p: p.rank([], [], rerank=9), "rank: .* no head of itm"),
        (("irtr",), lambda p: p.answer_all([], []), "answer: .* no head of vqa"),
        (("irtr",), lambda p: p.judge([], [], []), "judge: .* no head of nlvr2"),
    ],
)
def test_a_missing_head_is_named(vocabulary, heads, call, message):
    with pytest.raises(ValueError, match=message):
        call(Predictor(model_of(heads), load_vocabulary(vocabulary)))


def test_missing_vocabulary_and_answers_are_told(vocabulary, pictures):
    predictor = Predictor(model_of(ALL))
    assert predictor.embed_images(pictures).shape == (5, TINY.dim)
    with pytest.raises(ValueError, match="no vocabulary was given"):
        predictor.embed_texts("a one")
    predictor = Predictor(model_of(ALL), load_vocabulary(vocabulary))
    with pytest.raises(ValueError, match="no names of the answers"):
        predictor.answer(pictures[0], "a one")
    with pytest.raises(ValueError, match="batch_size: 0"):
        Predictor(model_of(ALL), batch_size=0)


def test_a_run_folder_is_all_it_needs(predictor, run_folder, pictures):
    loaded = Predictor.load(run_folder, device="cpu")
    assert not loaded.model.training
    torch.testing.assert_close(loaded.match(pictures, TEXTS), predictor.match(pictures, TEXTS))
    first, second = (p.answer_all(pictures, TEXTS) for p in (loaded, predictor))
    assert [row[0].text for row in first] == [row[0].text for row in second]


def test_a_checkpoint_takes_vocabulary_and_answers(predictor, run_folder, pictures, vocabulary):
    loaded = Predictor.load(
        run_folder / "model.safetensors", vocabulary=vocabulary, answers=ANSWERS, device="cpu"
    )
    torch.testing.assert_close(loaded.match(pictures, TEXTS), predictor.match(pictures, TEXTS))
    assert loaded.answers == list(ANSWERS)


def test_sixteen_bits_are_close(run_folder, pictures, predictor):
    loaded = Predictor.load(run_folder, device="cpu", dtype="bfloat16")
    found, exact = (p.embed_images(pictures) for p in (loaded, predictor))
    assert found.dtype == torch.float32
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.05)


def test_pictures_are_resized_for_another_resolution(run_folder, pictures):
    loaded = Predictor.load(run_folder, device="cpu", image_size=64)
    assert loaded.embed_images(pictures).shape == (5, TINY.dim)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"dtype": "int8"}, "dtype: 'int8'"),
        ({"backend": "numpy"}, "backend: 'numpy' is not a backend"),
        ({"answers": ["yes"]}, "answers: the list has 1 answers, the model has"),
        ({"answers": [1] * len(ANSWERS)}, "answers: 1 is not a text"),
        ({"answers": ["\ud800"]}, r"answers: .* holds half of a surrogate pair"),
    ],
)
def test_bad_options_of_loading_are_refused(run_folder, options, message):
    with pytest.raises(ValueError, match=message):
        Predictor.load(run_folder, **{"device": "cpu", **options})


def test_files_that_do_not_fit_are_named(run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        load_model(tmp_path)
    for content, message in (("{", "is not JSON"), ('{"yes": 0}', "holds no list")):
        path = tmp_path / "answers.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_model(run_folder, answers=path)
    other = tmp_path / "vocab.txt"
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    other.write_text("".join(f"{token}\n" for token in (*specials, "a")))
    assert train_wordpiece(["a"], 6).get_vocab_size() == 6
    with pytest.raises(ValueError, match="has 6 tokens, the model has"):
        load_model(run_folder, vocabulary=other)


def test_a_model_without_questions_ignores_answers(tmp_path):
    save_checkpoint(model_of(("irtr",)), tmp_path / "model.safetensors")
    (tmp_path / "answers.json").write_text(json.dumps(["yes"]))
    assert load_model(tmp_path).answers is None
