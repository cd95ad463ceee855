"""Options of things that are found by name: a model of fields for each, chosen by the name beside them.

    class Focal(Options):                              registry: {"focal": Focal, …}
        name: str = "focal"
        gamma: float = Field(2.0, description="…")

    choose(LOSSES, {"name": "focal", "gamma": 1})  ->  Focal(gamma=1)

A discriminated union that can grow: pydantic's own is closed when its class is made. Mistakes are pydantic's line
errors, so the reader of a recipe names the field, the file and the line as for any other part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from livt_scale.util.errors import nearest
from livt_scale.util.registry import Registry

UNKNOWN_NAME = "unknown_name"  # types of errors; `hint` in their context says what would be right
UNKNOWN_OPTION = "unknown_option"


class Options(BaseModel):
    """Fields with defaults and descriptions. Frozen; an unknown field is an error, and so is a number not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


O = TypeVar("O", bound=Options)  # noqa: E741


def choose(
    registry: Registry[type[O]], values: dict[str, Any], *, default: str | None = None, strict: bool = False
) -> O:
    """The options in `values`, as the class that its `name` chooses; without a name, `default`'s.

    An option that is None counts as not given. strict: no "12" or true for 12. Raises pydantic's ValidationError.
    """
    name = values.get("name", default)
    check_name(registry, name, loc=("name",))
    model = registry[str(name)]
    of_others = {option for other in registry.values() for option in other.model_fields}
    given = {key: value for key, value in values.items() if value is not None or key not in of_others}
    return read(model, {**given, "name": name}, owner=f"{registry.kind} {name!r}", registry=registry, strict=strict)


def read(
    model: type[O],
    values: dict[str, Any],
    *,
    owner: str,
    registry: Registry[type[O]] | None = None,
    strict: bool = False,
) -> O:
    """`values` as `model`. An unknown option names those that `owner` has, and the names of `registry` that take it."""
    has = [option for option in model.model_fields if option != "name"]
    unknown = [key for key in values if key not in model.model_fields]
    if unknown:
        raise _errors(UNKNOWN_OPTION, ((key, values[key], _hint(key, has, owner, registry)) for key in unknown))
    # by way of JSON where strict, so that a list is a tuple
    return model.model_validate_json(json.dumps(values), strict=True) if strict else model.model_validate(values)


def check_name(registry: Registry[Any], name: Any, *, loc: tuple[str, ...] = ()) -> None:
    """Raise pydantic's ValidationError, with the nearest name, where `registry` has no `name`."""
    if not isinstance(name, str) or name not in registry:
        raise _errors(UNKNOWN_NAME, [(*loc, name, nearest(str(name), registry))])


def _hint(key: str, has: list[str], owner: str, registry: Registry[Any] | None) -> str:
    takers = [name for name, other in (registry or {}).items() if key in other.model_fields]
    instead = f"leave it out, or take {' or '.join(takers)}" if takers else nearest(key, has) if has else "leave it out"
    return f"the {owner} has {'the options ' + ', '.join(has) if has else 'no options'}: {instead}"


def _errors(kind: Any, details: Iterable[tuple[Any, ...]]) -> ValidationError:
    """Line errors of one kind; each detail: the path of the field, its value, the hint."""
    lines: list[InitErrorDetails] = [
        {"type": PydanticCustomError(kind, "{hint}", {"hint": hint}), "loc": tuple(loc), "input": value}
        for *loc, value, hint in details
    ]
    return ValidationError.from_exception_data("options", lines)
