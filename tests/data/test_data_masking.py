"""Texts without maskable tokens: masks, losses and metrics are still correct."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

import evaluation_cases
from vlmo import VLMo
from vlmo.data import Draw, TextTokenizer, collate, digit_tokenizer
from vlmo.tasks.evaluation import evaluate
from vlmo.tasks.losses import compute_losses
from vlmo.training.step import backward

EMPTY = ["", "   ", "\u200b\u0000", "\u2603 \u2603", "[MASK] [SEP] [CLS] [PAD] [UNK]"]
TINY = evaluation_cases.TINY.replace(
    max_text_length=8, text_capacity=8, image_size=16, patch_size=8, drop_path=0.0
)


def batch_of(texts: list[str], official: bool) -> dict[str, Any]:
    samples = [
        {"text": text, "image": torch.full((3, 16, 16), n, dtype=torch.uint8)}
        for n, text in enumerate(texts)
    ]
    return collate(samples, tokenizer(), mask_share=0.3, official_masking=official)


def tokenizer() -> TextTokenizer:
    return digit_tokenizer(8)


def model_of(*tasks: str) -> VLMo:
    torch.manual_seed(0)
    return VLMo(TINY.replace(tasks=tasks))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("text", EMPTY)
def test_texts_without_a_word_have_nothing_to_predict(text, official):
    batch = batch_of([text, "a one left of a two", text], official)
    labels = batch["text_labels_mlm"]
    assert (labels[[0, 2]] == -100).all()
    assert torch.equal(batch["text_ids_mlm"][[0, 2]], batch["text_ids"][[0, 2]])
    assert (batch["mlm_tokens"] // 8 == 1).all()
    assert official or len(batch["mlm_tokens"])


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("tasks", [("textmlm",), ("mlm",), ("mlm", "itm", "itc")])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_losses_are_those_of_the_words_there_are(official, tasks, micro_batch):
    texts = [EMPTY[0], EMPTY[3], "a one left of a two", "a six", EMPTY[4], "two threes"]
    model, batch = model_of(*tasks), batch_of(texts, official)
    assert len(batch["mlm_tokens"])
    output = model(compute_losses, batch)
    words, labels = output["mlm_logits"].float(), output["mlm_labels"]
    weight = 1.0 if tasks == ("textmlm",) else 0.25
    assert torch.allclose(output["mlm_loss"], weight * F.cross_entropy(words, labels))
    losses = backward(model, batch, micro_batch=micro_batch, seed=(0, 0))
    assert torch.allclose(losses["mlm_loss"], output["mlm_loss"], rtol=1e-5)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("tasks", [("textmlm",), ("mlm",), ("mlm", "itm", "itc")])
@pytest.mark.parametrize("micro_batch", [None, 2])
def test_a_batch_of_nothing_to_predict_has_a_loss_of_zero(official, tasks, micro_batch):
    model, batch = model_of(*tasks), batch_of([*EMPTY[:3], EMPTY[4]], official)
    assert not len(batch["mlm_tokens"])
    losses = backward(model, batch, micro_batch=micro_batch, seed=(0, 0))
    assert float(losses["mlm_loss"]) == 0
    assert math.isfinite(float(losses["loss"]))
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
            assert "mlm" not in name or not parameter.grad.any()


class Texts(Dataset):
    def __init__(self, texts: list[str]):
        self.texts = texts

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, item: Any) -> dict[str, Any]:
        return {"text": self.texts[Draw.of(item).index]}


def test_metrics_are_those_of_the_words_there_are():
    model = model_of("textmlm")
    some = ["a one left of a two", *EMPTY, "two threes"]
    mixed = evaluate(model, Texts(some), tokenizer(), "textmlm", batch_size=2)
    # Masks come from the number of a sample, so its neighbours change nothing.
    whole = evaluate(model, Texts(some), tokenizer(), "textmlm", batch_size=7)
    assert mixed == pytest.approx(whole, rel=1e-5)
    assert math.isfinite(mixed["mlm_loss"]) and mixed["mlm_loss"] > 0
    assert evaluate(model, Texts(EMPTY), tokenizer(), "textmlm", batch_size=2) == {}
