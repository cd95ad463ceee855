"""Which changes of a recipe a run may go on with in mid-stage, when it is told to (`livt train --allow FIELD`).

Those that leave every tensor its shape and every sample its place: schedule, regularisation, augmentation, the groups
of the report. The run is then neither the old recipe's nor the new one's, so each change is kept in the facts of all
checkpoints that follow. What the model is, what it is trained for and which samples come when cannot be changed under
way: that is another run. What moves work and files alone (`recipe.HARMLESS`) may change without being allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from livt_scale.checkpoint.manifest import differences
from livt_scale.config.load import from_saved
from livt_scale.config.recipe import learnt_from
from livt_scale.util.errors import CheckpointMismatch, LivtError, UsageError, nearest

OF_THE_DATA = ("data.manifest", "init")  # what a run adds to the fields of its recipe: `train_state.run_facts`

_IN_BOTH_STAGES = (
    "epochs",
    "base_lr",
    "min_lr",
    "warmup_epochs",
    "weight_decay",
    "clip_grad",
    "crop_scale",
    "flip",
)
_IN_FINETUNE = ("micro_batch", "layer_decay", "drop_path", "rand_augment", "random_erasing", "smoothing")
ALLOWABLE = (
    "data.many_over",
    "data.few_under",
    *(f"stages.{stage}.{field}" for stage in ("pretrain", "finetune") for field in _IN_BOTH_STAGES),
    *(f"stages.finetune.{field}" for field in _IN_FINETUNE),
)


def check_allowable(fields: Iterable[str]) -> tuple[str, ...]:
    """The fields, if each can be allowed; UsageError names the one that cannot, and those that can."""
    fields = tuple(fields)
    for field in fields:
        if field not in ALLOWABLE:
            raise UsageError(
                f"--allow {field}: this change cannot be allowed in mid-stage ({nearest(field, ALLOWABLE)})",
                remedy="give the changed run a run_dir of its own",
            )
    return fields


def check_same(ours: dict[str, Any], theirs: dict[str, Any], path: Path, *, allow: Sequence[str] = ()) -> list[str]:
    """What differs between the facts of a run and those of its checkpoint `path`, if all of it is allowed.

    Raises CheckpointMismatch with the rest, a field each.
    """
    if theirs.get("stage") != ours["stage"]:
        raise CheckpointMismatch(f"{path} is of stage {theirs.get('stage')}, not {ours['stage']}")
    changed = differences(_learnt_from(theirs, path), ours["learnt_from"])
    refused = [line for line in changed if _field(line) not in allow]
    if not refused:
        return changed
    remedy = "set these fields back, or give the changed run a run_dir of its own"
    could_be = [_field(line) for line in refused if _field(line) in ALLOWABLE]
    if len(could_be) == len(refused):
        remedy += f"; to go on with the change: {' '.join(f'--allow {field}' for field in could_be)}"
    raise CheckpointMismatch(f"{path} was trained by another recipe: {'; '.join(refused)}", remedy=remedy)


def _learnt_from(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the checkpoint `path` was trained by, under today's names: read from its recipe again."""
    stored, recipe = facts.get("learnt_from"), facts.get("recipe")
    if not isinstance(stored, dict) or not isinstance(recipe, dict):
        raise CheckpointMismatch(
            f"{path} does not say what it was trained by", remedy="was it converted without --recipe?"
        )
    try:
        learnt = learnt_from(from_saved(recipe), facts["stage"])
    except (ValidationError, LivtError, KeyError) as error:
        raise CheckpointMismatch(
            f"{path}: its recipe cannot be read: {error}", remedy="was it written by a newer version?"
        ) from error
    return learnt | {name: stored[name] for name in OF_THE_DATA if name in stored}


def _field(difference: str) -> str:
    return difference.partition(": ")[0]
