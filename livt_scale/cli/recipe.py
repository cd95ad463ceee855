"""`livt recipe show | check | schema`: look at a recipe before anything is allocated.

`show` prints what a run would use, including defaults, with derived numbers and their arithmetic as comments (the
output is itself a recipe). `check` reports for each file whether it describes a valid run; data missing on this machine
are a note, and an error only with --data, since recipes are often checked elsewhere. `schema` is for editors.

    livt recipe check recipes/imagenet_lt/*.yaml
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import AsJson, Force, RecipeFile, Sets
from livt_scale.cli.output import echo
from livt_scale.util.errors import LivtError

if TYPE_CHECKING:  # pydantic takes a third of a second: `livt --help` does without
    from livt_scale.config.recipe import Model, Recipe

app = typer.Typer(no_args_is_help=True, help="List, show, check and describe recipes.")


@app.command(name="list")
def list_(
    page: Annotated[Path | None, typer.Option("--page", help="Also write the table as this Markdown page.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """List the shipped recipes and what each reproduces."""
    from livt_scale.config.catalog import MARK, rows
    from livt_scale.config.catalog import page as made
    from livt_scale.util.atomic import write_atomic
    from livt_scale.util.outputs import check_output

    found = rows()
    if page is not None:
        check_output(page, marks=[MARK], command="recipe list", force=force)
        write_atomic(page, made(found).encode())
    if as_json:
        keys = ("name", "path", "reproduces", "hardware", "expect", "command")
        echo(json.dumps([{key: getattr(row, key) for key in keys} for row in found]))
        return
    for row in found:
        echo(f"{row.name}\n    {summary(row.recipe)}\n    {row.reproduces}")


@app.command()
def show(recipe: RecipeFile, *, sets: Sets = None, as_json: AsJson = False) -> None:
    """Print a resolved recipe, with bases, --set and defaults."""
    from livt_scale.config.load import load_recipe, to_yaml

    loaded = load_recipe(recipe, sets=sets or ())
    if as_json:
        echo(json.dumps(loaded.model_dump(mode="json"), indent=2))
    else:
        echo("".join(f"# {line}\n" for line in derived(loaded)) + to_yaml(loaded), nl=False)


@app.command()
def check(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="Recipe files.")],
    *,
    sets: Sets = None,
    data: Annotated[bool, typer.Option("--data", help="Also check data, weights, disk and lock.")] = False,
    as_json: AsJson = False,
) -> None:
    """Validate recipes.

    Exit codes: 0; 2 if a recipe is invalid.
    """
    results = [check_one(path, sets=sets or [], data=data) for path in recipes]
    if as_json:
        echo(json.dumps(results, indent=2))
    else:
        for result in results:
            _print_result(result)
    raise typer.Exit(max((int(result["exit_code"]) for result in results), default=0))


@app.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    echo(json.dumps(file_schema(), indent=2, ensure_ascii=False))


def check_one(path: Path, *, sets: list[str], data: bool) -> dict[str, Any]:
    """The result of `check` for one file: recipe, exit_code, errors, notes, and a summary if it is valid."""
    from livt_scale.config.load import load_recipe

    result: dict[str, Any] = {"recipe": str(path), "exit_code": 0, "summary": "", "errors": [], "notes": []}
    try:
        recipe = load_recipe(path, sets=sets)
        result["summary"] = summary(recipe)
        result["notes"] = [] if data else _missing_data(recipe)
        if data:
            from livt_scale.train.preflight import check_run, refuse

            refuse(check_run(recipe, stages=recipe.stage_names))
    except LivtError as error:
        result.update(exit_code=error.exit_code, errors=str(error).splitlines())
    return result


def summary(recipe: Recipe) -> str:
    """The run on one line: "vit_b 224 px; pretrain 800 epochs of 4096; finetune 100 epochs of 1024, bal_bce"."""
    parts = [f"{recipe.model.name} {recipe.model.image_px} px"]
    for name in recipe.stage_names:
        stage = recipe.stage(name)
        px = recipe.at(name).model.image_px
        at = f" at {px} px" if px != recipe.model.image_px else ""
        parts.append(f"{name} {stage.epochs} epochs{at}, batch {stage.global_batch}")
    if recipe.stages.finetune:
        parts[-1] += f", {recipe.stages.finetune.loss.name}"
        tuning = recipe.stages.finetune.train
        parts[-1] += f", {tuning.phrase}" if tuning.freezes else ""
    return "; ".join(parts)


def derived(recipe: Recipe) -> list[str]:
    """What follows from the recipe's numbers, each with its arithmetic."""
    lines = _model_lines(recipe.model)
    for name in recipe.stage_names:
        stage, model = recipe.stage(name), recipe.at(name).model
        if model.image_px != recipe.model.image_px:
            lines.append(f"{name} patches: {model.num_patches} = ({model.image_px} / {model.dims.patch_px})^2")
        lines.append(f"{name} peak lr: {stage.peak_lr:g} = {stage.base_lr:g} * {stage.global_batch} / 256")
    return lines


def _model_lines(model: Model) -> list[str]:
    if model.timm is not None:
        facts = model.timm_facts
        return [f"model: {model.timm} of timm, {len(facts.blocks)} blocks, head {facts.head}"]
    if model.is_resnet:
        stem = "3x3, stride 1" if model.has_small_stem else "7x7, stride 2, max pooling"
        return [f"model: {model.size}, blocks {' + '.join(map(str, model.stage_blocks))}, stem {stem}"]
    width, depth, heads, patch_px = model.dims
    return [
        f"model: width {width}, depth {depth}, heads {heads}, patch {patch_px} px",
        f"patches: {model.num_patches} = ({model.image_px} / {patch_px})^2",
    ]


def file_schema() -> dict[str, Any]:
    """JSON schema of a file. No field is required: a file may leave fields to its bases."""
    from livt_scale.config.recipe import Recipe

    tree: dict[str, Any] = Recipe.model_json_schema()
    for part in (tree, *tree.get("$defs", {}).values()):
        part.pop("required", None)
    path = {"type": "string", "minLength": 1}
    extends = {
        "description": "recipe files, relative to this one, over which this one is laid",
        "anyOf": [path, {"type": "array", "items": path}],
    }
    tree["properties"] = {"extends": extends, **tree["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree}


def _missing_data(recipe: Recipe) -> list[str]:
    """Notes on shards that are missing here; a URL cannot be checked from here."""
    folders = {"data.train": recipe.data.train, "data.val": recipe.data.val}
    return [
        f"{name}: no shards in {folder} (docs/data.md shows how to make them)"
        for name, folder in folders.items()
        if folder and "://" not in folder and not (Path(folder) / "manifest.json").is_file()
    ]


def _print_result(result: dict[str, Any]) -> None:
    if not result["errors"]:
        echo(f"ok       {result['recipe']}: {result['summary']}")
    for line in result["errors"]:
        where = "" if line.startswith(result["recipe"]) else f"{result['recipe']}: "  # most name the file themselves
        echo(f"problem  {where}{line}", err=True)
    for line in result["notes"]:
        echo(f"note     {line}")
