"""The formulas of vlmo.model.flops, compared with PyTorch's FLOP counter on dense products."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from test_model import TINY, make_batch
from vlmo import BEiT3, BEiT3Config, VLMo
from vlmo.model.flops import step_flops
from vlmo.tasks.losses import compute_losses
from vlmo.training.recipes import TEXT_PARTS

CONFIG = TINY.replace(vqa_labels=7)
LENGTHS = [3, 6, 4, 5]


def eager_moe_ffn(x: Tensor, routing, w1, w2, *, b1, b2, residual, **_) -> Tensor:
    ids = routing.expert_ids(len(x), x.device)
    rows = [(ids == expert).nonzero()[:, 0] for expert in range(len(w1))]
    parts = [
        F.linear(F.gelu(F.linear(x[own], w1[e], b1[e])), w2[e], b2[e]) for e, own in enumerate(rows)
    ]
    return residual + torch.cat(parts)[torch.cat(rows).argsort()]


def eager_moe_linear(x: Tensor, routing, weight, bias, *, residual=None, **_) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    ids = routing.expert_ids(len(flat), x.device)
    rows = [(ids == expert).nonzero()[:, 0] for expert in range(len(weight))]
    parts = [F.linear(flat[own], weight[e], bias[e]) for e, own in enumerate(rows)]
    y = torch.cat(parts)[torch.cat(rows).argsort()].unflatten(0, x.shape[:-1])
    return y if residual is None else residual + y


def eager_attention(qkv: Tensor, *, offsets: Tensor, **_) -> Tensor:
    lengths = offsets.diff().tolist()
    parts = []
    for own in qkv.split(lengths):
        q, k, v = own.permute(1, 2, 0, 3)
        parts.append(((q @ k.transpose(1, 2)).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(autouse=True)
def dense(monkeypatch):
    """The kernels' operations hide their products from the counter."""
    monkeypatch.setattr("vlmo.kernels.nn.moe_ffn", eager_moe_ffn)
    for place in ("vlmo.kernels.nn", "vlmo.model.layers"):
        monkeypatch.setattr(f"{place}.moe_linear", eager_moe_linear)
    monkeypatch.setattr("vlmo.model.layout.shared_attention", eager_attention)


def batch_of(lengths: list[int]) -> dict[str, Tensor]:
    batch = make_batch(len(lengths))
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    batch["text_masks"] = mask.long()
    batch["text_labels_mlm"][~mask] = -100
    return batch


def words_of(batch: dict[str, Tensor]) -> int:
    return int((batch["text_labels_mlm"] >= 0).sum())


def counted(model: VLMo | BEiT3, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Operations of the forward and of the backward."""
    with FlopCounterMode(display=False) as forward:
        loss = model(compute_losses, batch)["loss"]
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("tasks", [("textmlm",), ("mlm", "itc"), ("irtr",), ("vqa",), ("nlvr2",)])
@pytest.mark.parametrize("separate", [False, True])
def test_operations_are_those_that_pytorch_counts(tasks, separate):
    config = CONFIG.replace(tasks=tasks, separate_attention=separate)
    batch = batch_of(LENGTHS)
    flops = step_flops(config, LENGTHS, words=words_of(batch))
    assert (flops.forward, flops.backward) == counted(VLMo(config), batch)


@pytest.mark.parametrize("tasks", [("irtr",), ("vqa",), ("nlvr2",)])
def test_operations_of_beit3_are_those_that_pytorch_counts(tasks, monkeypatch):
    monkeypatch.undo()  # the counter sees the products of the reference
    sizes: dict[str, Any] = dict(
        dim=24, depth=3, heads=2, image_size=32, patch_size=16, max_text_length=8
    )
    config = BEiT3Config(tasks=tasks, vocab_size=50, vqa_labels=7, kernels="reference", **sizes)
    lengths = [5] * 4  # passes are padded to the longest
    flops = step_flops(config, lengths)
    assert (flops.forward, flops.backward) == counted(BEiT3(config), batch_of(lengths))


def test_matching_counts_three_pairs_a_row():
    lengths = [5] * 4  # whichever is drawn as a wrong text
    batch = batch_of(lengths)
    flops = step_flops(CONFIG, lengths, words=words_of(batch))
    assert (flops.forward, flops.backward) == counted(VLMo(CONFIG), batch)


def test_frozen_parameters_cost_no_weight_gradient():
    config = CONFIG.replace(tasks=("textmlm",))
    model, batch = VLMo(config), batch_of(LENGTHS)

    def trains(name: str) -> bool:
        return any(part in name for part in TEXT_PARTS)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name))
    flops = step_flops(config, LENGTHS, words=words_of(batch), trains=trains)
    assert (flops.forward, flops.backward) == counted(model, batch)
    assert flops.backward < 2 * flops.forward


def test_rows_of_other_processes_add_cosines_only():
    config = CONFIG.replace(tasks=("irtr",))
    alone, among = (step_flops(config, LENGTHS, others=n) for n in (0, 12))
    assert among.forward - alone.forward == 2 * 2 * 4 * 12 * 24
    assert among.backward - alone.backward == 2 * (among.forward - alone.forward)
    assert alone.total == alone.forward + alone.backward
