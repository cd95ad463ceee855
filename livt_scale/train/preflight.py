"""Checks whether a run can start: everything known before its first step, before anything is written.

    for problem in check_run(recipe, world_sizes={"pretrain": 8, "finetune": 8}):
        print(problem)       # data.val: there is no folder shards/x/val. Give the folder that contains manifest.json
    refuse(problems)         # RecipeError, exit code 2, with all of them

Of the sets, the manifests are read and the names of the files compared; no index, no sample, no torch. So the check
takes seconds where the set has a billion samples, and a login node can do it. Only a teacher is opened, by torch.
`livt recipe check --data`, `train`, `submit`, `study submit` and `reproduce` make this check and no other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from livt_scale.config.recipe import Finetune, Recipe, Stage
from livt_scale.config.run_place import absolute_run_dir
from livt_scale.config.stages import ALLOW_DOWNLOAD, DOWNLOAD
from livt_scale.data.classes import TrainingClasses, check_same_classes, read_group_counts
from livt_scale.data.order.for_stage import check_order
from livt_scale.data.remote.shards import held_bytes
from livt_scale.data.shard_set import SetFacts
from livt_scale.plan.memory import FP32, GIB, Spread
from livt_scale.plan.parameters import stage_weights
from livt_scale.plan.stage_plan import checkpoint_bytes
from livt_scale.train.batch_plan import stage_batches
from livt_scale.train.resume_rules import TEACHER
from livt_scale.train.run_dir import is_done, is_run
from livt_scale.util.atomic import lock_works
from livt_scale.util.errors import LivtError, RecipeError
from livt_scale.util.resources import is_name
from livt_scale.util.urls import is_url
from livt_scale.weights.locate import find_file


@dataclass(frozen=True)
class Problem:
    """Why a run cannot start. field: of the recipe; where: file or folder; absent: that is not on this machine."""

    field: str
    what: str
    where: str
    remedy: str
    absent: bool = False

    def __str__(self) -> str:
        return f"{self.field}: {LivtError(self.what, remedy=self.remedy)}"


@dataclass
class KnownSets:
    """Sets that were read already: the runs of a study share them."""

    found: dict[str, SetFacts | LivtError] = field(default_factory=dict)

    def read(self, location: str, recipe: Recipe) -> SetFacts:
        if location not in self.found:
            try:
                self.found[location] = SetFacts.read(location, data=recipe.data)
            except LivtError as error:
                self.found[location] = error
        known = self.found[location]
        if isinstance(known, LivtError):
            raise known
        return known


def check_run(
    recipe: Recipe,
    *,
    stages: Collection[Stage] | None = None,
    world_sizes: Mapping[Stage, int] | None = None,
    known: KnownSets | None = None,
) -> list[Problem]:
    """Everything that prevents `stages` of `recipe` from starting, beyond the recipe's own checks. Writes nothing.

    stages: None: those that the run directory does not have done. world_sizes: ranks of a stage, where they are known.
    """
    run_dir = absolute_run_dir(recipe.run_dir, name=recipe.name)
    if stages is None:
        stages = [stage for stage in recipe.stage_names if not is_done(run_dir, stage)]
    if not stages:
        return []
    known = known or KnownSets()
    found: list[Problem] = []
    train = _read_set("data.train", recipe.data.train, recipe, known, found)
    val = _read_set("data.val", recipe.data.val, recipe, known, found)
    found += _cache_problems(recipe, train, val)
    found += _evaluation_problems(recipe, train, val)
    for stage in stages:
        found += _batch_problems(recipe, stage, train, world_size=(world_sizes or {}).get(stage))
        found += _weights_problems(recipe, stage)
        found += _teacher_problems(recipe, stage, train)
    found += _run_dir_problems(recipe, stages, run_dir, train)
    return found


def refuse(problems: Iterable[Problem]) -> None:
    """Raise RecipeError with every problem, each on a line; do nothing without problems."""
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if lines:
        raise RecipeError(lines)


# --- the sets ---


def _read_set(
    name: str, location: str | None, recipe: Recipe, known: KnownSets, found: list[Problem]
) -> SetFacts | None:
    """The known facts of a set; None without any: a problem then has the reason."""
    if location is None:
        return None
    try:
        return known.read(location, recipe)
    except LivtError as error:
        remedy, absent = error.remedy, is_absent(location)
        parent = Path(location).parent
        spec = parent.parent / f"{parent.name}.yaml"  # as the shipped specs and their sets are named
        if absent and not Path(location).exists() and spec.is_file():
            remedy = f"build it: livt shards build {spec}"
        found.append(Problem(name, error.message, location, remedy, absent))
        return None


def is_absent(location: str) -> bool:
    """Whether there are no shards in a folder, as seen from this machine."""
    return not is_url(location) and not (Path(location) / "manifest.json").is_file()


def _cache_problems(recipe: Recipe, train: SetFacts | None, val: SetFacts | None) -> Iterator[Problem]:
    """Whether the cache holds what is read of a set at a URL at the least: one shard, and those fetched ahead.

    How many more the processes of a node read at a time follows from order and world size, when the stage begins.
    """
    workers, open_bytes = recipe.data.workers, 0
    processes = max(1, workers) if isinstance(workers, int) else 1
    for facts, what in ((train, "training"), (val, "an evaluation")):
        if facts is None or facts.remote is None:
            continue
        room = partial(
            facts.remote.check_room, facts.manifest, in_view=1, processes=processes, beside=open_bytes, what=what
        )
        yield from _problems(room, "data.cache.limit_gib", facts.where)
        open_bytes += held_bytes(facts.manifest)


def _evaluation_problems(recipe: Recipe, train: SetFacts | None, val: SetFacts | None) -> Iterator[Problem]:
    """Classes of the sets, and the counts that the groups go by."""
    if train is None or recipe.stages.finetune is None:
        return
    names = TrainingClasses(tuple(train.manifest.class_names), tuple(map(int, train.class_counts)), train.where)
    if val is not None:
        yield from _problems(lambda: check_same_classes(val, names), "data.val", val.where)
    place = recipe.data.group_counts
    if place is not None:
        absent = not (is_url(place) or is_name(place) or Path(place).exists())
        yield from _problems(lambda: read_group_counts(recipe.data, names), "data.group_counts", place, absent=absent)


def _batch_problems(
    recipe: Recipe, stage: Stage, train: SetFacts | None, *, world_size: int | None
) -> Iterator[Problem]:
    """Samples against the global batch and its lane groups; the global batch against ranks and micro-batch."""
    part, name = recipe.stage(stage), f"stages.{stage}.global_batch"
    if train is not None:
        yield from _problems(lambda: check_order(train, recipe, stage), name, train.where)
        if isinstance(part, Finetune):
            yield from _problems(
                lambda: part.loss.check_counts(train.class_counts), "stages.finetune.loss", train.where
            )
    if world_size is not None:
        yield from _problems(lambda: stage_batches(recipe, stage, world_size=world_size), name, f"{world_size} ranks")


# --- weights, disk and lock ---


def _weights_problems(recipe: Recipe, stage: Stage) -> Iterator[Problem]:
    """Whether the weights to start from exist, and are of a known kind; they are read when the stage begins."""
    part = recipe.stage(stage)
    if isinstance(part, Finetune) and part.head_file is not None and not Path(part.head_file).is_file():
        head_file = part.head_file
        yield Problem(
            f"stages.{stage}.head_file", f"there is no file {head_file}", head_file, "see docs/features.md", absent=True
        )
    if part.weights is None:
        return
    path, name = Path(part.weights), f"stages.{stage}.weights"
    if part.weights == DOWNLOAD and recipe.model.timm is not None:
        if not os.environ.get(ALLOW_DOWNLOAD):
            what = f"the weights of {recipe.model.timm} would be downloaded, which is not allowed"
            yield Problem(name, what, DOWNLOAD, "run livt train --allow-download, or give a file")
        return
    if isinstance(part, Finetune) and is_run(path):
        if part.keep_head:
            yield Problem(
                name, f"{path} is a run: its pretraining has no head", str(path), "export it, and give the export"
            )
        elif not is_done(path, "pretrain"):
            yield Problem(name, f"the pretraining of the run {path} is not done", str(path), "finish it first")
        return
    yield from _problems(lambda: find_file(path), name, str(path), absent=not path.exists())


def _teacher_problems(recipe: Recipe, stage: Stage, train: SetFacts | None) -> Iterator[Problem]:
    """Whether there is a teacher and it fits: it is opened, before days of pretraining."""
    part = recipe.stage(stage)
    if train is None or not isinstance(part, Finetune) or part.distill is None:
        return
    teacher = part.distill.teacher
    if not Path(teacher).exists():
        remedy = "train a CNN, export it with `livt export`, and give that folder"
        yield Problem(TEACHER, f"there is no folder {teacher}", teacher, remedy, absent=True)
        return

    from livt_scale.train.distill import open_teacher

    yield from _problems(lambda: open_teacher(recipe, train.manifest.class_names), TEACHER, teacher)


def _run_dir_problems(
    recipe: Recipe, stages: Collection[Stage], run_dir: Path, train: SetFacts | None
) -> Iterator[Problem]:
    """Whether the run directory can be written and locked, and has room for the first checkpoints."""
    place = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.exists())
    try:
        if not lock_works(place):
            remedy = "set run_dir to a folder on another file system, or LIVT_LOCK=file in all processes"
            what = f"{run_dir} cannot be locked: the file system there has no flock"
            yield Problem("run_dir", what, str(place), remedy)
    except OSError as error:
        remedy = "set run_dir to a folder that you can write to"
        yield Problem("run_dir", f"{run_dir} cannot be written: {error.strerror}", str(place), remedy)
        return
    if train is None:
        return
    needed, free = first_checkpoints_bytes(recipe, stages, train), shutil.disk_usage(place).free
    if needed > free:
        yield Problem(
            "run_dir",
            f"{run_dir} has {free / GIB:.2f} GiB free, and the first checkpoints take {needed / GIB:.2f} GiB",
            str(place),
            "free some space, set run_dir to another disk, or lower checkpoint.keep_last",
        )


def first_checkpoints_bytes(recipe: Recipe, stages: Collection[Stage], train: SetFacts) -> int:
    """Of the stage that needs most: the checkpoints it keeps and the one being written, beside the stages before it.

    Those that are there already, from an earlier start, are not counted again.
    """
    most = kept = 0
    for stage in stages:
        size, saves, there = _checkpoints(recipe, stage, train)
        most = max(most, kept + size * max(min(recipe.checkpoint.keep_last + 1, saves) - there, 1))
        kept += size
    return most


def disk_problems(runs: Iterable[tuple[Recipe, Stage]], folder: Path, *, known: KnownSets) -> Iterator[Problem]:
    """Whether `folder` has room for what all `runs`, each one stage, keep together, and for a checkpoint being written.

    Nothing where a training set cannot be read, which `check_run` reports.
    """
    kept = largest = 0
    for recipe, stage in runs:
        try:
            train = known.read(recipe.data.train, recipe)
        except LivtError:
            return
        size, saves, there = _checkpoints(recipe, stage, train)
        kept += size * max(max(min(recipe.checkpoint.keep_last, saves), 1) - there, 0)
        largest = max(largest, size)
    place = next(there for there in (folder, *folder.absolute().parents) if there.exists())
    needed, free = kept + largest, shutil.disk_usage(place).free
    if needed > free:
        yield Problem(
            "run_dir",
            f"{folder} has {free / GIB:.2f} GiB free, and the runs keep {needed / GIB:.2f} GiB of checkpoints",
            str(place),
            "free some space, choose a folder on another disk, or lower checkpoint.keep_last",
        )


def _checkpoints(recipe: Recipe, stage: Stage, train: SetFacts) -> tuple[int, int, int]:
    """(bytes of a checkpoint, how many the stage writes, how many an earlier start has left)."""
    part = recipe.stage(stage)
    weights = stage_weights(recipe.at(stage), stage, num_classes=train.num_classes)
    size = checkpoint_bytes(weights, Spread("ddp", 1, "fp32", 1))
    if isinstance(part, Finetune) and part.ema:
        size += FP32 * sum(weight.numel for weight in weights if weight.trained)
    steps = train.num_samples // part.global_batch * part.epochs
    saves = steps // recipe.checkpoint.every_steps if recipe.checkpoint.every_steps else part.epochs
    run_dir = absolute_run_dir(recipe.run_dir, name=recipe.name)
    return size, saves, len(list((run_dir / stage / "checkpoints").glob("step-*")))


def _problems(check: Callable[[], object], name: str, where: str, *, absent: bool = False) -> Iterator[Problem]:
    """The problem that `check()` raises, if it does."""
    try:
        check()
    except LivtError as error:
        yield Problem(name, error.message, where, error.remedy, absent)
