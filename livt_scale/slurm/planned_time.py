"""How long a stage takes by the plan on the GPUs that its jobs ask for, for `livt submit` before it was measured."""

from __future__ import annotations

from dataclasses import dataclass

from livt_scale.config.recipe import Recipe, Stage
from livt_scale.plan.assumptions import Assumptions, accelerator
from livt_scale.plan.devices import DEVICES
from livt_scale.plan.task import PlanTask
from livt_scale.slurm.sites import Resources
from livt_scale.train.planned_stage import data_set, planned_stage
from livt_scale.util.errors import LivtError


@dataclass(frozen=True)
class PlannedTime:
    """step_s: at the high end of the plan. about: for people, "likely 2.1 h, at most 5.3 h on 16 x h100"."""

    steps: int
    step_s: float
    about: str


def planned_time(recipe: Recipe, stage: Stage, asked: Resources) -> PlannedTime | None:
    """None where the plan does not apply: no GPU that it knows, no ViT, or a stage that it cannot plan.

    Cores are those that the jobs ask for.
    """
    gpus = asked.nodes * asked.gpus_per_node
    if asked.device not in DEVICES or gpus != asked.world_size or not recipe.model.is_vit:
        return None
    cores = Assumptions() if asked.cpus_per_task is None else Assumptions(cores_per_gpu=asked.cpus_per_task)
    try:
        data = data_set(recipe, cores)
        task = PlanTask(recipe.at(stage), stage, data, gpus, asked.gpus_per_node, accelerator(asked.device), cores)
        planned, _ = planned_stage(task, recipe.parallel.strategy)
    except LivtError:  # no shards here, no such precision, batches that do not divide: the checks of a run say more
        return None
    about = f"likely {planned.hours:.2g} h, at most {planned.range[1]:.2g} h on {gpus} x {asked.device}"
    return PlannedTime(task.steps, planned.step_s_high, about)
