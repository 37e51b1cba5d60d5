"""SentencePiece vocabularies, compared with the library sentencepiece and with transformers."""

from __future__ import annotations

import io
import unicodedata

import pytest
import sentencepiece
import torch
from transformers.models.xlm_roberta import XLMRobertaTokenizer

from test_tokenizer import TEXTS
from vlmo.data import TextTokenizer, load_vocabulary, mask_whole_words
from vlmo.data.spm import SPECIAL_TOKENS

LEARNED = [*TEXTS, "hello wörld, how are you?", "two digits: 1 2 3 and ½", "日本語の テキスト"]
SEEN = [
    *LEARNED,
    "Unknown: ☃☃ and 漢字",
    "\ttabs,  spaces\u00a0\u3000and\nlines ",
    "",
    "   ",
    "naïve “quotes” — dash… №5 ﬁne ½",
    "▁ of the input",
    "हिन्दी में लिखें",
    "น้ำผึ้ง ที่นี่",
    "ｱｲｳ 한국어",
]


def trained(size: int = 90, texts=LEARNED, **options) -> bytes:
    """A SentencePiece model with the settings of XLM-R."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **dict(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=size,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "beit3.spm"
    path.write_bytes(trained())
    return path


@pytest.fixture(scope="module")
def tokenizer(path) -> TextTokenizer:
    return TextTokenizer(load_vocabulary(path), 64)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_pieces_and_ids_are_those_of_sentencepiece(path, tokenizer, form):
    official = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.vocab_size == official.get_piece_size() + 2
    assert tokenizer.tokens(range(4)) == ["<s>", "<pad>", "</s>", "<unk>"]
    for number in range(3, official.get_piece_size()):
        assert tokenizer.tokens([number + 1]) == [official.id_to_piece(number)]
    texts = [unicodedata.normalize(form, text) for text in SEEN]
    encoded = tokenizer.encode(texts)
    for text, ids, mask in zip(texts, encoded["text_ids"], encoded["text_masks"], strict=True):
        pieces = official.encode(text)
        wanted = [0, *(3 if n == 0 else n + 1 for n in pieces), 2]
        assert ids[mask.bool()].tolist() == wanted, text
        assert (ids[~mask.bool()] == 1).all()


def test_ids_are_those_of_transformers(path, tokenizer):
    (path.parent / "sentencepiece.bpe.model").write_bytes(path.read_bytes())
    official = XLMRobertaTokenizer.from_pretrained(str(path.parent))
    texts = [*SEEN, "the <mask> sat", "ｶﾞｷﾞ, which SentencePiece normalises otherwise"]
    wanted = official(texts, padding="max_length", max_length=64, truncation=True)
    encoded = tokenizer.encode(texts)
    assert encoded["text_ids"].tolist() == wanted["input_ids"]
    assert encoded["text_masks"].tolist() == wanted["attention_mask"]
    assert official.mask_token_id == tokenizer.mask_id == tokenizer.vocab_size - 1


def test_the_interface_is_that_of_wordpiece(tokenizer):
    special = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id)
    assert special == (1, 3, 0, 2)
    assert tokenizer.is_special.nonzero()[:, 0].tolist() == [0, 1, 2, 3, tokenizer.mask_id]
    (ids,) = tokenizer.encode("the <mask> sat")["text_ids"]
    assert tokenizer.mask_id in ids
    assert tokenizer.decode(tokenizer.encode(" The  cat")["text_ids"]) == ["The cat"]
    short = TextTokenizer(tokenizer._tokenizer, 5).encode(TEXTS)["text_ids"]
    assert short.shape == (3, 5)
    assert (short[:, -1] == 2).all()


def test_whole_words_are_masked(tokenizer):
    ids = tokenizer.encode(TEXTS)["text_ids"]
    masked, labels = mask_whole_words(ids, tokenizer, 0.3, seeds=[1, 2, 3])
    chosen = labels >= 0
    assert chosen.any(1).all() and not tokenizer.is_special[ids[chosen]].any()
    for row, text_ids in zip(chosen, ids, strict=True):
        for place in tokenizer.is_continuation[text_ids].nonzero()[:, 0].tolist():
            assert row[place] == row[place - 1]
    assert not torch.equal(masked, ids)


def test_a_vocabulary_survives_its_file(tokenizer, tmp_path):
    assert tokenizer.file_name == "tokenizer.json"
    tokenizer.save_vocabulary(tmp_path / tokenizer.file_name)
    again = TextTokenizer(load_vocabulary(tmp_path / tokenizer.file_name), 64)
    assert again.tokens(range(again.vocab_size)) == tokenizer.tokens(range(tokenizer.vocab_size))
    assert torch.equal(again.encode(SEEN)["text_ids"], tokenizer.encode(SEEN)["text_ids"])
    longer = "cat " * 90  # a file has no truncation
    assert len(load_vocabulary(tmp_path / tokenizer.file_name).encode(longer).ids) > 64


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (dict(model_type="bpe"), "no unigram model"),
        (dict(add_dummy_prefix=False), "one space"),
        (dict(user_defined_symbols=["digit"]), "besides ordinary ones"),
        (dict(pad_id=0, bos_id=1, eos_id=2, unk_id=3), "its first pieces are"),
    ],
)
def test_models_of_other_kinds_are_rejected(tmp_path, options, fault):
    path = tmp_path / "other.spm"
    path.write_bytes(trained(**options))
    with pytest.raises(ValueError, match=f"other.spm: .*{fault}.*unlike the model of XLM-R"):
        load_vocabulary(path)


@pytest.mark.parametrize("content", [b"", b"[PAD]\n[UNK]\n", b"\x0a\xff\xff\xff", b"\x0b" * 40])
def test_files_of_other_kinds_are_rejected(tmp_path, content):
    (tmp_path / "vocab.spm").write_bytes(content)
    with pytest.raises(ValueError, match=r"vocab\.spm: "):
        load_vocabulary(tmp_path / "vocab.spm")


def test_a_truncated_model_is_rejected(path, tmp_path):
    content = path.read_bytes()
    (tmp_path / "half.spm").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.spm: is no SentencePiece model, or damaged"):
        load_vocabulary(tmp_path / "half.spm")


@pytest.mark.parametrize(
    ("content", "fault"),
    [("{}", "no file of tokenizers"), ("no JSON", "no file of tokenizers")],
)
def test_damaged_tokenizer_files_are_rejected(tmp_path, content, fault):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=rf"tokenizer\.json: .*{fault}"):
        load_vocabulary(tmp_path / "tokenizer.json")


def test_a_tokenizer_file_of_another_model_is_rejected(tmp_path):
    from vlmo.data import train_wordpiece

    train_wordpiece(TEXTS, 200).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=f"lacks {', '.join(SPECIAL_TOKENS)}"):
        load_vocabulary(tmp_path / "tokenizer.json")
