"""Samples that cannot be read: errors of each kind of data, and vlmo check."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vlmo.commands import app as cli
from vlmo.commands import check as command
from vlmo.commands.app import app
from vlmo.data import (
    BadSample,
    DigitScenes,
    GlobalBatches,
    check_samples,
    digit_tokenizer,
    loader,
    open_data,
)
from vlmo.data.check import splits_there, tasks_of


def picture(level: int = 0, kind: str = "PNG", side: int = 40) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((side, side), level + 1).save(stream, kind)
    return stream.getvalue()


def jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def opened(source, task: str = "pretrain", split: str = "train", **options):
    return open_data(source, task, split, image_size=16, **options)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Records of eight pictures, each of two captions; train.jsonl has those of 4 .. 6 damaged."""
    home = tmp_path / "data"
    home.mkdir()
    for n in range(8):
        (home / f"{n}.jpg").write_bytes(picture(n, "JPEG"))
    records = [{"image": f"{n}.jpg", "caption": [f"one {n}", f"two {n}"]} for n in range(8)]
    jsonl(home / "train.jsonl", records)
    jsonl(home / "val.jsonl", records[:2])
    (home / "4.jpg").write_bytes(picture(4, "JPEG")[:300])
    (home / "5.jpg").write_bytes(b"no picture")
    (home / "6.jpg").write_bytes(b"")
    return home


def fault(dataset, index: int) -> BadSample:
    with pytest.raises(BadSample) as caught:
        dataset[index]
    copy = pickle.loads(pickle.dumps(caught.value))
    for error in (caught.value, copy):
        assert error.index == index
        assert (str(error), error.file, error.row) == (str(copy), copy.file, copy.row)
    return copy


def test_bad_pictures_of_files(folder, monkeypatch):
    data = opened(folder)
    (folder / "7.jpg").unlink()
    for index, reason in (
        (8, "4.jpg: the image cannot be read: "),
        (9, "4.jpg: the image cannot be read: "),
        (10, "5.jpg: is not an image of a known format"),
        (12, "6.jpg: is not an image of a known format"),
        (14, "7.jpg: No such file or directory"),
    ):
        found = fault(data, index)
        assert str(found).startswith(f"{folder}/{reason}")
        assert (found.file, found.row) == (str(folder / reason.partition(":")[0]), None)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert "0.jpg: the image has too many pixels" in str(fault(data, 0))


def test_missing_pictures_are_told_at_once_or_when_they_are_read(folder):
    (folder / "1.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 image files are missing: .*1\.jpg"):
        opened(folder)
    data = opened(folder, allow_missing=True)
    assert str(fault(data, 2)) == f"{folder}/1.jpg: No such file or directory"
    assert len(data.fingerprint()) == 16
    assert len(set(data.keys.tolist())) == 8


def test_bad_pictures_of_tables(tmp_path):
    images = [picture(), picture()[:200], b"nonsense"]
    table = pa.table({"image": images, "caption": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "train.parquet")
    data = opened(tmp_path / "train.parquet")
    for index, reason in ((1, "cannot be read"), (2, "is not an image of a known format")):
        found = fault(data, index)
        place = f"{tmp_path}/train.parquet, row {index + 1}, image: "
        assert str(found).startswith(place) and reason in str(found)
        assert (found.file, found.row) == (str(tmp_path / "train.parquet"), index + 1)
    assert "image" in data[0]


def arrow(path: Path, images: list[bytes], captions: list[list[str]]) -> None:
    numbers = list(range(len(images)))
    table = pa.table({"image": images, "caption": captions, "image_id": numbers})
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)


def test_bad_texts_of_arrow_files(tmp_path):
    arrow(tmp_path / "wikibk_val_0.arrow", [b"", b""], [["one", "a word"], ["three"]])
    data = opened(tmp_path, "textmlm", "val")
    content = (tmp_path / "wikibk_val_0.arrow").read_bytes()
    assert content.count(b"a word") == 1
    (tmp_path / "wikibk_val_0.arrow").write_bytes(content.replace(b"a word", b"a w\xffrd"))
    for of in (data, opened(tmp_path, "textmlm", "val")):
        found = fault(of, 1)
        assert str(found).startswith(f"{tmp_path}/wikibk_val_0.arrow, row 0: ")
        assert "utf-8" in str(found)


def test_bad_pictures_of_arrow_files(tmp_path):
    images = [picture(), picture()[:200], picture()]
    arrow(tmp_path / "vg.arrow", images, [["one"], ["two", "three"], ["four"]])
    data = opened(tmp_path, datasets=["vg"])
    found = fault(data, 2)
    assert str(found).startswith(f"{tmp_path}/vg.arrow, row 1, image: the image cannot be read")
    assert (found.file, found.row) == (str(tmp_path / "vg.arrow"), 1)
    assert [index for index, _ in check_samples(data)] == [1], "each picture once"


def test_bad_texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"one\ntwo\nthree\n")
    data = opened(path, "textmlm")
    path.write_bytes(b"one\n\xff\xfeo\nthree\n")  # after it was opened
    found = fault(data, 1)
    assert str(found).startswith(f"{path}, row 2: ") and "utf-8" in str(found)
    assert (found.file, found.row) == (str(path), 2)
    with pytest.raises(BadSample, match="row 2"):
        data.text(1)
    assert list(check_samples(data)) == [(1, str(found))]


def test_bad_samples_of_files_reach_the_batch(folder):
    data = opened(folder)
    for workers in (0, 2):
        batches = GlobalBatches(16, 8, steps=2)
        loaded = loader(data, batches, digit_tokenizer(8), workers=workers, on_bad="leave_out")
        bad = [pair for batch in loaded for pair in batch["bad_samples"]]
        assert sorted(index for index, _ in bad) == [8, 9, 10, 11, 12, 13]
        batches = GlobalBatches(16, 2, spares=3, keys=data.keys, steps=8)
        loaded = loader(data, batches, digit_tokenizer(8), workers=workers, on_bad="replace")
        assert all(batch["image"].shape == (2, 3, 16, 16) for batch in loaded)


def test_check_reads_every_picture_once(folder, monkeypatch):
    data = opened(folder)
    seen: list[int] = []
    decoded = type(data).picture

    def spy(self, index, name):
        seen.append(index)
        return decoded(self, index, name)

    monkeypatch.setattr(type(data), "picture", spy)
    found = list(check_samples(data))
    assert seen == [0, 2, 4, 6, 8, 10, 12, 14]
    assert [index for index, _ in found] == [8, 10, 12]
    assert all(str(folder / f"{index // 2}.jpg") in reason for index, reason in found)


@pytest.mark.parametrize("workers", [1, 2])
def test_check_finds_the_same_with_workers(folder, workers):
    data = opened(folder)
    assert list(check_samples(data, workers=workers)) == list(check_samples(data))


def test_check_of_pairs_names_both_pictures(folder):
    pairs = [(4, 5), (0, 5), (4, 6), (1, 0)]
    records = [
        {"image_0": f"{a}.jpg", "image_1": f"{b}.jpg", "statement": "both", "label": True}
        for a, b in pairs
    ]
    data = opened(jsonl(folder / "pairs.jsonl", records), "nlvr2")
    found = [(index, Path(reason.partition(":")[0]).name) for index, reason in check_samples(data)]
    assert found == [(0, "4.jpg"), (0, "5.jpg"), (2, "6.jpg")]


def test_check_of_other_data_sets():
    assert list(check_samples(DigitScenes("val", 40))) == []


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["check", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_lists_what_is_bad(folder, tmp_path):
    (folder / "7.jpg").unlink()
    report = tmp_path / "bad.jsonl"
    code, output = run(folder, "--task", "retrieval", "--output", report)
    lines = output.splitlines()
    assert code == 1
    assert lines[0].startswith(f"train: {folder}/4.jpg: the image cannot be read")
    assert "train: 16 samples and 8 pictures: 4 cannot be read" in lines
    assert "val: 4 samples and 2 pictures: all can be read" in lines
    found = [json.loads(line) for line in report.read_text().splitlines()]
    assert [(f["split"], f["sample"], Path(f["file"]).name, f["row"]) for f in found] == [
        ("train", 8, "4.jpg", None),
        ("train", 10, "5.jpg", None),
        ("train", 12, "6.jpg", None),
        ("train", 14, "7.jpg", None),
    ]
    assert [f"train: {f['reason']}" for f in found] == lines[:4]
    code, output = run(folder, "--task", "pretrain", "--split", "val")
    assert (code, output) == (0, "val: 4 samples and 2 pictures: all can be read\n")


def test_the_command_refuses_before_it_reads(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"output: the folder of .* does not"):
        run(folder, "--task", "pretrain", "--output", tmp_path / "absent" / "bad.jsonl")
    with pytest.raises(FileNotFoundError, match="absent does not exist"):
        run(tmp_path / "absent", "--task", "pretrain")
    with pytest.raises(ValueError, match=r"datasets: \['coco'\]"):
        run(folder, "--task", "pretrain", "--datasets", "coco")
    with pytest.raises(FileNotFoundError, match=r"has no test\.jsonl"):
        run(folder, "--task", "pretrain", "--split", "test")


def test_the_command_finds_out_the_task(folder, tmp_path):
    assert run(folder, "--split", "val")[1].startswith("pretrain, val: 4 samples and 2 pictures")
    assert tasks_of("digits") == ["pretrain"]
    records: dict[str, dict[str, Any]] = {
        "vqa": {"image": "0.jpg", "question": "a?", "answer": "b", "caption": "c"},
        "nlvr2": {"image_0": "0.jpg", "image_1": "1.jpg", "statement": "a", "label": True},
        "textmlm": {"text": "a"},
    }
    for task, record in records.items():
        assert tasks_of(str(jsonl(tmp_path / f"{task}.jsonl", [record]))) == [task]
    (tmp_path / "lines.txt").write_text("one\n")
    assert tasks_of(str(tmp_path / "lines.txt")) == ["textmlm"]
    with pytest.raises(ValueError, match=r"odd\.jsonl, line 1: has none of question, statement"):
        tasks_of(str(jsonl(tmp_path / "odd.jsonl", [{"a": 1}])))
    with pytest.raises(FileNotFoundError):
        tasks_of(str(tmp_path / "absent"))
    arrow(tmp_path / "f30k_caption_karpathy_val.arrow", [picture()], [["one"]])
    arrow(tmp_path / "vg.arrow", [picture()], [["one"]])
    assert tasks_of(str(tmp_path)) == ["pretrain"]
    arrow(tmp_path / "nlvr2_dev.arrow", [picture()], [["one"]])
    assert tasks_of(str(tmp_path)) == ["pretrain", "nlvr2"]
    (tmp_path / "nlvr2_dev.arrow").unlink()
    code, output = run(tmp_path)
    assert code == 0
    assert [line.partition(":")[0] for line in output.splitlines()] == [
        "pretrain, train",
        "pretrain, val",
    ]


def test_a_bar_on_a_terminal_only(folder, monkeypatch):
    for terminal in (False, True):
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=terminal, width=80)
        monkeypatch.setattr(command, "plain_console", lambda console=console: console)
        command.check(str(folder), "pretrain", "val")
        assert ("━" in stream.getvalue()) == terminal


def test_splits_that_are_there(folder, tmp_path):
    assert splits_there("digits", "vqa") == ["train", "val", "test"]
    assert splits_there(str(folder), "pretrain") == ["train", "val"]
    assert splits_there(str(folder / "val.jsonl"), "pretrain") == ["train"]
    records = [{"image": "0.jpg", "caption": "a", "split": name} for name in ("dev", "test")]
    assert splits_there(str(jsonl(folder / "all.jsonl", records)), "pretrain") == ["val", "test"]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "val.txt").write_text("one\n")
    assert splits_there(str(tmp_path / "texts"), "textmlm") == ["val"]
    arrow(tmp_path / "f30k_caption_karpathy_val.arrow", [picture()], [["one"]])
    arrow(tmp_path / "vg.arrow", [picture()], [["one"]])
    assert splits_there(str(tmp_path), "retrieval") == ["val"]
    assert splits_there(str(tmp_path), "pretrain", ["vg"]) == ["train"]


def test_the_command_line_tells_of_a_killed_worker_wherever_torch_does(monkeypatch, capsys):
    def raising(message):
        def run():
            raise RuntimeError(message)

        monkeypatch.setattr(cli, "app", run)
        cli.main()

    with pytest.raises(SystemExit, match="2"):
        raising("DataLoader worker (pid 12) is killed by signal: Killed. ")
    told = capsys.readouterr().err
    assert told.startswith(
        "vlmo: workers: process 12, which made samples, killed by signal: Killed"
    )
    assert told.count("\n") == 1
    with pytest.raises(RuntimeError, match="a defect"):
        raising("a defect")
