"""What is wrong with a YAML file that is no recipe (a shard spec, a site profile, a study): file, line, field.

validated(parse(text, path), path, BuildSpec)
UsageError: fashion.yaml, line 3: there is no field sets.a.sauce: did you mean 'source'?
"""

from __future__ import annotations

import json
import typing
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from livt_scale.errors import UsageError, nearest
from livt_scale.recipe_yaml import Tree, shown

M = TypeVar("M", bound=BaseModel)


def validated(tree: Tree, path: Path, model: type[M], *, strict: bool = True) -> M:
    """The whole file as `model`. Raises UsageError: every mistake on a line of its own.

    strict: no "12" or true for 12; yet a list is a tuple, by way of JSON.
    """
    try:
        return model.model_validate_json(json.dumps(tree.values), strict=strict)
    except ValidationError as error:
        lines = [_explain(each, tree, path, model) for each in error.errors(include_url=False)]
        raise UsageError("\n".join(dict.fromkeys(lines))) from None


def _explain(error: Any, tree: Tree, path: Path, model: type[BaseModel]) -> str:
    where = tuple(k for k in error["loc"] if k != "[key]")
    named = ".".join(map(str, where)) or "the file"
    origin = tree.origin_of(where, default=shown(path))
    if error["type"] == "extra_forbidden":
        return f"{origin}: there is no field {named}: {nearest(str(where[-1]), _fields_at(where[:-1], model))}"
    if error["type"] == "missing":
        return f"{origin}: {named} is missing and has no default"
    if error["type"] == "value_error":  # one of ours; of the whole file, it begins with the field
        said = str(error["ctx"]["error"])
        origin = tree.origins.get(tuple(said.split(" ")[0].split(".")), origin) if not where else origin
        return f"{origin}: {named + ': ' if where else ''}{said}"
    if error["type"] == "string_pattern_mismatch" and "A-Za-z0-9" in error["ctx"]["pattern"]:
        return f"{origin}: {named}: a name is made of letters, digits, _ and -, at most 64"
    if error["type"] == "model_type":
        return f"{origin}: {named} is {error['input']!r}, but it has fields: {', '.join(_fields_at(where, model))}"
    return f"{origin}: {named} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields_at(where: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    """The fields of the part at `where`: ("sets", "train-lt", "balanced") -> like, per_class, total."""
    part: type[BaseModel] | None = model
    keys = list(where)
    while keys and part:
        annotation = part.model_fields[keys.pop(0)].annotation
        part = _part_in(annotation)
        if keys and _is_mapping(annotation):
            keys.pop(0)  # a name that the file gives
    return list(part.model_fields) if part else []


def _part_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation holds: X | None, dict[str, X], tuple[X, ...]."""
    options = typing.get_args(annotation) or (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _is_mapping(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return any(_is_mapping(each) for each in typing.get_args(annotation))
    return typing.get_origin(annotation) is dict
