"""Learning rates and groups of parameters."""

import math

import pytest
import torch

from vlmo import BEiT3, BEiT3Config, VLMo
from vlmo.training.optimizer import (
    adamw,
    beit3_parameter_groups,
    cosine_schedule,
    linear_schedule,
    parameter_groups,
    warmup_then_cosine,
    warmup_then_decay,
)
from vlmo.training.recipes import tiny


def test_schedule_rises_and_falls():
    factors = [warmup_then_decay(step, warmup=2, total=6) for step in range(8)]
    assert factors == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25, 0, 0])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = linear_schedule(optimizer, warmup=2, total=5)
    rates = []
    for _ in range(5):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([1.0, 2.0, 1.5, 1.0, 0.5])


def test_a_cosine_rises_and_falls():
    factors = [warmup_then_cosine(step, warmup=2, total=6, least=0.2) for step in range(8)]
    half = math.sqrt(0.5) / 2
    falling = [1.0, 0.2 + 0.8 * (0.5 + half), 0.6, 0.2 + 0.8 * (0.5 - half)]
    assert factors == pytest.approx([0.5, 1.0, *falling, 0.2, 0.2])
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, (2.0, 1.0), strict=True)]
    optimizer = torch.optim.SGD(groups)
    schedule = cosine_schedule(optimizer, warmup=0, total=2, least=0.5)
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates == [pytest.approx([2 * f, f]) for f in (1.0, 0.75, 0.5)]


def test_adamw_has_the_groups_of_the_model():
    sizes = dict(dim=8, depth=2, heads=2, image_size=32, vocab_size=10, max_text_length=4)
    beit3 = BEiT3(BEiT3Config(tasks=("vqa",), **sizes))
    optimizer = adamw(
        torch.nn.DataParallel(beit3), lr=1.0, layer_decay=0.5, head_lr_scale=3.0, beta2=0.9
    )
    assert {group["lr"] for group in optimizer.param_groups} == {0.125, 0.25, 0.5, 1.0, 3.0}
    assert optimizer.defaults["betas"] == (0.9, 0.9)
    with pytest.raises(ValueError, match=r"layer_decay: 0\.5 is for BEiT-3, not for VLMo"):
        adamw(VLMo(tiny(tasks=("vqa",), dim=32)), lr=1.0, layer_decay=0.5)


def test_parameter_groups_follow_the_official_rule():
    model = VLMo(tiny(tasks=("vqa",), dim=32, depth=2, vl_start=1))
    names = {parameter: name for name, parameter in model.named_parameters()}
    model.transformer.cls_token.requires_grad_(False)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, head_lr_scale=20.0)
    found = {names[p]: (g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    assert found["relative_position_bias_table"] == (0.0, 1.0)
    assert found["transformer.blocks.0.norm1.weight"] == (0.0, 1.0)
    assert found["transformer.blocks.0.norm2_text.weight"] == (0.1, 1.0)
    assert found["transformer.blocks.0.attn.q_bias"] == (0.0, 1.0)
    assert found["vqa_classifier.0.weight"] == (0.1, 20.0)
    assert set(found) == set(names.values()) - {"transformer.cls_token"}


@pytest.mark.parametrize("wrapped", [False, True])
def test_parameter_groups_of_beit3_follow_the_official_rule(wrapped):
    """The layer of each parameter is that of unilm's ``get_num_layer_for_vit``."""
    sizes = BEiT3Config(dim=8, depth=3, heads=2, image_size=32, vocab_size=10, max_text_length=4)
    model = BEiT3(sizes.replace(tasks=("irtr", "nlvr2")))
    model.language_head.requires_grad_(False)
    names = {parameter: name for name, parameter in model.named_parameters()}
    module = torch.nn.DataParallel(model) if wrapped else model
    groups = beit3_parameter_groups(
        module, lr=2.0, weight_decay=0.1, layer_decay=0.5, head_lr_scale=10.0
    )
    found = {names[p]: (g["weight_decay"], g["lr"]) for g in groups for p in g["params"]}
    assert set(found) == set(names.values()) - {"language_head.weight"}
    embeddings, lowest, highest = (2.0 * 0.5**power for power in (4, 3, 1))
    for name, expected in {
        "beit3.text_embed.weight": (0.1, embeddings),
        "beit3.vision_embed.proj.weight": (0.1, embeddings),
        "beit3.vision_embed.proj.bias": (0.0, embeddings),
        "beit3.vision_embed.cls_token": (0.0, embeddings),
        "beit3.vision_embed.mask_token": (0.1, embeddings),
        "beit3.encoder.embed_positions.A.weight": (0.0, embeddings),
        "beit3.encoder.embed_positions.B.weight": (0.1, embeddings),
        "beit3.encoder.layers.0.ffn.A.fc1.weight": (0.1, lowest),
        "beit3.encoder.layers.0.self_attn_layer_norm.B.weight": (0.0, lowest),
        "beit3.encoder.layers.2.self_attn.q_proj.B.weight": (0.1, highest),
        "beit3.encoder.layers.2.ffn.A.fc1.bias": (0.0, highest),
        "beit3.encoder.layer_norm.A.weight": (0.0, 2.0),
        "vision_head.weight": (0.1, 2.0),
        "logit_scale": (0.0, 2.0),
        "head.dense1.weight": (0.1, 20.0),
        "head.norm1.bias": (0.0, 20.0),
    }.items():
        assert found[name] == expected, name
    assert [len(g["params"]) for g in groups if g["params"][0].dim() == 0] == [1]
