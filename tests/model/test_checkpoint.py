"""Checkpoints: every published layout, resizing, recognition, bad files, atomic saving."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pickle
import re
import shutil
import stat
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn

from vlmo.checkpoint import io as checkpoint_module
from vlmo.checkpoint.configs import ratio_of_widths
from vlmo.checkpoint.formats import CONFIG_RECORD, CheckpointError, read_content
from vlmo.checkpoint.io import LoadReport, config_of, load_checkpoint, save_checkpoint
from vlmo.checkpoint.resize import (
    geometric_offsets,
    resize_absolute_positions,
    resize_relative_table,
)
from vlmo.model.config import VLMoConfig
from vlmo.model.vlmo import VLMo

DATA = Path(__file__).parent / "data"
TABLE = "relative_position_bias_table"
POSITION_IDS = "text_embeddings.position_ids"
TEXT_POSITIONS = "text_embeddings.position_embeddings.weight"
TOKEN_TYPES = "token_type_embeddings.weight"

TINY = VLMoConfig(
    dim=32,
    depth=3,
    heads=4,
    vl_start=2,
    image_size=64,
    max_text_length=8,
    text_capacity=20,
    vocab_size=50,
    vqa_labels=7,
)
TINY_ABSOLUTE = TINY.replace(
    dim=34, heads=1, relative_position_bias=False, absolute_position=True, layer_scale=None
)
PUBLISHED = {
    "base:pretrain": VLMoConfig.base(),
    "base:stage2": VLMoConfig.base(tasks=("textmlm",), max_text_length=196),
    "base:vqa": VLMoConfig.base(tasks=("vqa",)),
    "base:nlvr2": VLMoConfig.base(tasks=("nlvr2",)),
    "base:irtr": VLMoConfig.base(tasks=("irtr",)),
    "base_plus:pretrain": VLMoConfig.base_plus(),
    "base_plus:irtr": VLMoConfig.base_plus(tasks=("irtr",)),
    "large:pretrain": VLMoConfig.large(),
    "large:irtr": VLMoConfig.large(tasks=("irtr",)),
}


def build(config: VLMoConfig = TINY, seed: int = 0) -> nn.Module:
    """A model whose every parameter is random, so that no two tensors agree by being constant."""
    model = VLMo(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same_state(actual, expected, except_keys=()):
    assert list(actual) == list(expected)
    for key in actual:
        if key not in except_keys:
            assert torch.equal(actual[key], expected[key]), key


def published_shapes(name: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    listed = False
    for line in (DATA / "published_keys.txt").read_text().splitlines():
        if line.startswith("["):
            listed = name in line[1:-1].split()
        elif listed and not line.startswith("#"):
            key, text = line.split()
            shape = [] if text == "()" else [int(size) for size in text.split("x")]
            span = re.search(r"\.(\d+)-(\d+)\.", key)
            if span is None:
                shapes[key] = shape
            else:
                for block in range(int(span[1]), int(span[2]) + 1):
                    shapes[key.replace(span[0], f".{block}.")] = shape
    return shapes


def meta_state(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def beit_state(config: VLMoConfig, *, grid: int | None = None, shared: bool = False):
    """What BEiT's fine-tuned file holds under "model", for a model of the same sizes."""
    generator = torch.Generator().manual_seed(5)
    w = grid or config.grid
    table_shape = ((2 * w - 1) ** 2 + 3, config.heads)
    state: dict[str, tuple[int, ...]]
    state = {"cls_token": (1, 1, config.dim), "mask_token": (1, 1, config.dim)}
    patch = config.patch_size
    state["patch_embed.proj.weight"] = (config.dim, 3, patch, patch)
    state["patch_embed.proj.bias"] = (config.dim,)
    official = published_shapes("base:pretrain")
    hidden = int(config.dim * config.mlp_ratio)
    sizes = {768: config.dim, 3072: hidden, 2304: 3 * config.dim}
    for block in range(config.depth):
        for key, shape in official.items():
            prefix = "transformer.blocks.0."
            if key.startswith(prefix) and "text" not in key:
                beit_key = key.removeprefix(prefix).replace("_imag", "")
                state[f"blocks.{block}.{beit_key}"] = tuple(sizes[size] for size in shape)
        if not shared:
            state[f"blocks.{block}.attn.{TABLE}"] = table_shape
    if shared:
        state[f"rel_pos_bias.{TABLE}"] = table_shape
    state |= {"fc_norm.weight": (config.dim,), "fc_norm.bias": (config.dim,)}
    state |= {"head.weight": (10, config.dim), "head.bias": (10,)}
    values = {key: torch.randn(shape, generator=generator) for key, shape in state.items()}
    index = torch.zeros(w * w + 1, w * w + 1, dtype=torch.long)
    values["rel_pos_bias.relative_position_index"] = index
    values["blocks.0.attn.relative_position_index"] = index
    return values


# Published keys


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_has_exactly_the_published_keys_and_shapes(name):
    with torch.device("meta"):
        model = VLMo(PUBLISHED[name])
    actual = {key: list(value.shape) for key, value in model.state_dict().items()}
    expected = published_shapes(name)
    assert sorted(set(expected) ^ set(actual)) == []
    assert actual == expected


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_of_recognises_every_published_key_list(name):
    assert config_of(meta_state(published_shapes(name))) == PUBLISHED[name]


@pytest.mark.parametrize(("size", "rows"), [(224, 1126), (384, 2606), (480, 3878)])
def test_config_of_reads_the_image_size_off_the_table(size, rows):
    shapes = published_shapes("base:vqa") | {TABLE: [rows, 144]}
    assert config_of(meta_state(shapes)) == VLMoConfig.base(tasks=("vqa",), image_size=size)


@pytest.mark.parametrize("size", [224, 384, 480])
def test_config_of_reads_the_image_size_off_the_positions(size):
    rows = (size // 16) ** 2 + 1
    shapes = published_shapes("base_plus:irtr") | {"transformer.pos_embed": [1, rows, 544]}
    assert config_of(meta_state(shapes)).image_size == size


def test_config_of_reads_a_custom_answer_list():
    shapes = published_shapes("base:vqa") | {"vqa_classifier.3.weight": [12, 1536]}
    assert config_of(meta_state(shapes)).vqa_labels == 12


def test_config_of_asks_for_what_nothing_tells():
    with pytest.raises(ValueError, match="text_capacity="):
        config_of(state_of(build()))
    config = config_of(state_of(build()), text_capacity=20)
    assert config.replace(vqa_labels=7) == TINY
    with pytest.raises(ValueError, match="heads="):
        config_of(state_of(build(TINY_ABSOLUTE)))
    config = config_of(state_of(build(TINY_ABSOLUTE)), heads=1, text_capacity=20)
    assert config.replace(vqa_labels=7) == TINY_ABSOLUTE
    with pytest.raises(ValueError, match="12 columns for 3 blocks of 5 heads"):
        config_of(state_of(build()), heads=5, text_capacity=20)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    "config",
    [
        TINY.replace(drop_path=0.25, layer_scale=0.5),
        TINY_ABSOLUTE.replace(tasks=("nlvr2",)),
        TINY.replace(tasks=("textmlm",)),
        TINY.replace(tasks=("itc", "irtr", "vqa")),
        TINY.replace(separate_attention=True),
    ],
    ids=["relative", "absolute", "textmlm", "retrieval", "separate attention"],
)
def test_config_of_a_file_of_ours_is_the_models_own(tmp_path, suffix, config):
    path = tmp_path / f"model{suffix}"
    save_checkpoint(build(config), path)
    assert config_of(path) == config


def test_config_of_applies_changes(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(build(), path)
    config = config_of(path, image_size=96, tasks=("vqa",), kernels="reference")
    assert config == TINY.replace(image_size=96, tasks=("vqa",), kernels="reference")
    model = VLMo.from_checkpoint(path, image_size=96)
    assert model.config == TINY.replace(image_size=96)
    assert model.state_dict()[TABLE].shape == (166, 12)
    with pytest.raises(ValueError, match="not a multiple"):
        config_of(path, image_size=97)


@given(dim=st.integers(1, 4000), hidden=st.integers(1, 16000))
def test_any_hidden_width_has_a_ratio(dim, hidden):
    assert int(dim * ratio_of_widths(dim, hidden)) == hidden


def test_config_of_believes_tensors_more_than_the_record(tmp_path):
    path = tmp_path / "model.pt"
    save_checkpoint(build(), path)
    state = torch.load(path, weights_only=True)
    for key in [key for key in state if key.startswith("mlm_score")]:
        del state[key]
    torch.save(state, path)
    assert config_of(path) == TINY.replace(tasks=("itc", "itm"))


def test_config_of_refuses_a_damaged_record(tmp_path):
    path = tmp_path / "model.safetensors"
    records = ["{", "[]", "{}", '{"tasks": ["dance"]}', '{"tasks": [], "heads": "x"}']
    records += [
        "[" * 100_000,
        '{"tasks": "mlm"}',
        '{"tasks": [["mlm"]]}',
        '{"tasks": [], "dim": 1e9}',
    ]
    records += ['{"tasks": [], "vl_start": true}', '{"tasks": [], "drop_path": NaN}']
    records += [f'{{"tasks": [], "depth": {"9" * 5000}}}']
    for record in records:
        save_file(state_of(build()), path, metadata={CONFIG_RECORD: record})
        with pytest.raises(CheckpointError, match=f"{path}.*{CONFIG_RECORD} is damaged"):
            config_of(path)


def test_config_of_names_what_a_file_lacks():
    state = state_of(build())
    words = state.pop("text_embeddings.word_embeddings.weight")
    with pytest.raises(CheckpointError, match=r"lacks text_embeddings.word_embeddings.weight"):
        config_of(state, text_capacity=20)
    state["text_embeddings.word_embeddings.weight"] = words[0]
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight has shape"):
        config_of(state, text_capacity=20)
    with pytest.raises(CheckpointError, match="BEiT"):
        config_of({"model": beit_state(TINY)})
    holes = {key: value for key, value in state_of(build()).items() if "blocks.1." not in key}
    with pytest.raises(CheckpointError, match=r"blocks \[0, 2\]"):
        config_of(holes, text_capacity=20)


# Resizes


def test_table_resize_equals_the_official_code():
    golden = np.load(DATA / "relpos_4to7.npz")
    actual = resize_relative_table(torch.from_numpy(golden["src"]), 7, tail=45)
    torch.testing.assert_close(actual, torch.from_numpy(golden["dst"]), rtol=0, atol=1e-6)
    assert torch.equal(actual[-45:], torch.from_numpy(golden["src"])[-45:])


def test_geometric_offsets_reach_the_rim():
    offsets = geometric_offsets(27, 47)
    assert offsets[14] == 1.0
    assert offsets[15] - offsets[14] == pytest.approx(1.090307, abs=2e-6)
    assert offsets[-1] == pytest.approx(23, abs=1e-3)
    assert offsets == [-x for x in reversed(offsets)]


@pytest.mark.parametrize(("source", "target"), [(2, 5), (3, 8), (4, 2), (24, 14), (14, 30), (2, 1)])
def test_table_resize_keeps_constants_and_symmetry(source, target):
    """A constant stays one; an even function of the offsets stays even; the tail is untouched."""
    side = 2 * source - 1
    axis = torch.linspace(-1, 1, side)
    even = (axis[:, None] ** 2 + 2 * axis[None, :] ** 2).reshape(-1)
    table = torch.stack([torch.full_like(even, 3.0), even], dim=1)
    tail = torch.randn(9, 2)
    resized = resize_relative_table(torch.cat([table, tail]), target, tail=9)
    side = 2 * target - 1
    assert resized.shape == (side * side + 9, 2)
    assert torch.equal(resized[-9:], tail)
    torch.testing.assert_close(resized[:-9, 0], torch.full((side * side,), 3.0))
    image = resized[:-9, 1].reshape(side, side)
    torch.testing.assert_close(image, image.flip(0, 1), rtol=0, atol=1e-5)


def test_table_resize_does_not_swap_rows_and_columns():
    rows = torch.arange(7.0).repeat_interleave(7)[:, None]
    resized = resize_relative_table(rows, 6, tail=0).reshape(11, 11)
    assert (resized.diff(dim=0)[2:-2] > 0).all()
    torch.testing.assert_close(resized, resized[:, :1].expand(11, 11), rtol=0, atol=1e-5)


def test_resizes_refuse_what_is_no_grid():
    with pytest.raises(ValueError, match=r"no .* offsets"):
        resize_relative_table(torch.zeros(16 + 5, 2), 7, tail=5)
    with pytest.raises(ValueError, match="1 x 1 grid"):
        resize_relative_table(torch.zeros(1 + 5, 2), 7, tail=5)
    with pytest.raises(ValueError, match="square"):
        resize_absolute_positions(torch.zeros(1, 6, 4), 7)


@pytest.mark.parametrize("image_size", [32, 112, 160])
def test_load_resizes_the_table(image_size):
    source, model = build(), build(TINY.replace(image_size=image_size), seed=1)
    report = load_checkpoint(model, source.state_dict(), strict=True)
    assert [entry.key for entry in report.resized] == [TABLE]
    table = source.state_dict()[TABLE]
    expected = resize_relative_table(table, image_size // 16, tail=45)
    assert torch.equal(model.state_dict()[TABLE], expected)
    assert report.resized[0].source == tuple(table.shape)
    assert report.resized[0].target == tuple(expected.shape)
    assert f"grid 4 to {image_size // 16}" in report.resized[0].how
    assert_same_state(state_of(model), state_of(source), except_keys=[TABLE])


@pytest.mark.parametrize("image_size", [32, 112])
def test_load_resizes_the_positions(image_size):
    source = build(TINY_ABSOLUTE)
    model = build(TINY_ABSOLUTE.replace(image_size=image_size), seed=1)
    report = load_checkpoint(model, source.state_dict(), strict=True)
    key = "transformer.pos_embed"
    assert [entry.key for entry in report.resized] == [key]
    before, after = source.state_dict()[key], model.state_dict()[key]
    assert torch.equal(after[:, 0], before[:, 0])
    grid = image_size // 16
    image = before[:, 1:].reshape(1, 4, 4, 34).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    assert torch.equal(after[:, 1:], image.permute(0, 2, 3, 1).reshape(1, grid * grid, 34))


@pytest.mark.parametrize("config", [TINY, TINY_ABSOLUTE], ids=["relative", "absolute"])
def test_load_cuts_text_positions(config):
    """Stage 2 files are for 196 tokens, everything after for 40."""
    source = build(config.replace(max_text_length=20))
    model = build(config, seed=1)
    report = load_checkpoint(model, source.state_dict(), strict=True)
    assert [entry.key for entry in report.resized] == [TEXT_POSITIONS]
    expected = source.state_dict()[TEXT_POSITIONS][:8]
    assert torch.equal(model.state_dict()[TEXT_POSITIONS], expected)
    assert torch.equal(model.state_dict()[POSITION_IDS], torch.arange(8)[None])


def test_load_extends_text_positions_only_where_they_are_unused():
    model = build(TINY.replace(max_text_length=12), seed=1)
    own = state_of(model)[TEXT_POSITIONS]
    source = build().state_dict()
    report = load_checkpoint(model, source, strict=True)
    assert "does not use" in report.resized[0].how
    expected = torch.cat([source[TEXT_POSITIONS], own[8:]])
    assert torch.equal(model.state_dict()[TEXT_POSITIONS], expected)
    model = build(TINY_ABSOLUTE.replace(max_text_length=12))
    with pytest.raises(ValueError, match=rf"{TEXT_POSITIONS} is \(8, 34\).*\(12, 34\)"):
        load_checkpoint(model, build(TINY_ABSOLUTE).state_dict())


def test_load_adds_and_drops_the_second_image_of_nlvr2():
    two, three = build(), build(TINY.replace(tasks=("nlvr2",)), seed=1)
    report = load_checkpoint(three, two.state_dict())
    types = two.state_dict()[TOKEN_TYPES]
    assert torch.equal(three.state_dict()[TOKEN_TYPES], types[[0, 1, 1]])
    assert [entry.key for entry in report.resized] == [TOKEN_TYPES]
    three = build(TINY.replace(tasks=("nlvr2",)), seed=2)
    report = load_checkpoint(two, three.state_dict())
    assert torch.equal(two.state_dict()[TOKEN_TYPES], three.state_dict()[TOKEN_TYPES][:2])
    assert "second image" in report.resized[0].how
    assert {key.split(".")[0] for key in report.unexpected} == {"nlvr2_classifier"}


# Layouts


def with_old_buffers(state):
    index = {
        "relative_position_index": torch.zeros(17, 17),
        "text_relative_position_index": torch.zeros(8, 8),
        "text_imag_relative_position_index": torch.zeros(25, 25),
        "transformer.blocks.0.attn.relative_position_index": torch.zeros(17, 17),
    }
    return {**index, **state}


LAYOUTS = {
    "flat": lambda state: state,
    "lightning": lambda state: {
        "state_dict": state,
        "epoch": 3,
        "pytorch-lightning_version": "1.5.5",
        "hyper_parameters": {"config": {"lr": 1e-4, "loss_names": {"mlm": 1}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
    },
    "deepspeed": lambda state: {
        "module": {f"module.{key}": value for key, value in state.items()},
        "global_steps": 5,
    },
    "deepspeed without prefix": lambda state: {"module": state},
    "model": lambda state: {"model": state},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "distributed": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "old buffers": with_old_buffers,
    "wrapped old buffers": lambda state: {"state_dict": with_old_buffers(state)},
    "other entries": lambda state: {**state, "epoch": 3},
    "no position ids": lambda state: {k: v for k, v in state.items() if k != POSITION_IDS},
    "half precision": lambda state: {
        k: v.half() if v.is_floating_point() else v for k, v in state.items()
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_load_reads_every_layout(tmp_path, layout):
    source, model = build(), build(seed=1)
    path = tmp_path / "file.ckpt"
    torch.save(LAYOUTS[layout](source.state_dict()), path)
    report = load_checkpoint(model, path, strict=True)
    expected = state_of(source)
    if layout == "half precision":
        expected = {k: v.half().to(v.dtype) for k, v in expected.items()}
    assert_same_state(state_of(model), expected)
    assert report.name == str(path)
    assert report.resized == ()
    assert set(report.loaded) == set(expected) - {POSITION_IDS}
    buffers = [key for key in report.ignored if key.endswith("relative_position_index")]
    assert len(buffers) == (4 if "old buffers" in layout else 0)
    assert bool(report.converted) == (layout in list(LAYOUTS)[1:7] + ["wrapped old buffers"])


def test_load_reads_files_of_old_torch(tmp_path):
    source, model = build(), build(seed=1)
    path = tmp_path / "file.pth"
    state = {"model": source.state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    load_checkpoint(model, path, strict=True)
    assert_same_state(state_of(model), state_of(source))


def test_load_reads_safetensors_of_others(tmp_path):
    source, model = build(), build(seed=1)
    save_file(state_of(source), tmp_path / "file.safetensors")
    load_checkpoint(model, tmp_path / "file.safetensors", strict=True)
    assert_same_state(state_of(model), state_of(source))


def test_load_ignores_position_ids_of_any_shape():
    source, model = state_of(build()), build(seed=1)
    source[POSITION_IDS] = torch.zeros(1, 196, dtype=torch.long)
    load_checkpoint(model, source, strict=True)
    assert torch.equal(model.state_dict()[POSITION_IDS], torch.arange(8)[None])


def test_load_into_a_wrapped_model_and_into_bfloat16():
    source = build()
    wrapped = nn.DataParallel(build(seed=1))
    load_checkpoint(wrapped, source.state_dict(), strict=True)
    assert_same_state(state_of(wrapped.module), state_of(source))
    low = build(seed=1).bfloat16()
    load_checkpoint(low, source.state_dict(), strict=True)
    assert low.state_dict()[TABLE].dtype == torch.bfloat16
    assert torch.equal(low.state_dict()[TABLE], source.state_dict()[TABLE].bfloat16())


def test_stage_3_starts_from_stage_2():
    stage2 = build(TINY.replace(tasks=("textmlm",), max_text_length=20))
    model = build(seed=1)
    before = state_of(model)
    report = load_checkpoint(model, stage2.state_dict())
    after = state_of(model)
    assert report.unexpected == ()
    kinds = {re.sub(r"transformer\.blocks\.\d+\.", "", key).split(".")[0] for key in report.missing}
    heads = {"itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj"}
    heads |= {"itm_score", "logit_scale", "logit_vl_scale"}
    assert kinds == {"mlp_vl", "norm2_vl"} | heads
    for key in report.missing:
        assert torch.equal(after[key], before[key]), key
    for key in set(report.loaded) - {TEXT_POSITIONS}:
        assert torch.equal(after[key], stage2.state_dict()[key]), key


def test_strict_refuses_and_leaves_the_model_alone():
    model = build(seed=1)
    before = state_of(model)
    state = state_of(build())
    with pytest.raises(ValueError, match=r"missing.*\n*.*itm_score"):
        load_checkpoint(
            model, {k: v for k, v in state.items() if "itm_score" not in k}, strict=True
        )
    with pytest.raises(ValueError, match=r"unexpected.*extra"):
        load_checkpoint(model, {**state, "extra.weight": torch.zeros(2)}, strict=True)
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize("skip", [["vqa_classifier."], "vqa_classifier."], ids=["list", "string"])
def test_skip_leaves_a_head_alone(skip):
    source = build(TINY.replace(tasks=("vqa",)))
    model = build(TINY.replace(tasks=("vqa",), vqa_labels=9), seed=1)
    with pytest.raises(ValueError, match=r"vqa_classifier\.3\.weight is \(7, 64\).*\(9, 64\)"):
        load_checkpoint(model, source.state_dict())
    before = state_of(model)
    report = load_checkpoint(model, source.state_dict(), skip=skip)
    assert {key.split(".")[0] for key in report.missing} == {"vqa_classifier"}
    assert set(report.missing) <= set(report.ignored)
    for key in report.missing:
        assert torch.equal(model.state_dict()[key], before[key])


def test_report_reads_well(tmp_path):
    path = tmp_path / "stage2.pt"
    save_checkpoint(build(TINY.replace(tasks=("textmlm",), max_text_length=20)), path)
    report = load_checkpoint(build(TINY.replace(image_size=96)), path)
    assert isinstance(report, LoadReport)
    text = str(report)
    assert text.startswith(f"{path} (flat): {len(report.loaded)} of ")
    assert f"resized {TABLE} (94, 12) -> (166, 12): geometric-grid cubic spline" in text
    assert "missing, left as they were (14): " in text
    assert "transformer.blocks.*.mlp_vl.* (4)" in text
    assert "itc_text_proj.fc.weight" in text
    assert max(map(len, text.splitlines())) < 400
    with pytest.raises(AttributeError):
        report.missing = ()  # type: ignore[misc]


# BEiT


@pytest.mark.parametrize("image_size", [64, 96])
@pytest.mark.parametrize("shared", [False, True], ids=["per layer", "shared"])
def test_beit_becomes_the_image_experts(tmp_path, shared, image_size):
    config = TINY.replace(tasks=("textmlm",), max_text_length=20, image_size=image_size)
    model = build(config, seed=1)
    before = state_of(model)
    beit = beit_state(config, grid=4, shared=shared)
    path = tmp_path / "beit.pth"
    torch.save({"model": beit}, path)
    report = load_checkpoint(model, path)
    after = state_of(model)
    assert report.converted == ('wrapped in "model"', "BEiT")
    assert report.unexpected == ()
    for block in range(config.depth):
        for ours, theirs in (
            ("mlp_imag.fc1.weight", "mlp.fc1.weight"),
            ("mlp_imag.fc2.bias", "mlp.fc2.bias"),
            ("norm2_imag.weight", "norm2.weight"),
            ("norm1.bias", "norm1.bias"),
            ("attn.qkv.weight", "attn.qkv.weight"),
            ("attn.q_bias", "attn.q_bias"),
            ("gamma_2", "gamma_2"),
        ):
            key = f"transformer.blocks.{block}.{ours}"
            assert torch.equal(after[key], beit[f"blocks.{block}.{theirs}"]), key
        for part in ("mlp_text.fc1.weight", "norm2_text.weight"):
            key = f"transformer.blocks.{block}.{part}"
            assert torch.equal(after[key], before[key])
            assert key in report.missing
    assert "transformer.norm.weight" in report.missing
    assert torch.equal(after["transformer.cls_token"], beit["cls_token"])
    rows = (2 * config.grid - 1) ** 2 + 3
    for block in range(config.depth):
        key = f"rel_pos_bias.{TABLE}" if shared else f"blocks.{block}.attn.{TABLE}"
        expected = resize_relative_table(beit[key], config.grid, tail=3)
        columns = slice(4 * block, 4 * block + 4)
        torch.testing.assert_close(after[TABLE][:rows, columns], expected, rtol=0, atol=0)
    assert not after[TABLE][rows:].any()
    unused = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias", "mask_token"}
    assert unused <= set(report.ignored)


def test_beit_of_another_size_or_with_torn_tables_is_refused():
    model = build(seed=1)
    before = state_of(model)
    with pytest.raises(ValueError, match=r"\(64,\).*\(32,\)|\(1, 1, 64\).*\(1, 1, 32\)"):
        load_checkpoint(model, {"model": beit_state(TINY.replace(dim=64))})
    with pytest.raises(ValueError, match=rf"{TABLE} is \(52, 6\).*\(94, 12\)"):
        load_checkpoint(model, {"model": beit_state(TINY.replace(heads=2))})
    torn = beit_state(TINY)
    del torn[f"blocks.1.attn.{TABLE}"]
    with pytest.raises(CheckpointError, match=r"tables in \[0, 2\]"):
        load_checkpoint(model, {"model": torn})
    assert_same_state(state_of(model), before)


# Failed loads


def test_a_load_that_fails_late_changes_nothing():
    """The last tensor of the file does not fit; all before it would."""
    model = build(seed=1)
    before = state_of(model)
    state = state_of(build())
    last = list(state)[-1]
    bad = {
        "shape": torch.zeros(3, 3, 3),
        "dtype": torch.zeros(state[last].shape, dtype=torch.int64),
        "no values": torch.empty(state[last].shape, device="meta"),
    }
    for value in bad.values():
        with pytest.raises(ValueError, match=rf"{re.escape(last)} is .*cannot be made to fit"):
            load_checkpoint(model, {**state, last: value})
    assert_same_state(state_of(model), before)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (TABLE, (93, 12)),
        (TABLE, (94, 24)),
        (TABLE, (46, 12)),
        (TABLE, (94,)),
        ("text_embeddings.word_embeddings.weight", (51, 32)),
        (TOKEN_TYPES, (4, 32)),
        ("transformer.cls_token", (1, 1, 31)),
        ("logit_scale", (1,)),
    ],
)
def test_a_shape_that_cannot_fit_names_key_and_shapes(key, shape):
    model = build()
    wanted = re.escape(str(tuple(model.state_dict()[key].shape)))
    with pytest.raises(ValueError, match=rf"{key} is {re.escape(str(shape))}.*{wanted}"):
        load_checkpoint(model, {**state_of(build()), key: torch.zeros(shape)})


def test_a_model_without_storage_is_refused(tmp_path):
    with torch.device("meta"):
        model = VLMo(TINY)
    with pytest.raises(ValueError, match="meta device"):
        load_checkpoint(model, build().state_dict())
    with pytest.raises(ValueError, match="meta device"):
        save_checkpoint(model, tmp_path / "model.pt")
    assert list(tmp_path.iterdir()) == []


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


class EvilElsewhere:
    """Calls what no list of forbidden modules names."""

    def __reduce__(self):
        return shutil.copytree, ("a", "evil")


class EvilBuiltin:
    def __reduce__(self):
        return eval, ("__import__('os').mkdir('evil')",)


def torch_bytes(value, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("word/document.xml", "<w/>")
    return buffer.getvalue()


def bad_files() -> dict[str, tuple[str, bytes, str]]:
    state = {"logit_scale": torch.ones(()), "x": torch.zeros(1000)}
    good = torch_bytes(state)
    legacy = torch_bytes(state, _use_new_zipfile_serialization=False)
    safe = b"\x10\x00\x00\x00\x00\x00\x00\x00{}"
    return {
        "empty": ("a.pt", b"", "is empty"),
        "empty safetensors": ("a.safetensors", b"", "is empty"),
        "truncated": ("a.pt", good[: len(good) // 2], "truncated"),
        "truncated legacy": ("a.pth", legacy[: len(legacy) - 2000], "damaged"),
        "short legacy": ("a.pth", legacy[:40], "damaged"),
        "web page": ("a.pt", b"\n<!DOCTYPE html><html>Not found</html>", "web page"),
        "web page safetensors": ("a.safetensors", b"<html></html>", "web page"),
        "lfs pointer": ("a.pt", b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        "text": ("a.pt", b"hello, world", "not a torch checkpoint"),
        "zip of others": ("a.pt", zip_bytes(), "no torch checkpoint"),
        "foreign pickle": ("a.pt", pickle.dumps({"a": 1}), "no torch checkpoint"),
        "code": ("a.pt", torch_bytes({"state_dict": {"x": Evil()}}), "refused.* posix.mkdir"),
        "code of another module": (
            "a.pt",
            torch_bytes({"state_dict": {"x": torch.ones(2)}, "callbacks": [EvilElsewhere()]}),
            "refused.* shutil.copytree",
        ),
        "code of Python's own": ("a.pt", torch_bytes({"x": EvilBuiltin()}), "refused.* eval"),
        "legacy code": (
            "a.pt",
            torch_bytes(Evil(), _use_new_zipfile_serialization=False),
            "refused.* posix.mkdir",
        ),
        "list": ("a.pt", torch_bytes([torch.ones(2)]), "holds a list"),
        "tensor": ("a.pt", torch_bytes(torch.ones(2)), "holds a Tensor"),
        "no tensors": ("a.pt", torch_bytes({"epoch": 3}), "holds no tensors.*epoch"),
        "empty dict": ("a.pt", torch_bytes({}), "holds no tensors"),
        "other model": (
            "a.pt",
            torch_bytes({"bert.x": torch.ones(2)}),
            "none of its 1 tensors.*bert.*looks like a file of BERT",
        ),
        "index of shards": ("a.bin.index.json", b'{"weight_map": {}}', "in several files"),
        "JSON": ("config.json", b"{}", "a JSON file"),
        "truncated safetensors": ("a.safetensors", safe, "no safetensors file"),
        "torch as safetensors": ("a.safetensors", good, "no safetensors file"),
    }


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", bad_files())
def test_a_bad_file_says_what_is_wrong(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    name, content, message = bad_files()[kind]
    path = tmp_path / name
    path.write_bytes(content)
    model = build()
    before = state_of(model)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: .*{message}"):
        load_checkpoint(model, path)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(path))}: "):
        config_of(path)
    assert_same_state(state_of(model), before)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def foreign_states() -> dict[str, list[str]]:
    """Keys of files that share some tensors with VLMo, by what they are."""
    return {
        "CLIP": ["logit_scale", "visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.bias"],
        "ViLT": [
            *("text_embeddings.word_embeddings.weight", "pooler.dense.weight"),
            *("transformer.blocks.0.norm1.weight", "transformer.blocks.0.attn.qkv.weight"),
            *("transformer.blocks.0.attn.proj.weight", "transformer.blocks.0.mlp.fc1.weight"),
        ],
        "ALBEF or BLIP": ["visual_encoder.cls_token", "itm_score.fc.bias"],
    }


@pytest.mark.parametrize("kind", foreign_states())
def test_a_file_that_shares_a_few_tensors_is_refused(kind):
    model = build(seed=1)
    before = state_of(model)
    own = state_of(build())
    state = {key: own.get(key, torch.ones(2)) for key in foreign_states()[kind]}
    with pytest.raises(CheckpointError, match=f"no transformer block.*looks like a file of {kind}"):
        load_checkpoint(model, state)
    with pytest.raises(CheckpointError, match=f"looks like a file of {kind}"):
        config_of(state)
    assert_same_state(state_of(model), before)


def test_prefix_to_skip_that_fits_no_key_is_refused():
    model = build()
    before = {key: value.clone() for key, value in state_of(model).items()}
    with pytest.raises(ValueError, match=r"skip: no key of the file or the model starts with vqa_"):
        load_checkpoint(model, state_of(build(seed=1)), skip=["transformer.", "vqa_clasifier."])
    assert all(torch.equal(value, before[key]) for key, value in state_of(model).items())


def test_heads_without_blocks_are_refused_and_blocks_may_be_skipped():
    state = state_of(build())
    model = build(seed=1)
    heads = {key: value for key, value in state.items() if not key.startswith("transformer.")}
    count = len(heads) - 1  # but position_ids
    with pytest.raises(CheckpointError, match=rf"only {count} of its {count} tensors"):
        load_checkpoint(model, heads)
    report = load_checkpoint(model, state, skip=["transformer."])
    assert set(report.loaded) == set(heads) - {POSITION_IDS}
    assert "tensors loaded" in str(report)


def test_the_state_of_a_training_is_no_model(tmp_path):
    path = tmp_path / "training.pt"
    state = dict.fromkeys(("version", "run", "step", "best", "optimizer", "schedule", "scaler"), 1)
    torch.save({**state, "model": state_of(build())}, path)
    for function in (lambda path: load_checkpoint(build(), path), config_of):
        with pytest.raises(
            CheckpointError, match=r"state of a training.* when the training has en"
        ):
            function(path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"its weights are in .*model\.safetensors"):
        config_of(path)


@pytest.fixture
def lightning(monkeypatch):
    """The modules of Lightning and of a training script, for as long as a file is written."""

    class ModelCheckpoint:
        pass

    module: Any = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    ModelCheckpoint.__module__, ModelCheckpoint.__qualname__ = module.__name__, "ModelCheckpoint"
    module.ModelCheckpoint = ModelCheckpoint
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return ModelCheckpoint


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_file_of_lightning_that_names_classes_is_read(tmp_path, lightning, monkeypatch, zipped):
    """As versions up to 1.4 wrote them, and those of ViLT and VLMo are; nothing is imported."""
    source = build()
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "1.1.4",
        "callbacks": {
            lightning: {"monitor": "val/loss", "best_model_score": torch.tensor(0.5)},
        },
        "hyper_parameters": argparse.Namespace(lr=1e-4),
        "state_dict": source.state_dict(),
    }
    path = tmp_path / "lightning.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        monkeypatch.delitem(sys.modules, name)
    model = build(seed=1)
    report = load_checkpoint(model, path, strict=True)
    assert report.converted == ('wrapped in "state_dict"',)
    assert_same_state(state_of(model), state_of(source))
    assert config_of(path, text_capacity=20).dim == TINY.dim
    assert not [name for name in sys.modules if name.startswith("pytorch_lightning")]
    assert "ModelCheckpoint" not in str(torch.serialization.get_safe_globals())


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path):
    for function in (lambda path: load_checkpoint(build(), path), config_of):
        with pytest.raises(FileNotFoundError, match=r"none\.pt"):
            function(tmp_path / "none.pt")
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            function(tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), kind=st.sampled_from(["zip", "legacy", "safetensors"]))
def test_damaged_bytes_raise_only_the_documented_error(tmp_path, data, kind):
    """With bytes changed anywhere, a file reads or raises CheckpointError; never anything else."""
    state = {"logit_scale": torch.ones(()), "x": torch.zeros(3)}
    if kind == "safetensors":
        content = bytearray(save(state))
    else:
        content = bytearray(torch_bytes(state, _use_new_zipfile_serialization=kind == "zip"))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    path.write_bytes(content)
    # Most bytes are padding or values, whose loss cannot be seen.
    with contextlib.suppress(CheckpointError):
        read_content(path)


# Saving


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("config", [TINY, TINY_ABSOLUTE], ids=["relative", "absolute"])
def test_round_trip(tmp_path, config, suffix):
    source, model = build(config), build(config, seed=1)
    path = tmp_path / f"model{suffix}"
    save_checkpoint(source, path)
    report = load_checkpoint(model, path, strict=True)
    assert report.resized == ()
    assert_same_state(state_of(model), state_of(source))
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_saved_file_is_what_the_official_code_reads(tmp_path):
    """Flat, official keys, a plain ``load_state_dict(strict=True)`` away."""
    source = build()
    save_checkpoint(source, tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert isinstance(state, OrderedDict)
    assert_same_state(state, state_of(source))
    assert torch.equal(state[POSITION_IDS], torch.arange(8)[None])
    build(seed=1).load_state_dict(state, strict=True)
    save_checkpoint(source, tmp_path / "model.safetensors")
    assert set(load_file(tmp_path / "model.safetensors")) == set(state)


def test_save_adds_position_ids_a_model_does_not_keep(tmp_path):
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = TINY
            self.text_embeddings = nn.Module()
            self.text_embeddings.position_embeddings = nn.Embedding(8, 32)

    save_checkpoint(Bare(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert torch.equal(state[POSITION_IDS], torch.arange(8)[None])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_save_copes_with_views_and_shared_memory(tmp_path, suffix):
    model: Any = build()
    big = torch.randn(100, 32, 32)
    with torch.no_grad():
        model.pooler.dense.weight.data = big[3].T
        model.itc_text_proj.fc.weight = model.itc_image_proj.fc.weight
    expected = state_of(model)
    path = tmp_path / f"model{suffix}"
    save_checkpoint(model, path)
    assert path.stat().st_size < 1.2 * sum(v.nbytes for v in expected.values()) + 100_000
    loaded = build(seed=1)
    load_checkpoint(loaded, path, strict=True)
    assert_same_state(state_of(loaded), expected)


def test_save_unwraps(tmp_path):
    model = build()
    save_checkpoint(nn.DataParallel(model), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert list(state) == list(model.state_dict())


@pytest.mark.parametrize("suffix", ["", ".ckpt", ".npz", ".PT.old"])
def test_save_refuses_other_suffixes(tmp_path, suffix):
    with pytest.raises(ValueError, match="suffix"):
        save_checkpoint(build(), tmp_path / f"model{suffix}")
    assert list(tmp_path.iterdir()) == []


def test_save_refuses_a_directory_and_a_missing_folder(tmp_path):
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(IsADirectoryError, match=r"model\.pt"):
        save_checkpoint(build(), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError):
        save_checkpoint(build(), tmp_path / "none" / "model.pt")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("existing", [True, False], ids=["over a file", "new"])
@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_save_that_fails_leaves_no_trace(tmp_path, monkeypatch, suffix, existing, step):
    path = tmp_path / f"model{suffix}"
    first = build()
    if existing:
        save_checkpoint(first, path)
    held = path.read_bytes() if existing else None

    def half_written(state, target, *args, **kwargs):
        if isinstance(target, Path):
            target.write_bytes(b"half")
        else:
            target.write(b"half")
        raise OSError("no space left on device")

    def refused(*args, **kwargs):
        raise OSError("no space left on device")

    if step == "write":
        monkeypatch.setattr(torch, "save", half_written)
        monkeypatch.setattr(checkpoint_module, "save_file", half_written)
    else:
        monkeypatch.setattr(os, step, refused)
    with pytest.raises(OSError, match="no space"):
        save_checkpoint(build(seed=1), path)
    monkeypatch.undo()
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if existing else [])
    if existing:
        assert path.read_bytes() == held
        model = build(seed=2)
        load_checkpoint(model, path, strict=True)
        assert_same_state(state_of(model), state_of(first))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path, monkeypatch, suffix):
    """As the two writers report it: not as OSError."""

    def full(error):
        def write(*args, **kwargs):
            raise error

        return write

    monkeypatch.setattr(torch, "save", full(RuntimeError("PytorchStreamWriter failed\nmore")))
    monkeypatch.setattr(checkpoint_module, "save_file", full(SafetensorError("No space left")))
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"older")
    with pytest.raises(OSError, match=r"model\.\w+: could not be written \((Pytorch|No sp).*\)$"):
        save_checkpoint(build(), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"older"


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_saved_file_has_the_usual_mode_and_follows_links(tmp_path, suffix):
    plain = tmp_path / "plain"
    plain.touch()
    path = tmp_path / f"model{suffix}"
    save_checkpoint(build(), path)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    link = tmp_path / f"link{suffix}"
    link.symlink_to(path)
    save_checkpoint(build(seed=1), link)
    assert link.is_symlink()
    model = build(seed=2)
    load_checkpoint(model, path, strict=True)
    assert_same_state(state_of(model), state_of(build(seed=1)))


def test_the_record_is_plain_json(tmp_path):
    save_checkpoint(build(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    record = json.loads(vars(state)["_metadata"][""][CONFIG_RECORD])
    assert record["dim"] == 32
    assert "kernels" not in record
