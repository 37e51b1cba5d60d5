"""WordPiece tokenizer and whole-word masking."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vlmo.data import TextTokenizer, load_vocabulary, mask_whole_words, train_wordpiece
from vlmo.data.tokenizer import is_blank

TEXTS = ["The cat sat on the mat.", "a catalogue of mats", "unbelievable cats, unbelievable mats!"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(train_wordpiece(TEXTS, 200), 16)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory) -> TextTokenizer:
    """Knows "a" to "t" and "##a" to "##t": each letter of a word is one piece."""
    letters = "abcdefghijklmnopqrst"
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]))
    return TextTokenizer(load_vocabulary(path), 40)


def test_round_trip(tokenizer):
    encoded = tokenizer.encode(TEXTS)
    decoded = [text.replace(" ", "") for text in tokenizer.decode(encoded["text_ids"])]
    assert decoded == [text.lower().replace(" ", "") for text in TEXTS]
    assert tokenizer.decode(tokenizer.encode("A  MAT")["text_ids"]) == ["a mat"]


def test_padding_and_special_tokens(tokenizer):
    encoded = tokenizer.encode(["cats", ""])
    ids, masks = encoded["text_ids"], encoded["text_masks"]
    assert ids.dtype == masks.dtype == torch.int64
    assert ids.shape == masks.shape == (2, 16)
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    assert ids[1].tolist() == [cls, sep, *[0] * 14]
    length = int(masks[0].sum())
    assert masks[0].tolist() == [1] * length + [0] * (16 - length)
    assert (ids[0, 0], ids[0, length - 1]) == (cls, sep)
    assert tokenizer.tokens(range(5)) == SPECIAL
    assert tokenizer.encode([])["text_ids"].shape == (0, 16)


def test_truncation_keeps_sep(tokenizer):
    short = TextTokenizer(train_wordpiece(TEXTS, 200), 5)
    ids = short.encode(TEXTS)["text_ids"]
    assert ids.shape == (3, 5)
    assert (ids[:, -1] == short.sep_id).all()
    assert torch.equal(ids[:, :4], tokenizer.encode(TEXTS)["text_ids"][:, :4])


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=4), length=st.integers(3, 24))
def test_any_text_becomes_a_well_formed_row(tokenizer, texts, length):
    assume(not any(token in text for token in SPECIAL for text in texts))
    encoded = TextTokenizer(tokenizer._tokenizer, length).encode(texts)
    for ids, mask in zip(encoded["text_ids"].tolist(), encoded["text_masks"].tolist(), strict=True):
        used = sum(mask)
        assert mask == [1] * used + [0] * (length - used)
        assert ids[0] == tokenizer.cls_id
        assert ids[used - 1] == tokenizer.sep_id
        assert not {tokenizer.cls_id, tokenizer.sep_id, 0} & set(ids[1 : used - 1])
        assert set(ids[used:]) <= {0}


def test_mask_token_in_a_text(tokenizer):
    assert tokenizer.mask_id in tokenizer.encode("the [MASK] sat")["text_ids"][0]


def test_unknown_characters(tokenizer):
    assert tokenizer.encode("\u4e09")["text_ids"][0, 1] == tokenizer.unk_id


def test_max_length_below_three_is_refused():
    with pytest.raises(ValueError, match="max_length: 2"):
        TextTokenizer(train_wordpiece(TEXTS, 200), 2)


def test_training_is_frequency_ordered_and_bounded():
    """Hand computed: "ab" occurs most, "abc" next, and no capacity is left for "##bc"."""
    tokenizer = TextTokenizer(train_wordpiece(["ab ab ab abc abc"], 10), 8)
    assert tokenizer.tokens(range(10)) == [*SPECIAL, "##b", "##c", "a", "ab", "abc"]
    with pytest.raises(ValueError, match="vocab_size: 7 does not hold 5 special tokens and 3"):
        train_wordpiece(["ab abc"], 7)


def test_training_ignores_the_order_of_texts():
    vocabularies = [train_wordpiece(texts, 60).get_vocab() for texts in (TEXTS, TEXTS[::-1])]
    assert vocabularies[0] == vocabularies[1]


def test_vocabulary_file_round_trip(tokenizer, tmp_path):
    path = tmp_path / "vocab.txt"
    tokenizer.save_vocabulary(path)
    again = TextTokenizer(load_vocabulary(path), 16)
    assert torch.equal(again.encode(TEXTS)["text_ids"], tokenizer.encode(TEXTS)["text_ids"])
    assert again.vocab_size == tokenizer.vocab_size
    assert os.listdir(tmp_path) == ["vocab.txt"]


def test_failed_save_keeps_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "vocab.txt"
    path.write_text("old")

    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="no space"):
        tokenizer.save_vocabulary(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["vocab.txt"]


def test_published_layout_is_kept(tmp_path):
    """Special tokens away from the start, foreign line separators and Windows line ends."""
    tokens = ["[PAD]", "[unused0]", "\u2028", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "##s"]
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join([*tokens, ""]).encode())
    tokenizer = TextTokenizer(load_vocabulary(path), 6)
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("Cats dog")["text_ids"].tolist() == [[4, 7, 8, 3, 5, 0]]
    assert tokenizer.is_special.nonzero().flatten().tolist() == [0, 3, 4, 5, 6]
    assert tokenizer.is_continuation.nonzero().flatten().tolist() == [8]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_byte_order_marks_are_no_part_of_the_first_token(tmp_path, encoding):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, "cat", "ü", ""]), encoding=encoding)
    tokenizer = TextTokenizer(load_vocabulary(path), 6)
    assert tokenizer.tokens(range(7)) == [*SPECIAL, "cat", "ü"]
    path.write_bytes("\n".join([*SPECIAL, "cat", "ü"]).encode("latin-1"))
    with pytest.raises(ValueError, match=r"vocab\.txt, line 7: is not UTF-8"):
        load_vocabulary(path)


def test_blank_is_what_no_token_is_made_of(tokenizer):
    blank = ["", " \t\n", "\x00", "\u200b", "\ufeff \u3000", "\u0301", "\ufffd"]
    for text in [*blank, "a", "?", "\u3002", "\u4e09", "\u00e9", "\U0001f642", "[MASK]"]:
        assert is_blank(text) == (text in blank), repr(text)
        assert is_blank(text) == (tokenizer.encode(text)["text_masks"].sum() == 2)


def test_training_takes_texts_in_blocks(monkeypatch):
    expected = train_wordpiece(TEXTS * 3, 60).get_vocab()
    monkeypatch.setattr("vlmo.data.tokenizer._BLOCK", 2)
    assert train_wordpiece(iter(TEXTS * 3), 60).get_vocab() == expected


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[PAD]", "[UNK]", "cat"], r"lacks \[CLS\], \[SEP\], \[MASK\]"),
        ([*SPECIAL, "cat", "dog", "cat"], "token 'cat' of line 6 stands on line 8"),
        ([], r"lacks \[PAD\], \[UNK\]"),
    ],
)
def test_unusable_vocabularies(tmp_path, lines, message):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        load_vocabulary(path)
    with pytest.raises(FileNotFoundError):
        load_vocabulary(tmp_path / "absent.txt")


def words_of(row: list[int], tokenizer: TextTokenizer) -> list[list[int]]:
    """Columns of each word of a row of ids."""
    words: list[list[int]] = []
    for column, token in enumerate(tokenizer.tokens(row)):
        if token in SPECIAL:
            continue
        if token.startswith("##"):
            words[-1].append(column)
        else:
            words.append([column])
    return words


@settings(max_examples=80, deadline=None)
@given(
    texts=st.lists(
        st.lists(st.text("abcdefghijklmnopqrst", min_size=1, max_size=6), max_size=12).map(
            " ".join
        ),
        min_size=1,
        max_size=5,
    ),
    probability=st.floats(0.01, 1),
    seed=st.integers(0, 1000),
    official=st.booleans(),
)
def test_masking_chooses_whole_words(pieces, texts, probability, seed, official):
    ids = pieces.encode(texts)["text_ids"]
    before = ids.clone()
    masked, labels = mask_whole_words(
        ids,
        pieces,
        probability,
        generator=torch.Generator().manual_seed(seed),
        official=official,
    )
    assert torch.equal(ids, before)
    chosen = labels != -100
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    for row in range(len(ids)):
        words = words_of(ids[row].tolist(), pieces)
        tokens = sum(map(len, words))
        taken = [word for word in words if chosen[row, word].any()]
        assert all(chosen[row, word].all() for word in taken)
        assert int(chosen[row].sum()) == sum(map(len, taken)) <= tokens
        if official:
            assert int(chosen[row].sum()) <= max(1, round(probability * ids.shape[1]))
            continue
        budget = max(1, round(probability * tokens))
        assert bool(taken) == bool(words)
        assert int(chosen[row].sum()) <= max(budget, max(map(len, words), default=0))
        left = [len(word) for word in words if word not in taken]
        assert all(int(chosen[row].sum()) + size > budget for size in left)


def test_masking_statistics(pieces):
    ids = pieces.encode(["a b c d e f g h i j k l m n o p q r s t"] * 4000)["text_ids"]
    generator = torch.Generator().manual_seed(0)
    masked, labels = mask_whole_words(ids, pieces, generator=generator)
    chosen = labels != -100
    assert (chosen.sum(1) == 3).all()
    # Each of the 20 words is as likely as the others.
    assert chosen[:, 1:21].double().mean(0) == pytest.approx(torch.full((20,), 0.15), abs=0.02)
    hidden = (masked == pieces.mask_id)[chosen].double().mean()
    kept = (masked == ids)[chosen].double().mean()
    # A random token is the token itself in one of 40 cases.
    assert hidden == pytest.approx(0.8, abs=0.015)
    assert kept == pytest.approx(0.1 + 0.1 / 40, abs=0.01)
    randomised = masked[chosen & (masked != pieces.mask_id) & (masked != ids)]
    assert not pieces.is_special[randomised].any()
    assert len(randomised.unique()) == 40


def test_official_rule_draws_padding(pieces):
    """6 of 40 columns are drawn but [CLS] and [SEP]; what falls on padding is left alone."""
    ids = pieces.encode(["a b c d e f g h"] * 4000)["text_ids"]
    generator = torch.Generator().manual_seed(0)
    _, labels = mask_whole_words(ids, pieces, generator=generator, official=True)
    count = (labels != -100).sum(1)
    assert count.double().mean() == pytest.approx(8 * 6 / 38, abs=0.05)
    # Hypergeometric: none of the 6 of 38 falls on the 8 words.
    none = math.prod((30 - n) / (38 - n) for n in range(6))
    assert (count == 0).double().mean() == pytest.approx(none, abs=0.03)


def test_long_words_are_learned_from_short_texts(pieces):
    ids = pieces.encode(["abc d e f"] * 1000)["text_ids"]
    generator = torch.Generator().manual_seed(0)
    _, labels = mask_whole_words(ids, pieces, generator=generator)
    assert (labels[:, 1:4] != -100).all(1).double().mean() == pytest.approx(0.25, abs=0.05)


def test_masking_repeats_with_its_generator(tokenizer):
    ids = tokenizer.encode(TEXTS)["text_ids"]
    runs = [
        mask_whole_words(ids, tokenizer, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    ]
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][1], runs[2][1])


def test_unknown_words_are_not_predicted(tokenizer):
    ids = tokenizer.encode("\u4e09 cat \u4e09")["text_ids"]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        _, labels = mask_whole_words(ids, tokenizer, 0.9, generator=generator)
        assert tokenizer.unk_id not in labels


def test_masking_checks_its_arguments(tokenizer):
    ids = tokenizer.encode(TEXTS)["text_ids"]
    with pytest.raises(ValueError, match=r"torch.int32 \(3, 16\)"):
        mask_whole_words(ids.int(), tokenizer)
    with pytest.raises(ValueError, match="probability: 0"):
        mask_whole_words(ids, tokenizer, 0)
    empty = mask_whole_words(ids[:0], tokenizer)
    assert empty[0].shape == empty[1].shape == (0, 16)
