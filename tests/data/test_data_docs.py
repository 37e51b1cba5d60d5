"""The examples of docs/data.md, read by the code that they describe."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from vlmo.data import ANSWERS, open_data

DOCS = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
RECORDS = [json.loads(line) for line in re.findall(r"^    (\{.*\})$", DOCS, re.MULTILINE)]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where every picture of the examples is."""
    monkeypatch.chdir(tmp_path)
    for record in RECORDS:
        for name in ("image", "image_0", "image_1"):
            if name in record:
                path = tmp_path / record[name]
                path.parent.mkdir(exist_ok=True)
                Image.new("RGB", (20, 20), "red").save(path)
    return tmp_path


@pytest.mark.parametrize(
    ("task", "key", "samples"),
    [
        ("pretrain", "caption", 4),
        ("retrieval", "caption", 4),
        ("vqa", "question", 3),
        ("nlvr2", "statement", 1),
        ("textmlm", "text", 1),
    ],
)
def test_records(folder, task, key, samples):
    lines = [json.dumps({**record, "split": "train"}) for record in RECORDS if key in record]
    (folder / "data.jsonl").write_text("\n".join(lines))
    data = open_data("data.jsonl", task, "train", image_size=16, train=True)
    assert len(data) == samples
    assert data[0]["text"] == data.text(0)
    assert len({data.text(row) for row in range(samples)}) == samples


def test_split_of_a_record(folder):
    lines = [json.dumps(record) for record in RECORDS if "caption" in record]
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    sizes = {
        s: len(open_data("pairs.jsonl", "pretrain", s, image_size=16)) for s in ("train", "val")
    }
    assert sizes == {"train": 3, "val": 4}


def test_arrow_file(folder):
    code = re.search(r"^    import pyarrow as pa\n(?:(?:    .*)?\n)+", DOCS, re.MULTILINE)
    assert code
    (folder / "photos" / "0001.jpg").rename("0001.jpg")
    exec(textwrap.dedent(code[0]), {})
    data = open_data(folder, "retrieval", "val", image_size=16)
    assert [data.text(row) for row in range(2)] == ["a dog runs on the beach", "a dog"]
    assert data[1]["image"].shape == (3, 16, 16)


def test_answers_of_the_first_example(folder):
    (question,) = [r for r in RECORDS if isinstance(r.get("answer"), list)]
    (folder / "train.jsonl").write_text(json.dumps(question))
    data = open_data(folder, "vqa", "train", image_size=16, answers=["no", "yes"])
    fields = data[0]
    assert dict(zip(fields["answer_labels"], fields["answer_scores"], strict=True)) == {
        1: 0.9,
        0: 0.3,
    }
    assert open_data("digits", "vqa", "val", image_size=32).answers == list(ANSWERS)
