"""Text files in common encodings."""

from __future__ import annotations

import codecs

import pytest

from vlmo.files import read_lines, read_text

TEXT = "eins\r\nzwei mit ü\n\n\u4e09\u2028dort\n"
LINES = ["eins", "zwei mit ü", "", "\u4e09\u2028dort"]


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
def test_byte_order_marks_tell_the_encoding(tmp_path, mark, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes(mark + TEXT.encode(encoding))
    assert read_text(path) == TEXT
    assert [*read_lines(path)] == LINES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\nü".encode("latin-1"), "line 3: is not UTF-8; save the file as UTF-8"),
        (codecs.BOM_UTF16_LE + "a\nb\n".encode("utf-16-le") + b"\x00\xd8", "line 3: is not UTF-16"),
        ("a\nb\n".encode("utf-16-le"), "line 1: holds the character NUL"),
    ],
)
def test_other_encodings_are_refused_with_the_line(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    for read in (read_text, lambda path: [*read_lines(path)]):
        with pytest.raises(ValueError, match=rf"a\.txt, {message}"):
            read(path)


def test_a_file_without_a_last_line_end(tmp_path):
    path = tmp_path / "a.txt"
    for encoding in ("utf-8", "utf-16"):
        for text, lines in (("a\n\nb", ["a", "", "b"]), ("a\n", ["a"])):
            path.write_text(text, encoding=encoding)
            assert [*read_lines(path)] == lines
    path.write_text("")
    assert read_text(path) == ""
    assert [*read_lines(path)] == []
