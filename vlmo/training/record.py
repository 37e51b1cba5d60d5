"""The identity of a training, on which its result depends, and recipe.json, which records it.

The first record is never changed; every time the training is resumed, an entry is added.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vlmo.files import write_json
from vlmo.run_folder import RECIPE
from vlmo.training.recipes import Recipe

_LENGTH = ("steps", "epochs")  # may change on the way
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Recipe)
    if field.default is not dataclasses.MISSING
}


def identity(recipe: Recipe, **facts: Any) -> dict[str, Any]:
    """What must be equal for a training to be resumed.

    Args:
        recipe: with the user's changes.
        facts: ``seed``; ``samples``, their number; ``data``, a fingerprint of them; ``vocabulary``
            and ``answers``, digests; ``initial``, see :func:`identify_weights`. None for those that
            do not apply.
    """
    return {"recipe": _as_json(dataclasses.asdict(recipe)), **facts}


def identify_weights(path: Path, weights: Path, skip: tuple[str, ...]) -> dict[str, Any]:
    """Identify the weights that a training starts from: name, digest, and the keys left out.

    Args:
        path: as given by the user, a file or a run folder.
        weights: the file.
        skip: prefixes of keys that are not loaded.
    """
    digest = hashlib.sha256()
    with weights.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return {"path": str(path), "digest": digest.hexdigest()[:16], "skip": list(skip)}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The differences of two identities, one phrase each: ``lr: 0.001 instead of 0.002``.

    A field that ``old`` lacks because it was added later is not compared; a missing recipe field
    has its default. The length of the training and its initial weights are not compared here.
    """
    found = []
    recipes = {**_as_json(_DEFAULTS), **old["recipe"]}, new["recipe"]
    for name in dict.fromkeys([*recipes[0], *recipes[1]]):
        before, now = (recipe.get(name) for recipe in recipes)
        if name not in _LENGTH and before != now:
            found.append(f"{name}: {now} instead of {before}")
    for name in ("seed", "samples", "data", "vocabulary", "answers"):
        before, now = old.get(name), new.get(name)
        if name in old and before != now and not (name == "data" and None in (before, now)):
            of = " (fingerprint)" if name == "data" else ""
            found.append(f"{name}{of}: {now} instead of {before}")
    return found


def length(run: Mapping[str, Any]) -> int:
    """Total number of steps of a training, from its identity."""
    recipe = run["recipe"]
    if recipe["steps"] is not None:
        return recipe["steps"]
    return recipe["epochs"] * (run["samples"] // recipe["batch_size"])


def read_record(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's recipe.json; None if there is none.

    Raises:
        ValueError: it is damaged, or not the record of a training.
    """
    path = folder / RECIPE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # invalid syntax or encoding
        raise _damaged(path, f"it is not JSON: {error}") from error
    run = content.get("run") if isinstance(content, dict) else None
    if not isinstance(run, dict):
        raise _damaged(path, "it has no 'run'")
    check_identity(run, path)
    if not isinstance(content.get("resumed", []), list):
        raise _damaged(path, "its 'resumed' is not a list")
    return content


def check_identity(run: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError unless the ``run`` in a file has the form of :func:`identity`."""
    recipe = run.get("recipe")
    if not isinstance(recipe, dict) or not isinstance(run.get("samples"), int):
        raise _damaged(path, "its 'run' has no recipe or no samples")
    steps, epochs, batch = (recipe.get(name) for name in (*_LENGTH, "batch_size"))
    if not isinstance(steps, int) and not (isinstance(epochs, int) and isinstance(batch, int)):
        raise _damaged(path, "its recipe has no steps and no epochs")


def write_record(
    folder: Path,
    run: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    step: int,
) -> None:
    """Record a training in recipe.json, or add an entry that it is resumed.

    Args:
        folder: folder of the run, which exists.
        run: identity of the training.
        facts: further information to record.
        step: number of steps done.

    Raises:
        OSError: it cannot be written.
        ValueError: the existing file is damaged; it is not changed.
    """
    content = read_record(folder)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    if content is None:
        content = {"run": dict(run), "time": now, **facts, "resumed": []}
    else:
        changes = {name: v for name, v in run.items() if content["run"].get(name) != v}
        entry = {"step": step, "time": now, "run": changes, **facts}
        content["resumed"] = [*content.get("resumed", []), entry]
    write_json(folder / RECIPE, content)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(
        f"{path}: is not the record of a training: {what}; repair it, or move it away (the "
        "training resumes without it if training.pt is there)"
    )
