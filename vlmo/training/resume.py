"""Checks a training against the earlier one in its folder, which it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmo.run_folder import WEIGHTS
from vlmo.training.parallel import on_first
from vlmo.training.record import (
    check_identity,
    differences,
    identify_weights,
    length,
    read_record,
)
from vlmo.training.state import STATE, load_state


def weights_file(initial: Path | None) -> Path | None:
    """The checkpoint of ``--init``, which may be a run folder.

    Raises:
        FileNotFoundError: the folder has no weights.
    """
    if initial is None or not initial.is_dir():
        return initial
    if not (initial / WEIGHTS).is_file():
        raise FileNotFoundError(f"init: {initial} has no {WEIGHTS}")
    return initial / WEIGHTS


def earlier(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """State and identity of the training in a folder; None for what is missing."""
    record = read_record(folder)
    if (folder / STATE).exists():
        state = load_state(folder / STATE)
        check_identity(state["run"], folder / STATE)
        return state, state["run"]
    return None, None if record is None else record["run"]


def initial_weights(
    given: Path | None, skip: tuple[str, ...], before: Mapping[str, Any] | None, *, anew: bool
) -> dict[str, Any] | None:
    """The identity of the initial weights, see :func:`vlmo.training.record.identify_weights`.

    Args:
        given: checkpoint or run folder of ``--init``.
        skip: prefixes of keys that are not loaded from it.
        before: identity of the training in the folder.
        anew: whether the weights are going to be loaded.

    Raises:
        ValueError: they are not those that the folder's training started from.
    """
    if before is None or "initial" not in before:
        return None if given is None or not anew else _digested(given, skip)
    first = before["initial"]
    if given is None:
        if anew and first is not None:
            raise ValueError(f"init: this training starts from {first['path']}; give --init again")
        return first
    if first is None:
        raise ValueError(f"init: {given}: this training started from random weights")
    if not anew and str(given) == first["path"] and not given.exists():
        return first
    found = _digested(given, skip)
    if found["digest"] != first["digest"]:
        rest = "" if anew else "; it resumes without --init"
        raise ValueError(
            f"init: {given} (digest {found['digest']}) is not what this training started from, "
            f"{first['path']} (digest {first['digest']}){rest}"
        )
    if found["skip"] != first["skip"]:
        raise ValueError(f"skip: {found['skip']} instead of {first['skip']}")
    return first


def _digested(given: Path, skip: tuple[str, ...]) -> dict[str, Any]:
    path = weights_file(given)
    assert path is not None
    return on_first(lambda: identify_weights(given, path, skip))


def resumed(
    output: Path,
    before: dict[str, Any],
    run: dict[str, Any],
    state: Mapping[str, Any] | None,
    repeats: bool,
    console: Console,
) -> dict[str, Any]:
    """The identity of a resumed training, which keeps what it was started with.

    Args:
        output: folder of the run.
        before: identity of the training in the folder.
        run: identity that the command line asks for.
        state: state of the training in the folder, None if none is saved.
        repeats: whether the data have several captions per picture and are not digit scenes.
        console: for messages.

    Raises:
        ValueError: it is another training, or its new length is below the number of steps done.
    """
    # Runs from before this option existed drew random batches for all data but digit scenes.
    drew = before["recipe"].get("official_batches", repeats)
    before = {**before, "recipe": {**before["recipe"], "official_batches": drew}}
    found = differences(before, run)
    if state is not None and _lacks_bad_samples(state, run):
        found = [phrase for phrase in found if not phrase.startswith(("samples:", "data ("))]
        console.print(
            f"{before['samples'] - run['samples']} samples that could not be read have been "
            f"removed from the data; {run['samples']} are left"
        )
        before = {**before, "samples": run["samples"], "data": run["data"]}
    if found:
        hint = ""
        if drew and not run["recipe"]["official_batches"]:
            hint = "; --official-batches draws random batches, as this training began"
        raise ValueError(f"output: {output} holds another training ({'; '.join(found)}){hint}")
    done = 0 if state is None else state["step"]
    now = {**before, "recipe": run["recipe"]}
    if length(now) < done:
        raise ValueError(
            f"steps: {length(now)} in all are fewer than the {done} already done in {output}"
        )
    if length(now) != length(before):
        console.print(
            f"{length(now)} steps in all instead of {length(before)}; from here on the learning "
            "rate follows the schedule of the new length",
            highlight=False,
        )
    return now


def _lacks_bad_samples(state: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether the data are those of the run without the samples that could not be read."""
    fewer = state.get("fewer")
    return fewer is not None and fewer == run["data"] and run["data"] != state["run"].get("data")
