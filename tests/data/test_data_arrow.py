"""The Arrow files of unilm: the files of each split, and the samples from their rows."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from vlmo.data import Draw, GlobalBatches, collate, digit_tokenizer, loader, open_data
from vlmo.data.arrow import DATASETS

COCO = "coco_caption_karpathy"
Columns = dict[str, list]
# Two rows of each, as the official scripts write them; pictures are grey levels, see write().
PAIRS: Columns = {
    "image": [10, 20],
    "caption": [["a dog", "an animal"], ["a cat"]],
    "image_id": [5, 3],
}
REGIONS: Columns = PAIRS | {
    "width": [[4, 4], [4]],
    "height": [[4, 4], [4]],
    "x": [[0, 1], [0]],
}
NAMED: Columns = PAIRS | {"image_id": ["a.jpg", "b.jpg"], "split": ["train", "train"]}
TEXTS: Columns = {
    "image": ["None"] * 2,
    "caption": [["one line"], ["another"]],
    "source": ["wikibk"] * 2,
}
QUESTIONS: Columns = {
    "image": [30, 40],
    "questions": [["what?", "how many?"], ["who?"]],
    "answers": [[["red", "blue"], ["2"]], [["red"]]],
    "answer_labels": [[[0, 2], [1]], [[0]]],
    "answer_scores": [[[1.0, 0.3], [0.9]], [[0.6]]],
    "image_id": [7, 8],
    "question_id": [[70, 71], [80]],
    "split": ["train", "train"],
}
UNLABELLED: Columns = QUESTIONS | {
    name: [[], []] for name in ("answers", "answer_labels", "answer_scores")
}
STATEMENTS: Columns = {
    "image_0": [50, 60],
    "image_1": [51, 61],
    "questions": [["both are", "one is"], ["none is"]],
    "answers": [["True", "False"], ["True"]],
    "identifier": ["dev-1-0", "dev-2-0"],
}


def picture(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (level,) * 3).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, columns: dict[str, list[Any]], *stems: str, rows_of_batch: int = 1) -> None:
    """An Arrow file for each stem; a number in a column of pictures is a picture of that level."""
    columns = {
        name: [picture(v) if name.startswith("image") and isinstance(v, int) else v for v in values]
        if name != "image_id"
        else values
        for name, values in columns.items()
    }
    table = pa.table(columns)
    for stem in stems:
        with (
            pa.OSFile(str(folder / f"{stem}.arrow"), "wb") as sink,
            pa.RecordBatchFileWriter(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=rows_of_batch)


def opened(folder: Path, task: str, split: str = "train", **options):
    return open_data(folder, task, split, **({"image_size": 16} | options))


def level(sample: dict, name: str = "image") -> int:
    assert (sample[name].dtype, sample[name].shape) == (torch.uint8, (3, 16, 16))
    (value,) = sample[name].unique().tolist()
    return value


def texts(data) -> list[str]:
    return [data.text(n) for n in range(len(data))]


@pytest.fixture
def pretraining(tmp_path) -> Path:
    """Every file of the four data sets of pre-training."""
    write(tmp_path, PAIRS, f"{COCO}_train", f"{COCO}_restval", f"{COCO}_val", f"{COCO}_test")
    write(tmp_path, REGIONS, "vg")
    write(tmp_path, NAMED, *DATASETS["sbu"]["train"])
    write(tmp_path, NAMED, *DATASETS["gcc"]["train"], *DATASETS["gcc"]["val"], rows_of_batch=2)
    return tmp_path


@pytest.fixture
def questions(tmp_path) -> Path:
    write(tmp_path, QUESTIONS, "vqav2_train", "vqav2_trainable_val", "vqav2_rest_val")
    write(tmp_path, UNLABELLED, "vqav2_test", "vqav2_test-dev")
    return tmp_path


def test_pre_training_joins_four_data_sets(pretraining):
    train = opened(pretraining, "pretrain")
    assert len(train) == 3 * (2 + 1 + 9 + 30)
    assert texts(train)[:4] == ["a dog", "an animal", "a cat", "a dog"]
    assert [level(train[n]) for n in (0, 1, 2, 3, 8, 124, 125)] == [10, 10, 20, 10, 20, 10, 20]
    # Ids of different data sets are different pictures; samples keep their own.
    assert train.image_ids[:3] == ["coco/5", "coco/5", "coco/3"]
    assert train.image_ids[-3:] == ["gcc/a.jpg", "gcc/a.jpg", "gcc/b.jpg"]
    assert train.fields(125) == {"text": "a cat", "image_id": "b.jpg"}
    assert train[0].keys() == {"image", "text", "image_id"}
    assert len(opened(pretraining, "pretrain", "val")) == 6  # coco and gcc
    assert len(opened(pretraining, "pretrain", "test")) == 3
    with pytest.raises(IndexError, match="126 of 126"):
        train[126]


@pytest.mark.parametrize(
    ("datasets", "size"), [(["coco"], 6), (["vg"], 3), (["sbu"], 27), (("gcc", "coco"), 96)]
)
def test_data_sets_can_be_chosen(pretraining, datasets, size):
    assert len(opened(pretraining, "pretrain", datasets=datasets)) == size


def test_all_missing_files_are_named_at_once(tmp_path):
    write(tmp_path, PAIRS, f"{COCO}_train")
    write(tmp_path, NAMED, *DATASETS["sbu"]["train"][1:])
    with pytest.raises(FileNotFoundError) as failure:
        opened(tmp_path, "pretrain", datasets=["coco", "vg", "sbu"])
    message = str(failure.value)
    assert "3 files of the train split are missing" in message
    for needed in (f"{COCO}_restval.arrow for coco", "vg.arrow for vg", "sbu_0.arrow for sbu"):
        assert needed in message
    with pytest.raises(FileNotFoundError, match=r"33 files .* vg\.arrow for vg"):
        opened(tmp_path, "pretrain")


def test_retrieval_takes_what_is_there(tmp_path):
    write(tmp_path, NAMED, "f30k_caption_karpathy_train", "f30k_caption_karpathy_test")
    data = opened(tmp_path, "retrieval")
    assert texts(data) == ["a dog", "an animal", "a cat"]
    assert data[2]["image_id"] == "b.jpg"
    assert len(opened(tmp_path, "retrieval", "test")) == 3
    with pytest.raises(FileNotFoundError, match=r"f30k_caption_karpathy_val\.arrow for f30k"):
        opened(tmp_path, "retrieval", "val")
    write(tmp_path, PAIRS, f"{COCO}_train", f"{COCO}_restval")
    with pytest.raises(ValueError, match=r"datasets: .* holds coco and f30k, choose one"):
        opened(tmp_path, "retrieval")
    assert len(opened(tmp_path, "retrieval", datasets=["coco"])) == 6


def test_text_only(tmp_path):
    write(tmp_path, TEXTS, *DATASETS["wikibk"]["train"])
    data = opened(tmp_path, "textmlm")
    assert len(data) == 100
    assert data[99] == {"text": "another"}
    with pytest.raises(FileNotFoundError, match=r"wikibk_val_0\.arrow for wikibk"):
        opened(tmp_path, "textmlm", "val")


def test_captions_serve_as_text(pretraining):
    data = opened(pretraining, "textmlm", "val", datasets=["coco"])
    assert data[1] == {"text": "an animal"}


def test_visual_questions(questions):
    train = opened(questions, "vqa")
    assert len(train) == 6
    assert train.answers == ["red", "2", "blue"]
    sample = train[1]
    assert level(sample) == 30
    del sample["image"]
    assert sample == {
        "text": "how many?",
        "image_id": 7,
        "question_id": 71,
        "answer_labels": [1],
        "answer_scores": [pytest.approx(0.9)],
    }
    assert train.image_ids == [7, 7, 8] * 2
    batch = collate([train[n] for n in range(3)], digit_tokenizer(8), answers=3)
    expected = torch.tensor([[1, 0, 0.3], [0, 0.9, 0], [0.6, 0, 0]])
    assert torch.allclose(batch["vqa_targets"], expected)
    assert len(opened(questions, "vqa", "val")) == 3


@pytest.mark.parametrize("datasets", [None, ["vqa-test-dev"]])
def test_questions_without_answers(questions, datasets):
    test = opened(questions, "vqa", "test", datasets=datasets)
    assert [test.fields(n)["question_id"] for n in range(3)] == [70, 71, 80]
    assert all(test.fields(n)["answer_labels"] == [] for n in range(3))
    assert test.answers == ["red", "2", "blue"]
    batch = collate([test[n] for n in range(3)], digit_tokenizer(8), answers=3)
    assert torch.equal(batch["vqa_targets"], torch.zeros(3, 3))


def test_given_answers_must_agree_with_the_files(questions):
    longer = ["red", "2", "blue", "green"]
    assert opened(questions, "vqa", answers=longer).answers == longer
    with pytest.raises(ValueError, match="answers: answer 1 is 'two', but '2' in"):
        opened(questions, "vqa", answers=["red", "two", "blue"])
    with pytest.raises(ValueError, match="answers: answer 2 is missing, but 'blue' in"):
        opened(questions, "vqa", answers=["red", "2"])


def test_answers_must_have_names(tmp_path):
    write(tmp_path, UNLABELLED, "vqav2_test")
    with pytest.raises(ValueError, match="has no labelled questions"):
        opened(tmp_path, "vqa", "test")
    assert opened(tmp_path, "vqa", "test", answers=["red"]).answers == ["red"]
    write(tmp_path, QUESTIONS | {"answer_labels": [[[0, 3], [1]], [[0]]]}, "vqav2_rest_val")
    with pytest.raises(ValueError, match=r"1 answers have no name .* answer 2"):
        opened(tmp_path, "vqa", "val")
    for label in (-1, 2**62):
        write(tmp_path, QUESTIONS | {"answer_labels": [[[0, label], [1]], [[0]]]}, "vqav2_rest_val")
        with pytest.raises(ValueError, match=rf"vqav2_rest_val\.arrow: answer_labels: {label} of"):
            opened(tmp_path, "vqa", "val")
    write(tmp_path, QUESTIONS | {"answer_labels": [[[0, 1], [1]], [[0]]]}, "vqav2_rest_val")
    with pytest.raises(ValueError, match=r"answer 1 is '(2|blue)' and '(2|blue)'"):
        opened(tmp_path, "vqa", "val")


def test_statements_about_two_pictures(tmp_path):
    write(tmp_path, STATEMENTS, "nlvr2_train", "nlvr2_dev", "nlvr2_test1")
    val = opened(tmp_path, "nlvr2", "val")
    assert [val[n]["answers"] for n in range(6)] == [1, 0, 1] * 2
    assert [val[n]["table_name"] for n in range(6)] == ["nlvr2_dev"] * 3 + ["nlvr2_test1"] * 3
    assert (level(val[2], "image_0"), level(val[2], "image_1")) == (60, 61)
    assert val[1]["identifier"] == "dev-1-0"
    assert val[1].keys() == {
        "image_0",
        "image_1",
        "text",
        "answers",
        "identifier",
        "table_name",
    }
    assert len(opened(tmp_path, "nlvr2")) == len(opened(tmp_path, "nlvr2", "test")) == 3
    flags = STATEMENTS | {"answers": [[True, False], [True]]}
    write(tmp_path, flags, "nlvr2_train")
    assert [opened(tmp_path, "nlvr2")[n]["answers"] for n in range(3)] == [1, 0, 1]


def test_damaged_pictures_are_named(tmp_path):
    damaged = PAIRS | {"image": [picture(10), picture(20)[:40]]}
    write(tmp_path, damaged, f"{COCO}_val")
    data = opened(tmp_path, "pretrain", "val", datasets=["coco"])
    assert level(data[1]) == 10
    with pytest.raises(ValueError, match=r"coco_caption_karpathy_val\.arrow, row 1, image: "):
        data[2]


def test_files_of_another_layout(tmp_path):
    path = tmp_path / f"{COCO}_val.arrow"
    path.write_bytes(b"nothing like it")
    with pytest.raises(ValueError, match=r"val\.arrow: is not an Arrow file"):
        opened(tmp_path, "retrieval", "val")
    write(tmp_path, {"image": [1], "text": ["x"]}, f"{COCO}_val")
    with pytest.raises(ValueError, match=r"val\.arrow: lacks the columns caption, image_id"):
        opened(tmp_path, "retrieval", "val")
    write(tmp_path, {"image": [1], "caption": ["x"], "image_id": [1]}, f"{COCO}_val")
    with pytest.raises(ValueError, match="caption: string is not a list of texts"):
        opened(tmp_path, "retrieval", "val")


@pytest.mark.parametrize(
    ("task", "split", "datasets", "message"),
    [
        ("pretrain", "train", ["imagenet"], "'imagenet' is not one of coco, f30k, vg, sbu, gcc"),
        ("pretrain", "train", [], r"\[\] is not a list of coco"),
        ("pretrain", "train", "coco", "'coco' is not a list of coco"),
        ("retrieval", "train", ["vg"], "'vg' is not one of coco, f30k"),
        ("pretrain", "val", ["vg", "sbu"], "vg, sbu have no split 'val'"),
    ],
)
def test_choices_that_do_not_fit(pretraining, task, split, datasets, message):
    with pytest.raises(ValueError, match=f"datasets: {message}"):
        opened(pretraining, task, split, datasets=datasets)


def test_empty_files_and_rows(tmp_path):
    write(tmp_path, PAIRS | {"caption": [[], ["a cat"]]}, f"{COCO}_train")
    pairs = pa.table(PAIRS | {"image": [b"", b""]})
    with (
        pa.OSFile(str(tmp_path / f"{COCO}_restval.arrow"), "wb") as sink,
        pa.RecordBatchFileWriter(sink, pairs.schema),
    ):
        pass
    data = opened(tmp_path, "retrieval")
    assert texts(data) == ["a cat"]
    assert level(data[0]) == 20
    assert data.image_ids == [3]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.heavy)])
def test_workers_change_nothing(pretraining, method):
    data = opened(pretraining, "pretrain", train=True, datasets=["coco", "gcc"])
    assert data[95]["text"] == "a cat"  # the files are open before workers start
    batches = GlobalBatches(len(data), 8, steps=4)
    workers = 2 if method == "fork" else 1
    helped = loader(data, batches, digit_tokenizer(8), mask_share=0.5, workers=workers)
    helped.multiprocessing_context = method
    alone = loader(data, batches, digit_tokenizer(8), mask_share=0.5)
    for one, two in zip(alone, helped, strict=True):
        assert torch.equal(one["image"], two["image"])
        assert torch.equal(one["text_ids_mlm"], two["text_ids_mlm"])
        assert one["image_id"] == two["image_id"]


def test_training_augments_by_the_seed_of_the_draw(tmp_path):
    gradient = Image.linear_gradient("L")
    stream = io.BytesIO()
    gradient.save(stream, "PNG")
    write(tmp_path, PAIRS | {"image": [stream.getvalue()] * 2}, f"{COCO}_val")
    data = opened(tmp_path, "retrieval", "val", train=True)
    one, again, other = (data[Draw(0, seed)]["image"] for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def rewrite(folder: Path, stem: str, table: pa.Table, *, stream: bool = False) -> Path:
    path = folder / f"{stem}.arrow"
    kind = pa.RecordBatchStreamWriter if stream else pa.RecordBatchFileWriter
    with pa.OSFile(str(path), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    return path


def replaced(columns: dict[str, list[Any]], **changes: Any) -> pa.Table:
    """The table of some columns, of which some are Arrow's arrays."""
    columns = {
        name: [picture(v) if name.startswith("image") and name != "image_id" else v for v in values]
        for name, values in columns.items()
    }
    return pa.table(columns | changes)


@pytest.mark.parametrize(
    ("task", "columns", "stems"),
    [
        ("retrieval", PAIRS, [f"{COCO}_val"]),
        ("vqa", QUESTIONS, ["vqav2_rest_val"]),
        ("nlvr2", STATEMENTS, ["nlvr2_dev", "nlvr2_test1"]),
    ],
)
def test_streams_are_read_alike(tmp_path, task, columns, stems):
    write(tmp_path, columns, *stems)
    expected = list(opened(tmp_path, task, "val"))
    for stem in stems:
        rewrite(tmp_path, stem, replaced(columns), stream=True)
    data = opened(tmp_path, task, "val")
    assert len(data) == len(expected)
    for sample, other in zip(data, expected, strict=True):
        for name, value in other.items():
            same = torch.equal(sample[name], value) if torch.is_tensor(value) else None
            assert sample[name] == value if same is None else same


def test_streams_are_mapped(tmp_path):
    table = replaced(PAIRS | {"image": [10, 20]})
    large = table.set_column(0, "image", pa.array([b"x" * 10**6] * 2))
    rewrite(tmp_path, f"{COCO}_val", large, stream=True)
    before = pa.total_allocated_bytes()
    data = opened(tmp_path, "retrieval", "val")
    assert data.fields(1)["text"] == "an animal"
    assert pa.total_allocated_bytes() - before < 10**5


def test_blank_and_missing_texts_are_left_out(tmp_path):
    lists = [["a b", None], None, [], ["red"], ["\u200b"], ["two", "", " ", "三"]]
    columns = {"image": [10, 20, 30, 40, 50, 60], "image_id": [*range(6)]}
    table = replaced(columns, caption=pa.array(lists, pa.list_(pa.string())))
    rewrite(tmp_path, f"{COCO}_val", table)
    message = r"4 blank or missing texts are left out, in 1 files: coco_.*_val\.arrow \(4\)"
    with pytest.warns(UserWarning, match=message):
        data = opened(tmp_path, "retrieval", "val")
    assert texts(data) == ["a b", "red", "two", "三"]
    assert data.image_ids == [0, 3, 5, 5]
    assert [level(data[n]) for n in range(4)] == [10, 40, 60, 60]
    blank = replaced(PAIRS, caption=pa.array([[""], None], pa.list_(pa.string())))
    rewrite(tmp_path, f"{COCO}_val", blank)
    with (
        pytest.warns(UserWarning, match="1 blank or missing"),
        pytest.raises(ValueError, match=r"val\.arrow: holds no text"),
    ):
        opened(tmp_path, "retrieval", "val")


def test_blank_questions_keep_their_answers(tmp_path):
    changed = QUESTIONS | {"questions": [["", "how many?"], ["who?"]]}
    write(tmp_path, changed, "vqav2_rest_val")
    with pytest.warns(UserWarning, match="1 blank or missing texts"):
        data = opened(tmp_path, "vqa", "val")
    assert [data.fields(n)["question_id"] for n in range(2)] == [71, 80]
    assert [data.fields(n)["answer_labels"] for n in range(2)] == [[1], [0]]


@pytest.mark.parametrize(
    ("task", "columns", "changes", "message"),
    [
        ("retrieval", PAIRS, {"image": ["a", "b"]}, ": image: string is not a picture in bytes"),
        ("retrieval", PAIRS, {"image_id": [1.5, 2]}, ": image_id: double is not an integer or a"),
        ("retrieval", PAIRS, {"image_id": [1, None]}, ", row 1: has no 'image_id'"),
        (
            "retrieval",
            PAIRS,
            {"caption": [[1], [2]]},
            r": caption: list<.*> is not a list of texts",
        ),
        ("vqa", QUESTIONS, {"question_id": [[70], [80]]}, ", row 0: questions and question_id are"),
        ("vqa", QUESTIONS, {"question_id": [[70, None], [80]]}, ", row 0: question_id: one is mis"),
        ("vqa", QUESTIONS, {"question_id": [70, 80]}, ": question_id: int64 is not a list of"),
        (
            "vqa",
            QUESTIONS,
            {"answer_labels": [[[0, 2]], [[0]]]},
            ", row 0: answer_labels and answers",
        ),
        (
            "vqa",
            QUESTIONS,
            {"answer_scores": [[[1.0], [0.9]], [[0.6]]]},
            ", row 0: answer_labels a",
        ),
        (
            "vqa",
            QUESTIONS,
            {"answer_scores": [[[1.0, 0.3], [0.9]], [[7.0]]]},
            ": answer_scores: so",
        ),
        (
            "vqa",
            QUESTIONS,
            {"answers": [[["red"], ["2"]], [["red"]]]},
            ", row 0: answer_labels and",
        ),
        ("vqa", QUESTIONS, {"answers": [[["red", None], ["2"]], [["r"]]]}, ", row 0: answers: one"),
        ("vqa", QUESTIONS, {"answers": None}, ": lacks the columns answers"),
        (
            "nlvr2",
            STATEMENTS,
            {"answers": [["True"], ["True"]]},
            ", row 0: questions and answers a",
        ),
        (
            "nlvr2",
            STATEMENTS,
            {"answers": [["True", "no"], ["True"]]},
            ": answers: 'no' is neither",
        ),
        ("nlvr2", STATEMENTS, {"identifier": ["a", None]}, ", row 1: has no 'identifier'"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, task, columns, changes, message):
    table = replaced({k: v for k, v in columns.items() if k not in changes})
    for name, values in changes.items():
        if values is not None:
            table = table.append_column(name, pa.array(values))
    for stem in (f"{COCO}_val", "vqav2_rest_val", "nlvr2_dev", "nlvr2_test1"):
        rewrite(tmp_path, stem, table)
    with pytest.raises(ValueError, match=rf"\.arrow{message}"):
        opened(tmp_path, task, "val")


def test_missing_pictures_are_named(tmp_path):
    table = replaced(PAIRS, image=pa.array([None, picture(20)]))
    rewrite(tmp_path, f"{COCO}_val", table)
    data = opened(tmp_path, "retrieval", "val")
    assert level(data[2]) == 20
    with pytest.raises(ValueError, match=r"val\.arrow, row 0: has no 'image'"):
        data[0]


@pytest.mark.parametrize("stream", [False, True])
def test_damaged_files(tmp_path, stream):
    path = rewrite(tmp_path, f"{COCO}_val", replaced(PAIRS), stream=stream)
    content = path.read_bytes()
    # Offsets of the texts of the first row: 0, 5, 14.
    place = content.index(b"\0\0\0\0\5\0\0\0\16\0\0\0")
    damaged = content[: place + 8] + b"\xff\xff\xff\x7f" + content[place + 12 :]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"val\.arrow, rows 0 to 0: caption is damaged"):
        opened(tmp_path, "retrieval", "val")
    for damaged in (b"", content[:3], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"val\.arrow: is (not an|a damaged) Arrow file"):
            opened(tmp_path, "retrieval", "val")


def test_pictures_of_two_data_sets_are_different(tmp_path):
    write(tmp_path, PAIRS, f"{COCO}_val", "f30k_caption_karpathy_val")
    data = opened(tmp_path, "retrieval", "val", datasets=["coco", "f30k"])
    assert data.image_ids == [*["coco/5"] * 2, "coco/3", *["f30k/5"] * 2, "f30k/3"]
    assert [data[n]["image_id"] for n in range(6)] == [5, 5, 3, 5, 5, 3]


def test_what_is_said_of_other_arrow_files(tmp_path):
    write(tmp_path, PAIRS, "mine")
    with pytest.raises(ValueError, match=r"1 Arrow files: mine\.arrow, none of them named as one"):
        opened(tmp_path, "retrieval")
    (tmp_path / "mine.arrow").unlink()
    write(tmp_path, PAIRS, "vg", f"{COCO}_val")
    with pytest.raises(FileNotFoundError, match=r"\(--datasets\).* here are files of coco, vg"):
        opened(tmp_path, "pretrain")
    (tmp_path / "._vg.arrow").write_bytes(b"junk")
    assert len(opened(tmp_path, "pretrain", datasets=["vg"])) == 3
    with pytest.raises(ValueError, match=r"vg\.arrow is not a file of .*: give the folder"):
        opened(tmp_path / "vg.arrow", "pretrain")
