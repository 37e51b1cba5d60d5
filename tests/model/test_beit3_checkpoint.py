"""Checkpoints of BEiT-3: published layouts, resizing, recognition, bad files."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from official_beit3 import official_beit3
from test_beit3_parity import TINY as UNNAMED
from test_beit3_parity import batch_of, official_output, own_output, randomise
from vlmo import VLMo, VLMoConfig, load_checkpoint, save_checkpoint
from vlmo.checkpoint.beit3 import IMAGE_POSITIONS, config_of
from vlmo.checkpoint.formats import BEIT3_RECORD, CheckpointError
from vlmo.checkpoint.io import config_of as config_of_vlmo
from vlmo.model.beit3 import TASKS, BEiT3, BEiT3Config

TINY = UNNAMED.replace(vqa_labels=9, classes=11)


def build(*tasks: str, **changes: Any) -> BEiT3:
    model = BEiT3(TINY.replace(tasks=tasks, **changes))
    randomise(model, 0.1)
    return model


def assert_equal(model: BEiT3, state: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value), key


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("tasks", [(), *((task,) for task in TASKS)], ids=lambda t: "-".join(t))
def test_saved_and_loaded(tmp_path, suffix, tasks):
    path, model = tmp_path / f"model.{suffix}", build(*tasks)
    save_checkpoint(model, path)
    again = BEiT3.from_checkpoint(path)
    assert_equal(again, model.state_dict())
    assert again.config == model.config
    report = load_checkpoint(build(*tasks), path, strict=True)
    assert len(report.loaded) == len(model.state_dict()) and not report.converted
    with pytest.raises(CheckpointError, match=r"lacks .*; it looks like a file of BEiT-3"):
        config_of_vlmo(path)


def test_a_saved_file_is_one_of_the_reference_implementation(tmp_path):
    model, batch = build(), batch_of(TINY, 3)
    save_checkpoint(model, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    official = official_beit3(TINY)
    official.load_state_dict({key.removeprefix("beit3."): t for key, t in state.items()})
    expected = official_output(official, "fused", batch)
    torch.testing.assert_close(own_output(model, "fused", batch), expected)


@pytest.mark.parametrize("wrapper", ["model", "module"])
def test_published_layouts(tmp_path, wrapper):
    """unilm's files have the arguments of the run beside the weights."""
    model = build("irtr")
    content = {wrapper: model.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=1.0)}
    torch.save(content, tmp_path / "model.pth")
    again = build("irtr")
    report = load_checkpoint(again, tmp_path / "model.pth", strict=True)
    assert report.converted == (f'wrapped in "{wrapper}"',)
    assert_equal(again, model.state_dict())


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("tasks", [(), *((task,) for task in TASKS), ("irtr", "nlvr2")])
def test_configurations_of_published_files(size, tasks):
    wanted = getattr(BEiT3Config, size)(tasks=tasks, image_size=384)
    with torch.device("meta"):
        state = BEiT3(wanted).state_dict()
    assert config_of({"model": state}) == wanted
    changed = config_of({"model": state}, image_size=480, kernels="reference")
    assert changed == wanted.replace(image_size=480, kernels="reference")


def test_sizes_that_no_tensor_shows(tmp_path):
    model = build()
    with pytest.raises(ValueError, match="attention heads of a model of width 32 and depth 3"):
        config_of(model.state_dict())
    found = config_of(model.state_dict(), heads=4)
    assert (found.heads, found.max_text_length, found.text_positions) == (4, 18, 20)
    save_checkpoint(build(drop_path=0.3, kernels="reference"), tmp_path / "model.safetensors")
    recorded = config_of(tmp_path / "model.safetensors")
    assert recorded == TINY.replace(drop_path=0.3)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        fields = json.loads(file.metadata()[BEIT3_RECORD])
    assert fields.keys().isdisjoint({"kernels", "checkpointing"})


@pytest.mark.parametrize("grid", [2, 7])
def test_positions_of_another_resolution(tmp_path, grid):
    """As unilm's ``load_model_and_may_interpolate``: two unused rows and [CLS] are kept."""
    save_checkpoint(build(), tmp_path / "model.pt")
    table = torch.load(tmp_path / "model.pt", weights_only=True)[IMAGE_POSITIONS]
    model = BEiT3.from_checkpoint(tmp_path / "model.pt", image_size=8 * grid)
    actual = model.state_dict()[IMAGE_POSITIONS]
    square = table[3:].view(4, 4, -1).permute(2, 0, 1)[None]
    resized = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    assert torch.equal(actual[:3], table[:3])
    torch.testing.assert_close(actual[3:], resized[0].flatten(1).T)
    report = load_checkpoint(model, tmp_path / "model.pt", strict=True)
    (entry,) = report.resized
    assert entry.key == IMAGE_POSITIONS
    assert entry.how == f"bicubic to a {grid} x {grid} grid"
    assert model.encode_image(torch.randn(1, 3, 8 * grid, 8 * grid)).tokens.isfinite().all()


def test_pretrained_weights_for_a_task():
    state = build().state_dict()
    model = build("vqa")
    report = load_checkpoint(model, state)
    assert {key.split(".")[0] for key in report.missing} == {"pooler", "head"}
    assert sorted(report.unexpected) == [
        f"beit3.encoder.layer_norm.{expert}.{part}"
        for expert in "AB"
        for part in ("bias", "weight")
    ]
    message = (
        r"strict: file and model differ(.|\n)*pooler.*head(.|\n)*encoder\.layer_norm\.\* \(4\)"
    )
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, state, strict=True)


def test_answers_of_another_vocabulary():
    state, model = build("vqa").state_dict(), build("vqa", vqa_labels=5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = r"head\.3\.weight is \(9, 64\) .* cannot be made to fit the model's \(5, 64\)"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, state)
    assert_equal(model, before)
    report = load_checkpoint(model, state, skip=["head."])
    assert len(report.missing) == len(report.ignored) == 6
    assert torch.equal(model.state_dict()["pooler.dense.weight"], state["pooler.dense.weight"])


@pytest.mark.parametrize(
    "key",
    [
        "beit3.text_embed.weight",
        "beit3.encoder.embed_positions.B.weight",
        "beit3.encoder.layers.1.self_attn.q_proj.A.weight",
    ],
)
def test_strict_names_the_key(key):
    state, model = build().state_dict(), build()
    value = state.pop(key)
    renamed = key.replace("weight", "wait")
    named = key.replace("layers.1", r"layers\.\d")
    with pytest.raises(ValueError, match=rf"missing, left as they were \(1\): {named}"):
        load_checkpoint(model, state, strict=True)
    with pytest.raises(ValueError, match=rf"unexpected, not used \(1\): {renamed}"):
        load_checkpoint(model, {**state, key: value, renamed: value}, strict=True)
    with pytest.raises(ValueError, match=rf"{named} is .* and cannot be made to fit the model's"):
        load_checkpoint(model, {**state, key: value[:-1]})


def test_other_files(tmp_path):
    vlmo = VLMo(VLMoConfig(dim=24, depth=2, heads=2, vl_start=1, image_size=32, vocab_size=30))
    state = build().state_dict()
    for source, message in (
        (vlmo.state_dict(), "not a BEiT-3 checkpoint: none of its .* transformer.blocks"),
        ({"beit3.text_embed.weight": state["beit3.text_embed.weight"]}, "only 1 of its 1 tensors"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(build(), source)
    with pytest.raises(CheckpointError, match=r"not a VLMo or BEiT checkpoint.* a file of BEiT-3"):
        load_checkpoint(vlmo, state)
    with pytest.raises(ValueError, match="the model is on the meta device"):
        load_checkpoint(build().to("meta"), state)


def test_files_without_a_configuration():
    state = build().state_dict()
    words = "beit3.text_embed.weight"
    gap = {key: t for key, t in state.items() if ".layers.1." not in key}
    for changed, message in (
        ({key: t for key, t in state.items() if key != words}, f"it lacks {words}"),
        ({**state, words: state[words][None]}, rf"{words} has shape \(1, 50, 32\), not 2 sizes"),
        (
            {**state, IMAGE_POSITIONS: state[IMAGE_POSITIONS][1:]},
            r"has shape \(18, 32\), no square",
        ),
        (gap, r"it has layers \[0, 2\], some are missing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            config_of(changed, heads=4)


@pytest.mark.parametrize("record", ["{", '{"tasks": ["mlm"]}', '{"tasks": [], "heads": "4"}'])
def test_damaged_record(tmp_path, record):
    state: Any = build().state_dict()
    vars(state)["_metadata"] = {"": {"version": 1, BEIT3_RECORD: record}}
    path: Path = tmp_path / "model.pt"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=f"its {BEIT3_RECORD} is damaged"):
        config_of(path)


def test_wrapped_models_are_not_saved_under_foreign_keys(tmp_path):
    model: Any = build()
    torch.nn.utils.parametrizations.weight_norm(model.beit3.encoder.layers[0].ffn["A"].fc1)
    with pytest.raises(
        ValueError, match=r"its state dict has .*layers\.\*\.ffn.* remove parametri"
    ):
        save_checkpoint(model, tmp_path / "model.pt")
