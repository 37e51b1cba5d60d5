"""Every format and location of a user's own records, and their errors."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vlmo.data import has_splits, open_data

LEVELS = (0, 50, 100)
# The records of a task; pictures are grey levels.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "pretrain": [
        {"image": 0, "caption": "a red square"},
        {"image": 1, "caption": "a dog"},
        {"image": 1, "caption": "an animal"},
    ],
    "vqa": [
        {"image": 0, "question": "what?", "answer": "red", "question_id": 7},
        {"image": 1, "question": "how many?", "answer": "2", "question_id": 9},
    ],
    "nlvr2": [
        {"image_0": 0, "image_1": 1, "statement": "both", "label": "True", "identifier": "a-1"},
        {"image_0": 2, "image_1": 0, "statement": "one", "label": "False", "identifier": "a-2"},
    ],
    "textmlm": [{"text": "one, two"}, {"text": 'three "four"'}],
}
RECORDS["retrieval"] = RECORDS["pretrain"]
TASKS = sorted(RECORDS)


def png(level: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (level,) * 3).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    for n, level in enumerate(LEVELS):
        (tmp_path / f"{n}.png").write_bytes(png(level))
    return tmp_path


def named(record: dict) -> dict:
    """The record with paths in place of pictures."""
    return {k: f"{v}.png" if k.startswith("image") else v for k, v in record.items()}


def table(records: list[dict], pictures: str = "path") -> pa.Table:
    """Pictures as paths, as bytes, or as Hugging Face's struct of both."""
    columns: dict[str, Any] = {name: [r[name] for r in records] for name in records[0]}
    for name in columns:
        if name.startswith("image"):
            contents = [png(LEVELS[n]) for n in columns[name]]
            if pictures == "path":
                columns[name] = [f"{n}.png" for n in columns[name]]
            elif pictures == "bytes":
                columns[name] = contents
            else:
                columns[name] = [{"bytes": content, "path": "x.png"} for content in contents]
    return pa.table(columns)


def write_saved(folder: Path, tables: list[pa.Table]) -> None:
    """As ``datasets.Dataset.save_to_disk`` does."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"data-{n:05}-of-{len(tables):05}.arrow" for n in range(len(tables))]
    for name, part in zip(names, tables, strict=True):
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.RecordBatchStreamWriter(sink, part.schema) as writer,
        ):
            writer.write_table(part, max_chunksize=1)
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def write(path: Path, records: list[dict]) -> Path:
    """A file of records of the format of its suffix."""
    if path.suffix == ".parquet":
        pq.write_table(table(records), path)
        return path
    records = [*map(named, records)]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1))
    elif path.suffix == ".txt":
        path.write_text("".join(record["text"] + "\n" for record in records))
    else:
        with path.open("w", newline="") as stream:
            dialect = "excel" if path.suffix == ".csv" else "excel-tab"
            writer = csv.DictWriter(stream, list(records[0]), dialect=dialect)
            writer.writeheader()
            writer.writerows(records)
    return path


def opened(source, task: str, split: str = "train", **options):
    return open_data(source, task, split, **({"image_size": 16} | options))


def texts(data) -> list[str]:
    return [data.text(n) for n in range(len(data))]


def level(sample: dict, name: str = "image") -> int:
    (value,) = sample[name].unique().tolist()
    return value


def check(data, task: str) -> None:
    """The samples are those of RECORDS."""
    records = RECORDS[task]
    name = {"vqa": "question", "nlvr2": "statement", "textmlm": "text"}.get(task, "caption")
    assert texts(data) == [record[name] for record in records]
    for n, record in enumerate(records):
        sample = data[n]
        for key in ("image", "image_0", "image_1"):
            if key in record:
                assert level(sample, key) == LEVELS[record[key]]
        for key in ("question_id", "identifier"):
            assert sample.get(key) == record.get(key)
        if task == "vqa":
            assert [data.answers[label] for label in sample["answer_labels"]] == [record["answer"]]
        if task == "nlvr2":
            assert sample["answers"] == (record["label"] == "True")


SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


@pytest.mark.parametrize("with_val", [False, True])
@pytest.mark.parametrize(
    ("task", "suffix"),
    [(t, s) for t in TASKS for s in SUFFIXES if s != ".txt" or t == "textmlm"],
)
def test_every_task_opens_every_kind_of_file(folder, task, suffix, with_val):
    single = write(folder / f"all{suffix}", RECORDS[task])
    assert not has_splits(single)
    for split in ("train", "val"):
        check(opened(single, task, split), task)
    write(folder / f"train{suffix}", RECORDS[task])
    if with_val:
        write(folder / f"validation{suffix}", RECORDS[task][1:])
    assert has_splits(folder)
    check(opened(folder, task), task)
    if with_val:
        assert texts(opened(folder, task, "val")) == texts(opened(folder, task))[1:]
    else:
        with pytest.raises(FileNotFoundError, match=r"has no val\.jsonl"):
            opened(folder, task, "val")


@pytest.mark.parametrize("suffix", SUFFIXES[:-1])
@pytest.mark.parametrize("task", TASKS)
def test_records_say_their_split(folder, task, suffix):
    records = [record | {"split": "train"} for record in RECORDS[task]]
    records += [records[0] | {"split": name} for name in ("val", "Validation", "valid", "dev")]
    path = write(folder / f"all{suffix}", records)
    assert has_splits(path)
    check(opened(path, task), task)
    assert len(opened(path, task, "val")) == 4
    with pytest.raises(ValueError, match="holds nothing of split 'test'"):
        opened(path, task, "test")
    write(path, [*records, records[0] | {"split": "restval"}])
    row = {".parquet": "row", ".json": "line"}.get(suffix, "line")
    with pytest.raises(ValueError, match=rf"{row} \d+: split: 'restval' is not one of train, val,"):
        opened(path, task)


@pytest.mark.parametrize("pictures", ["bytes", "struct"])
@pytest.mark.parametrize("kind", ["parquet", "saved", "dictionary"])
@pytest.mark.parametrize("task", [task for task in TASKS if task != "textmlm"])
def test_pictures_in_tables(tmp_path, task, kind, pictures):
    records = table(RECORDS[task], pictures)
    if kind == "parquet":
        source = tmp_path / "all.parquet"
        pq.write_table(records, source, row_group_size=2)
    else:
        source = tmp_path / "saved"
        write_saved(
            source / "train" if kind == "dictionary" else source, [records[:1], records[1:]]
        )
        if kind == "dictionary":
            (source / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
            write_saved(source / "validation", [records[1:]])
            assert len(opened(source, task, "val")) == len(records) - 1
    assert has_splits(source) == (kind == "dictionary")
    data = opened(source, task)
    check(data, task)
    check(pickle.loads(pickle.dumps(data)), task)
    assert len(opened(source, "textmlm")) == len(records) if task == "pretrain" else True


def test_stored_pictures_of_equal_ids_are_one(tmp_path):
    records = table(RECORDS["pretrain"], "struct").append_column("image_id", pa.array([4, 9, 9]))
    pq.write_table(records, tmp_path / "a.parquet")
    data = opened(tmp_path / "a.parquet", "retrieval")
    assert data.image_ids == [4, 9, 9]
    pq.write_table(records.drop_columns("image_id"), tmp_path / "a.parquet")
    data = opened(tmp_path / "a.parquet", "retrieval")
    assert data.image_ids == ["a.parquet, row 1", "a.parquet, row 2", "a.parquet, row 3"]


def test_bytes_and_paths_in_one_column(folder):
    column = [{"bytes": png(50), "path": None}, {"bytes": None, "path": "2.png"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    records = pa.table({"image": pa.array(column * 2, kind), "caption": list("abcd")})
    pq.write_table(records, folder / "a.parquet", row_group_size=2)
    data = opened(folder / "a.parquet", "pretrain")
    assert [level(data[n]) for n in range(4)] == [50, 100, 50, 100]
    records = pa.table({"image": pa.array([column[0], None], kind), "caption": list("ab")})
    pq.write_table(records, folder / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 2: has no 'image'"):
        opened(folder / "a.parquet", "pretrain")


def test_row_groups_are_read_one_at_a_time(tmp_path, monkeypatch):
    records = table(RECORDS["pretrain"] * 4, "struct")
    pq.write_table(records, tmp_path / "a.parquet", row_group_size=3)
    data = opened(tmp_path / "a.parquet", "pretrain")
    assert not data._stored._groups
    monkeypatch.setattr("vlmo.data.tables._CACHED_BYTES", 1)
    for n in (11, 0, 5, 6):
        assert level(data[n]) == LEVELS[(RECORDS["pretrain"] * 4)[n]["image"]]
        assert len(data._stored._groups) == 1
    monkeypatch.setattr("vlmo.data.tables._GROUP_BYTES", 100)
    with pytest.raises(ValueError, match=r"row group 0: holds .* bytes of 'image'.*row_group_size"):
        opened(tmp_path / "a.parquet", "pretrain")


def test_parts_of_a_split(tmp_path):
    for n in range(2):
        part = table(RECORDS["pretrain"][n : n + 1], "struct")
        pq.write_table(part, tmp_path / f"train-{n:05}-of-00003-0123456789abcdef.parquet")
    with pytest.raises(FileNotFoundError, match="1 files like it are missing: part 00002"):
        opened(tmp_path, "pretrain")
    pq.write_table(
        table(RECORDS["pretrain"][2:], "struct"), tmp_path / "train-00002-of-00003.parquet"
    )
    check(opened(tmp_path, "pretrain"), "pretrain")
    pq.write_table(table(RECORDS["pretrain"]), tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="for one split, keep one"):
        opened(tmp_path, "pretrain")


def test_question_ids_count_over_parts(tmp_path):
    for n in range(2):
        records = table(RECORDS["vqa"], "struct").drop_columns("question_id")
        pq.write_table(records, tmp_path / f"train-{n:05}-of-00002.parquet")
    data = opened(tmp_path, "vqa")
    assert [data.fields(n)["question_id"] for n in range(4)] == [0, 1, 2, 3]


def test_numbers_of_hugging_face_that_have_names(folder):
    info = {"info": {"features": {"label": {"names": ["True", "False"], "_type": "ClassLabel"}}}}
    records = table([record | {"label": n} for n, record in enumerate(RECORDS["nlvr2"])])
    records = records.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(records, folder / "a.parquet")
    check(opened(folder / "a.parquet", "nlvr2"), "nlvr2")


def test_a_saved_selection_is_refused(tmp_path):
    write_saved(tmp_path, [table(RECORDS["pretrain"], "struct")])
    state = json.loads((tmp_path / "state.json").read_text())
    (tmp_path / "state.json").write_text(json.dumps(state | {"_indices_data_files": [1]}))
    with pytest.raises(ValueError, match=r"state\.json: only some rows .* flatten_indices\(\)"):
        opened(tmp_path, "pretrain")
    names = [{"filename": 5}]
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": names}))
    with pytest.raises(ValueError, match=r"state\.json: is not that of a data set saved"):
        opened(tmp_path, "pretrain")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match=r"state\.json: is not that of a data set"):
        opened(tmp_path, "pretrain")
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "gone.arrow"}]}')
    with pytest.raises(FileNotFoundError, match=r"1 files are missing: .*gone\.arrow"):
        opened(tmp_path, "pretrain")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
@pytest.mark.parametrize("task", ["pretrain", "vqa", "nlvr2"])
def test_metadata_beside_pictures(folder, task, name):
    def as_hugging_face(record):
        names = {"image": "file_name", "image_0": "image_0_file_name", "caption": "text"}
        return {names.get(k, k): v for k, v in record.items()}

    records = [as_hugging_face(named(record)) for record in RECORDS[task]]
    suffix = Path(name).suffix
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), folder / name)
    else:
        if suffix == ".jsonl":
            (folder / name).write_text("\n".join(map(json.dumps, records)))
        else:
            lines = [list(records[0]), *(list(record.values()) for record in records)]
            (folder / name).write_text("\n".join(",".join(map(str, line)) for line in lines))
    assert not has_splits(folder)
    check(opened(folder, task, "test"), task)
    # In the folders of splits, and in folders below them.
    for split in ("train", "valid"):
        below = folder / "data" / split / "a"
        below.mkdir(parents=True)
        for path in (name, "0.png", "1.png", "2.png"):
            os.link(folder / path, below / path)
    assert has_splits(folder / "data")
    for split in ("train", "val"):
        check(opened(folder / "data", task, split), task)


def test_metadata_above_the_folders_of_splits(folder):
    records = []
    for split, n in (("train", 0), ("train", 1), ("dev", 2)):
        (folder / "data" / split).mkdir(parents=True, exist_ok=True)
        (folder / f"{n}.png").rename(folder / "data" / split / f"{n}.png")
        records.append({"file_name": f"{split}/{n}.png", "text": f"text {n}"})
    (folder / "data" / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert has_splits(folder / "data")
    assert texts(opened(folder / "data", "pretrain")) == ["text 0", "text 1"]
    assert texts(opened(folder / "data", "pretrain", "val")) == ["text 2"]
    with pytest.raises(FileNotFoundError, match="test: does not exist"):
        opened(folder / "data", "pretrain", "test")
    (folder / "data" / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(ValueError, match=r"has metadata\.jsonl and metadata\.csv for one split"):
        opened(folder / "data", "pretrain")


def test_two_names_for_one_split(folder):
    write(folder / "val.jsonl", RECORDS["pretrain"])
    write(folder / "validation.jsonl", RECORDS["pretrain"])
    with pytest.raises(ValueError, match=r"has val\.jsonl and validation\.jsonl for one split"):
        opened(folder, "pretrain", "val")
    for name in ("dev", "valid"):
        (folder / "pictures" / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="has dev and valid for one split"):
        opened(folder / "pictures", "pretrain", "val")


def test_hidden_files_are_not_data(folder):
    for n in range(3):
        (folder / f"{n}.txt").write_text(f"picture {n}")
    for name in ("._0.png", "._train.jsonl", ".DS_Store", "Thumbs.db", "._a.arrow"):
        (folder / name).write_bytes(b"\0junk")
    for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
        (folder / name).mkdir()
        (folder / name / "a.png").write_bytes(b"junk")
        (folder / name / "metadata.csv").write_bytes(b"junk")
    assert not has_splits(folder)
    assert texts(opened(folder, "pretrain")) == ["picture 0", "picture 1", "picture 2"]


def test_one_picture_however_it_is_spelled(folder):
    os.symlink(folder, folder / "same")
    os.symlink(folder / "1.png", folder / "link.png")
    names = ["1.png", "./1.png", str(folder / "1.png"), "same/1.png", "link.png", "2.png"]
    records = [{"image": name, "caption": "x"} for name in names]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert opened(folder / "a.jsonl", "retrieval").image_ids == ["1.png"] * 5 + ["2.png"]


def test_equal_names_in_different_folders_are_different_pictures(folder):
    for name in ("a", "b"):
        (folder / "data" / name).mkdir(parents=True)
        os.link(folder / "0.png", folder / "data" / name / "0.png")
        line = json.dumps({"file_name": "0.png", "text": name})
        (folder / "data" / name / "metadata.jsonl").write_text(line)
    assert opened(folder / "data", "retrieval").image_ids == ["a/0.png", "b/0.png"]


BLANK = ["", "  ", "\u200b", "\ufeff \u3000", "\x00"]


@pytest.mark.parametrize("text", BLANK)
@pytest.mark.parametrize(
    ("task", "name", "record"),
    [
        ("pretrain", "caption", {"caption": None}),
        ("pretrain", "caption", {"caption": ["good", None]}),
        ("pretrain", "image", {"image": None}),
        ("retrieval", "image_id", {"image_id": None}),
        ("vqa", "question", {"question": None}),
        ("vqa", "answer", {"answer": None}),
        ("vqa", "answer", {"answer": ["red", None]}),
        ("vqa", "answers", {"answers": {None: 1.0}}),
        ("nlvr2", "statement", {"statement": None}),
        ("textmlm", "text", {"text": None}),
    ],
)
def test_blank_texts_are_refused(folder, task, name, record, text):
    def filled(value):
        if isinstance(value, list):
            return [filled(v) for v in value]
        if isinstance(value, dict):
            return {filled(k): v for k, v in value.items()}
        return text if value is None else value

    good = named(RECORDS[task][0])
    lines = [good, good | {key: filled(value) for key, value in record.items()}]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2: {name}: .* is blank"):
        opened(folder / "a.jsonl", task)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('"\\ud83d"', "caption: '.ud83d' holds half of a surrogate pair"),
        ("[" * 100_000, "is not JSON: it is nested too deeply"),
        ('"a", "caption": "b"', "'caption' appears twice in one object"),
        ("1" * 5000, "Exceeds the limit"),
        ("NaN", "caption: nan is not a text"),
        ("1e999", "caption: inf is not a text"),
        ('"a" "b"', "is not JSON: Expecting ',' delimiter at column 35"),
    ],
)
def test_json_that_is_hard_to_read(folder, value, message):
    line = f'{{"image": "0.png", "caption": {value}}}'
    for name in ("a.jsonl", "a.json"):
        (folder / name).write_text(f'{{"image": "0.png", "caption": "x"}}\n{line}\n')
        with pytest.raises(ValueError, match=rf"{name}, line 2: {message}"):
            opened(folder / name, "pretrain")


def test_identities_of_any_size(folder):
    record = named(RECORDS["vqa"][0])
    for name in ("image_id", "question_id"):
        for number in (2**63, 2**64, -(2**63) - 1):
            lines = [record | {name: n} for n in (5, number)]
            (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
            data = opened(folder / "a.jsonl", "vqa")
            assert [data.fields(n)[name] for n in range(2)] == ["5", str(number)]
        lines = [record | {name: n} for n in (2**63 - 1, -(2**63))]
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        data = opened(folder / "a.jsonl", "vqa")
        assert [data.fields(n)[name] for n in range(2)] == [2**63 - 1, -(2**63)]
    columns = table(RECORDS["pretrain"])
    ids = pa.array([2**64 - 1, 3, 3], pa.uint64())
    pq.write_table(columns.append_column("image_id", ids), folder / "a.parquet")
    assert opened(folder / "a.parquet", "retrieval").image_ids == [str(2**64 - 1), "3", "3"]


def test_ids_are_alike_over_many_rows(folder, monkeypatch):
    monkeypatch.setattr("vlmo.data.columns._CHUNK", 2)
    lines = [named(RECORDS["vqa"][0]) | {"question_id": n} for n in (1, 2, 3, 4, "x", 6)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = opened(folder / "a.jsonl", "vqa")
    assert [data.fields(n)["question_id"] for n in range(6)] == ["1", "2", "3", "4", "x", "6"]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines[:4])))
    data = opened(folder / "a.jsonl", "vqa")
    assert [data.fields(n)["question_id"] for n in range(4)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1.5, 2, 3]), "row 1: caption: 1.5 is not a text"),
        (pa.array([b"a", b"b", b"c"]), "column 'caption': binary is neither text nor number"),
        (pa.array([None, "x", "y"]), "row 1: has no 'caption': it is empty or null"),
        (pa.array([["a"], ["b", None], ["c"]]), "row 2: caption: .* is not a text or a list"),
        (pa.array([{"a": "b"}] * 3), "row 1: caption: {'a': 'b'} is not a text"),
        (pa.array([0] * 3, pa.date32()), r"column 'caption': date32\[day\] is neither text nor"),
        (pa.array([0] * 3, pa.decimal128(5)), r"column 'caption': decimal128\(5, 0\) is neither"),
    ],
)
def test_columns_of_other_types(folder, column, message):
    records = table(RECORDS["pretrain"]).drop_columns("caption").append_column("caption", column)
    pq.write_table(records, folder / "a.parquet")
    with pytest.raises(ValueError, match=rf"a\.parquet(, |: ){message}"):
        opened(folder / "a.parquet", "pretrain")


def test_columns_that_are_not_needed_may_be_anything(folder):
    twice = pa.array([[("a", 1), ("a", 2)]] * 3, pa.map_(pa.string(), pa.int64()))
    records = table(RECORDS["pretrain"]).append_column("extra", twice)
    records = records.append_column("when", pa.array([10**18] * 3, pa.timestamp("ns", "Mars/City")))
    pq.write_table(records, folder / "a.parquet")
    check(opened(folder / "a.parquet", "pretrain"), "pretrain")


def test_maps_of_answers(folder):
    kind = pa.map_(pa.string(), pa.float64())
    records = table(RECORDS["vqa"]).drop_columns("answer")
    for answers, right in (([("a", 1.0)], True), ([("a", 1.0), ("a", 0.3)], False)):
        column = pa.array([[("b", 0.6)], answers], kind)
        pq.write_table(records.append_column("answers", column), folder / "a.parquet")
        if right:
            assert opened(folder / "a.parquet", "vqa").answers == ["b", "a"]
            continue
        with pytest.raises(ValueError, match=r"a\.parquet, row 2: answers: names a key twice"):
            opened(folder / "a.parquet", "vqa")


def test_damaged_parquet(folder):
    path = folder / "a.parquet"
    records = pa.table(
        {"image": ["0.png"] * 4000, "caption": [f"a text {n * 7919 % 4001}" for n in range(4000)]}
    )
    pq.write_table(records, path, row_group_size=1000, use_dictionary=False)
    content = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(2).column(1)
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 400] = b"\xff" * 400
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet, row group 2: is damaged"):
        opened(path, "pretrain")
    for damaged in (b"", content[:100], content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"a\.parquet: is not a Parquet file"):
            opened(path, "pretrain")


def test_damaged_pictures_in_parquet(tmp_path):
    records = pa.table({"image": [png(0) + os.urandom(5000)] * 4, "caption": list("abcd")})
    path = tmp_path / "a.parquet"
    pq.write_table(records, path, row_group_size=2, use_dictionary=False)
    content = bytearray(path.read_bytes())
    chunk = pq.read_metadata(path).row_group(1).column(0)
    content[chunk.data_page_offset : chunk.data_page_offset + 200] = b"\xff" * 200
    path.write_bytes(content)
    data = opened(path, "pretrain")
    assert level(data[1]) == 0
    with pytest.raises(ValueError, match=r"a\.parquet, row group 1: is damaged"):
        data[2]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_encodings_of_records(folder, name, encoding):
    path = write(folder / name, [{"image": 0, "caption": "x"}])
    path.write_text(path.read_text().replace("x", "größer"), encoding=encoding)
    if encoding == "latin-1":
        with pytest.raises(ValueError, match=rf"{name}, line \d: is not UTF-8"):
            opened(path, "pretrain")
    else:
        assert texts(opened(path, "pretrain")) == ["größer"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_encodings_of_texts(folder, encoding):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    content = f"{mark}größer\r\n\n\u200b\n三\u2028x\n".encode(encoding)
    (folder / "a.txt").write_bytes(content)
    data = opened(folder / "a.txt", "textmlm")
    assert texts(data) == ["größer", "三\u2028x"]
    assert texts(pickle.loads(pickle.dumps(data))) == ["größer", "三\u2028x"]
    for n in range(3):
        (folder / f"{n}.txt").write_bytes(content)
    (folder / "a.txt").unlink()
    assert texts(opened(folder, "pretrain")) == ["größer", "三\u2028x"] * 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,caption\n0.png,a,b\n", "line 2: has 3 cells for 2 columns"),
        ("image,caption\n0.png\n", "line 2: has 1 cells for 2 columns"),
        ("image,image\n0.png,a\n", "line 1: names the column 'image' twice"),
        ('image,caption\n0.png,"a\nb\n', "line 2: is not CSV: unexpected end of data"),
        ('image,caption\n0.png,"a"b\n', "line 2: is not CSV: ',' expected after '\"'"),
        ("image;caption\n0.png;a\n", "line 2: has no 'image', only 'image;caption'"),
        ("image,caption\n0.png,\n", "line 2: has no 'caption'"),
        ("image,caption\n", r"a\.csv: holds nothing of split 'train'"),
        ("", r"a\.csv: holds nothing of split 'train'"),
    ],
)
def test_csv_of_another_form(folder, content, message):
    (folder / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        opened(folder / "a.csv", "pretrain")


def test_csv_of_pandas(folder):
    (folder / "a.csv").write_text(
        ',image,caption,image_id\r\n0,0.png,"one, ""two""\nthree",5\r\n\r\n1,1.png,four,7\r\n'
    )
    data = opened(folder / "a.csv", "retrieval")
    assert texts(data) == ['one, "two"\nthree', "four"]
    assert data.image_ids == [5, 7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}\n {"text": "b"}]', "line 2: is not JSON: here a list of records must end"),
        ('[{"text": "a"},\n', "line 2: is not JSON: here a list of records must end or go"),
        ('[{"text": "a"}]\n x', "line 1: is not JSON: here a list of records must end or go"),
        ('[{"text": "a"},\n {"text": }]', "line 2: is not JSON: Expecting value at column 11"),
        ('[{"text": "a"},\n\n "b"]', "line 3: 'b' is not a JSON object"),
        ('[{"text": "a"},\n {"text": 3}]', "line 2: text: 3 is not a text"),
        ('{"info": 1,\n "questions": [{"question": "a"}]}', "line 1: holds VQAv2's questions as"),
        ('{"annotations": [{"answers": []}]}', "line 1: holds VQAv2's annotations as they are"),
        ('{"images": [{"sentences": []}]}', "line 1: holds Karpathy's splits as they are"),
        ('{"images": [{}], "annotations": [{}]}', "line 1: holds COCO's annotations as they are"),
        ("[]", "holds nothing of split 'train'"),
        ("", "holds nothing of split 'train'"),
    ],
)
def test_json_of_another_form(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.json(, |: ){message}"):
        opened(tmp_path / "a.json", "textmlm")


def test_json_records_one_after_another(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "a"}\n{"text":\n "b"}\n\n')
    assert texts(opened(tmp_path / "a.json", "textmlm")) == ["a", "b"]


@pytest.mark.parametrize("task", ["pretrain", "vqa", "nlvr2"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v2_OpenEnded_mscoco_train2014_questions.json", "holds VQAv2's questions as they are"),
        ("v2_mscoco_train2014_annotations.json", "holds VQAv2's annotations as they are"),
        ("dataset_coco.json", "holds Karpathy's splits as they are published"),
        ("captions_train2014.json", "holds COCO's annotations as they are published"),
        (
            "data.jsonl",
            r"1 files whose names say no split: data\.jsonl; .* needs .*train\.jsonl \(or",
        ),
        ("sub/train.jsonl", "holds no data itself; its folder sub does"),
        ("sub/vg.arrow", "holds no data itself; its folder sub does"),
        (
            "readme.md",
            "holds no pictures .*, no records and no Arrow files; .* needs .*train.jsonl ",
        ),
    ],
)
def test_folders_without_what_is_wanted(tmp_path, task, name, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=message):
        opened(tmp_path, task)


@pytest.mark.parametrize(
    ("task", "wanted"),
    [
        ("vqa", "'image', 'question' and 'answer'"),
        ("nlvr2", "'image_0', 'image_1', 'statement' and 'label'"),
    ],
)
@pytest.mark.parametrize("with_texts", [False, True])
def test_bare_pictures_are_no_questions(folder, task, wanted, with_texts):
    (folder / "train").mkdir()
    for n in range(3):
        (folder / f"{n}.png").rename(folder / "train" / f"{n}.png")
        if with_texts:
            (folder / "train" / f"{n}.txt").write_text("a")
    with pytest.raises(FileNotFoundError) as failure:
        opened(folder, task)
    message = str(failure.value)
    assert f"train: holds 3 pictures but no records; {task} needs {folder}/train.jsonl " in message
    assert message.endswith(f"with {wanted} in each record")
    assert "caption" not in message


def test_questions_without_answers_are_named(folder):
    records = [{"image": "0.png", "question": "what?"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ValueError, match=r"train\.jsonl, line 1: has no 'answer'"):
        opened(folder, "vqa")
    (folder / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds nothing of split 'train'"):
        opened(folder, "vqa")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://example.com/a.png", "is not on this machine: download it first"),
        ("a\0b.png", "is not a path"),
        ("\ud83d.png", "holds half of a surrogate pair"),
        (".", "1 image files are missing"),
        ("x" * 5000, "is not a path"),
    ],
)
def test_paths_that_are_none(folder, image, message):
    (folder / "a.jsonl").write_text(json.dumps({"image": image, "caption": "x"}))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(folder / "a.jsonl", "pretrain")


def test_file_names_that_are_not_utf8(folder):
    name = os.fsdecode(b"\xff.png")
    (folder / "0.png").rename(folder / name)
    (folder / os.fsdecode(b"\xff.txt")).write_text("x")
    for n in (1, 2):
        (folder / f"{n}.txt").write_text("x")
    with pytest.raises(ValueError, match="the name of the file is not UTF-8: rename it"):
        opened(folder, "pretrain")


def test_a_stream_without_an_end_is_told(tmp_path):
    write_saved(tmp_path, [table(RECORDS["pretrain"], "struct")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened(tmp_path, "pretrain")
    (path,) = tmp_path.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="has no end mark, so it may be incomplete"):
        assert len(opened(tmp_path, "pretrain")) == 3
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"arrow: is not an Arrow file"):
        opened(tmp_path, "pretrain")


def test_pixels_are_the_same_however_stored(folder):
    pq.write_table(table(RECORDS["pretrain"], "struct"), folder / "a.parquet")
    write(folder / "b.csv", RECORDS["pretrain"])
    stored, files = (opened(folder / name, "pretrain") for name in ("a.parquet", "b.csv"))
    for n in range(3):
        assert torch.equal(stored[n]["image"], files[n]["image"])
