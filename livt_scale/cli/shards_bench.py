"""`livt shards bench`: this machine's decode rate, and whether it feeds a number of GPUs.

livt shards bench shards/fashion-mnist-lt/train-lt --image-px 28 --channels 1
livt shards bench recipes/imagenet_lt/vit_b16.yaml --gpus 8 --images-per-s-per-gpu 1200
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import AsJson, Sets
from livt_scale.cli.output import echo

if TYPE_CHECKING:
    from livt_scale.config.recipe import Recipe


def bench(
    what: Annotated[Path, typer.Argument(metavar="FOLDER|RECIPE", help="Folder of shards, or a recipe (every stage).")],
    gpus: Annotated[int | None, typer.Option(min=1, help="GPUs that this machine would feed.")] = None,
    images_per_s_per_gpu: Annotated[
        float | None, typer.Option(min=0.001, help="Images/s of one GPU, from metrics.jsonl.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, max=300, help="Duration of each measurement.")] = 3.0,
    image_px: Annotated[int | None, typer.Option(min=2, help="For a folder: crop size.", show_default="224")] = None,
    channels: Annotated[int | None, typer.Option(min=1, help="For a folder: 1 or 3.", show_default="3")] = None,
    sets: Sets = None,
    as_json: AsJson = False,
) -> None:
    """Measure images/s decoded per core; compare with GPUs."""
    from livt_scale.data.shard_set import ShardSet
    from livt_scale.doctor.decode import bench as measure
    from livt_scale.doctor.decode import needed
    from livt_scale.util.errors import UsageError

    if (gpus is None) != (images_per_s_per_gpu is None):
        raise UsageError(
            "--gpus and --images-per-s-per-gpu belong together", remedy="give both, or neither for the rates alone"
        )
    if what.is_dir() and sets:
        raise UsageError("--set overrides a recipe value, and this is a folder", remedy="give a recipe")
    if not what.is_dir() and (image_px or channels):
        raise UsageError("--image-px and --channels need a folder", remedy="use --set model.image_px=… for a recipe")
    recipe = _for_folder(what, image_px or 224, channels or 3) if what.is_dir() else _load(what, sets or [])
    shards = ShardSet.open(recipe.data.train, data=recipe.data)
    results = []
    for stage in recipe.stage_names:
        facts = measure(shards, recipe, stage, seconds=seconds)
        if gpus is not None and images_per_s_per_gpu is not None:
            facts = needed(facts, gpus=gpus, images_per_s_per_gpu=images_per_s_per_gpu)
        results.append(facts)
        if not as_json:
            for line in told(facts):
                echo(line)
    if as_json:
        echo(json.dumps({"stages": results}, indent=1))


def told(facts: dict[str, Any]) -> list[str]:
    rates, cores = facts["images_per_s"], facts["cores"]
    lines = [
        f"{facts['set']}, {facts['stage']} at {facts['image_px']} px: one core decodes {rates['core']:,.0f} images/s, "
        f"{cores} {'core' if cores == 1 else 'cores'} {rates['machine']:,.0f}"
    ]
    if "needed" in facts:
        need = facts["needed"]
        verdict = "suffices" if need["suffices"] else f"does not suffice: {need['share']:.0%} of it"
        lines.append(
            f"{need['gpus']} GPUs need {need['images_per_s']:,.0f} images/s, {need['cores']:,.1f} cores of this kind: "
            f"this machine {verdict}"
        )
        if not need["suffices"]:
            lines.append("what helps: shards built with --resize-shorter 256, more cores a GPU, a larger model")
    return lines


def _load(path: Path, sets: list[str]) -> Recipe:
    from livt_scale.config.load import load_recipe

    return load_recipe(path, sets=sets)


def _for_folder(folder: Path, image_px: int, channels: int) -> Recipe:
    """MAE's transform, the defaults of a recipe. The model's size plays no part."""
    from livt_scale.config.recipe import Recipe
    from livt_scale.util.errors import UsageError

    if channels not in (1, 3):
        raise UsageError(f"--channels is {channels}: images are read as grey (1) or colour (3)", remedy="take 1 or 3")
    return Recipe.model_validate(
        {
            "name": "bench",
            "data": {"train": str(folder), "mean": [0.5] * channels, "std": [0.25] * channels},
            "model": {"size": "vit_b", "image_px": image_px, "patch_px": 1, "channels": channels},
            "stages": {
                "pretrain": {"epochs": 1, "global_batch": 2, "micro_batch": 2, "warmup_epochs": 0, "norm_pix": False}
            },
        }
    )
