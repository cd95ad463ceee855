"""Recipes on disk: YAML, `extends:`, `--set a.b=c`, and errors that name file, line and nearest valid name.

    extends: ../base/vit.yaml       # or a list; what stands here wins, part by part; `null` takes a part away
    data: {train: shards/x/train}   # a relative path is looked for here, then beside and above the recipe file

Every value remembers where it was written (`Origin`), so that a mistake in a base recipe is reported there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from livt_scale.errors import RecipeError, UsageError, nearest
from livt_scale.recipe import STAGES, Recipe

Where = tuple[str | int, ...]  # a path into the tree: ("stages", "pretrain", "epochs")


@dataclass
class Tree:
    """Plain values, and for each path the place where it was written ("file.yaml, line 3" or "--set a.b")."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Where, str] = field(default_factory=dict)


def load_recipe(path: str | Path, *, sets: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe in `path` with `sets` ("a.b=c") laid over it, checked. Raises RecipeError."""
    path = Path(path)
    tree = _read(path, seen=())
    for text in sets:
        _apply_set(tree, text)
    recipe = _validate(tree, path)
    return _resolve_paths(recipe, path)


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML. The caller sees to the temporary name."""
    path.write_text(to_yaml(recipe))


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(path: Path, *, seen: tuple[Path, ...]) -> Tree:
    real = path.resolve()
    if real in seen:
        raise RecipeError(f"{path}: `extends` goes round in a circle: {' -> '.join(p.name for p in (*seen, real))}")
    try:
        text = path.read_text()
    except FileNotFoundError:
        options = [str(p) for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        hint = nearest(str(path), options) if options else "give the path of a YAML file, as recipes/…/….yaml"
        raise RecipeError(f"there is no recipe {path}", remedy=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping of names to values")
    own = Tree()
    own.values = _walk(node, (), path, own.origins)
    bases = own.values.pop("extends", [])
    tree = Tree()
    for base in [bases] if isinstance(bases, str) else bases:
        _merge(tree, _read(path.parent / base, seen=(*seen, real)))
    _merge(tree, own)
    return tree


def _walk(node: yaml.Node, where: Where, path: Path, origins: dict[Where, str]) -> Any:
    origins[where] = f"{path}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            line = f"{path}, line {key_node.start_mark.line + 1}"
            if key in values:
                raise RecipeError(f"{line}: {'.'.join(map(str, (*where, key)))} is given twice", remedy="keep one")
            values[key] = _walk(value_node, (*where, key), path, origins)
            origins[(*where, key)] = line
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_walk(child, (*where, k), path, origins) for k, child in enumerate(node.value)]
    try:
        return yaml.safe_load(yaml.serialize(node, Dumper=yaml.SafeDumper))
    except yaml.YAMLError as error:
        raise RecipeError(f"{origins[where]}: a value that is not plain YAML: {node.tag}") from error


def _merge(base: Tree, over: Tree) -> None:
    def laid(under: Any, top: Any) -> Any:
        if isinstance(under, dict) and isinstance(top, dict):
            return {**under, **{k: laid(under.get(k), v) for k, v in top.items()}}
        return top

    base.values = laid(base.values, over.values)
    base.origins.update(over.origins)


def _apply_set(tree: Tree, text: str) -> None:
    name, equals, raw = text.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {text}: not of the form a.b=value")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {text}: the value is not YAML") from error
    keys = name.split(".")
    if len(keys) > 1 and keys[0] == "stages" and keys[1] == "*":
        for stage in STAGES:
            if tree.values.get("stages", {}).get(stage) is not None:
                _put(tree, ["stages", stage, *keys[2:]], value, origin=f"--set {name}")
    else:
        _put(tree, keys, value, origin=f"--set {name}")


def _put(tree: Tree, keys: list[str], value: Any, *, origin: str) -> None:
    node = tree.values
    for depth, key in enumerate(keys[:-1]):
        child = node.setdefault(key, {})
        if child is None:  # `finetune: null`, and now a part of it is wanted
            child = node[key] = {}
        if not isinstance(child, dict):
            raise RecipeError(f"{origin}: {'.'.join(keys[: depth + 1])} is a value, it has no parts")
        node = child
    node[keys[-1]] = value
    tree.origins[tuple(keys)] = origin


def _validate(tree: Tree, path: Path) -> Recipe:
    try:
        return Recipe.model_validate(tree.values)
    except ValidationError as error:
        lines = [_explain(e, tree, path) for e in error.errors(include_url=False)]
        raise RecipeError("\n".join(dict.fromkeys(lines))) from None


def _explain(error: Any, tree: Tree, path: Path) -> str:
    where: Where = tuple(error["loc"])
    name = ".".join(map(str, where)) or "recipe"
    origin = next((tree.origins[where[:n]] for n in range(len(where), 0, -1) if where[:n] in tree.origins), str(path))
    if error["type"] == "extra_forbidden":
        return f"{origin}: there is no field {name}: {nearest(str(where[-1]), _fields_at(where[:-1]))}"
    if error["type"] == "missing":
        return f"{origin}: {name} is missing and has no default"
    if error["type"] == "value_error":
        said = str(error["ctx"]["error"])
        return f"{origin}: {name}: {said}"
    if error["type"] == "literal_error":
        names = [n.strip().strip("'") for n in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{origin}: {name} is {error['input']!r}: {nearest(str(error['input']), names)}"
    said = error["msg"][0].lower() + error["msg"][1:]
    return f"{origin}: {name} is {error['input']!r}: {said}"


def _fields_at(where: Where) -> list[str]:
    """The fields that a part of the recipe has: `stages.pretrain` -> epochs, global_batch, …"""
    part: type[BaseModel] = Recipe
    for key in where:
        annotation = part.model_fields[str(key)].annotation
        options = getattr(annotation, "__args__", (annotation,))
        part = next(o for o in options if isinstance(o, type) and issubclass(o, BaseModel))
    return list(part.model_fields)


def _resolve_paths(recipe: Recipe, path: Path) -> Recipe:
    data = {name: _find(getattr(recipe.data, name), path) for name in ("train", "val")}
    run_dir = recipe.run_dir or str(Path("runs") / recipe.name)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=data), "run_dir": run_dir})


def _find(location: str | None, recipe_path: Path) -> str | None:
    """A relative folder as it is; or, if nothing is there, beside the recipe file or in a folder above it."""
    if location is None or "://" in location or Path(location).is_absolute():
        return location
    for folder in (Path(), *recipe_path.resolve().parents):
        if (folder / location).exists():
            return str((folder / location).resolve())
    return str(Path(location).resolve())
