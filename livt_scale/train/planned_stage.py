"""A stage of a recipe as `livt plan` plans it: its data set, and the spread that the recipe or `auto` gives."""

from __future__ import annotations

from livt_scale.config.capabilities import StrategyName
from livt_scale.config.recipe import Recipe
from livt_scale.data.shard_set import ShardSet
from livt_scale.plan.assumptions import Assumptions
from livt_scale.plan.published import published
from livt_scale.plan.stage_plan import StagePlan, best, candidates, plan_stage, spread_of, strategies_for
from livt_scale.plan.task import DataSet, PlanTask
from livt_scale.train.batch_plan import BatchPlan, plan_batches
from livt_scale.util.errors import LivtError, UsageError


def data_set(recipe: Recipe, assumed: Assumptions, *, images: int | None = None, classes: int | None = None) -> DataSet:
    """The sizes given, else those of the shards, else the published size of the set that the folder is named after."""
    size = assumed.image_kib * 1024
    if images is not None:
        if classes is None and recipe.stages.finetune is not None:
            raise UsageError("--images goes with --classes: the classifier's head has one row a class")
        return DataSet(images, classes or 1, size, "--images and --classes")
    try:
        shards = ShardSet.open(recipe.data.train, data=recipe.data)
    except (LivtError, OSError) as error:
        known = published(recipe.data.train)
        if known is None:
            raise UsageError(
                f"how many images data.train has is not known: {error}", remedy="give --images and --classes"
            ) from error
        name, number, number_of_classes = known
        return DataSet(number, classes or number_of_classes, size, f"{name}'s published size: its shards are not here")
    manifest = shards.manifest
    mean = sum(s.bytes for s in manifest.shards) / max(manifest.num_samples, 1)
    return DataSet(shards.num_samples, len(manifest.class_names), mean, "the shards' manifest")


def as_wanted(task: PlanTask, wanted: str) -> tuple[BatchPlan, StrategyName | None]:
    """How the stage's batches are cut, and the strategy; None: any. UsageError for a stage that cannot be so."""
    part = task.part
    if task.steps < 1:
        raise UsageError(
            f"{task.stage}: the training set has {task.data.images} images, fewer than global_batch = "
            f"{part.global_batch}",
            remedy=f"set stages.{task.stage}.global_batch to at most {task.data.images}",
        )
    batches = plan_batches(part.global_batch, part.micro_batch, world_size=task.gpus, pairs=part.mixes)
    possible = strategies_for(part)
    strategy = next((name for name in possible if name == wanted), None)
    if strategy is None and wanted != "auto":
        raise UsageError(
            f"{task.stage}: {wanted} takes neither LARS nor a frozen backbone", remedy=f"give {' or '.join(possible)}"
        )
    return batches, strategy


def planned_stage(task: PlanTask, wanted: str) -> tuple[StagePlan, list[StagePlan]]:
    """The stage as requested, and all candidates that were tried."""
    batches, strategy = as_wanted(task, wanted)
    tried = candidates(task)
    if strategy is None:
        return best(tried) or min(tried, key=lambda p: p.memory.peak), tried
    spread = spread_of(
        task, strategy, micro_batch=batches.micro_batch, accumulation=batches.accumulation,
        recompute=task.recipe.parallel.activation_checkpointing,
    )  # fmt: skip
    return plan_stage(task, spread), tried
