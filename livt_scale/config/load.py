"""Recipes on disk: YAML, `extends:`, `--set a.b=c`, and errors that name file, line and nearest valid name.

    extends: ../base/livt.yaml      # or a list; a value of this file wins, part by part; `null` removes a stage
    extends: livt:base/livt         # a recipe that ships, from anywhere
    data: {train: shards/x/train}   # a relative path is looked for here, then beside and above the recipe file
    run_dir: runs/a                 # relative to the working directory (`livt_scale.config.run_place`)

Every value remembers where it was written (`Tree.origins`), so that a mistake in a base recipe is reported there.
`livt_scale.config.yaml` reads the YAML itself: only plain values, and nothing is ever executed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from livt_scale.config import renamed
from livt_scale.config.extends import forget_below, read_tree
from livt_scale.config.fields import dotted, fields_at, hint, types_at
from livt_scale.config.recipe import STAGES, Recipe
from livt_scale.config.run_place import SAVED, absolute_run_dir, other_run
from livt_scale.config.stages import DOWNLOAD
from livt_scale.config.timm_models import with_pixel_facts
from livt_scale.config.yaml import MAX_DEPTH, Tree, Where, dump, mistakes_in, parse_value, shown_value
from livt_scale.extensions import load_extensions
from livt_scale.util.choices import SET_EXTENSIONS, UNKNOWN_NAME, UNKNOWN_OPTION, mistake_in_saved
from livt_scale.util.errors import CheckpointMismatch, RecipeError, UsageError, nearest
from livt_scale.util.outside import real_path
from livt_scale.util.resources import is_name, named
from livt_scale.util.urls import is_url


def load_recipe(path: str | Path, *, sets: Sequence[str] | Mapping[str, Any] = (), to_start: bool = False) -> Recipe:
    """The recipe in `path` (or the shipped one that `livt:NAME` means), overridden by `sets` and checked.

    sets: texts "a.b=c" as of --set, or values by dotted name. to_start: a run of it is about to be started. Raises
    RecipeError; UsageError for an unknown name, one of the `sets` that cannot be applied, and with `to_start` where the
    run is known in another working directory.
    """
    by_name, path = is_name(path), named(path, kind="recipes")
    tree = read_tree(path)
    if isinstance(sets, Mapping):
        for name, value in sets.items():
            _apply_value(tree, name, value)
    else:
        for text in sets:
            _apply_set(tree, text)
    recipe = _validate(tree, path)
    if to_start and not by_name:  # livt:NAME is not a file of the user's: use the working directory
        _refuse_second_run(recipe, path)
    return _resolve_paths(recipe, path)


def load_saved(path: Path) -> Recipe:
    """The recipe that a run saved in `path`, perhaps by an earlier version: old names are translated.

    Raises RecipeError.
    """
    tree = read_tree(path)
    tree.values = renamed.translate(tree.values)
    return _resolve_paths(_validate(tree, path, saved=True), path)


def from_saved(values: Any, *, where: Path) -> Recipe:
    """The recipe in the facts of the checkpoint `where`, perhaps of an earlier version. Raises CheckpointMismatch."""
    load_extensions()
    problem, remedy = "it has none", "was it written by another livt_scale?"
    if isinstance(values, dict):
        try:
            return Recipe.model_validate(renamed.translate(values))
        except ValidationError as error:
            problem, remedy = mistake_in_saved(error)
    raise CheckpointMismatch(f"{where}: its recipe cannot be read: {problem}", remedy=remedy)


def to_yaml(recipe: Recipe) -> str:
    """The complete recipe, including defaults; `load_recipe` reads it back to the same values."""
    return dump(recipe.model_dump(mode="json"))


# --- `--set` ---


def _apply_set(tree: Tree, text: str) -> None:
    name, equals, raw = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(
            f"--set {text!r} is not of the form a.b=value", remedy="for example --set stages.finetune.epochs=30"
        )
    if not raw.strip():
        raise UsageError(f"--set {name}= has no value", remedy="give one, or null for none")
    if keys == ["extends"]:
        raise UsageError("--set extends=…: only a file can extend another", remedy="write a recipe that extends both")
    for where in _expand(keys, tree):
        _put(tree, where, _set_value(where, raw, text), origin=f"--set {name}")


def _apply_value(tree: Tree, name: str, value: Any) -> None:
    """Put a Python value, of the kinds that a recipe can hold, at the dotted `name`."""
    origin = f"overrides[{name!r}]"
    try:
        plain = json.loads(json.dumps(value, default=os.fspath))
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"{origin} is {value!r}, which a recipe cannot hold", remedy="give numbers, text, lists and mappings"
        ) from error
    keys = name.split(".")
    if not all(keys) or keys == ["extends"]:
        raise UsageError(f"{origin}: no field has that name", remedy="for example 'stages.finetune.epochs'")
    for where in _expand(keys, tree):
        _put(tree, where, plain, origin=origin)


def _expand(keys: list[str], tree: Tree) -> list[list[str]]:
    """`stages.*.epochs` stands for every stage that the recipe runs; anything else for itself."""
    if keys[:2] != ["stages", "*"]:
        return [keys]
    stages = tree.values.get("stages")
    present = [s for s in STAGES if isinstance(stages, dict) and stages.get(s) is not None]
    if not present:
        raise UsageError(f"{'.'.join(keys)}: the recipe has no stage", remedy="name one: stages.pretrain.…")
    return [["stages", stage, *keys[2:]] for stage in present]


def _set_value(where: list[str], raw: str, text: str) -> Any:
    """`raw` as YAML; unparsed where the recipe expects text: a path may hold `: `, `#` or look like a number."""
    types = types_at(where)
    if str in types and not {bool, int} & {*types} and raw not in ("null", "~"):
        return raw
    try:
        return parse_value(raw)
    except RecipeError as error:
        remedy = error.remedy or "give the value as YAML would have it"
        raise UsageError(f"--set {text}: {error.message}", remedy=remedy) from error


def _put(tree: Tree, keys: list[str], value: Any, *, origin: str) -> None:
    if len(keys) > MAX_DEPTH:
        raise UsageError(f"{origin[:50]}…: a name of {len(keys):,} parts", remedy="no field has more than 4")
    node = tree.values
    for depth, key in enumerate(keys[:-1], start=1):
        child = node.get(key)
        if child is None:  # not there, or taken away by `null`; and now a part of it is wanted
            child = node[key] = {}
            tree.origins[tuple(keys[:depth])] = origin
        if not isinstance(child, dict):
            raise UsageError(f"{origin}: {'.'.join(keys[:depth])} is {shown_value(child)}, a value: it has no parts")
        node = child
    node[keys[-1]] = value
    forget_below(tree, {tuple(keys)})
    tree.origins[tuple(keys)] = origin


# --- checking, and reporting what is wrong ---


def _validate(tree: Tree, path: Path, *, saved: bool = False) -> Recipe:
    load_extensions()
    try:
        # as JSON: strict (no "12" or true for 12), but a list is accepted for a tuple
        values = _with_second_token(with_pixel_facts(tree.values))
        return Recipe.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        mistakes = mistakes_in(error)
        lines = [_explain(e, tree, path) for e in mistakes]
        if saved and any(e["type"] == UNKNOWN_NAME for e in mistakes):
            lines.append(f"{path}: a name that is not known may be of an extension: {SET_EXTENSIONS}")
        raise RecipeError(list(dict.fromkeys(lines))) from None


def _with_second_token(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe's `values` with the token that `stages.finetune.distill` trains, if the model does not say."""
    match values:
        case {"stages": {"finetune": {"distill": dict()}}, "model": dict(model)}:
            return {**values, "model": {"distillation_token": True, **model}}
        case {"stages": {"finetune": {"distill": dict()}}} if "model" not in values:
            return {**values, "model": {"distillation_token": True}}
    return values


def _explain(error: Any, tree: Tree, path: Path) -> str:
    """One line for one mistake: where it is written, the field, what is wrong, what would be valid."""
    where: Where = tuple(error["loc"])
    name, given = dotted(where), shown_value(error["input"])
    if error["type"] == "value_error":  # a rule over several fields: its message starts with the field
        said = str(error["ctx"]["error"])
        field = (*where, *said.split(" ", 1)[0].split("."))
        prefix = f"{name}." if where else ""
        return f"{tree.origin_of(field if field in tree.origins else where, default=str(path))}: {prefix}{said}"
    origin = tree.origin_of(where, default=str(path))
    if error["type"] == "extra_forbidden":
        return f"{origin}: there is no field {name}: {renamed.hint(name) or hint(where)}"
    if error["type"] == UNKNOWN_OPTION:
        return f"{origin}: there is no field {name}: {error['ctx']['hint']}"
    if error["type"] == UNKNOWN_NAME:
        return f"{origin}: {name} is {given}: {error['ctx']['hint']}"
    if error["type"] == "missing":
        return f"{origin}: {name} is missing and has no default"
    if error["type"] == "literal_error":
        names = [n.strip().strip("'") for n in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"{origin}: {name} is {given}: {nearest(str(error['input']), names)}"
    if error["type"] == "json_invalid":  # the one text that a shell can hold and JSON cannot
        raise UsageError(f"{path}: a value or a name is not UTF-8 text")
    if error["type"] in ("model_type", "model_attributes_type"):
        if not where:
            return f"{origin}: a recipe is a mapping of names to values, not {given}"
        fields = ", ".join(fields_at(where))
        return f"{origin}: {name} is {given}, but it is a part that has fields: {fields}"
    said = error["msg"].removeprefix("Input ")
    for theirs, ours in (
        ("a valid boolean", "true or false"),
        ("a valid array", "a list"),
        ("a valid tuple", "a list"),
    ):
        said = said.replace(theirs, ours)
    return f"{origin}: {name} is {given}: {said[0].lower()}{said[1:]}"


# --- paths ---


def _resolve_paths(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with absolute paths: what is read is looked for, what is written is in the working directory."""
    data = {name: _find(getattr(recipe.data, name), path) for name in ("train", "val", "group_counts")}
    found = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "run_dir": str(absolute_run_dir(recipe.run_dir, name=recipe.name)),
        }
    )
    part = recipe.stages.finetune
    if part is None:
        return found
    files = {name: _find(getattr(part, name), path) for name in ("weights", "head_file")}
    if part.weights == DOWNLOAD:
        files["weights"] = DOWNLOAD
    distill = part.distill
    if distill is not None:
        distill = distill.model_copy(update={"teacher": _find(distill.teacher, path)})
    stage = part.model_copy(update={**files, "distill": distill})
    return found.model_copy(update={"stages": recipe.stages.model_copy(update={"finetune": stage})})


def _refuse_second_run(recipe: Recipe, path: Path) -> None:
    """Raise UsageError if a relative run_dir is new here but is a run in the recipe's folder or above it."""
    other = other_run(recipe.run_dir, name=recipe.name, recipe=path)
    if other is None:
        return
    here = absolute_run_dir(recipe.run_dir, name=recipe.name)
    raise UsageError(
        f"run_dir is relative to the working directory: {here} would be a second run beside {other}",
        remedy=f"resume that one with {other / SAVED} as the recipe; for another run, set run_dir to {here}",
    )


def _find(location: str | None, recipe_path: Path) -> str | None:
    """A relative path from here on; or, if nothing is there, from the recipe's folder or one above it on."""
    if location is None or is_url(location) or is_name(location) or Path(location).is_absolute():
        return location
    for folder in (Path(), *real_path(recipe_path).parents):
        if (folder / location).exists():
            return str(real_path(folder / location))
    return str(real_path(location))
