"""Reads SentencePiece models (.spm) into tokenizers, with the ids of XLM-R that BEiT-3 uses.

unilm reads ``beit3.spm`` with ``transformers.XLMRobertaTokenizer``, whose ids are those of fairseq:
<s>, <pad>, </s>, <unk>, then piece n of the file (from 3) as n + 1, and <mask> after the last.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("<pad>", "<unk>", "<s>", "</s>", "<mask>")
SUFFIXES = (".spm", ".model")
SPACE = "\u2581"  # starts a piece that starts a word
_FIRST = ("<unk>", "<s>", "</s>")  # the first pieces of every such file
_UNIGRAM = 1  # TrainerSpec.model_type
_NORMAL = 1  # SentencePiece.type


class _Piece(NamedTuple):
    text: str
    score: float
    kind: int


def load_spm(path: str | os.PathLike[str]) -> Tokenizer:
    """Load a SentencePiece model as unilm does for BEiT-3.

    Texts have the pieces that SentencePiece gives them, but for rare sequences with combining marks
    that the library tokenizers, and with it transformers, normalises in another way: an accent
    after "½", half-width katakana with voiced sound marks. "<mask>" and the other special tokens
    are recognised in a text, as transformers does.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no SentencePiece model, or one of another kind than XLM-R's: it is not a
            unigram model, treats spaces in another way, or its first pieces are not <unk>, <s>,
            </s>.
    """
    try:
        pieces, charsmap, fault = _read(Path(path).read_bytes())
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)}: is no SentencePiece model, or damaged") from error
    if fault is not None:
        raise ValueError(f"{os.fspath(path)}: {fault}, unlike the model of XLM-R and BEiT-3")
    scored = [(piece.text, piece.score) for piece in pieces[len(_FIRST) :]]
    special = [(token, 0.0) for token in (CLS, PAD, SEP, UNK)]
    tokenizer = Tokenizer(models.Unigram([*special, *scored, (MASK, 0.0)], special.index((UNK, 0))))
    tokenizer.normalizer = normalizers.Sequence(
        [
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            normalizers.Replace(Regex("^ +| +$"), ""),
            normalizers.Replace(Regex(" +"), SPACE),
            normalizers.Prepend(SPACE),
        ]
    )
    ids = {token: tokenizer.token_to_id(token) for token in (CLS, SEP)}
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[CLS, "$A", SEP], special_tokens=list(ids.items())
    )
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _read(content: bytes) -> tuple[list[_Piece], bytes, str | None]:
    """Pieces, compiled character map, and what makes the model unlike that of XLM-R, if any.

    The file is a protocol buffer, ``ModelProto`` of sentencepiece_model.proto.
    """
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece[2])
            pieces.append(_Piece(piece[1].decode(), score, piece.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    kinds = {piece.kind for piece in pieces[len(_FIRST) :]}
    texts = [piece.text for piece in pieces]
    fault = None
    if tuple(texts[: len(_FIRST)]) != _FIRST:
        fault = f"its first pieces are {texts[: len(_FIRST)]}, not {list(_FIRST)}"
    elif trainer.get(3, _UNIGRAM) != _UNIGRAM:
        fault = "it is no unigram model"
    elif kinds - {_NORMAL} or len({*texts, PAD, MASK}) < len(texts) + 2:
        fault = "it has pieces besides ordinary ones, or one of them twice"
    elif not all(normalizer.get(field, 1) for field in (3, 4, 5)) or trainer.get(24, 0):
        fault = "it does not start a text and each word with one space"
    return pieces, normalizer.get(2, b""), fault


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of a protocol buffer's fields: integers, or bytes."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = message[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(message):
        key = varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if place + length > len(message):
            raise IndexError(place)
        yield key >> 3, message[place : place + length]
        place += length
