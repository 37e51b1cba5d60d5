"""Reads a checkpoint file of any layout into tensors under the keys of unilm.

unilm is the reference implementation. No code from a file is executed: pickles are read with
``torch.load(weights_only=True)``, where unknown classes are replaced by empty ones that cannot be
called.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Source = str | os.PathLike[str] | Mapping[str, Any]

TABLE = "relative_position_bias_table"
POSITION_IDS = "text_embeddings.position_ids"

WRAPPERS = ("state_dict", "module", "model")
KEY_PREFIXES = ("module.", "_orig_mod.")
INDEX_BUFFERS = (
    "relative_position_index",
    "text_relative_position_index",
    "text_imag_relative_position_index",
)
SAFETENSORS_SUFFIX = ".safetensors"
# A zip file ends with this signature, 22 bytes and a comment of up to 64 KiB.
ZIP_END = b"PK\x05\x06"
ZIP_END_REACH = 22 + 2**16

# Entries that save_checkpoint records in the metadata, which both formats support: the
# configuration, and digests of the vocabulary and the answers that the weights were trained with.
CONFIG_RECORD, BEIT3_RECORD = "vlmo_config", "vlmo_beit3_config"
VOCABULARY_RECORD, ANSWERS_RECORD = "vlmo_vocabulary", "vlmo_answers"
_RECORDS = (CONFIG_RECORD, BEIT3_RECORD, VOCABULARY_RECORD, ANSWERS_RECORD)

# Entries of a training.pt, which has its weights under "model", as BEiT files do.
_STATE_OF_TRAINING = {"version", "run", "step", "model", "optimizer", "schedule"}
_CLASSES = 64  # largest number of classes, other than those of tensors, in a file
# Keys of files that are often mistaken for those of VLMo, in the order in which they are tried.
_FOREIGN = {
    "BEiT-3": r"(beit3|model)\.text_embed\.|beit3\.",
    "ViLT": r"vilt\.|transformer\.blocks\.\d+\.mlp\.",
    "CLIP": r"visual\.(conv1|class_embedding|transformer|trunk)|(vision|text)_model\.",
    "ALBEF or BLIP": r"visual_encoder\.",
    "BERT": r"(bert|roberta)\.|encoder\.layer\.\d+\.",
    "a language model": r"(model\.)?layers\.\d+\.self_attn\.",
}


class CheckpointError(ValueError):
    """A file is not a checkpoint of this model; the message names the file and the fault."""


@dataclass(frozen=True)
class Content:
    """A file after unwrapping: tensors by unilm's keys (with an image table, if ``beit``)."""

    name: str
    state: dict[str, Tensor]
    converted: tuple[str, ...]
    ignored: tuple[str, ...]
    records: dict[str, str]
    beit: bool


def read_content(source: Source | Content) -> Content:
    """Open, unwrap and convert a checkpoint to unilm's keys."""
    if isinstance(source, Content):
        return source
    raw: Any = source
    name = "state dict"
    records: dict[str, str] = {}
    if not isinstance(source, Mapping):
        path = Path(source)
        name = str(path)
        kind = _kind(path)
        if kind == "safetensors":
            raw, records = _open_safetensors(path)
        else:
            raw = _open_torch(path, kind)
    if not isinstance(raw, Mapping):
        raise CheckpointError(f"{name}: holds a {type(raw).__name__}, not a dict of tensors")
    if raw.keys() >= _STATE_OF_TRAINING:
        raise CheckpointError(f"{name}: is the state of a training, not a model{_beside(name)}")
    converted: list[str] = []
    wrapper = _wrapper(raw)
    if wrapper is not None:
        raw = raw[wrapper]
        converted.append(f'wrapped in "{wrapper}"')
    records = records or _attached_records(raw)
    state: dict[str, Tensor] = {}
    ignored: list[str] = []
    for key, value in raw.items():
        official = str(key)
        for prefix in KEY_PREFIXES:
            if official.startswith(prefix):
                official = official.removeprefix(prefix)
                note = f'prefix "{prefix}"'
                converted.extend([note] if note not in converted else [])
        last = official.rsplit(".", 1)[-1]
        if not isinstance(value, Tensor) or last in INDEX_BUFFERS or official == POSITION_IDS:
            ignored.append(official)
        else:
            state[official] = value
    if not state:
        raise CheckpointError(f"{name}: holds no tensors (entries: {summary(list(raw))})")
    beit = any(re.match(r"blocks\.\d+\.mlp\.", key) for key in state)
    if beit:
        state, more = _from_beit(name, state)
        ignored += more
        converted.append("BEiT")
    return Content(name, state, tuple(converted), tuple(ignored), records, beit)


def read_records(source: str | os.PathLike[str]) -> dict[str, str]:
    """Records of :func:`vlmo.save_checkpoint` in the metadata of a file; reads no tensor.

    Raises:
        FileNotFoundError, IsADirectoryError, CheckpointError: as :func:`vlmo.load_checkpoint`.
    """
    path = Path(source)
    kind = _kind(path)
    if kind == "safetensors":
        with _safetensors(path) as file:
            return _own_records(file.metadata())
    if kind == "pickle":  # we do not write this format, and it would have to be read as a whole
        return {}
    raw = _open_torch(path, kind)
    if not isinstance(raw, Mapping):
        return {}
    wrapper = _wrapper(raw)
    return _attached_records(raw if wrapper is None else raw[wrapper])


def _wrapper(raw: Mapping[str, Any]) -> str | None:
    return next((w for w in WRAPPERS if isinstance(raw.get(w), Mapping)), None)


def _kind(path: Path) -> str:
    """The format of a file: "safetensors", "zip" or "pickle"; raises for anything else."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a directory, not a checkpoint")
    with path.open("rb") as handle:
        head = handle.read(256)
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - ZIP_END_REACH))
        tail = handle.read()
    if not head:
        raise CheckpointError(f"{path}: the file is empty")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path}: a web page, not a checkpoint (the download was refused?)")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer, not the file it stands for")
    if path.suffix.lower() == SAFETENSORS_SUFFIX:
        return "safetensors"
    if head.startswith(b"PK\x03\x04"):
        if ZIP_END not in tail:
            raise CheckpointError(f"{path}: truncated, the zip file has no end")
        return "zip"
    if head.startswith(b"\x80"):
        return "pickle"
    if path.name.endswith(".index.json"):
        raise CheckpointError(
            f"{path}: the index of a checkpoint in several files, which have to be merged into one"
        )
    if path.suffix.lower() == ".json":
        raise CheckpointError(f"{path}: a JSON file, not a checkpoint")
    raise CheckpointError(f"{path}: not a torch checkpoint, it starts with {head[:16]!r}")


def _open_torch(path: Path, kind: str, classes: tuple[str, ...] = ()) -> Any:
    """Content of a ``torch.save`` file; its storages stay on disk until used if possible.

    Lightning up to 1.4 uses the class of a callback as the key of its state, and training scripts
    add their arguments. These objects are not needed: ``classes`` names the classes of the file
    that :class:`_Empty` replaces.
    """
    stand_ins: list[Any] = [(_NotCalled(name, (_Empty,), {}), name) for name in classes]
    # For arbitrary bytes torch may raise anything; the caller gets one type, with the path.
    try:
        with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about another pickle protocol
            return torch.load(path, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except Exception as error:
        # torch wraps the unpickler's error in advice to load the file unsafely; report only the
        # inner error.
        inner = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
        unknown = re.match(r"Unsupported global: GLOBAL ([A-Za-z_][\w.]*) was not", str(inner))
        if unknown is None or unknown[1] in classes or len(classes) == _CLASSES:
            raise CheckpointError(f"{path}: {_complaint(inner or error)}") from (inner or error)
    return _open_torch(path, kind, (*classes, unknown[1]))


class _NotCalled(type):
    """Metaclass of the stand-ins for a file's classes: they can be instantiated but not called."""

    def __call__(cls, *arguments: Any) -> Any:
        raise pickle.UnpicklingError(f"GLOBAL {cls.__name__} is to be called")


class _Empty:
    """Stand-in for an object of any class: accepts any state and discards it."""

    def __new__(cls, *arguments: Any) -> _Empty:
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


def _complaint(error: BaseException) -> str:
    """Why ``torch.load`` failed, in one sentence."""
    reason = str(error).strip()
    refused = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", reason)
    if refused is not None:
        return (
            f"refused, because it is a pickle with {refused[1]} besides tensors, and loading that "
            "could run code; where it was written, save the state dict alone"
        )
    cause = ": ".join([type(error).__name__, *reason.splitlines()[:1]])
    return f"damaged, or no torch checkpoint ({cause})"


def _open_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file, and the records of ours in its metadata."""
    with _safetensors(path) as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names}, _own_records(file.metadata())


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Any]:
    """A safetensors file; errors of its reader are raised as one type, with the path."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except Exception as error:
        raise CheckpointError(f"{path}: damaged, or no safetensors file: {error}") from error


def _from_beit(name: str, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Convert BEiT keys to those of unilm's VLMo; also returns BEiT keys that VLMo has no use for.

    The tables of all layers are concatenated under ``TABLE``, ``[image offsets + 3, heads *
    depth]``: image rows only, which :func:`vlmo.checkpoint.resize.fit_tensor` completes.
    """
    unused = ("fc_norm.", "head.", "lm_head.", "mask_token")
    shared_key = f"rel_pos_bias.{TABLE}"
    converted: dict[str, Tensor] = {}
    ignored: list[str] = []
    tables: dict[int, Tensor] = {}
    for key, value in state.items():
        layer = re.fullmatch(rf"blocks\.(\d+)\.attn\.{TABLE}", key)
        if layer:
            tables[int(layer[1])] = value
        elif key.startswith(unused):
            ignored.append(key)
        elif key != shared_key:
            official = key.replace(".mlp.", ".mlp_imag.").replace(".norm2.", ".norm2_imag.")
            converted[f"transformer.{official}"] = value
    layers = sorted(blocks_with(converted, ""))
    if shared_key in state and not tables:
        tables = dict.fromkeys(layers, state[shared_key])
    if tables:
        shapes = {tuple(table.shape) for table in tables.values()}
        if sorted(tables) != layers or len(shapes) != 1 or len(*shapes) != 2:
            raise CheckpointError(
                f"{name}: BEiT's layers {layers} have tables in {sorted(tables)} of shapes "
                f"{sorted(shapes)}; each needs one, all of one shape [rows, heads]"
            )
        converted[TABLE] = torch.cat([tables[layer] for layer in layers], dim=1)
    return converted, ignored


def _attached_records(raw: Mapping[str, Any]) -> dict[str, str]:
    """Records that :func:`vlmo.save_checkpoint` attached to a file in torch's format."""
    metadata = getattr(raw, "_metadata", None)
    return _own_records(metadata.get("") if isinstance(metadata, Mapping) else None)


def _own_records(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, Mapping):
        return {}
    found = {name: metadata.get(name) for name in _RECORDS}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _beside(name: str) -> str:
    """The end of an error: where the weights of a training with the state ``name`` are."""
    weights = Path(name).with_name("model.safetensors")
    if weights.is_file():
        return f"; its weights are in {weights}"
    return "; its weights will be in model.safetensors beside it when the training has ended"


def contents_of(folder: Path) -> str:
    """The end of an error: what a folder without model.safetensors contains."""
    names = sorted(path.name for path in folder.iterdir())
    indices = [name for name in names if name.endswith(".index.json")]
    if "training.pt" in names:
        return "; its training has not ended"
    if indices:
        return f"; it is a checkpoint in several files ({indices[0]}), to be merged into one"
    if "config.json" in names:
        return "; it has a config.json, as a model of Hugging Face has"
    files = [name for name in names if name.endswith((".ckpt", ".pt", ".pth", ".bin"))]
    return f"; name one of its files: {summary(files)}" if files else ""


def likeness(keys: Iterable[str]) -> str:
    """The end of an error: the software whose files have such keys; "" if unknown."""
    names = list(keys)
    for name, pattern in _FOREIGN.items():
        if any(re.match(pattern, key) for key in names):
            return f"; it looks like a file of {name}"
    return ""


def blocks_with(state: Mapping[str, Any], part: str) -> set[int]:
    """Numbers of the transformer blocks with a key that starts with ``part``."""
    found = (re.match(rf"transformer\.blocks\.(\d+)\.{re.escape(part)}", key) for key in state)
    return {int(match[1]) for match in found if match}


def summary(keys: Sequence[Any], limit: int = 12) -> str:
    """A short summary of keys: one entry per head or kind of block tensor, with its count."""
    groups: dict[str, list[str]] = {}
    for key in map(str, keys):
        parts = re.sub(r"(blocks|layers)\.\d+\.", r"\1.*.", key).split(".")
        depth = 4 if parts[:2] == ["transformer", "blocks"] else 1
        if parts[0] == "beit3":
            depth = 5 if parts[2:3] == ["layers"] else 3
        groups.setdefault(".".join(parts[:depth]), []).append(key)
    shown = [
        members[0] if len(members) == 1 else f"{group}.* ({len(members)})"
        for group, members in groups.items()
    ]
    more = [f"and {len(shown) - limit} more kinds"] if len(shown) > limit else []
    return ", ".join(shown[:limit] + more) or "none"
