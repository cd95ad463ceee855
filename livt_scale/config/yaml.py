"""YAML for recipes and shard specs: plain values with the line of each, and no executable content.

PyYAML's scanner and parser, but our own reading of scalars, after YAML 1.2's core schema: `1e-3` is a number (PyYAML
says text), `no` and `on` are text (PyYAML says false and true), `010` is ten, `12:30` is text. Only maps, lists,
text, numbers, true, false and null exist; any other tag (`!!python/object`, `!!binary`, …) is refused, and so are a
name given twice, a value that holds itself, and a file whose aliases unfold to more than MAX_VALUES values.

    parse("seed: 7\\n", Path("a.yaml")).origins[("seed",)]  ->  "a.yaml, line 1"
"""

from __future__ import annotations

import json
import math
import re
import typing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from livt_scale.util.choices import UNKNOWN_OPTION
from livt_scale.util.errors import RecipeError, UsageError, nearest
from livt_scale.util.outside import Kind, read_text
from livt_scale.util.urls import redacted

Where = tuple[str | int, ...]  # a path into the tree: ("stages", "pretrain", "epochs")
MAX_VALUES = 10_000
MAX_MISTAKES = 20  # in one error
MAX_DEPTH = 32  # of lists and parts in each other

_TAG = "tag:yaml.org,2002:"
_SCALARS = {  # in this order: the first that fits
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"true|True|TRUE|false|False|FALSE"),
    "int": re.compile(r"[-+]?[0-9][0-9_]*"),
    "float": re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF|nan|NaN|NAN)"),
    "merge": re.compile(r"<<"),
}


@dataclass
class Tree:
    """Plain values, and for each path the place where it was written ("file.yaml, line 3" or "--set a.b")."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Where, str] = field(default_factory=dict)

    def origin_of(self, where: Where, *, default: str) -> str:
        """Where the value at `where` was written, or the nearest part around it that was; else `default`."""
        known = (self.origins[where[:n]] for n in range(len(where), 0, -1) if where[:n] in self.origins)
        return next(known, default)


class _Loader(yaml.SafeLoader):
    """Stops at the first value too many or too deep: PyYAML reads 30,000 values a second."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - yaml's own name; filled below
    _depth = _num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        self._num_nodes += 1
        if self._depth > MAX_DEPTH:
            raise self._refused(f"lists or parts in each other, more than {MAX_DEPTH} deep")
        if self._num_nodes > 2 * MAX_VALUES:  # a name and its value are two
            raise self._refused(f"the file has more than {MAX_VALUES} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def _refused(self, problem: str) -> yaml.YAMLError:
        return yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that also quotes text which we, and not PyYAML, would read as a number."""


for _name, _pattern in _SCALARS.items():
    _whole = re.compile(rf"^(?:{_pattern.pattern})$")
    _Loader.add_implicit_resolver(_TAG + _name, _whole, None)
    _Dumper.add_implicit_resolver(_TAG + _name, _whole, None)


def dump(values: dict[str, Any]) -> str:
    """`values` as YAML in their own order, which `parse` reads back to the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def parse(text: str, path: Path) -> Tree:
    """The mapping in `text`, the content of the file `path`, with the line of each value. Raises RecipeError."""
    file = str(path)
    node = _compose(text, file)
    if node is None:
        raise RecipeError(f"{file} is empty", remedy="it should be a mapping of names to values")
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{file}, line {node.start_mark.line + 1}: the file is not a mapping of names to values")
    reader = _Reader(file)
    return Tree(reader.read(node, ()), reader.origins)


def read_file(path: Path, kind: Kind, *, what: str, remedy: str = "") -> Tree:
    """The mapping in a YAML file. `what`: it should be. Raises UsageError, with the nearest file if there is none."""
    try:
        text = read_text(path, kind)
    except (OSError, ValueError) as error:
        near = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UsageError(
            f"the {what} {path} cannot be read: {getattr(error, 'strerror', None) or error}",
            remedy=nearest(str(path), near) if near else remedy,
        ) from error
    return parse(text, path)


def parse_value(text: str) -> Any:
    """One value, as given after `--set a.b=`. Raises RecipeError."""
    node = _compose(text, "")
    return None if node is None else _Reader("").read(node, ())


@lru_cache(maxsize=64)  # a study reads the same files for each of its runs
def _compose(text: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{file}, line {mark.line + 1}" if mark and file else file
        said = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error).splitlines()[0]
        raise RecipeError(f"{place}: not YAML: {said}" if place else f"not YAML: {said}") from error


class _Reader:
    """Nodes to plain values; `origins` fills up on the way."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.origins: dict[Where, str] = {}
        self._open: list[yaml.Node] = []  # from the root to the node being read: an alias to one of them never ends
        self._num_values = 0

    def read(self, node: yaml.Node, where: Where) -> Any:
        self.origins.setdefault(where, self._place(node))  # a value in a part has the line of its name already
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise self._error(node, where, f"has more than {MAX_VALUES} values", remedy="no file of ours is so large")
        if any(node is outer for outer in self._open):
            raise self._error(node, where, "holds itself", remedy="write the value out")
        self._open.append(node)
        try:
            return self._value(node, where)
        finally:
            self._open.pop()

    def _value(self, node: yaml.Node, where: Where) -> Any:
        if node.tag == f"{_TAG}map" and isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if node.tag == f"{_TAG}seq" and isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*where, k)) for k, child in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, where)
        raise self._refused(node, where)

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, where, "has a list or a part for a name", remedy="a name is plain text")
            if key_node.tag == f"{_TAG}merge":
                merged = {**self._merged(value_node, where), **merged}  # of two `<<` the first wins
                continue
            key = key_node.value
            self._check_text(key, key_node, where)
            if key in own:
                raise self._error(key_node, (*where, key), "is given twice", remedy="keep one")
            self.origins[(*where, key)] = self._place(key_node)
            own[key] = self.read(value_node, (*where, key))
        return {**merged, **own}

    def _merged(self, node: yaml.Node, where: Where) -> dict[str, Any]:
        """What `<<: *anchor` or `<<: [*a, *b]` brings in: names that the part itself has not."""
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        merged: dict[str, Any] = {}
        for part in parts:
            if not isinstance(part, yaml.MappingNode):
                raise self._error(node, where, "has a << that is neither a part nor a list of parts")
            inner = _Reader(self.file)
            inner._open, inner._num_values = self._open, self._num_values
            merged = {**inner.read(part, where), **merged}
            self._num_values = inner._num_values
            for path, place in inner.origins.items():
                self.origins.setdefault(path, place)
        return merged

    def _scalar(self, node: yaml.ScalarNode, where: Where) -> Any:
        kind, text = node.tag.removeprefix(_TAG), node.value
        if kind in ("str", "merge"):  # `<<` as a value is just text
            self._check_text(text, node, where)
            return text
        if kind not in _SCALARS or not _SCALARS[kind].fullmatch(text):  # `!!int x` and every foreign tag
            raise self._refused(node, where)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        number = _number(text, kind)
        if number is None:
            raise self._error(node, where, f"is {text[:40]}", remedy="give a finite number, an integer within 64 bits")
        return number

    def _check_text(self, text: str, node: yaml.Node, where: Where) -> None:
        if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise self._error(node, where, "contains a NUL or half a character (a lone surrogate)")

    def _refused(self, node: yaml.Node, where: Where) -> RecipeError:
        tag = f"!!{node.tag.removeprefix(_TAG)}" if node.tag.startswith(_TAG) else node.tag
        remedy = "only these are read: text, numbers, true, false, null, lists and parts"
        return self._error(node, where, f"is tagged {tag}, which is refused", remedy=remedy)

    def _error(self, node: yaml.Node, where: Where, said: str, *, remedy: str = "") -> RecipeError:
        name = ".".join(map(str, where)) or ("the file" if self.file else "the value")
        return RecipeError(f"{self._place(node)}: {name} {said}" if self.file else f"{name} {said}", remedy=remedy)

    def _place(self, node: yaml.Node) -> str:
        return f"{self.file}, line {node.start_mark.line + 1}"


def _number(text: str, kind: str) -> int | float | None:
    """The number; None if it is not finite, or an integer that needs more than 64 bits: our JSON refuses those too."""
    if kind == "int":
        integer = int(text.replace("_", "")) if len(text) <= 30 else 2**63
        return integer if -(2**63) <= integer < 2**63 else None
    if text.lower().lstrip("+-") in (".inf", ".nan"):
        return None
    number = float(text.replace("_", ""))
    return number if math.isfinite(number) else None


def shown_value(value: Any) -> str:
    """A value as an error shows it: as YAML has it, short, and without what a URL in it may give away."""
    text = redacted("null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value))
    return text if len(text) <= 80 else f"{text[:77]}…"


M = TypeVar("M", bound=BaseModel)


def validated(tree: Tree, path: Path, model: type[M], *, strict: bool = True) -> M:
    """The file's tree as `model`. Raises UsageError with every mistake on a separate line.

    strict: refuses "12" or true for 12, but accepts a list for a tuple (validated as JSON).
    """
    try:
        return model.model_validate_json(json.dumps(tree.values), strict=strict)
    except ValidationError as error:
        lines = [_explain(each, tree, path, model) for each in mistakes_in(error)]
        raise UsageError(list(dict.fromkeys(lines))) from None


def mistakes_in(error: ValidationError) -> list[Any]:
    """What pydantic found wrong, of thousands the first: explaining each of them takes milliseconds."""
    return error.errors(include_url=False)[:MAX_MISTAKES]


def _explain(error: Any, tree: Tree, path: Path, model: type[BaseModel]) -> str:
    where = tuple(k for k in error["loc"] if k != "[key]")
    named, given = ".".join(map(str, where)) or "the file", shown_value(error["input"])
    origin = tree.origin_of(where, default=str(path))
    if error["type"] == "extra_forbidden":
        return f"{origin}: there is no field {named}: {nearest(str(where[-1]), _fields_at(where[:-1], model))}"
    if error["type"] == UNKNOWN_OPTION:
        return f"{origin}: there is no field {named}: {error['ctx']['hint']}"
    if error["type"] == "missing":
        return f"{origin}: {named} is missing and has no default"
    if error["type"] == "value_error":  # one of ours; a rule over the file begins with the field
        said = str(error["ctx"]["error"])
        origin = tree.origins.get(tuple(said.split(" ")[0].split(".")), origin) if not where else origin
        return f"{origin}: {named + ': ' if where else ''}{said}"
    if error["type"] == "string_pattern_mismatch" and "A-Za-z0-9" in error["ctx"]["pattern"]:
        return f"{origin}: {named}: a name is made of letters, digits, _ and -, at most 64"
    if error["type"] == "model_type":
        return f"{origin}: {named} is {given}, but it has fields: {', '.join(_fields_at(where, model))}"
    return f"{origin}: {named} is {given}: {error['msg'][0].lower()}{error['msg'][1:]}"


def _fields_at(where: tuple[Any, ...], model: type[BaseModel]) -> list[str]:
    """The fields of the part at `where`: ("sets", "train-lt", "balanced") -> like, per_class, total."""
    part: type[BaseModel] | None = model
    keys = list(where)
    while keys and part:
        annotation = part.model_fields[keys.pop(0)].annotation
        part = part_in(annotation)
        if keys and _is_mapping(annotation):
            keys.pop(0)  # a name that the file gives
    return list(part.model_fields) if part else []


def part_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation holds: X | None, dict[str, X], tuple[X, ...]."""
    options = typing.get_args(annotation) or (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _is_mapping(annotation: Any) -> bool:
    if typing.get_origin(annotation) in (typing.Union, UnionType):
        return any(_is_mapping(each) for each in typing.get_args(annotation))
    return typing.get_origin(annotation) is dict
