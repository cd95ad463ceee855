"""Compares a recipe with an existing run: may a command continue it? Only reads files.

    compare_run(recipe, run_dir)     a record for each field that differs from what the run was trained by
    check_start(recipe, run_dir)     raises if the run may not be continued by this recipe

Every command that starts runs calls `check_start` before it writes anything; `livt status` shows the records. What a
stage was trained by is in its newest checkpoint, or in RUN/recipe.yaml if a finished stage has none left.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livt_scale.checkpoint.catalog import step_folders
from livt_scale.checkpoint.manifest import read_manifest
from livt_scale.config.load import load_saved
from livt_scale.config.recipe import STAGES, Recipe, Stage, learnt_from
from livt_scale.config.resume import Change
from livt_scale.config.run_place import SAVED, check_place
from livt_scale.data.shard_set import ShardSet
from livt_scale.train.resume_rules import (
    QUARANTINE,
    REMEDY,
    TEACHER,
    compare_facts,
    data_facts,
    describe,
    refuse_unallowed,
)
from livt_scale.train.run_dir import is_done
from livt_scale.util.errors import CheckpointDamaged, CheckpointMismatch, DataError, LivtError, UsageError
from livt_scale.util.urls import is_url


@dataclass(frozen=True)
class Difference:
    """A field in which `stage` of a run, as the file `where` has it, differs from a recipe."""

    stage: Stage
    finished: bool
    change: Change
    where: Path


@dataclass(frozen=True)
class _Trained:
    """What a stage was trained by."""

    facts: dict[str, Any]
    where: Path
    finished: bool


def check_start(recipe: Recipe, run_dir: Path, *, allow: Sequence[str] = ()) -> tuple[Stage, ...]:
    """The stages of `recipe` that are still to be trained in `run_dir`, if they may be.

    allow: fields that may have changed in mid-stage. Raises UsageError (a place that cannot be a run, a finished stage
    of another recipe) and CheckpointMismatch (an unfinished stage of another recipe).
    """
    check_place(run_dir)
    differences = compare_run(recipe, run_dir)
    unfinished = unfinished_stages(recipe, run_dir)

    for stage in unfinished:
        of_it = [d for d in differences if d.stage == stage]
        if of_it:
            refuse_unallowed([d.change for d in of_it], of_it[0].where, allow=allow)

    # A finished stage cannot take a change over, but a field of both stages may change for the one that is not finished
    finished = [d for d in differences if d.finished and not (unfinished and _is_for_both(d.change))]
    if finished:
        lines = "; ".join(describe(d.change, where=f"in the finished {d.stage}") for d in finished)
        raise UsageError(f"{run_dir} was trained by another recipe: {lines}", remedy=REMEDY)
    return unfinished


def _is_for_both(change: Change) -> bool:
    return change.policy == "allow" and not change.path.startswith("stages.")


def unfinished_stages(recipe: Recipe, run_dir: Path) -> tuple[Stage, ...]:
    return tuple(stage for stage in recipe.stage_names if not is_done(run_dir, stage))


def compare_run(recipe: Recipe, run_dir: Path, *, sets: bool = True) -> list[Difference]:
    """Where `recipe` differs from what the stages of `run_dir` were trained by, but in fields that may always change.

    sets: compare the sets of shards too, as far as they are on this machine. Raises CheckpointMismatch if an unfinished
    stage does not say what it was trained by.
    """
    found = []
    complete = not unfinished_stages(recipe, run_dir)
    opened = _sets(recipe, run_dir, complete=complete) if sets else {}
    for stage in STAGES:
        trained = _trained(run_dir, stage)
        if trained is None:
            continue
        if stage in recipe.stage_names:
            changed = _changes(recipe, stage, trained, opened if complete or not trained.finished else {})
        else:
            changed = [Change(f"stages.{stage}", "trained", None, "fixed")]
        found += [Difference(stage, trained.finished, change, trained.where) for change in changed]
    return found


def _trained(run_dir: Path, stage: Stage) -> _Trained | None:
    """What `stage` was trained by; None if there is nothing of it that could be continued."""
    finished = is_done(run_dir, stage)
    for path in reversed(step_folders(run_dir / stage / "checkpoints")):
        try:
            return _Trained(read_manifest(path).facts, path, finished)
        except CheckpointDamaged:
            continue
    saved = _saved_recipe(run_dir) if finished else None
    if saved is None or stage not in saved.stage_names:
        return None
    facts = {"stage": stage, "recipe": saved.model_dump(mode="json"), "learnt_from": learnt_from(saved, stage)}
    return _Trained(facts, run_dir / SAVED, finished)


def _changes(recipe: Recipe, stage: Stage, trained: _Trained, sets: dict[str, ShardSet]) -> list[Change]:
    theirs = trained.facts
    ours: dict[str, Any] = {"stage": stage, "recipe": recipe.at(stage).model_dump(mode="json")}
    ours["learnt_from"] = learnt_from(recipe, stage)
    if "data.train" in sets:
        ours["learnt_from"]["data.manifest"] = sets["data.train"].digest
        ours["data"] = data_facts(sets["data.train"])
    try:
        changed = compare_facts(ours, theirs, trained.where)
    except CheckpointMismatch:
        if trained.finished:  # converted from elsewhere, or by a newer version: nothing is going to be trained by it
            return []
        raise

    # initial weights and a teacher's are compared when they are loaded, sets only if they are here
    not_compared = {"init", TEACHER} | ({"data.manifest"} if "data.train" not in sets else set())
    not_compared |= {QUARANTINE} if trained.finished else set()
    changed = [change for change in changed if change.path not in not_compared]
    scored_on = theirs.get("scored_on")
    if trained.finished and scored_on and "data.val" in sets and sets["data.val"].digest != scored_on:
        changed.append(Change("data.val", scored_on, sets["data.val"].digest, "fixed"))
    return changed


def _sets(recipe: Recipe, run_dir: Path, *, complete: bool) -> dict[str, ShardSet]:
    """The sets of `recipe` by field, as far as they can be opened here; of a complete run, those of another folder."""
    if not any((run_dir / stage).is_dir() for stage in STAGES):
        return {}
    saved = _saved_recipe(run_dir) if complete else None
    found = {}
    for name in ("train", "val"):
        folder = getattr(recipe.data, name)
        same = complete and (saved is None or getattr(saved.data, name) == folder)
        if folder is None or is_url(folder) or same:
            continue
        with suppress(DataError):
            found[f"data.{name}"] = ShardSet.open(folder, data=recipe.data)
    return found


def _saved_recipe(run_dir: Path) -> Recipe | None:
    try:
        return load_saved(run_dir / SAVED)
    except LivtError:
        return None
