"""Learning rates and groups of parameters."""

import pytest
import torch

from vlmo import VLMo
from vlmo.training.optimizer import linear_schedule, parameter_groups, warmup_then_decay
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
