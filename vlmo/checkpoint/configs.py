"""What the configurations of all models need: recorded fields, and a width as a ratio."""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from vlmo.checkpoint.formats import CheckpointError, Content


def fields_to_record(config: Any, run_fields: Sequence[str]) -> str:
    """The fields of a configuration that determine weights, as JSON."""
    fields = dataclasses.asdict(config)
    return json.dumps({name: value for name, value in fields.items() if name not in run_fields})


def recorded_fields(
    content: Content, record: str, config: type[Any], run_fields: Sequence[str]
) -> dict[str, Any]:
    """Fields of the configuration in a file's ``record``; unknown fields are left out.

    Raises:
        CheckpointError: the record is damaged.
    """
    if record not in content.records:
        return {}
    try:
        fields = json.loads(content.records[record])
        fields["tasks"] = tuple(fields["tasks"])
        names = {field.name for field in dataclasses.fields(config)} - set(run_fields)
        fields = {name: value for name, value in fields.items() if name in names}
        _check_kinds(fields, config)
        config(**fields)
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        raise CheckpointError(f"{content.name}: its {record} is damaged: {error}") from error
    return fields


def _check_kinds(fields: Mapping[str, Any], config: type[Any]) -> None:
    """Raise TypeError unless the fields of a configuration have the types of the defaults."""
    optional = {field.name for field in dataclasses.fields(config) if "None" in str(field.type)}
    for name, value in fields.items():
        default = getattr(config, name)
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        if name in optional:
            kinds = (*kinds, type(None))
        if type(value) not in kinds:
            raise TypeError(f"{name} is {reprlib.repr(value)}")


def ratio_of_widths(dim: int, hidden: int) -> float:
    """A ratio for which ``int(dim * ratio)`` is ``hidden``, despite rounding."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf)
