"""``vlmo vocab``."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vlmo.commands.app import app
from vlmo.data import TextTokenizer, load_vocabulary, open_data, texts_of, train_wordpiece


def vocab(*arguments):
    return CliRunner().invoke(app, ["vocab", *map(str, arguments)])


def test_a_vocabulary_is_learned_from_any_source(tmp_path):
    source = tmp_path / "train.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab ab abc", "abc")))
    result = vocab(source, "--task", "textmlm", "--size", 10, "--output", tmp_path / "vocab.txt")
    assert result.exit_code == 0, result.output
    assert "vocab.txt: 10 tokens, learned from 2 texts" in result.output
    lines = (tmp_path / "vocab.txt").read_text().split()
    assert lines == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "##b", "##c", "a", "ab", "abc"]


def test_texts_of_every_sample():
    data = open_data("digits", "vqa", "val", image_size=32)
    texts = [*texts_of(data)]
    assert len(texts) == len(data)
    assert texts[7] == data.text(7)
    assert train_wordpiece(texts, 200).get_vocab_size() <= 200


def test_a_file_that_exists_is_kept(tmp_path):
    output = tmp_path / "vocab.txt"
    output.write_text("mine")
    with pytest.raises(FileExistsError, match=r"output: .*vocab\.txt exists; --force replaces it"):
        raise vocab("digits", "--output", output).exception
    assert output.read_text() == "mine"
    (tmp_path / "a.txt").write_text("a b\nb c\n")
    assert (
        vocab(tmp_path / "a.txt", "--task", "textmlm", "--output", output, "--force").exit_code == 0
    )
    assert TextTokenizer(load_vocabulary(output), 8).vocab_size == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--output", "absent/vocab.txt"], "output: the folder of absent/vocab.txt does"),
        (["digits", "--size", "20"], "vocab_size: 20 does not hold 5 special tokens and"),
        (["absent"], "source: .*absent does not exist"),
    ],
)
def test_what_cannot_be_done_writes_nothing(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=message):
        raise vocab(*arguments).exception
    assert not [*tmp_path.iterdir()]
