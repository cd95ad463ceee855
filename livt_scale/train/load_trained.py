"""A trained classifier, read from a run directory: which checkpoint, and what it holds.

    RUN/finetune/checkpoints/   step-00000040   step-00000080 (best)   step-00000120 (final)
                                    "40"            "best"          None: the final one; "newest": the last complete one

The final checkpoint is the default. An earlier one is read only on request, so that the weights of an interrupted run
are not published by mistake. Likewise for the moving average of the weights, if the run kept one
(`stages.finetune.ema`): the weights are the trained ones unless "ema" is requested. Model, classes and recipe come from
the checkpoint, so a run directory that was moved or copied, away from its data, is complete.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from livt_scale.checkpoint import load
from livt_scale.config.load import from_saved
from livt_scale.config.recipe import STAGES, Recipe, Stage
from livt_scale.config.tuning import TrainAll, Tuning
from livt_scale.data.classes import TrainingClasses
from livt_scale.distributed.state_dict import AVERAGE, collect
from livt_scale.evaluation.calibration import NOT_FITTED, Calibration, recorded_calibration
from livt_scale.evaluation.evaluate import weights_lineage
from livt_scale.models.classifier import AnyClassifier, Classifier
from livt_scale.models.parameter_efficient import build_tuned, merge
from livt_scale.train.run_dir import is_done, is_run
from livt_scale.train.run_files import EVAL, STATUS, read_eval, read_status
from livt_scale.util.errors import CheckpointDamaged, CheckpointMismatch, RunError, UsageError

NAMED = ("best", "newest")
Weights = Literal["raw", "ema"]
PLAIN = TrainAll()


@dataclass(frozen=True)
class Trained:
    """A classifier on the CPU in evaluation mode, with what is needed to use it and its lineage."""

    model: AnyClassifier
    recipe: Recipe
    classes: TrainingClasses
    weights: dict[str, Any]  # as `evaluate.weights_lineage` gives it
    learnt_from: dict[str, Any]  # the recipe's fields that decided what was learnt, dotted
    calibration: Calibration = NOT_FITTED
    tuning: Tuning = PLAIN  # what `model` is besides a plain network


def load_trained(run_dir: Path, *, which: str | None = None, weights: Weights = "raw", merged: bool = True) -> Trained:
    """The classifier of `run_dir`: its final checkpoint, or `which` of "best", "newest" and a step number.

    weights: "raw", as trained, or "ema", their average. merged: as a plain network, where the method of tuning allows
    it. Every byte is checked first. Raises UsageError (no average),
    RunError (fine-tuning has not finished, no such checkpoint: it lists what is there), CheckpointDamaged and
    CheckpointMismatch.
    """
    trained = read_trained(pick_checkpoint(run_dir, which=which), weights=weights, merged=merged)
    return replace(trained, calibration=_calibration(run_dir, trained, weights))


def _calibration(run_dir: Path, trained: Trained, weights: Weights) -> Calibration:
    path = run_dir / "finetune" / EVAL
    if not path.exists():
        return Calibration(why="the run has no finetune/eval.json: fine-tuning has not finished, or had no data.val")
    try:
        report = read_eval(path)
    except RunError:
        return Calibration(why="finetune/eval.json cannot be read")
    return recorded_calibration(report, checkpoint_digest=trained.weights["checkpoint_digest"], weights=weights)


def read_trained(path: Path, *, weights: Weights = "raw", merged: bool = True) -> Trained:
    """The classifier in the fine-tuning checkpoint `path`. Raises as `load_trained`."""
    manifest = load.read_manifest(path)
    facts = manifest.facts
    try:
        recipe = from_saved(facts.get("recipe"), where=path)
        groups = facts.get("group_counts")
        classes = TrainingClasses(
            tuple(facts["class_names"]),
            tuple(facts["class_counts"]),
            where=str(path),
            group_counts=None if groups is None else tuple(groups),
        )
    except (KeyError, TypeError) as error:
        raise CheckpointMismatch(
            f"{path} does not say what was trained: {error!r}", remedy="was it written by another livt_scale?"
        ) from error
    with torch.random.fork_rng(devices=[]):
        part = recipe.stages.finetune
        tuning = part.train if part is not None else PLAIN
        head_norm = part is not None and part.head_norm == "batch"
        scale = part.cosine_scale if part is not None else None
        model = build_tuned(
            recipe.model,
            num_classes=len(classes.names),
            drop_path=0.0,
            tuning=tuning,
            head_norm=head_norm,
            cosine_scale=scale,
        )
    load.load(path, collect(model), allow_unexpected=("optim.*", f"{AVERAGE}*"))
    position = manifest.position
    lineage = weights_lineage(facts, step=position.step, epoch=position.epoch, checkpoint=path.name)
    lineage["checkpoint_digest"] = manifest.files_digest
    if weights == "ema":
        lineage["ema"] = _take_average(model, recipe, path)
    if isinstance(model, Classifier):
        model.fold_head_norm()
    if merged and tuning.merges:
        merge(model, tuning)
        tuning = PLAIN
    return Trained(model.eval(), recipe, classes, lineage, facts["learnt_from"], tuning=tuning)


def _take_average(model: AnyClassifier, recipe: Recipe, path: Path) -> dict[str, Any]:
    """Load the average in `path` into `model`. Returns how it was kept. A frozen weight is its own average."""
    part = recipe.stages.finetune
    if part is None or part.ema is None:
        raise UsageError(
            f"weights 'ema': {path} has no average of the weights",
            remedy="train with stages.finetune.ema, as --set 'stages.finetune.ema={decay: 0.999}', or give raw",
        )
    wanted = {f"{AVERAGE}{name}": p.detach() for name, p in model.named_parameters()}
    trained = load.read_tensors(path, choose=lambda name: name in wanted)
    for name, tensor in trained.items():
        wanted[name].copy_(tensor)
    return {**part.ema.model_dump(mode="json"), "tensors": len(trained)}


def pick_checkpoint(run_dir: Path, *, which: str | None = None) -> Path:
    """The fine-tuning checkpoint `which`, its file sizes checked. Errors as `load_trained`."""
    if not is_run(run_dir):
        raise UsageError(f"{run_dir} is not a run directory", remedy="it would hold recipe.yaml and finetune/")
    if which is not None and which not in NAMED and not which.isdecimal():
        raise UsageError(
            f"checkpoint {which!r}: no checkpoint has that name", remedy="give best, newest or a step number"
        )
    found = load.list_checkpoints(run_dir / "finetune" / "checkpoints", quick=True)
    if which == "newest":
        chosen = [c for c in found if c.whole]
    elif which == "best":
        chosen = [c for c in found if c.best]
    elif which is None:
        chosen = [c for c in found if c.final]
    else:
        chosen = [c for c in found if c.position and c.position.step == int(which)]
    if not chosen:
        is_over = is_done(run_dir, "finetune")
        ended = "the final checkpoint of fine-tuning is gone" if is_over else "fine-tuning has not ended"
        what = ended if which is None else f"there is no fine-tuning checkpoint {which!r}"
        remedy = train_on(run_dir, "finetune") if is_over else "finish it with `livt train`"
        if any(c.whole for c in found):
            remedy += ", or choose checkpoint newest"
        raise RunError(f"{what} in {run_dir}: {_what_is_there(run_dir)}", remedy=remedy)
    if not chosen[-1].whole:
        raise CheckpointDamaged(
            f"{chosen[-1].path} is damaged: {chosen[-1].why}",
            remedy="put the file back, choose another checkpoint, or remove the folder, and finetune/status.json, and "
            "train on",
        )
    return chosen[-1].path


def has_final(run_dir: Path, stage: Stage) -> bool:
    """Whether the stage's final checkpoint is there, its file sizes checked."""
    return any(c.final and c.whole for c in load.list_checkpoints(run_dir / stage / "checkpoints", quick=True))


def train_on(run_dir: Path, stage: Stage) -> str:
    """What to do where a stage is done, but not its final checkpoint."""
    return f"remove {run_dir / stage / STATUS}, and `livt train` trains on from the newest complete checkpoint"


def _what_is_there(run_dir: Path) -> str:
    return "; ".join(f"{stage}: {_stage_state(run_dir, stage)}" for stage in STAGES)


def _stage_state(run_dir: Path, stage: Stage) -> str:
    checkpoints = load.list_checkpoints(run_dir / stage / "checkpoints", quick=True)
    names = ", ".join(c.path.name + ("" if c.whole else f" (damaged: {c.why})") for c in checkpoints[-3:])
    status = read_status(run_dir, stage)
    if status is None and not checkpoints:
        return "not started"
    text: str = status["state"] if status else "no status"
    if status and "step" in status:
        text += f" at step {status['step']} of {status.get('total_steps', '?')}"
    more = f"{len(checkpoints)} checkpoints, the last: {names}" if len(checkpoints) > 3 else f"checkpoints: {names}"
    return f"{text}, {more if checkpoints else 'no checkpoint'}"
