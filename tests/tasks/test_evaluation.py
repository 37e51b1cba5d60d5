"""Metrics, compared with manual computation, direct calls of the model, and two processes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import evaluation_cases
from evaluation_cases import (
    HEADS,
    TINY,
    TOKENIZER,
    Damaged,
    First,
    damaged,
    digits,
    model_of,
    results,
)
from processes import in_ranks
from vlmo.data import ANSWERS, BadSample, Draw, TextTokenizer, collate, open_data, train_wordpiece
from vlmo.data.draws import hashed
from vlmo.tasks import evaluation
from vlmo.tasks.evaluation import evaluate, gallery_of
from vlmo.tasks.losses import compute_losses
from vlmo.tasks.retrieval import Embeddings, encode, recall_at


class Given(nn.Module):
    """A classifier that gives these logits, row after row."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.rows = iter(logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([next(self.rows) for _ in range(len(x))])


def whole_batch(dataset, task: str, rows: list[int]) -> dict:
    """All rows as one batch."""
    mask_share = evaluation.MASK_SHARE if task in ("pretrain", "textmlm") else None
    answers = None if dataset.answers is None else len(dataset.answers)
    samples = [dataset[row] for row in rows]
    return collate(
        samples, TOKENIZER, mask_share=mask_share, seeds=hashed(rows).tolist(), answers=answers
    )


def targets_of(dataset) -> torch.Tensor:
    return whole_batch(dataset, "vqa", list(range(len(dataset))))["vqa_targets"]


def test_vqa_score_of_a_perfect_a_wrong_and_a_constant_classifier():
    soft = [[0.3], [1.0, 0.6], [0.9]] + [[1.0]] * 8
    labels = [[2], [3, 4], [2]] + [[5]] * 8
    dataset = digits("vqa", answer_labels=labels, answer_scores=soft)
    targets = targets_of(dataset)
    model = model_of(("vqa",))
    best = (0.3 + 1.0 + 0.9 + 8) / 11
    for logits, expected in (
        (targets, best),
        (-targets, 0.0),
        (torch.eye(len(ANSWERS))[[2] * 11], (0.3 + 0.9) / 11),
        (torch.eye(len(ANSWERS))[[4] * 11], 0.6 / 11),
    ):
        model.vqa_classifier = Given(logits)
        found = evaluate(model, dataset, TOKENIZER, "vqa", batch_size=4)
        assert found["vqa_score"] == pytest.approx(expected)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, targets) * len(ANSWERS)
        assert found["vqa_loss"] == pytest.approx(float(loss), rel=1e-5)


def test_questions_without_a_known_answer_count_as_wrong():
    dataset = digits("vqa", answer_labels=[[]] + [[0]] * 10, answer_scores=[[]] + [[1.0]] * 10)
    model = model_of(("vqa",))
    model.vqa_classifier = Given(targets_of(dataset))
    found = evaluate(model, dataset, TOKENIZER, "vqa")
    assert found["vqa_score"] == pytest.approx(10 / 11)


def test_a_test_split_without_answers_has_predictions_only(tmp_path):
    dataset = digits(
        "vqa", answer_labels=[[]] * 11, answer_scores=[[]] * 11, question_id=range(100, 111)
    )
    model = model_of(("vqa",))
    model.vqa_classifier = Given(torch.eye(len(ANSWERS))[torch.arange(11) % len(ANSWERS)])
    path = tmp_path / "answers.json"
    assert evaluate(model, dataset, TOKENIZER, "vqa", batch_size=4, predictions=path) == {}
    assert json.loads(path.read_text()) == [
        {"question_id": 100 + n, "answer": ANSWERS[n % len(ANSWERS)]} for n in range(11)
    ]


def test_nlvr2_accuracy_of_each_split(tmp_path):
    names = [f"dev-{n}-0-0" for n in range(4)] + [f"test1-{n}-0-0" for n in range(7)]
    labels = [1, 0, 1, 1] + [0] * 7
    dataset = digits("nlvr2", identifier=names, answers=labels)
    dataset.answers = None
    model = model_of(("nlvr2",))
    chosen = [1, 0, 0, 0] + [0, 0, 0, 0, 0, 0, 1]
    model.nlvr2_classifier = Given(torch.eye(2)[chosen])
    path = tmp_path / "answers.csv"
    found = evaluate(model, dataset, TOKENIZER, "nlvr2", batch_size=3, predictions=path)
    assert found["accuracy"] == pytest.approx(8 / 11)
    assert found["dev_accuracy"] == pytest.approx(2 / 4)
    assert found["test1_accuracy"] == pytest.approx(6 / 7)
    lines = path.read_text().splitlines()
    assert lines == [f"{n},{bool(answer)}" for n, answer in zip(names, chosen, strict=True)]


def test_splits_by_the_name_of_the_table():
    names = ["nlvr2_dev"] * 4 + ["nlvr2_test1"] * 7
    dataset = digits("nlvr2", table_name=names)
    dataset.answers = None
    model = model_of(("nlvr2",))
    model.nlvr2_classifier = Given(torch.eye(2)[[1] * 4 + [0] * 7])
    found = evaluate(model, dataset, TOKENIZER, "nlvr2")
    true = [row["answers"] for row in map(dataset.__getitem__, range(11))]
    assert found["dev_accuracy"] == pytest.approx(sum(true[:4]) / 4)
    assert found["test1_accuracy"] == pytest.approx(1 - sum(true[4:]) / 7)
    assert "test_accuracy" not in found


def test_the_accuracy_of_one_split_has_one_name():
    dataset = digits("nlvr2")
    found = evaluate(model_of(("nlvr2",)), dataset, TOKENIZER, "nlvr2")
    assert set(found) == {"accuracy", "nlvr2_loss"}


def test_recall_of_hand_made_embeddings(monkeypatch):
    """Three images of two, one and two captions; the last caption is nearest to the first image."""
    dataset = digits("retrieval", size=5, image_id=["b", "b", "a", 7, 7])
    vectors = torch.eye(3)
    text = vectors[[0, 0, 1, 2, 0]]
    text[4, 2] = 0.5
    text = nn.functional.normalize(text, dim=1)
    monkeypatch.setattr(evaluation, "encode", lambda *_, **__: Embeddings(vectors, text))
    found = evaluate(model_of(("irtr",)), dataset, TOKENIZER, "retrieval")
    assert found["ir@1"] == pytest.approx(4 / 5)
    assert found["tr@1"] == 1.0
    assert found["ir@5"] == found["tr@10"] == 1.0
    assert found["mean_recall"] == pytest.approx((4 / 5 + 5) / 6)


def test_gallery_holds_an_image_of_several_captions_once():
    dataset = digits("retrieval", size=5, image_id=["b", "b", "a", 7, "b"])
    gallery = gallery_of(dataset, TOKENIZER)
    assert gallery.image_of_text.tolist() == [0, 0, 1, 2, 0]
    assert len(gallery.images) == 3
    for number, row in enumerate((0, 2, 3)):
        assert torch.equal(gallery.images[number], dataset[row]["image"])
    words = TOKENIZER.encode([dataset[row]["text"] for row in range(5)])
    assert torch.equal(gallery.text_ids, words["text_ids"])
    assert torch.equal(gallery.text_masks, words["text_masks"])


def test_no_image_is_decoded_to_learn_what_the_gallery_holds():
    class Telling(First):
        image_ids = ("b", "b", "a")

        def text(self, index: int) -> str:
            return f"a {index}"

        def __getitem__(self, item) -> dict:
            raise AssertionError("a sample was made")

    scenes = open_data("digits", "retrieval", "val", image_size=32)
    gallery = gallery_of(Telling(scenes, 3), TOKENIZER)
    assert gallery.image_of_text.tolist() == [0, 0, 1]
    assert torch.equal(gallery.text_ids, TOKENIZER.encode(["a 0", "a 1", "a 2"])["text_ids"])


def test_retrieval_is_the_recall_of_the_models_embeddings():
    dataset, model = digits("retrieval"), model_of(HEADS["retrieval"])
    found = evaluate(model, dataset, TOKENIZER, "retrieval", batch_size=4, rerank=100)
    gallery = gallery_of(dataset, TOKENIZER)
    embeddings = encode(model, gallery)
    samples = [dataset[row] for row in range(11)]
    with torch.no_grad():
        model.eval()
        pixels = torch.stack([sample["image"] for sample in samples])
        words = TOKENIZER.encode([sample["text"] for sample in samples])
        image, text = model.encode_image(pixels).embedding, model.encode_text(*words.values())
        logits = torch.stack(
            [
                model.itm_score(
                    model.fuse(
                        words["text_ids"][n].expand(11, -1),
                        words["text_masks"][n].expand(11, -1),
                        pixels,
                    ).pooled
                )[:, 1]
                for n in range(11)
            ]
        )
    torch.testing.assert_close(embeddings.image, image)
    torch.testing.assert_close(embeddings.text, text.embedding)
    recall = recall_at(embeddings, torch.arange(11))
    assert found["tr@1"] == recall.text[1]
    assert found["ir@5"] == recall.image[5]
    scores = logits + text.embedding @ image.T
    own = scores.diagonal()
    assert found["reranked_ir@1"] == pytest.approx(
        float((scores.max(1).values == own).float().mean())
    )
    assert found["reranked_tr@5"] == pytest.approx(
        float(((scores >= own).sum(0) <= 5).float().mean())
    )


@pytest.mark.parametrize("task", ["pretrain", "textmlm", "vqa", "nlvr2"])
def test_losses_are_those_of_training(task):
    """For one batch; in a world of one."""
    dataset, model = digits(task), model_of(HEADS[task])
    model.train()
    found = evaluate(model, dataset, TOKENIZER, task, batch_size=16)
    assert model.training
    order = list(range(11))
    if task == "pretrain":
        order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).tolist()
    batch = whole_batch(dataset, task, order)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        expected = compute_losses(model.eval(), batch, generator=generator)
    losses = {name: float(value) for name, value in expected.items() if name.endswith("loss")}
    if len(losses) == 2:
        del losses["loss"]
    assert {n: v for n, v in found.items() if n.endswith("loss")} == pytest.approx(losses, rel=1e-5)
    for name in {"mlm", "itm", "nlvr2"} & {key.split("_")[0] for key in expected}:
        right = (expected[f"{name}_logits"].argmax(1) == expected[f"{name}_labels"]).double().mean()
        assert found["accuracy" if name == "nlvr2" else f"{name}_accuracy"] == pytest.approx(
            float(right)
        )
    if task == "pretrain":
        label = torch.arange(11)
        for name in ("i2t", "t2i"):
            right = (expected[f"itc_{name}_logits"].argmax(1) == label).double().mean()
            assert found[f"itc_{name}_accuracy"] == pytest.approx(float(right))
        assert 0 <= found["itc_vl_i2t_accuracy"] <= 1


def test_mlm_losses_of_batches_are_weighed_by_their_words():
    dataset, model = digits("textmlm"), model_of(("textmlm",))
    whole, parts = (
        evaluate(model, dataset, TOKENIZER, "textmlm", batch_size=size) for size in (16, 2)
    )
    assert parts == pytest.approx(whole, rel=1e-5)


def test_metrics_are_repeatable_and_leave_random_numbers_alone():
    dataset, model = digits("pretrain"), model_of(HEADS["pretrain"])
    state = torch.get_rng_state()
    first, again = (evaluate(model, dataset, TOKENIZER, "pretrain", batch_size=4) for _ in "ab")
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("task", HEADS)
def test_workers_change_nothing(task):
    dataset, model = digits(task), model_of(HEADS[task])
    without, with_workers = (
        evaluate(model, dataset, TOKENIZER, task, batch_size=4, workers=workers)
        for workers in (0, 2)
    )
    assert without == with_workers


@pytest.mark.parametrize("task", HEADS)
def test_autocast_rounds(task):
    dataset, model = digits(task), model_of(HEADS[task])
    options: dict[str, Any] = {"rerank": 3} if task == "retrieval" else {}
    exact = evaluate(model, dataset, TOKENIZER, task, **options)
    rounded = evaluate(model, dataset, TOKENIZER, task, autocast=torch.bfloat16, **options)
    assert rounded.keys() == exact.keys()
    for name in exact:
        if name.endswith("loss"):
            assert rounded[name] != exact[name]
            assert rounded[name] == pytest.approx(exact[name], rel=0.1)


class Chosen(torch.utils.data.Dataset):
    """Some samples of a data set."""

    def __init__(self, dataset, rows: list[int]):
        self.dataset, self.rows, self.answers = dataset, rows, dataset.answers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item) -> dict:
        return self.dataset[self.rows[Draw.of(item).index]]


BAD = (3, 4, 5, 6, 8)  # of 11 samples: the whole second batch of four, and one of the third
GOOD = [row for row in range(11) if row not in BAD]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", ["vqa", "nlvr2", "retrieval"])
def test_without_bad_samples_the_metrics_are_those_of_the_others(capfd, task, workers):
    model, options = model_of(HEADS[task]), {"batch_size": 4, "workers": workers}
    if task == "retrieval":
        options["rerank"] = 3
    found = evaluate(model, damaged(task, *BAD), TOKENIZER, task, on_bad_sample="skip", **options)
    assert found.pop("skipped") == 5
    said = capfd.readouterr().err
    assert said.startswith("vlmo: 5 samples cannot be read and are left out:\n")
    assert [f"picture {row} is damaged" in said for row in range(11)] == [
        n in BAD for n in range(11)
    ]
    expected = evaluate(model, Chosen(digits(task), GOOD), TOKENIZER, task, **options)
    assert found == pytest.approx(expected, rel=1e-5)
    whole = evaluate(model, digits(task), TOKENIZER, task, on_bad_sample="skip", **options)
    assert whole == evaluate(model, digits(task), TOKENIZER, task, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("task", HEADS)
def test_a_bad_sample_is_an_error_with_its_own_words(task, workers):
    with pytest.raises(BadSample, match=r"^picture 8 is damaged$"):
        evaluate(model_of(HEADS[task]), damaged(task, 8), TOKENIZER, task, workers=workers)
    with pytest.raises(ValueError, match="on_bad_sample: 'replace' is not one of"):
        evaluate(*(model_of(HEADS[task]), digits(task), TOKENIZER, task), on_bad_sample="replace")


@pytest.mark.parametrize("task", HEADS)
def test_nothing_but_bad_samples_is_an_error(task):
    dataset = damaged(task, *range(11))
    with pytest.raises(ValueError, match="no sample can be read, the first because of picture"):
        evaluate(
            *(model_of(HEADS[task]), dataset, TOKENIZER, task),
            batch_size=4,
            on_bad_sample="skip",
        )


def test_a_bad_image_leaves_out_its_texts(capfd):
    ids = ["b", "b", "a", 7, "b"]

    class Telling(Damaged):
        bad = (0,)
        image_ids = ids

        def text(self, index: int) -> str:
            return self.dataset[index]["text"]

    scenes = open_data("digits", "retrieval", "val", image_size=32)
    model = model_of(HEADS["retrieval"])
    found = evaluate(
        *(model, Telling(scenes, 5, image_id=ids), TOKENIZER, "retrieval"), on_bad_sample="skip"
    )
    assert found.pop("skipped") == 3
    assert capfd.readouterr().err.count("picture 0 is damaged") == 1
    others = Chosen(digits("retrieval", 5, image_id=ids), [2, 3])
    assert found == evaluate(model, others, TOKENIZER, "retrieval")


def test_a_text_that_cannot_be_read_leaves_out_itself(capfd):
    class Telling(First):
        image_ids = ("b", "b", "a")

        def text(self, index: int) -> str:
            if index == 0:
                raise BadSample("text 0 is not UTF-8", 0)
            return f"a {index}"

    dataset = Telling(open_data("digits", "retrieval", "val", image_size=32), 3)
    with pytest.raises(BadSample, match="text 0 is not UTF-8"):
        gallery_of(dataset, TOKENIZER)
    found = evaluate(model_of(("irtr",)), dataset, TOKENIZER, "retrieval", on_bad_sample="skip")
    assert found["skipped"] == 1
    assert "text 0 is not UTF-8" in capfd.readouterr().err


def test_a_sample_left_alone_in_its_batch_has_no_negative(capfd):
    dataset, model = damaged("pretrain", size=4), model_of(HEADS["pretrain"])
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    dataset.bad = (order[0],)
    options: dict[str, Any] = {"batch_size": 2, "on_bad_sample": "skip"}
    found = evaluate(model, dataset, TOKENIZER, "pretrain", **options)
    assert found.pop("skipped") == 2
    assert "is left without a negative in its batch" in capfd.readouterr().err
    assert all(math.isfinite(value) for value in found.values())
    # With contrast and masked words alone it counts.
    model = model_of(("mlm", "itc"))
    assert evaluate(model, dataset, TOKENIZER, "pretrain", **options)["skipped"] == 1


def test_a_file_of_answers_tells_what_it_lacks(tmp_path, capfd):
    dataset = damaged("vqa", *BAD, question_id=range(100, 111))
    path = tmp_path / "answers.json"
    evaluate(
        *(model_of(("vqa",)), dataset, TOKENIZER, "vqa"),
        batch_size=4,
        predictions=path,
        on_bad_sample="skip",
    )
    rows = json.loads(path.read_text())
    assert [row["question_id"] for row in rows] == [100 + row for row in GOOD]
    said = capfd.readouterr().err
    assert f"vlmo: {path} lacks 5 samples: 103, 104, 105, 106, 108\n" in said


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("retrieval", "itc_text_proj"),
        ("retrieval", "itm_score"),
        ("vqa", "vqa_classifier.3"),
        ("nlvr2", "nlvr2_classifier.3"),
        ("pretrain", "itc_image_proj"),
        ("textmlm", "mlm_score.decoder"),
    ],
)
def test_outputs_that_are_not_finite_are_never_a_metric(task, name, tmp_path):
    model = model_of(HEADS[task])
    with torch.no_grad():
        for parameter in model.get_submodule(name).parameters():
            parameter.fill_(math.nan)
    options: dict[str, Any] = {"rerank": 3} if task == "retrieval" else {}
    path = tmp_path / "answers"
    if task in ("vqa", "nlvr2"):
        options["predictions"] = path
    with pytest.raises(FloatingPointError, match="outputs are NaN or infinite"):
        evaluate(model, digits(task), TOKENIZER, task, **options)
    assert not path.exists()


def test_a_vocabulary_of_another_number_is_refused():
    other = TextTokenizer(train_wordpiece(["a"], 6), 12)
    with pytest.raises(ValueError, match=f"has 6 tokens, the model has {TINY.vocab_size}"):
        evaluate(model_of(("vqa",)), digits("vqa"), other, "vqa")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    in_ranks(lambda: evaluation_cases.main(folder), folder)
    return folder


@pytest.mark.heavy
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_ranks_find_what_one_does(two_ranks, wrapper, tmp_path):
    """11 samples do not divide among 2 ranks; of 2 samples in batches of 4, one rank has none."""
    first, second = (
        json.loads((two_ranks / wrapper / f"rank{rank}.json").read_text()) for rank in range(2)
    )
    assert first == second
    for size in (11, 2):
        alone = results(lambda model: model, tmp_path, size)
        assert first[str(size)].keys() == alone.keys()
        for task, metrics in alone.items():
            assert first[str(size)][task] == pytest.approx(metrics, rel=1e-5), task
    for name in ("vqa", "nlvr2"):
        assert (two_ranks / wrapper / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize(
    ("task", "heads", "options", "message"),
    [
        ("caption", ("vqa",), {}, "task: 'caption' is not one of"),
        ("retrieval", ("vqa",), {}, "needs a head of itc or irtr, the model has"),
        ("vqa", ("irtr",), {}, "needs a head of vqa"),
        ("retrieval", ("irtr",), {"rerank": 4}, "rerank: needs the head of itm"),
        ("vqa", ("vqa",), {"rerank": 4}, "rerank: 4"),
        ("retrieval", ("irtr",), {"rerank": -1}, "rerank: -1"),
        ("textmlm", ("textmlm",), {"predictions": "x"}, "predictions: task 'textmlm'"),
        ("vqa", ("vqa",), {"batch_size": 0}, "batch_size: 0"),
        ("pretrain", ("itc", "itm"), {"batch_size": 1}, "no negatives in a batch of 1"),
        ("pretrain", ("mlm", "itm"), {}, "itm needs itc"),
    ],
)
def test_bad_arguments_are_refused(task, heads, options, message):
    dataset = digits(task if task in HEADS else "vqa")
    with pytest.raises(ValueError, match=message):
        evaluate(model_of(heads), dataset, TOKENIZER, task, **options)


def test_answers_of_another_number_are_refused():
    with pytest.raises(ValueError, match="model has 5"):
        evaluate(model_of(("vqa",), vqa_labels=5), digits("vqa"), TOKENIZER, "vqa")


def test_an_empty_data_set_is_refused():
    with pytest.raises(ValueError, match="holds no sample"):
        evaluate(model_of(("vqa",)), digits("vqa", size=0), TOKENIZER, "vqa")


class Without(First):
    """Samples that lack a key."""

    def __getitem__(self, item) -> dict:
        return {n: v for n, v in super().__getitem__(item).items() if n not in self.changes}


def test_predictions_need_the_names_of_samples(tmp_path):
    scenes = open_data("digits", "vqa", "val", image_size=32)
    dataset = Without(scenes, 3, question_id=range(3))
    path = tmp_path / "answers.json"
    with pytest.raises(ValueError, match="have no question_id"):
        evaluate(model_of(("vqa",)), dataset, TOKENIZER, "vqa", predictions=path)
    assert not path.exists()


def test_retrieval_needs_the_ids_of_images():
    scenes = open_data("digits", "retrieval", "val", image_size=32)
    with pytest.raises(ValueError, match="no image_id"):
        gallery_of(Without(scenes, 3, image_id=range(3)), TOKENIZER)
