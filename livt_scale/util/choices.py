"""Options of things that are found by name: a model of fields for each, chosen by the name beside them.

    class Focal(Options):                              registry: {"focal": Focal, …}
        name: str = "focal"
        gamma: float = Field(2.0, description="…")

    choose(LOSSES, {"name": "focal", "gamma": 1})  ->  Focal(gamma=1)
    loss: Annotated[LossOptions, Chosen(LOSSES, default="bal_bce")]           a field of a recipe that does the same

A discriminated union that can grow: pydantic's own is closed when its class is made. Mistakes are pydantic's line
errors, so the reader of a recipe names the field, the file and the line as for any other part.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, LiteralString, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, PydanticKnownError, core_schema

from livt_scale.util.errors import nearest
from livt_scale.util.outside import first_mistake
from livt_scale.util.registry import Registry

UNKNOWN_NAME: LiteralString = "unknown_name"  # types of errors; `hint` in their context has the valid value
UNKNOWN_OPTION = "unknown_option"
SET_EXTENSIONS = "set LIVT_EXTENSIONS to the file that registers it"


class Options(BaseModel):
    """Fields with defaults and descriptions. Frozen; an unknown field is an error, and so is a number not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


O = TypeVar("O", bound=Options)  # noqa: E741


def choose(
    registry: Registry[type[O]],
    values: dict[str, Any],
    *,
    key: str = "name",
    default: str | None = None,
    strict: bool = False,
) -> O:
    """The options in `values`, as the class that its field `key` chooses; without that field, `default`'s.

    An option that is None counts as not given. strict: no "12" or true for 12. Raises pydantic's ValidationError.
    """
    name = values.get(key, default)
    check_name(registry, name, loc=(key,))
    model = registry[str(name)]
    of_others = {option for other in registry.values() for option in other.model_fields}
    given = {option: value for option, value in values.items() if value is not None or option not in of_others}
    owner = f"{registry.kind} {name!r}"
    return read(model, {**given, key: name}, owner=owner, key=key, registry=registry, strict=strict)


def read(
    model: type[O],
    values: dict[str, Any],
    *,
    owner: str,
    key: str = "name",
    registry: Registry[type[O]] | None = None,
    strict: bool = False,
) -> O:
    """`values` as `model`. An unknown option names those that `owner` has, and the names of `registry` that take it."""
    has = [option for option in model.model_fields if option != key]
    unknown = [option for option in values if option not in model.model_fields]
    if unknown:
        raise _errors(UNKNOWN_OPTION, ((each, values[each], _hint(each, has, owner, registry)) for each in unknown))
    # by way of JSON where strict, so that a list is a tuple
    return model.model_validate_json(json.dumps(values), strict=True) if strict else model.model_validate(values)


@dataclass(frozen=True)
class Chosen:
    """Annotates a field of a model whose options follow from the field `key` in it, as `choose` reads them.

    short: a name alone is read, and written, for options that have nothing but a name.
    """

    registry: Registry[Any]
    default: str
    key: str = "name"
    short: bool = False

    def __get_pydantic_core_schema__(self, base: type[Options], handler: GetCoreSchemaHandler) -> CoreSchema:
        def validated(value: Any, info: ValidationInfo) -> Any:
            if isinstance(value, base):
                return value
            if self.short and isinstance(value, str):
                value = {self.key: value}
            if not isinstance(value, dict):
                raise PydanticKnownError("model_type", {"class_name": base.__name__})
            strict = info.mode == "json"
            return choose(self.registry, value, key=self.key, default=self.default, strict=strict)

        def dumped(value: Options, info: SerializationInfo) -> Any:
            fields = value.model_dump(mode=info.mode, exclude_none=info.exclude_none)
            return fields[self.key] if self.short and list(fields) == [self.key] else fields

        return core_schema.with_info_plain_validator_function(
            validated, serialization=core_schema.plain_serializer_function_ser_schema(dumped, info_arg=True)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """For editors: any of the registered, each with its own options."""
        names = [{"enum": list(self.registry)}] if self.short else []
        schemas = [model.model_json_schema() for model in self.registry.values()]
        others = {option: {"type": "null"} for each in schemas for option in each["properties"]}
        for each in schemas:  # an option of another's may be null, as `choose` reads it
            each["properties"] = {**others, **each["properties"]}
        return {"anyOf": [*names, *schemas]}


class NameIn:
    """Annotates a field of text: a name in one of `tables`, as `model.size`."""

    def __init__(self, *tables: Mapping[str, Any]) -> None:
        self._tables = tables

    def names(self) -> list[str]:
        return [name for table in self._tables for name in table]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def known(name: str) -> str:
            if name not in self.names():
                hint = nearest(name, self.names())
                raise PydanticCustomError(UNKNOWN_NAME, "{hint}", {"hint": hint})
            return name

        return core_schema.no_info_after_validator_function(known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """For editors: the names of now, those from outside the package included."""
        return {**handler(schema), "enum": self.names()}


def check_name(registry: Registry[Any], name: Any, *, loc: tuple[str, ...] = ()) -> None:
    """Raise pydantic's ValidationError, with the nearest name, where `registry` has no `name`."""
    if not isinstance(name, str) or name not in registry:
        raise _errors(UNKNOWN_NAME, [(*loc, name, nearest(str(name), registry))])


def mistake_in_saved(error: ValidationError) -> tuple[str, str]:
    """(the first mistake in what a run or an export saved, what to do). A name that nothing here registers comes first:
    it is most often of an extension that this process has not loaded.
    """
    for found in error.errors(include_url=False):
        if found["type"] == UNKNOWN_NAME:
            where, name = ".".join(map(str, found["loc"])), str(found["input"])[:100]
            return f"{where} is {name!r}, which nothing here registers", SET_EXTENSIONS
    return first_mistake(error), "was it written by another livt_scale?"


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
