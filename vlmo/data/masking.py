"""Whole-word masking for masked language modelling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from vlmo.data.draws import uniform

if TYPE_CHECKING:
    from vlmo.data.tokenizer import TextTokenizer

IGNORE = -100  # label of tokens that are excluded from the loss
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the chosen tokens; the rest are unchanged


def mask_whole_words(
    ids: Tensor,  # [B, T]
    tokenizer: TextTokenizer,
    probability: float = 0.15,
    *,
    generator: torch.Generator | None = None,
    seeds: ArrayLike | None = None,
    official: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose words, mask their tokens and label them.

    A word is a token and the "##" pieces after it; special tokens are never chosen. Words are taken
    in random order until ``round(probability * n)`` of a text's n ordinary tokens, and at least
    one, are chosen. A word that would exceed that number is skipped, except for the first:
    otherwise long words of short texts would never be learned. Of the chosen tokens, 80 % become
    [MASK], 10 % become a random ordinary token, and 10 % are unchanged.

    With ``official`` the choice is that of unilm, the reference implementation
    (``DataCollatorForWholeWordMask``): n is the padded length T, [PAD] and [UNK] can be drawn and
    are then left unchanged, there is no exception for the first word, and random tokens come from
    the whole vocabulary. A short text may then have nothing to predict.

    Args:
        ids: int64 on the CPU; not modified.
        tokenizer: identifies special tokens and "##" pieces.
        probability: share of the tokens to predict, in (0, 1].
        generator: random number generator; None for torch's default one.
        seeds: B integers instead of a generator: each row is masked according to its own seed,
            independent of the batch.
        official: see above.

    Returns:
        Masked ids int64 [B, T], and labels int64 [B, T] with -100 where nothing is to be predicted.

    Raises:
        ValueError: ``ids`` is not an int64 matrix, ``probability`` is outside (0, 1], or the number
            of seeds is not the number of rows.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(f"ids: {ids.dtype} {tuple(ids.shape)} is not an int64 [B, T]")
    if not 0 < probability <= 1:
        raise ValueError(f"probability: {probability} is not within (0, 1]")
    order, fate, stranger = _draws(ids, generator, seeds)
    special = tokenizer.is_special[ids]
    if official:
        candidates = (ids != tokenizer.cls_id) & (ids != tokenizer.sep_id)
        lengths = torch.full((len(ids),), ids.shape[1], dtype=torch.float64)
    else:
        candidates = ~special
        lengths = candidates.sum(1).double()
    budget = (probability * lengths).round().long().clamp(min=1)
    word, is_start = _word_numbers(candidates, tokenizer.is_continuation[ids])
    chosen_words = _draw_words(word, candidates, is_start, budget, order, not official)
    chosen = chosen_words.gather(1, word) & candidates & ~special

    labels = ids.masked_fill(~chosen, IGNORE)
    masked = ids.masked_fill(chosen & (fate < MASK_SHARE), tokenizer.mask_id)
    randomised = chosen & (fate >= MASK_SHARE) & (fate < MASK_SHARE + RANDOM_SHARE)
    pool = torch.arange(tokenizer.vocab_size)
    if not official:
        pool = pool[~tokenizer.is_special]
    strangers = pool[(stranger * len(pool)).long()]
    return torch.where(randomised, strangers, masked), labels


def _draws(ids: Tensor, generator: torch.Generator | None, seeds: ArrayLike | None) -> Tensor:
    """Three uniform random numbers per token, float64 [3, B, T]."""
    batch, length = ids.shape
    if seeds is None:
        return torch.rand(3, batch, length, generator=generator, dtype=torch.float64)
    numbers = torch.from_numpy(uniform(seeds, 3, length))
    if numbers.shape[1] != batch:
        raise ValueError(f"seeds: {numbers.shape[1]} of them is not one for each of {batch} rows")
    return numbers


def _word_numbers(candidates: Tensor, continuation: Tensor) -> tuple[Tensor, Tensor]:
    """Number of each token's word within its text, and whether it starts a word, both [B, T]."""
    earlier = candidates.cumsum(1) - candidates.long()
    is_start = candidates & (~continuation | (earlier == 0))
    return (is_start.cumsum(1) - 1).clamp(min=0), is_start


def _draw_words(
    word: Tensor,  # [B, T]
    candidates: Tensor,  # [B, T]
    is_start: Tensor,  # [B, T]
    budget: Tensor,  # [B]
    order: Tensor,  # [B, T] random
    first_always: bool,
) -> Tensor:
    """The chosen words, bool [B, T] by word number; False beyond the last word of a text."""
    batch, length = word.shape
    sizes = torch.zeros(batch, length, dtype=torch.long)
    sizes.scatter_add_(1, word, candidates.long())
    exists = torch.arange(length) < is_start.sum(1, keepdim=True)
    order = order.masked_fill(~exists, 2.0).argsort(1)
    sizes = sizes.gather(1, order)
    taken = torch.zeros(batch, length, dtype=torch.bool)
    total = torch.zeros(batch, dtype=torch.long)
    for rank in range(length):
        size = sizes[:, rank]
        fits = total + size <= budget
        if first_always and rank == 0:
            fits = torch.ones_like(fits)
        taken[:, rank] = fits & (size > 0)
        total += size * taken[:, rank]
        if bool((total >= budget).all()):
            break
    return torch.zeros_like(taken).scatter_(1, order, taken)
