"""Output files of commands: they never overwrite a user's files, and names are unchanged."""

from __future__ import annotations

import json
import os
import sys

import pytest
from typer.testing import CliRunner

from vlmo.commands import app as cli
from vlmo.commands.outputs import check_outputs


@pytest.fixture
def folder(tmp_path):
    """A folder of data, and one of a training."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "boat.png").touch()
    (tmp_path / "run").mkdir()
    for name in ("recipe.json", "metrics.json", "model.safetensors"):
        (tmp_path / "run" / name).touch()
    (tmp_path / "pairs.jsonl").touch()
    os.symlink(tmp_path / "pairs.jsonl", tmp_path / "link.jsonl")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("pairs.jsonl", "is the file of input as well"),
        ("link.jsonl", "is the file of input as well"),
        ("photo.JPG", "has the name of a picture"),
        ("data/val.jsonl", "would be taken for data of"),
        ("data/train-00000-of-00002.parquet", "would be taken for data of"),
        ("data/metadata.csv", "would be taken for data of"),
        ("data/boat.txt", "would be taken for data of"),
        ("run/model.safetensors", "is a file of the training in its folder"),
        ("run/metrics.json", "is a file of the training in its folder"),
    ],
)
def test_outputs_take_no_place_of_what_is_read(folder, output, message):
    given = {"input": folder / "pairs.jsonl", "data": folder / "data", "vocab": None}
    with pytest.raises(ValueError, match=f"^output: .*{output} {message}"):
        check_outputs({"output": folder / output}, given=given)


@pytest.mark.parametrize("output", ["data/bad.jsonl", "data/vocab.txt", "run/test.json", "a.json"])
def test_other_outputs_may_lie_beside_it(folder, output):
    (folder / output).touch()
    check_outputs({"output": folder / output}, given={"data": folder / "data"})


@pytest.mark.parametrize("command", ["check", "vocab"])
def test_commands_do_not_write_over_their_data(tmp_path, command):
    source = tmp_path / "texts.jsonl"
    source.write_text(json.dumps({"text": "a b c"}) + "\n")
    before = source.read_bytes()
    force = ["--force"] if command == "vocab" else []
    arguments = [command, str(source), "--task", "textmlm", "--output", str(source), *force]
    error = CliRunner().invoke(cli.app, arguments).exception
    assert isinstance(error, ValueError)
    assert "is the file of data as well" in str(error)
    assert source.read_bytes() == before


@pytest.mark.parametrize("name", ["a[b]", "a[", "a:smile:", "a\udcff"])
def test_names_of_files_are_shown_as_they_are(tmp_path, monkeypatch, capfd, name):
    """Not taken for markup, nor for characters that can be encoded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a b c"}) + "\n")
    output = f"{name}.jsonl"
    arguments = ["check", "texts.jsonl", "--task", "textmlm", "--output", output]
    monkeypatch.setattr(sys, "argv", ["vlmo", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    shown = output.encode("utf-8", "backslashreplace").decode()
    assert capfd.readouterr().out.splitlines()[-1] == f"Written: {shown}"
    assert os.path.exists(output)
