"""Reads, writes and identifies checkpoints of VLMo, and reads and writes those of BEiT-3.

:func:`load_checkpoint` reads every published layout into a model, :func:`save_checkpoint` writes a
file that unilm, the reference implementation, can read, and :func:`config_of` infers the
configuration of a file's VLMo; :func:`vlmo.checkpoint.beit3.config_of` that of a BEiT-3, and
:func:`model_config_of` that of either. No code from a file is executed: pickles are read with
``torch.load(weights_only=True)``.

The layers of a file, in the order in which they are removed:

* ``.safetensors`` is recognised by suffix, anything else by content (zip or legacy ``torch.save``
  files);
* a wrapper ``"state_dict"`` (Lightning), ``"module"`` (DeepSpeed) or ``"model"`` (BEiT), or none;
* prefixes ``module.`` and ``_orig_mod.`` of the keys;
* the index buffers of old files, which the model computes itself;
* BEiT keys, which become the image experts, as in stage 2 of unilm.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmo.checkpoint import beit3
from vlmo.checkpoint.configs import fields_to_record, ratio_of_widths, recorded_fields
from vlmo.checkpoint.formats import (
    ANSWERS_RECORD,
    BEIT3_RECORD,
    CONFIG_RECORD,
    KEY_PREFIXES,
    POSITION_IDS,
    SAFETENSORS_SUFFIX,
    TABLE,
    VOCABULARY_RECORD,
    CheckpointError,
    Content,
    Source,
    blocks_with,
    likeness,
    read_content,
    summary,
)
from vlmo.checkpoint.resize import (
    POSITIONS,
    TEXT_POSITIONS,
    fit_tensor,
    grid_of_offsets,
    grid_of_patches,
    table_tail,
)
from vlmo.files import replacing
from vlmo.model.beit3 import RUN_FIELDS as BEIT3_RUN_FIELDS
from vlmo.model.beit3 import BEiT3, BEiT3Config
from vlmo.model.config import RUN_FIELDS, TASKS, VLMoConfig
from vlmo.model.vlmo import VLMo

PATCHES = "transformer.patch_embed.proj.weight"
WORDS = "text_embeddings.word_embeddings.weight"
HIDDEN = "transformer.blocks.0.mlp_text.fc1.weight"
# The tensors from which sizes are inferred, and their number of dimensions. The last two are
# optional.
SIZE_RANKS = {PATCHES: 4, WORDS: 2, TEXT_POSITIONS: 2, HIDDEN: 2, TABLE: 2, POSITIONS: 3}

TORCH_SUFFIXES = (".pt", ".pth", ".bin")

TASK_HEADS = {
    "mlm": {"mlm_score"},
    "textmlm": {"mlm_score"},
    "itc": {"itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj"},
    "itm": {"itm_score"},
    "vqa": {"vqa_classifier"},
    "nlvr2": {"nlvr2_classifier"},
    "irtr": {"itc_text_proj", "itc_image_proj"},
}
# Properties that no tensor shows, by (dim, depth): the number of heads of a model without a table,
# and the first vision-language block of a stage 2 file, which has no such expert yet.
PUBLISHED_HEADS = {(768, 12): 12, (544, 24): 16, (1024, 24): 16}
PUBLISHED_VL_START = {(768, 12): 10, (544, 24): 21, (1024, 24): 21}
PUBLISHED_TEXT_CAPACITY = 196


@dataclass(frozen=True)
class Resized:
    """A tensor that was loaded with a shape other than that of the file."""

    key: str
    source: tuple[int, ...]
    target: tuple[int, ...]
    how: str


@dataclass(frozen=True)
class LoadReport:
    """The result of :func:`load_checkpoint`.

    Attributes:
        name: the path, or "state dict".
        converted: the layout found, from the outside in; empty for a flat file of unilm.
        loaded: keys of the model that were written.
        missing: keys of the model that the file lacks; these tensors are unchanged.
        unexpected: keys of the file that the model lacks; they were not used.
        resized: tensors whose shape was converted, and how.
        ignored: entries of the file that are never loaded (index buffers, position ids, the
            classification head of BEiT, entries that are not tensors, keys excluded by ``skip``).
    """

    name: str
    converted: tuple[str, ...]
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    resized: tuple[Resized, ...]
    ignored: tuple[str, ...]

    def __str__(self) -> str:
        layout = ", ".join(self.converted) or "flat"
        total = len(self.loaded) + len(self.missing)
        lines = [f"{self.name} ({layout}): {len(self.loaded)} of {total} tensors loaded"]
        for entry in self.resized:
            shapes = f"{entry.source} -> {entry.target}"
            lines.append(f"  resized {entry.key} {shapes}: {entry.how}")
        for title, keys in (
            ("missing, left as they were", self.missing),
            ("unexpected, not used", self.unexpected),
            ("ignored", self.ignored),
        ):
            if keys:
                lines.append(f"  {title} ({len(keys)}): {summary(keys)}")
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    source: Source,
    *,
    strict: bool = False,
    skip: Sequence[str] = (),
) -> LoadReport:
    """Read a checkpoint into ``model``, converting and resizing tensors where necessary.

    Everything is checked before anything is written: after an exception the model is unchanged.
    Values are cast to the dtype and moved to the device of the model's own tensors.

    These are converted: the relative position table and the learned patch positions to the model's
    image size; text positions to its text length (the first rows; for a longer text length the
    model keeps its own last rows, which is only allowed if it does not use them); token types to
    its 2 or 3 rows (NLVR2's second image starts as a copy of the first). A BEiT checkpoint fills
    the image experts and the image rows of the table, whose text and cross-modal rows become zero;
    a table that BEiT shares among its layers is repeated for each layer. Of a BEiT-3 checkpoint,
    only the positions of patches are converted.

    Args:
        model: a :class:`vlmo.VLMo` or :class:`vlmo.model.beit3.BEiT3`, possibly wrapped
            (DistributedDataParallel, torch.compile).
        source: path of a file, or the content of such a file.
        strict: raise unless file and model have the same keys.
        skip: prefixes of unilm's keys that are not loaded, e.g. ``["vqa_classifier."]`` to
            fine-tune on other answers.

    Raises:
        FileNotFoundError, IsADirectoryError: ``source`` is not a file.
        CheckpointError: the file is damaged, is of another kind, contains code, or has no key of
            VLMo.
        ValueError: a tensor cannot be converted (the message names the key and both shapes),
            ``strict`` found missing or unexpected keys, a prefix of ``skip`` matches no key, or the
            model is on the meta device.
    """
    content = read_content(source)
    inner = _inner(model)
    target: dict[str, Tensor] = inner.state_dict()
    if any(tensor.is_meta for tensor in target.values()):
        raise ValueError("the model is on the meta device; give it storage with to_empty() first")
    # A single string is also a sequence of strings, one per letter.
    prefixes = (skip,) if isinstance(skip, str) else tuple(skip)
    keys = (*content.state, *target)
    if idle := [p for p in prefixes if not any(key.startswith(p) for key in keys)]:
        raise ValueError(f"skip: no key of the file or the model starts with {', '.join(idle)}")
    values, report = _plan(content, target, inner, prefixes)
    if strict and (report.missing or report.unexpected):
        raise ValueError(f"strict: file and model differ\n{report}")
    with torch.no_grad():
        for key, value in values.items():
            target[key].copy_(value)
    return report


def _plan(
    content: Content, target: dict[str, Tensor], model: Any, skip: tuple[str, ...]
) -> tuple[dict[str, Tensor], LoadReport]:
    """The tensors to write into the model, by its keys and in its shapes; writes nothing."""
    skipped = {key for key in content.state if key.startswith(skip)}
    ours = [key for key in content.state if key in target]
    is_beit3 = isinstance(model, BEiT3)
    if not (beit3.holds_a_layer(ours) if is_beit3 else _holds_a_block(ours)):
        found = f"only {len(ours)}" if ours else "none"
        kind = "BEiT-3" if is_beit3 else "VLMo or BEiT"
        raise CheckpointError(
            f"{content.name}: not a {kind} checkpoint: {found} of its {len(content.state)} "
            f"tensors belong to the model, and no transformer block with its attention and an "
            f"expert (it has {summary(list(content.state))}){likeness(content.state)}"
        )
    common = [key for key in ours if key not in skipped]
    values: dict[str, Tensor] = {}
    resized: list[Resized] = []
    for key in common:
        value, wanted = content.state[key], target[key]
        if is_beit3:
            fit = beit3.fit_tensor(key, value, wanted, model.config)
        else:
            fit = fit_tensor(key, value, wanted, model.config, beit=content.beit)
        if fit is None:
            raise ValueError(
                f"{content.name}: {key} is {_described(value)} and cannot be made to fit the "
                f"model's {_described(wanted)}; are the sizes of the two models the same?"
            )
        values[key], how = fit
        if how:
            resized.append(Resized(key, tuple(value.shape), tuple(wanted.shape), how))
    report = LoadReport(
        name=content.name,
        converted=content.converted,
        loaded=tuple(common),
        missing=tuple(k for k in target if k not in values and k != POSITION_IDS),
        unexpected=tuple(k for k in content.state if k not in target and k not in skipped),
        resized=tuple(resized),
        ignored=(*content.ignored, *sorted(skipped)),
    )
    return values, report


def _holds_a_block(keys: Sequence[str]) -> bool:
    """Whether the keys include a block with its attention and one of its experts."""
    state = dict.fromkeys(keys)
    return bool(blocks_with(state, "attn.qkv.") & blocks_with(state, "mlp_"))


def save_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    vocabulary: str | None = None,
    answers: str | None = None,
) -> None:
    """Write ``model`` as a flat state dict of unilm, for VLMo with its ``position_ids``.

    The file is replaced atomically, when the new one is complete and on disk: a failed save leaves
    an older file unchanged and no other trace (a killed one may leave a hidden file beside it). The
    configuration and the digests are recorded in the file's metadata, where :func:`config_of` and
    :func:`vlmo.run_folder.digests_of` read them and other programs ignore them.

    Args:
        model: a :class:`vlmo.VLMo` or :class:`vlmo.model.beit3.BEiT3`, possibly wrapped, on any
            device, in any dtype.
        path: ``.pt``, ``.pth`` or ``.bin`` for torch's format, ``.safetensors`` for that format.
        vocabulary: :func:`vlmo.run_folder.digest` of the tokens that the model was trained with, in
            the order of their ids. Loading the model then rejects any other vocabulary.
        answers: the same for the answers to visual questions.

    Raises:
        ValueError: the suffix is another one, the model is on the meta device, or its modules were
            wrapped or parametrized, so that its keys differ from those of unilm.
        OSError: the folder does not exist, the disk is full, or ``path`` is a directory.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (*TORCH_SUFFIXES, SAFETENSORS_SUFFIX):
        known = ", ".join((*TORCH_SUFFIXES, SAFETENSORS_SUFFIX))
        raise ValueError(f"{path}: suffix {suffix!r} is none of {known}")
    inner = _inner(model)
    _require_official_keys(inner)
    state = _official_state(inner)
    if isinstance(inner, BEiT3):
        records = {BEIT3_RECORD: fields_to_record(inner.config, BEIT3_RUN_FIELDS)}
    else:
        records = {CONFIG_RECORD: fields_to_record(inner.config, RUN_FIELDS)}
    given = {VOCABULARY_RECORD: vocabulary, ANSWERS_RECORD: answers}
    records |= {name: value for name, value in given.items() if value is not None}

    with replacing(path) as temporary:
        try:
            if suffix == SAFETENSORS_SUFFIX:
                _write_safetensors(state, records, temporary)
            else:
                # nn.Module.state_dict() stores versions in the same attribute; load_state_dict only
                # reads the entries it knows, so unilm ignores ours.
                vars(state)["_metadata"] = {"": {"version": 1, **records}}
                torch.save(state, temporary)
        except (RuntimeError, SafetensorError) as error:  # raised by the writers for a full disk
            reason = str(error).splitlines()[0]
            raise OSError(f"{path}: could not be written ({reason})") from error


def config_of(
    source: Source | Content,
    *,
    heads: int | None = None,
    text_capacity: int | None = None,
    **changes: Any,
) -> VLMoConfig:
    """Infer the configuration of the model that a checkpoint was saved from.

    Sizes and tasks are inferred from keys and shapes. The rest comes from the record of
    :func:`save_checkpoint`, otherwise from the arguments and the published models: ``vl_start`` of
    a stage 2 file (which has no vision-language experts; by size, else ``depth``), the number of
    heads of a model without a relative position table, the layer-scale and drop-path values
    (defaults). Only shapes are read, so even a large file is fast.

    Args:
        source: path of a file, or its content (tensors may be on the meta device).
        heads: number of attention heads, if the file has no relative position table.
        text_capacity: longest text that the table has rows for, if not the published 196.
        changes: fields to change in the inferred configuration, e.g. ``image_size=480,
            tasks=("vqa",)`` for fine-tuning.

    Raises:
        FileNotFoundError, IsADirectoryError, CheckpointError: as :func:`load_checkpoint`; a BEiT
            file is rejected as well, because it has no text part to infer sizes from.
        ValueError: the file does not determine a value that an argument must give, or a change
            results in an invalid configuration.
    """
    content = read_content(source)
    if content.beit:
        raise CheckpointError(
            f"{content.name}: a BEiT file has no text part to configure a model by; choose a "
            "VLMoConfig and load_checkpoint into it"
        )
    _require_sizes(content)
    recorded = recorded_fields(content, CONFIG_RECORD, VLMoConfig, RUN_FIELDS)
    found = _inferred(
        content,
        recorded,
        heads or recorded.get("heads"),
        text_capacity or recorded.get("text_capacity"),
    )
    return found.replace(**changes)


def model_config_of(source: Source, **changes: Any) -> VLMoConfig | BEiT3Config:
    """As :func:`config_of`, or :func:`vlmo.checkpoint.beit3.config_of` for a file of BEiT-3."""
    content = read_content(source)
    if beit3.holds_a_layer(content.state):
        return beit3.config_of(content, **changes)
    return config_of(content, **changes)


# Writing


def _described(tensor: Tensor) -> str:
    where = " on the meta device" if tensor.is_meta else ""
    return f"{tuple(tensor.shape)} {tensor.dtype}{where}"


def _require_official_keys(model: Any) -> None:
    """Raise if the model has keys that its configuration does not account for."""
    kind: Any = BEiT3 if isinstance(model, BEiT3) else VLMo
    with torch.device("meta"):
        expected = kind(model.config).state_dict().keys()
    foreign = [key for key in model.state_dict() if key not in expected]
    if foreign:
        raise ValueError(
            f"model: its state dict has {summary(foreign)}, which no official checkpoint has; "
            "merge adapters (PEFT: merge_and_unload) or remove parametrizations "
            "(torch.nn.utils.parametrize.remove_parametrizations) first"
        )


def _official_state(model: nn.Module) -> OrderedDict[str, Tensor]:
    """The model's state dict on the CPU; every tensor has its own storage of exactly its size."""
    state: OrderedDict[str, Tensor] = OrderedDict()
    seen: set[int] = set()
    for key, value in model.state_dict().items():
        if value.is_meta:
            raise ValueError(f"{key} is on the meta device; there is nothing to save")
        tensor = value.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        # torch.save writes the whole storage of a view, and safetensors rejects shared storages.
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        state[key] = tensor
    if TEXT_POSITIONS in state and POSITION_IDS not in state:
        state[POSITION_IDS] = torch.arange(state[TEXT_POSITIONS].shape[0]).unsqueeze(0)
    return state


def _write_safetensors(
    state: OrderedDict[str, Tensor], records: Mapping[str, str], path: Path
) -> None:
    # safetensors creates files that only their owner can read; give the file the mode that an
    # ordinary new file has.
    with path.open("xb") as handle:
        mode = os.fstat(handle.fileno()).st_mode & 0o777
    save_file(state, path, metadata={"format": "pt", **records})
    os.chmod(path, mode)


# Recognising


def _require_sizes(content: Content) -> None:
    """Raise unless the tensors that determine the sizes exist and no block is missing."""
    for key, rank in SIZE_RANKS.items():
        tensor = content.state.get(key)
        if tensor is None and key not in (TABLE, POSITIONS):
            raise CheckpointError(
                f"{content.name}: not a whole VLMo checkpoint, it lacks {key}"
                f"{likeness(content.state)}"
            )
        if tensor is not None and (tensor.dim() != rank or not tensor.numel()):
            shape = tuple(tensor.shape)
            raise CheckpointError(f"{content.name}: {key} has shape {shape}, not {rank} sizes")
    blocks = blocks_with(content.state, "")
    if max(blocks) >= len(blocks):
        raise CheckpointError(f"{content.name}: it has blocks {sorted(blocks)}, some are missing")


def _inferred(
    content: Content, recorded: dict[str, Any], heads: int | None, capacity: int | None
) -> VLMoConfig:
    """The recorded configuration, or the default, with everything the tensors show corrected."""
    state = content.state
    known = VLMoConfig(**recorded)
    dim, _, _, patch = state[PATCHES].shape
    depth = len(blocks_with(state, ""))
    experts = blocks_with(state, "mlp_vl.")
    vl_start = recorded.get("vl_start", PUBLISHED_VL_START.get((dim, depth), depth))
    has_scale = "transformer.blocks.0.gamma_1" in state
    grid, capacity = _geometry(content, capacity, known.grid if recorded else None)
    answers = state.get("vqa_classifier.3.weight")
    return known.replace(
        dim=dim,
        depth=depth,
        heads=_heads(content, dim, depth, heads),
        mlp_ratio=ratio_of_widths(dim, state[HIDDEN].shape[0]),
        vl_start=min(experts) if experts else min(vl_start, depth),
        image_size=grid * patch,
        patch_size=patch,
        max_text_length=state[TEXT_POSITIONS].shape[0],
        text_capacity=capacity,
        vocab_size=state[WORDS].shape[0],
        relative_position_bias=TABLE in state,
        absolute_position=POSITIONS in state,
        layer_scale=(known.layer_scale or VLMoConfig.layer_scale) if has_scale else None,
        tasks=_tasks(state, bool(experts), recorded.get("tasks", ())),
        vqa_labels=known.vqa_labels if answers is None else answers.shape[0],
        separate_attention=bool(blocks_with(state, "attn_text.")),
    )


def _heads(content: Content, dim: int, depth: int, told: int | None) -> int:
    if TABLE in content.state:
        columns = content.state[TABLE].shape[1]
        if columns % depth or (told is not None and told * depth != columns):
            asked = "" if told is None else f" of {told} heads"
            raise ValueError(
                f"{content.name}: {TABLE} has {columns} columns for {depth} blocks{asked}"
            )
        return columns // depth
    heads = told or PUBLISHED_HEADS.get((dim, depth))
    if heads is None:
        raise ValueError(
            f"{content.name}: without a relative position table nothing tells the number of "
            f"attention heads of a model of width {dim}; pass heads="
        )
    return heads


def _geometry(content: Content, capacity: int | None, known_grid: int | None) -> tuple[int, int]:
    """Grid of patches and text capacity.

    The learned positions determine the grid only; the number of rows of the table depends on grid
    and capacity, so one of the two must be known.
    """
    grid = known_grid
    if POSITIONS in content.state:
        grid = grid_of_patches(content.state[POSITIONS].shape[1] - 1)
    elif TABLE in content.state:
        rows = content.state[TABLE].shape[0]
        capacity = capacity or PUBLISHED_TEXT_CAPACITY
        grid = grid_of_offsets(rows - table_tail(capacity))
        if grid is None:
            raise ValueError(
                f"{content.name}: {TABLE} has {rows} rows, which fit no image with texts of up to "
                f"{capacity} tokens; pass text_capacity="
            )
    if grid is None:
        raise CheckpointError(f"{content.name}: neither {TABLE} nor a square {POSITIONS}")
    return grid, capacity or PUBLISHED_TEXT_CAPACITY


def _tasks(state: Mapping[str, Any], has_experts: bool, recorded: Sequence[str]) -> tuple[str, ...]:
    """Tasks inferred from the heads; ``recorded`` decides between tasks with the same heads."""
    present = {key.split(".", 1)[0] for key in state} & set().union(*TASK_HEADS.values())
    if recorded and set().union(*(TASK_HEADS[task] for task in recorded)) == present:
        return tuple(recorded)
    # Text pre-training has the same head as mlm. It differs in having no vision-language experts
    # and no other task. Retrieval has half of the heads of itc.
    text_only = not has_experts and present == TASK_HEADS["textmlm"]
    absent = {"mlm" if text_only else "textmlm"}
    absent.add("irtr" if TASK_HEADS["itc"] <= present else "itc")
    return tuple(task for task in TASKS if task not in absent and TASK_HEADS[task] <= present)


def _inner(model: nn.Module) -> Any:
    """The model inside DistributedDataParallel, DataParallel or torch.compile."""
    inner: Any = model
    while True:
        wrapped = next((p.rstrip(".") for p in KEY_PREFIXES if p.rstrip(".") in inner._modules), "")
        if not wrapped:
            return inner
        inner = inner._modules[wrapped]
