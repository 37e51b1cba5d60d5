"""Identification of samples that share a picture, and of equal data."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlmo.data import DigitScenes, GlobalBatches, open_data
from vlmo.data.identity import fingerprint, numbered, same_pictures

QUESTION = {"image": "a.png", "question": "what?", "answer": "red"}
STATEMENT = {"image_0": "a.png", "image_1": "b.png", "statement": "both", "label": True}


@pytest.fixture
def folder(tmp_path) -> Path:
    home = tmp_path / "data"
    home.mkdir()
    for name in ("a", "b", "c", "d"):
        Image.new("RGB", (8, 8)).save(home / f"{name}.png")
    return home


def jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(source, task: str = "pretrain", split: str = "train", **options):
    return open_data(source, task, split, image_size=8, **options)


def partition(keys) -> list[list[int]]:
    """Rows of equal keys."""
    rows: dict[int, list[int]] = {}
    for row, key in enumerate(keys):
        rows.setdefault(int(key), []).append(row)
    return sorted(rows.values())


@pytest.mark.parametrize("task", ["pretrain", "retrieval"])
def test_captions_of_one_picture_have_one_key(folder, task):
    os.symlink("c.png", folder / "link.png")
    os.symlink(folder, folder.parent / "other")
    records: list[dict[str, Any]] = [
        {"image": "a.png", "caption": ["one", "two"]},
        {"image": "b.png", "caption": "three"},
        {"image": "./a.png", "caption": "four"},
        {"image": str(folder / "b.png"), "caption": "five"},
        {"image": "c.png", "caption": "six"},
        {"image": "link.png", "caption": "seven"},
        {"image": "../other/d.png", "caption": "eight"},
        {"image": "d.png", "caption": "nine"},
    ]
    data = opened(jsonl(folder / "pairs.jsonl", records), task)
    assert data.keys.dtype == np.int64
    assert partition(data.keys) == [[0, 1, 3], [2, 4], [5, 6], [7, 8]]
    for batch in itertools.islice(GlobalBatches(9, 4, keys=data.keys), 20):
        assert len({data.keys[draw.index] for draw in batch}) == 4


def test_image_ids_join_pictures_and_files_join_image_ids(folder):
    records = [
        {"image": "a.png", "caption": "one", "image_id": 1},
        {"image": "b.png", "caption": "a scan of the same", "image_id": 1},
        {"image": "c.png", "caption": "a number for each caption", "image_id": 2},
        {"image": "c.png", "caption": "which is another", "image_id": 3},
        {"image": "d.png", "caption": "alone", "image_id": 4},
    ]
    keys = opened(jsonl(folder / "pairs.jsonl", records)).keys
    assert partition(keys) == [[0, 1], [2, 3], [4]]


def test_no_keys_where_every_sample_has_a_picture_of_its_own(folder):
    records = [{"image": f"{name}.png", "caption": "text"} for name in "abcd"]
    assert opened(jsonl(folder / "pairs.jsonl", records)).keys is None


def test_no_keys_for_tasks_without_captions(folder):
    (folder / "texts.txt").write_text("one\ntwo\n")
    assert opened(folder / "texts.txt", "textmlm").keys is None
    assert opened(jsonl(folder / "q.jsonl", [QUESTION] * 2), "vqa").keys is None
    assert opened(jsonl(folder / "s.jsonl", [STATEMENT] * 2), "nlvr2").keys is None


def arrow(path: Path, columns: dict[str, list], rows_of_batch: int = 100) -> None:
    columns = {"image": [b""] * len(columns["image_id"])} | columns
    table = pa.table(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_of_batch)


def test_image_ids_of_arrow_files_are_those_of_their_data_set(tmp_path):
    pairs = {"caption": [["one", "two"], ["three"]]}
    for name in ("train", "restval"):
        arrow(tmp_path / f"coco_caption_karpathy_{name}.arrow", pairs | {"image_id": [1, 2]}, 1)
    arrow(tmp_path / "vg.arrow", pairs | {"image_id": ["1", None]})
    keys = opened(tmp_path, datasets=["coco", "vg"]).keys
    assert partition(keys) == [[0, 1, 3, 4], [2, 5], [6, 7], [8]]
    assert opened(tmp_path, datasets=["vg"]).keys.dtype == np.int64
    assert opened(tmp_path, "textmlm", datasets=["vg"]).keys is None


def test_arrow_files_of_a_caption_for_each_picture_have_no_keys(tmp_path):
    arrow(tmp_path / "vg.arrow", {"caption": [["one"], ["two"]], "image_id": [1, 2]})
    assert opened(tmp_path, datasets=["vg"]).keys is None


def test_numbers_of_values_and_chains_of_pictures():
    assert numbered(pa.chunked_array([["a", None], ["b", "a", None]])).tolist() == [0, 2, 1, 0, 3]
    joined = same_pictures(np.array([0, 1, 1, 2, 3]), np.array([0, 0, 1, 1, 2]))
    assert partition(joined) == [[0, 1, 2, 3], [4]]
    assert len(same_pictures(np.array([], np.int64), np.array([], np.int64))) == 0


def test_fingerprints_are_those_of_the_values():
    texts = [["one", "two"], [], None, ["three"]]
    whole = fingerprint([pa.array(texts), pa.array([1, 2, None])])
    assert len(whole) == 16
    int(whole, 16)
    chunks = pa.chunked_array([texts[:1], texts[1:]], pa.large_list(pa.large_string()))
    assert fingerprint([chunks, pa.array([1, 2, None], pa.int16())]) == whole
    sliced = pa.array([["zero"], *texts, ["four"]]).slice(1, 4)
    assert fingerprint([sliced, pa.array([0, 1, 2, None]).slice(1)]) == whole
    others = [
        [pa.array([["one"], ["two"], None, ["three"]]), pa.array([1, 2, None])],
        [pa.array([["onet", "wo"], [], None, ["three"]]), pa.array([1, 2, None])],
        [pa.array([["one", "two"], None, [], ["three"]]), pa.array([1, 2, None])],
        [pa.array(texts), pa.array([1, 2, 0])],
        [pa.array(texts), pa.array([2, 1, None])],
    ]
    assert len({fingerprint(parts) for parts in others} | {whole}) == 6


def test_fingerprints_name_pictures_as_they_are_found_from_the_data(folder):
    """Below their folder, beside it, or by an absolute path."""
    for home in (folder.parent / "one" / "records", folder.parent / "two" / "records"):
        home.mkdir(parents=True)
        shutil.copytree(folder, home.parent / "pictures")
        shutil.copy(folder / "c.png", home)
        records = [
            {"image": "c.png", "caption": "below"},
            {"image": "../pictures/a.png", "caption": "beside"},
            {"image": str(home.parent / "pictures" / "b.png"), "caption": "absolute"},
        ]
        jsonl(home / "train.jsonl", records)
    prints = [opened(folder.parent / name / "records").fingerprint() for name in ("one", "two")]
    assert prints[0] == prints[1]


def test_own_data_have_a_fingerprint_of_their_content(folder):
    records = [{"image": f"{name}.png", "caption": [name, "more"]} for name in "abc"]
    whole = opened(jsonl(folder / "pairs.jsonl", records)).fingerprint()
    pq.write_table(pa.Table.from_pylist(records), folder / "pairs.parquet")
    assert opened(folder / "pairs.parquet").fingerprint() == whole
    copy = folder.parent / "a copy" / "elsewhere"
    shutil.copytree(folder, copy)
    assert opened(copy / "pairs.jsonl").fingerprint() == whole
    changes: list[tuple[int, dict]] = [
        (0, {"image": "d.png"}),
        (1, {"caption": ["b", "most"]}),
        (1, {"caption": ["bm", "ore"]}),
        (2, {"image_id": 5}),
    ]
    seen = {whole, opened(jsonl(folder / "pairs.jsonl", records[::-1])).fingerprint()}
    for number, change in changes:
        changed = [r | change if n == number else r for n, r in enumerate(records)]
        seen.add(opened(jsonl(folder / "pairs.jsonl", changed)).fingerprint())
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("task", "record", "changes"),
    [
        ("vqa", QUESTION, [{"answer": "blue"}, {"question": "who?"}, {"question_id": 9}]),
        ("nlvr2", STATEMENT, [{"label": False}, {"image_1": "c.png"}, {"identifier": "x"}]),
        ("textmlm", {"text": "one"}, [{"text": "two"}]),
    ],
)
def test_fingerprints_of_other_tasks(folder, task, record, changes):
    prints = set()
    for change in ({}, *changes):
        path = jsonl(folder / "data.jsonl", [record | change, record])
        answers = ["red", "blue"] if task == "vqa" else None
        data = opened(path, task, answers=answers)
        assert data.fingerprint() == opened(path, task, answers=answers).fingerprint()
        prints.add(data.fingerprint())
    assert len(prints) == len(changes) + 1


def test_fingerprints_of_texts_and_folders_of_pictures(folder):
    path = folder / "texts.txt"
    path.write_bytes(b"one\n\ntwo\n")
    whole = opened(path, "textmlm").fingerprint()
    path.write_bytes(b"one\r\n two\r\n")
    assert opened(path, "textmlm").fingerprint() == whole
    path.write_text("one\r\ntwo\n", encoding="utf-16")
    assert opened(path, "textmlm").fingerprint() == whole
    path.write_bytes(b"one\ntoo\n")
    assert opened(path, "textmlm").fingerprint() != whole
    pictures = folder.parent / "pictures"
    pictures.mkdir()
    for name in "ab":
        shutil.copy(folder / f"{name}.png", pictures)
        (pictures / f"{name}.txt").write_text(name)
    whole = opened(pictures).fingerprint()
    moved = pictures.rename(folder.parent / "moved")
    assert opened(moved).fingerprint() == whole
    (moved / "b.png").rename(moved / "c.png")
    (moved / "b.txt").rename(moved / "c.txt")
    assert opened(moved).fingerprint() != whole


def test_fingerprints_of_arrow_files(tmp_path):
    columns: dict[str, list] = {"caption": [["one", "two"], ["three"]], "image_id": [1, 2]}
    arrow(tmp_path / "vg.arrow", columns)
    whole = opened(tmp_path, datasets=["vg"]).fingerprint()
    prints = {whole}
    for rows, change in ((1, {}), (9, {"image_id": [1, 3]}), (9, {"caption": [["one"], ["two"]]})):
        arrow(tmp_path / "vg.arrow", columns | change, rows)
        prints.add(opened(tmp_path, datasets=["vg"]).fingerprint())
        assert (not change) == (prints == {whole})
    assert len(prints) == 3


def test_fingerprints_of_digit_scenes():
    assert DigitScenes("val", 20).fingerprint() == DigitScenes("val", 20).fingerprint()
    options: list[dict] = [
        {},
        {"seed": 1},
        {"task": "vqa"},
        {"task": "nlvr2"},
        {"size": 21},
        {"split": "test"},
        {"distinct": True},
        {"image_size": 64},
    ]
    prints = {DigitScenes(**({"split": "val", "size": 20} | o)).fingerprint() for o in options}
    assert len(prints) == len(options)
