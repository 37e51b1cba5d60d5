"""A user's own data: every supported form, and errors for unsupported data."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vlmo.data import (
    Draw,
    GlobalBatches,
    collate,
    digit_tokenizer,
    has_splits,
    loader,
    open_data,
)
from vlmo.data.answers import normal_answer, soft_scores, vocabulary
from vlmo.data.transforms import SquareTransform

TASKS = ("textmlm", "pretrain", "retrieval", "vqa", "nlvr2")
CAPTIONS: list[dict[str, Any]] = [
    {"image": "images/0.png", "caption": "a red square"},
    {"image": "images/1.png", "caption": ["a dog", "an animal"]},
    {"image": "images/2.png", "caption": ["a cat"], "image_id": 77},
]
QUESTIONS: list[dict[str, Any]] = [
    {"image": "images/0.png", "question": "what?", "answer": "Red"},
    {"image": "images/1.png", "question": "how many?", "answer": ["2", "2", "3", " 2 "]},
    {"image": "images/2.png", "question": "where?", "answers": {"here": 1.0, "red": 0.5}},
    {"image": "images/0.png", "question": "who?", "answer": "red", "question_id": 12},
]
STATEMENTS: list[dict[str, Any]] = [
    {"image_0": "images/0.png", "image_1": "images/1.png", "statement": "both", "label": True},
    {"image_0": "images/2.png", "image_1": "images/0.png", "statement": "one", "label": "False"},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, each of one grey level."""
    (tmp_path / "images").mkdir()
    for n in range(3):
        Image.new("RGB", (20 + n, 10), (50 * n,) * 3).save(tmp_path / "images" / f"{n}.png")
    return tmp_path


def write_jsonl(path: Path, records: list) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(source, task: str, split: str = "train", **options):
    return open_data(source, task, split, **({"image_size": 16} | options))


def level(sample: dict, name: str = "image") -> int:
    """The one grey level of a picture."""
    assert (sample[name].dtype, sample[name].shape) == (torch.uint8, (3, 16, 16))
    (value,) = sample[name].unique().tolist()
    return value


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_captions_of_json_lines(folder, task):
    data = opened(write_jsonl(folder / "pairs.jsonl", CAPTIONS), task)
    assert len(data) == 4
    assert [data.text(n) for n in range(4)] == ["a red square", "a dog", "an animal", "a cat"]
    assert [level(data[n]) for n in range(4)] == [0, 50, 50, 100]
    # Numbers and paths together become texts.
    assert data.image_ids == ["images/0.png", "images/1.png", "images/1.png", "77"]
    assert data[3].keys() == {"image", "text", "image_id"}
    assert data[3]["image_id"] == "77"
    assert data.answers is data.groups is None
    assert data.keys.tolist() == [0, 1, 1, 2]
    with pytest.raises(IndexError, match="4 of 4"):
        data[4]


def test_image_ids_that_are_numbers_stay_numbers(folder):
    records = [record | {"image_id": n} for n, record in enumerate(CAPTIONS)]
    data = opened(write_jsonl(folder / "pairs.jsonl", records), "retrieval")
    assert data.image_ids == [0, 1, 1, 2]


PARQUET = {
    "pretrain": [record | {"caption": ["x", "y"]} for record in CAPTIONS[:2]] + [CAPTIONS[2]],
    "nlvr2": [record | {"label": number == 0} for number, record in enumerate(STATEMENTS)],
    # Parquet stores such answers as a struct with both names in every row.
    "vqa": [QUESTIONS[2] | {"answers": {"x": 0.3}}, QUESTIONS[2]],
}


@pytest.mark.parametrize("task", list(PARQUET))
def test_parquet_is_read_alike(folder, task):
    records = PARQUET[task]
    columns = {name: [record.get(name) for record in records] for name in records[-1]}
    pq.write_table(pa.table(columns), folder / "data.parquet")
    data = opened(folder / "data.parquet", task)
    lines = opened(write_jsonl(folder / "data.jsonl", records), task)
    assert data.answers == lines.answers
    assert [*map(data.fields, range(len(data)))] == [*map(lines.fields, range(len(lines)))]
    with pytest.raises(ValueError, match=r"data\.parquet, row 1: has no '(text|question)'"):
        opened(folder / "data.parquet", "textmlm" if task != "pretrain" else "vqa")


def test_folder_of_splits(folder):
    write_jsonl(folder / "train.jsonl", CAPTIONS)
    pq.write_table(pa.Table.from_pylist(CAPTIONS[:1]), folder / "val.parquet")
    assert len(opened(folder, "pretrain")) == 4
    assert len(opened(str(folder), "pretrain", "val")) == 1
    with pytest.raises(FileNotFoundError, match=r"has no test\.jsonl, test\.json, .* or test\.p"):
        opened(folder, "pretrain", "test")
    write_jsonl(folder / "val.jsonl", CAPTIONS)
    with pytest.raises(ValueError, match=r"has val\.jsonl and val\.parquet"):
        opened(folder, "pretrain", "val")


def test_one_file_of_all_splits(folder):
    records = [CAPTIONS[0] | {"split": "train"}, CAPTIONS[1] | {"split": "val"}]
    path = write_jsonl(folder / "all.jsonl", records)
    assert [len(opened(path, "pretrain", split)) for split in ("train", "val")] == [1, 2]
    with pytest.raises(ValueError, match=r"all\.jsonl: holds nothing of split 'test'"):
        opened(path, "pretrain", "test")


def test_absolute_paths(folder, tmp_path_factory):
    records = [CAPTIONS[0] | {"image": str(folder / "images" / "2.png")}]
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    data = opened(write_jsonl(elsewhere / "pairs.jsonl", records), "pretrain")
    assert level(data[0]) == 100


def test_questions(folder):
    data = opened(write_jsonl(folder / "train.jsonl", QUESTIONS), "vqa")
    assert data.answers == ["red", "2", "here"]
    fields = [data.fields(n) for n in range(4)]
    assert [f["answer_labels"] for f in fields] == [[0], [1], [2, 0], [0]]
    assert [f["answer_scores"] for f in fields] == [[1.0], [0.9], [1.0, 0.5], [1.0]]
    assert [f["question_id"] for f in fields] == [0, 1, 2, 12]
    assert fields[1]["image_id"] == "images/1.png"
    assert level(data[1]) == 50
    assert data[1].keys() == {
        "image",
        "text",
        "image_id",
        "question_id",
        "answer_labels",
        "answer_scores",
    }
    batch = collate([data[n] for n in range(4)], digit_tokenizer(8), answers=3)
    expected = torch.tensor([[1, 0, 0], [0, 0.9, 0], [0.5, 0, 1], [1, 0, 0]])
    assert torch.equal(batch["vqa_targets"], expected)


def test_answers_come_from_the_train_split(folder):
    write_jsonl(folder / "train.jsonl", QUESTIONS)
    strange = [QUESTIONS[0], QUESTIONS[0] | {"answer": "blue"}]
    write_jsonl(folder / "val.jsonl", strange)
    val = opened(folder, "vqa", "val")
    assert val.answers == ["red", "2", "here"]
    # A question that cannot be answered counts as wrong, and is not left out.
    assert [val.fields(n)["answer_labels"] for n in range(2)] == [[0], []]
    frequent = opened(folder, "vqa", answer_minimum=2)
    assert frequent.answers == ["red"]
    assert len(frequent) == 3, "questions that nothing can be learned from are left out"
    unlabelled = [{name: QUESTIONS[0][name] for name in ("image", "question")}]
    write_jsonl(folder / "test.jsonl", unlabelled)
    test = opened(folder, "vqa", "test")
    assert test.fields(0)["answer_labels"] == test.fields(0)["answer_scores"] == []
    with pytest.raises(ValueError, match="answer_minimum: no answer is that of 5 questions"):
        opened(folder, "vqa", answer_minimum=5)
    with pytest.raises(ValueError, match="answer_minimum: 0"):
        opened(folder, "vqa", answer_minimum=0)


def test_given_answers_set_the_ids(folder):
    path = write_jsonl(folder / "train.jsonl", QUESTIONS)
    data = opened(path, "vqa", answers=["Blue", "RED"])
    assert data.answers == ["Blue", "RED"]
    assert len(data) == 3
    assert data.fields(1)["answer_labels"] == [1]
    assert data.fields(1)["answer_scores"] == [0.5]
    with pytest.raises(ValueError, match="answers: 'red' is listed twice"):
        opened(path, "vqa", answers=["Red", "red"])
    with pytest.raises(ValueError, match="no question has an answer among the 1 answers"):
        opened(path, "vqa", answers=["blue"])


def test_soft_scores_by_the_official_rule():
    people = ["a"] * 4 + ["b"] * 3 + ["C", " c "] + ["d"]
    assert soft_scores(people) == {"a": 1.0, "b": 0.9, "c": 0.6, "d": 0.3}
    assert soft_scores("Two  Dogs") == soft_scores(["two dogs"]) == {"two dogs": 1.0}
    assert soft_scores({"x": 0.25}) == {"x": 0.25}
    assert normal_answer("  Two\tDOGS ") == "two dogs"
    assert vocabulary([{"a": 0.3, "b": 0.9}, {"c": 1.0}, {"b": 0.3}, {}], 1) == ["b", "c"]
    assert vocabulary([{"a": 0.3, "b": 0.9}, {"c": 1.0}, {"b": 0.3}], 2) == ["b"]
    cases: list[tuple[Any, str]] = [
        ([], "is empty"),
        ({"x": 1.5}, "'x' the score 1.5"),
        ({"x": "1"}, "'1'"),
        ({"Yes": 1.0, "yes ": 0.3}, "gives scores for 'yes' twice"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            soft_scores(given)


def test_statements(folder):
    data = opened(write_jsonl(folder / "dev.jsonl", STATEMENTS), "nlvr2", "val")
    assert [data[n]["answers"] for n in range(2)] == [1, 0]
    assert [level(data[1], name) for name in ("image_0", "image_1")] == [100, 0]
    assert data[0].keys() == {"image_0", "image_1", "text", "answers", "identifier"}
    assert data[1]["identifier"] == 1


def test_texts(folder):
    path = write_jsonl(folder / "texts.jsonl", [{"text": "one"}, {"caption": ["two", "three"]}])
    data = opened(path, "textmlm")
    assert [data[n] for n in range(3)] == [{"text": "one"}, {"text": "two"}, {"text": "three"}]


def test_plain_text(tmp_path):
    lines = ["first", "", "  zweite Zeile mit ü ", "\t", "third"]
    for end, name in (("\n", "a.txt"), ("\r\n", "b.txt")):
        (tmp_path / name).write_bytes(end.join(lines).encode())
        data = opened(tmp_path / name, "textmlm")
        assert [data[n] for n in range(len(data))] == [
            {"text": "first"},
            {"text": "zweite Zeile mit ü"},
            {"text": "third"},
        ]
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "val.txt").write_text("x\ny\n")
    assert len(opened(tmp_path / "corpus", "textmlm", "val")) == 2
    (tmp_path / "blank.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"blank\.txt: holds no text"):
        opened(tmp_path / "blank.txt", "textmlm")
    (tmp_path / "mac.txt").write_bytes(b"a\r\nb\rc\r")
    with pytest.raises(ValueError, match=r"mac\.txt, line 2: holds carriage returns within"):
        opened(tmp_path / "mac.txt", "textmlm")
    (tmp_path / "latin.txt").write_bytes("ok\nü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt, line 2: is not UTF-8"):
        opened(tmp_path / "latin.txt", "textmlm")


def test_folder_of_pictures(folder):
    source = folder / "images"
    for n, captions in enumerate(["a black box\n", "grey\n\ndark\n", "lighter"]):
        (source / f"{n}.txt").write_text(captions)
    data = opened(source, "retrieval", "test")
    assert [data.text(n) for n in range(4)] == ["a black box", "grey", "dark", "lighter"]
    assert data.image_ids == ["0.png", "1.png", "1.png", "2.png"]
    assert [level(data[n]) for n in range(4)] == [0, 50, 50, 100]
    assert opened(source, "textmlm")[2] == {"text": "dark"}
    (source / "1.txt").write_bytes("ü".encode("latin-1"))
    with pytest.raises(ValueError, match=r"1\.txt, line 1: is not UTF-8"):
        opened(source, "retrieval")
    (source / "1.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"1\.txt: holds no caption"):
        opened(source, "retrieval")
    (source / "1.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 pictures have no .txt of captions: .*1\.png"):
        opened(source, "retrieval")
    (source / "1.txt").write_text("x")
    with pytest.raises(
        FileNotFoundError, match=r"3 pictures but no records; vqa needs .*/test\.jsonl"
    ):
        opened(source, "vqa", "test")


def test_folder_of_pictures_with_splits(folder):
    (folder / "images").rename(folder / "train")
    for n in range(3):
        (folder / "train" / f"{n}.txt").write_text(f"picture {n}")
    assert len(opened(folder, "pretrain")) == 3
    with pytest.raises(FileNotFoundError, match="val: does not exist"):
        opened(folder, "pretrain", "val")
    (folder / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no pictures"):
        opened(folder, "pretrain", "val")


def test_missing_pictures_are_listed(folder):
    records = [{"image": f"gone/{n}.png", "caption": "x"} for n in range(12)]
    path = write_jsonl(folder / "pairs.jsonl", [*CAPTIONS, *records])
    with pytest.raises(FileNotFoundError) as failure:
        opened(path, "pretrain")
    message = str(failure.value)
    assert "pairs.jsonl: 12 image files are missing" in message
    assert all(str(folder / "gone" / f"{n}.png") in message for n in range(10))
    assert message.endswith("9.png and 2 more")


def test_damaged_pictures_are_named(folder):
    (folder / "images" / "1.png").write_bytes(b"nothing")
    data = opened(write_jsonl(folder / "pairs.jsonl", CAPTIONS), "pretrain")
    with pytest.raises(ValueError, match=r"images/1\.png: is not an image"):
        data[1]


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("nlvr2", STATEMENTS[0] | {"label": None}, "has no 'label': it is empty or null"),
        ("pretrain", {"caption": "x"}, "has no 'image'"),
        ("pretrain", {"image": "images/0.png"}, "has no 'caption'"),
        ("pretrain", {"image": "images/0.png", "caption": None}, "has no 'caption': it is empty"),
        ("pretrain", {"image": "a" * 5000, "caption": "x"}, "image: 'a.*' is not a path"),
        ("pretrain", {"image": 3, "caption": "x"}, "image: 3 is not a path"),
        ("pretrain", {"image": "images/0.png", "caption": [1]}, r"caption: \[1\] is not a text"),
        ("pretrain", {"image": "images/0.png", "caption": []}, r"caption: \[\] is not a text"),
        ("pretrain", CAPTIONS[0] | {"image_id": 1.5}, "image_id: 1.5 is not an integer or a text"),
        ("vqa", QUESTIONS[0] | {"answer": 2}, r"answer: 2 is not made of texts"),
        ("vqa", QUESTIONS[0] | {"answer": []}, r"answer is empty"),
        ("vqa", QUESTIONS[0] | {"answer": None}, "has no 'answer'"),
        ("vqa", QUESTIONS[0] | {"answers": {"a": 2}}, "answers gives 'a' the score 2"),
        ("nlvr2", STATEMENTS[0] | {"label": "maybe"}, "label: 'maybe' is neither"),
        ("nlvr2", {"image_0": "images/0.png", "statement": "x", "label": 1}, "has no 'image_1'"),
        ("textmlm", {"words": "x"}, "has no 'text', only 'words'"),
    ],
)
def test_records_that_do_not_fit(folder, task, record, message):
    good = {"pretrain": CAPTIONS, "vqa": QUESTIONS, "nlvr2": STATEMENTS}.get(task, [{"text": "x"}])
    path = write_jsonl(folder / "data.jsonl", [good[0], record])
    with pytest.raises(ValueError, match=rf"data\.jsonl, line 2: {message}"):
        opened(path, task)


def test_files_that_are_not_what_they_seem(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3: is not JSON"):
        opened(tmp_path / "a.jsonl", "textmlm")
    (tmp_path / "b.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: \[1\] is not a JSON object"):
        opened(tmp_path / "b.jsonl", "textmlm")
    (tmp_path / "b.jsonl").write_bytes('{"text": "x"}\n{"text": "ü"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 2: is not UTF-8"):
        opened(tmp_path / "b.jsonl", "textmlm")
    (tmp_path / "c.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"c\.parquet: is not a Parquet file"):
        opened(tmp_path / "c.parquet", "textmlm")
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"d\.jsonl: holds nothing"):
        opened(tmp_path / "d.jsonl", "textmlm")


def test_sources_that_cannot_be_read(folder):
    with pytest.raises(FileNotFoundError, match=r"source: .*absent does not exist"):
        opened(folder / "absent", "pretrain")
    (folder / "data.xml").write_text("x")
    with pytest.raises(ValueError, match=r"data\.xml is not a file of \.jsonl, .* for vqa"):
        opened(folder / "data.xml", "vqa")
    path = write_jsonl(folder / "pairs.jsonl", CAPTIONS)
    with pytest.raises(ValueError, match=r"datasets: \['coco'\]"):
        opened(path, "pretrain", datasets=["coco"])
    with pytest.raises(ValueError, match="image_size: 0"):
        opened(path, "pretrain", image_size=0)


def test_missing_extras_are_named(folder, monkeypatch):
    path = write_jsonl(folder / "pairs.jsonl", CAPTIONS)
    for module in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    for module in ("arrow", "own"):
        monkeypatch.delitem(sys.modules, f"vlmo.data.{module}")
    with pytest.raises(ImportError, match=r"needs pyarrow.*: pip install 'vlmo\[train\]'"):
        opened(path, "pretrain")


def test_training_augments_by_the_seed_of_the_draw(folder):
    picture = np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "images" / "0.png")
    path = write_jsonl(folder / "statements.jsonl", [STATEMENTS[0] | {"image_1": "images/0.png"}])
    data = opened(path, "nlvr2", train=True)
    one, again, other = data[Draw(0, 5)], data[Draw(0, 5)], data[Draw(0, 6)]
    assert torch.equal(one["image_0"], again["image_0"])
    assert not torch.equal(one["image_0"], other["image_0"])
    assert not torch.equal(one["image_0"], one["image_1"]), "two pictures, two crops"
    plain = opened(path, "nlvr2")
    assert torch.equal(plain[Draw(0, 5)]["image_0"], plain[0]["image_0"])
    assert torch.equal(plain[0]["image_0"], SquareTransform(16)(Image.fromarray(picture)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.heavy)])
def test_workers_change_nothing(folder, method):
    picture = np.random.RandomState(0).randint(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "images" / "1.png")
    write_jsonl(folder / "train.jsonl", CAPTIONS)
    (folder / "train.txt").write_text("one\ntwo\nthree\nfour\n")
    for source, task in ((folder, "pretrain"), (folder / "train.txt", "textmlm")):
        data = opened(source, task, train=True)
        assert len(data[0]) == (1 if task == "textmlm" else 3)  # and what it maps is open
        batches = GlobalBatches(4, 2, steps=4)
        workers = 2 if method == "fork" else 1
        helped = loader(data, batches, digit_tokenizer(8), mask_share=0.5, workers=workers)
        helped.multiprocessing_context = method
        alone = loader(data, batches, digit_tokenizer(8), mask_share=0.5)
        for one, two in zip(alone, helped, strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                if torch.is_tensor(value):
                    assert torch.equal(value, two[name]), name
                else:
                    assert value == two[name], name


def test_which_sources_tell_their_splits_apart(folder):
    assert has_splits("digits")
    bare = write_jsonl(folder / "bare.jsonl", CAPTIONS)
    told = write_jsonl(folder / "told.jsonl", [*CAPTIONS, CAPTIONS[0] | {"split": "val"}])
    assert [has_splits(source) for source in (bare, told, folder)] == [False, True, False]
    (folder / "lines.txt").write_text("a\n")
    assert not has_splits(folder / "lines.txt")
    write_jsonl(folder / "train.jsonl", CAPTIONS)
    assert has_splits(folder)
    for name in ("pictures", "parted"):
        (folder / name / "val").mkdir(parents=True)
    (folder / "pictures" / "val").rmdir()
    assert [has_splits(folder / name) for name in ("pictures", "parted")] == [False, True]


def test_links_to_folders_of_pictures_are_followed_once(folder):
    (folder / "images").rename(folder / "there")
    for n in range(3):
        (folder / "there" / f"{n}.txt").write_text(f"picture {n}")
    source = folder / "source"
    (source / "below").mkdir(parents=True)
    (source / "a").symlink_to(folder / "there")
    (source / "again").symlink_to(folder / "there")
    (source / "below" / "loop").symlink_to(source)
    assert opened(source, "pretrain").image_ids == ["a/0.png", "a/1.png", "a/2.png"]


def test_captions_of_no_picture_are_told(folder):
    for n in range(3):
        (folder / "images" / f"{n}.txt").write_text(f"picture {n}")
    (folder / "images" / "3.heic").touch()
    (folder / "images" / "3.txt").write_text("lost")
    with pytest.warns(UserWarning, match=r"images: 1 \.txt lie beside no picture.*3\.txt"):
        assert len(opened(folder / "images", "pretrain")) == 3


def test_a_record_in_the_file_of_another_split_is_refused(folder):
    records = [CAPTIONS[0], CAPTIONS[0] | {"split": "restval"}, CAPTIONS[0] | {"split": "dev"}]
    write_jsonl(folder / "train.jsonl", records)
    with pytest.raises(ValueError, match=r"train\.jsonl, line 3: split: 'dev', but .* 'train'"):
        opened(folder, "pretrain")
    write_jsonl(folder / "train.jsonl", records[:2])
    assert opened(folder, "pretrain").image_ids
