"""A study's runs as Slurm arrays: the same recipes in the same directories as the local runner's.

Points that share a pretraining start from that of the first of them. So the first ones are submitted with both stages;
the others are submitted by the same command given again, once their pretraining is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livt_scale.config.recipe import STAGES, Recipe
from livt_scale.slurm.array import PreparedArray, prepare_array
from livt_scale.study.definition import LoadedStudy, Point, last_run, stages_of
from livt_scale.study.local_runner import lay_pretraining
from livt_scale.train.run_dir import is_done


@dataclass
class Ready:
    """What can be submitted now. waits: names of the points whose pretraining is not done."""

    points: list[Point] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)


def ready(loaded: LoadedStudy, points: list[Point]) -> Ready:
    """Which of `points` can start."""
    found = Ready()
    for point in points:
        run = last_run(loaded, point)
        if is_done(run.at(loaded.folder), run.stage):
            found.done.append(point.name)
        elif point.pretraining in (None, point.name) or is_done(loaded.folder / str(point.pretraining), "pretrain"):
            found.points.append(point)
        else:
            found.waits.append(point.name)
    return found


def prepare(loaded: LoadedStudy, points: list[Point], *, max_parallel: int | None) -> PreparedArray:
    """Plan their arrays; writes nothing but the pretraining that a point starts from, into its own directory."""
    for point in points:
        place = loaded.folder / point.name
        if point.pretraining not in (None, point.name) and not (place / "pretrain").exists():
            place.mkdir(parents=True, exist_ok=True)
            lay_pretraining(loaded.folder / str(point.pretraining), place)
    return prepare_array([whole_recipe(loaded, point) for point in points], max_parallel=max_parallel)


def whole_recipe(loaded: LoadedStudy, point: Point) -> Recipe:
    """The recipe of all the study's stages, as `livt submit` takes it."""
    left_out: dict[str, Any] = {f"stages.{stage}": None for stage in STAGES if stage not in stages_of(loaded, point)}
    place: Path = loaded.folder / point.name
    return loaded.load({**point.sets, **left_out, "run_dir": place})
