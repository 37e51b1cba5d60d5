"""Texts to ids: BERT's WordPiece, trained here or read from a vocab.txt, or SentencePiece.

VLMo uses WordPiece, the published BEiT-3 SentencePiece (:mod:`vlmo.data.spm`).
"""

from __future__ import annotations

import heapq
import itertools
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from vlmo.data import spm
from vlmo.files import read_lines, read_text, replacing

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONTINUATION = "##"
# Names of vocabularies in a run folder, of WordPiece and of SentencePiece.
WORDPIECE_FILE, SENTENCEPIECE_FILE = "vocab.txt", "tokenizer.json"
_NORMALIZER = normalizers.BertNormalizer(lowercase=True)
VISIBLE = "[!-~]"  # regular expression for characters that no normaliser removes
_BLOCK = 2**16  # number of texts that are counted at a time


def train_wordpiece(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a WordPiece vocabulary; the same texts give the same ids on every run.

    Pieces are merged by frequency as in ``tokenizers.trainers.WordPieceTrainer``. That class is not
    used because its ids, and the pieces in case of ties, differ between processes. The special
    tokens have the ids 0 to 4, starting with [PAD]; all characters follow in order, then merged
    pieces.

    Args:
        texts: training texts.
        vocab_size: upper bound; the vocabulary is smaller if every word has become one piece
            before.

    Returns:
        A lower-casing tokenizer without padding or truncation, for :class:`TextTokenizer`.

    Raises:
        ValueError: ``vocab_size`` is too small for the special tokens and single characters.
    """
    bare = _assemble({token: n for n, token in enumerate(SPECIAL_TOKENS)})
    counts: Counter[str] = Counter()
    remaining = iter(texts)
    # Split equal texts only once; the set of all texts need not fit in memory.
    while block := Counter(itertools.islice(remaining, _BLOCK)):
        for text, repeats in block.items():
            normalised = bare.normalizer.normalize_str(text)
            for word, _ in bare.pre_tokenizer.pre_tokenize_str(normalised):
                counts[word] += repeats
    pieces = _learn_pieces(sorted(counts.items()), vocab_size - len(SPECIAL_TOKENS))
    return _assemble({token: n for n, token in enumerate((*SPECIAL_TOKENS, *pieces))})


def load_vocabulary(path: str | os.PathLike) -> Tokenizer:
    """Load a tokenizer from the vocabulary of a model.

    Args:
        path: vocab.txt of BERT with one token per line, whose id is the line number from 0; or a
            SentencePiece model (.spm or .model, such as beit3.spm); or the tokenizer.json that
            :meth:`TextTokenizer.save_vocabulary` writes for the latter.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: special tokens are missing, a token is on two lines, the file is not text, or
            not of the kind that its suffix says.
    """
    suffix = os.path.splitext(path)[1].lower()
    if suffix in spm.SUFFIXES:
        return spm.load_spm(path)
    if suffix == ".json":
        return _load_json(path)
    # Not splitlines(): published vocabularies contain characters that it treats as line ends.
    tokens = [*read_lines(path)]
    vocabulary = {token: n for n, token in enumerate(tokens)}
    missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
    if missing:
        raise ValueError(f"{path}: the vocabulary lacks {', '.join(missing)}")
    if len(vocabulary) < len(tokens):
        line = next(n for n, token in enumerate(tokens) if vocabulary[token] != n)
        raise ValueError(
            f"{path}: token {tokens[line]!r} of line {line + 1} stands on line "
            f"{vocabulary[tokens[line]] + 1} as well"
        )
    return _assemble(vocabulary)


def _load_json(path: str | os.PathLike) -> Tokenizer:
    content = read_text(path)
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the only type that tokenizers raises
        raise ValueError(f"{path}: is no file of tokenizers: {error}") from error
    missing = [token for token in spm.SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(f"{path}: the vocabulary lacks {', '.join(missing)}")
    return tokenizer


def is_blank(text: str) -> bool:
    """Whether a text has no tokens: it is empty or only spaces, control characters and marks."""
    if re.search(VISIBLE, text):
        return False
    return not _NORMALIZER.normalize_str(text).strip()


class TextTokenizer:
    """Texts to tensors of one length: [CLS] words [SEP] [PAD] ...

    With SentencePiece these tokens are <s>, </s> and <pad>.

    Args:
        tokenizer: from :func:`train_wordpiece` or :func:`load_vocabulary`; it is copied.
        max_length: T, including [CLS] and [SEP]; longer texts are truncated at the end.

    Attributes:
        max_length: T.
        vocab_size: V, the number of ids.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
        is_special: bool [V], True for special tokens.
        is_continuation: bool [V], True for pieces that continue the preceding word: "##x" of
            WordPiece, those without a leading space of SentencePiece.
        file_name: name of the vocabulary in a run folder.

    Raises:
        ValueError: ``max_length`` is below 3.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int):
        if max_length < 3:
            raise ValueError(f"max_length: {max_length} leaves no room between [CLS] and [SEP]")
        self.max_length = max_length
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._tokenizer.enable_truncation(max_length)
        vocabulary = self._tokenizer.get_vocab()
        self._tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        self.vocab_size = len(self._tokens)
        wordpiece = CLS in vocabulary
        self.file_name = WORDPIECE_FILE if wordpiece else SENTENCEPIECE_FILE
        special = SPECIAL_TOKENS if wordpiece else spm.SPECIAL_TOKENS
        ids = [vocabulary[token] for token in special]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = ids
        self.is_special = torch.zeros(self.vocab_size, dtype=torch.bool)
        self.is_special[ids] = True
        self.is_continuation = torch.zeros(self.vocab_size, dtype=torch.bool)
        start = CONTINUATION if wordpiece else spm.SPACE
        continuations = [
            n
            for token, n in vocabulary.items()
            if token.startswith(start) == wordpiece and token not in special
        ]
        self.is_continuation[continuations] = True

    def encode(self, texts: str | Sequence[str]) -> dict[str, Tensor]:
        """Tokenise texts.

        Args:
            texts: B texts; one string is B = 1. "[MASK]", or "<mask>", in a text becomes the mask
                token.

        Returns:
            text_ids int64 [B, T]; text_masks int64 [B, T], 1 for tokens and 0 for padding.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        ids = np.full((len(texts), self.max_length), self.pad_id, dtype=np.int64)
        masks = np.zeros_like(ids)
        for row, encoding in enumerate(self._tokenizer.encode_batch(texts)):
            ids[row, : len(encoding.ids)] = encoding.ids
            masks[row, : len(encoding.ids)] = 1
        return {"text_ids": torch.from_numpy(ids), "text_masks": torch.from_numpy(masks)}

    def decode(self, ids: Tensor) -> list[str]:
        """The texts of ids [B, T] without special tokens, of WordPiece in lower case."""
        return self._tokenizer.decode_batch(ids.tolist(), skip_special_tokens=True)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entries of some ids."""
        return [self._tokens[n] for n in ids]

    def save_vocabulary(self, path: str | os.PathLike) -> None:
        """Write ``file_name`` for :func:`load_vocabulary`, atomically."""
        if self.file_name == WORDPIECE_FILE:
            content = "".join(f"{token}\n" for token in self._tokens)
        else:
            whole = Tokenizer.from_str(self._tokenizer.to_str())
            whole.no_truncation()
            content = whole.to_str()
        with replacing(path) as temporary:
            temporary.write_text(content, encoding="utf-8", newline="\n")


def _assemble(vocabulary: dict[str, int]) -> Tokenizer:
    """Add BERT's normaliser, splitter and [CLS] ... [SEP] template to a vocabulary."""
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK))
    tokenizer.normalizer = _NORMALIZER
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        (SEP, vocabulary[SEP]), (CLS, vocabulary[CLS])
    )
    tokenizer.decoder = decoders.WordPiece(prefix=CONTINUATION)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _learn_pieces(word_counts: Sequence[tuple[str, int]], capacity: int) -> list[str]:
    """Characters in order, then the most frequent pairs merged, ties broken by spelling."""
    words = [[word[0], *(CONTINUATION + letter for letter in word[1:])] for word, _ in word_counts]
    pieces = dict.fromkeys(sorted({piece for word in words for piece in word}))
    if len(pieces) > capacity:
        raise ValueError(
            f"vocab_size: {capacity + len(SPECIAL_TOKENS)} does not hold {len(SPECIAL_TOKENS)} "
            f"special tokens and {len(pieces)} single characters"
        )
    frequency: Counter[tuple[str, str]] = Counter()
    where = defaultdict(set)
    for n, word in enumerate(words):
        for pair in itertools.pairwise(word):
            frequency[pair] += word_counts[n][1]
            where[pair].add(n)
    heap = [(-count, pair) for pair, count in frequency.items()]
    heapq.heapify(heap)
    while heap and len(pieces) < capacity:
        count, pair = heapq.heappop(heap)
        if -count != frequency[pair]:
            continue  # outdated entry: the heap also holds the pair's current count
        merged = pair[0] + pair[1].removeprefix(CONTINUATION)
        pieces[merged] = None
        changed = set()
        for n in where.pop(pair):
            before, after = words[n], _merge(words[n], pair, merged)
            words[n] = after
            for sign, word in ((-1, before), (1, after)):
                for neighbours in itertools.pairwise(word):
                    frequency[neighbours] += sign * word_counts[n][1]
                    changed.add(neighbours)
            for neighbours in itertools.pairwise(after):
                where[neighbours].add(n)
        for neighbours in changed:
            if frequency[neighbours] > 0:
                heapq.heappush(heap, (-frequency[neighbours], neighbours))
    return list(pieces)


def _merge(word: list[str], pair: tuple[str, str], merged: str) -> list[str]:
    result: list[str] = []
    for piece in word:
        if result and (result[-1], piece) == pair:
            result[-1] = merged
        else:
            result.append(piece)
    return result
