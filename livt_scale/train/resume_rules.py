"""Which changes of a recipe a run may continue with: each field's own policy (`livt_scale.config.resume`), applied.

`livt train --allow FIELD` lets those through that leave every tensor its shape and every sample its place: schedule,
regularisation, augmentation, the groups of the report. The run is then neither the old recipe's nor the new one's, so
each change is recorded in the facts of all checkpoints that follow.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from livt_scale.config.load import from_saved
from livt_scale.config.recipe import Recipe, learnt_from
from livt_scale.config.resume import Change, allowable, changes
from livt_scale.util.errors import CheckpointMismatch, LivtError, UsageError, nearest

OF_THE_DATA = ("data.manifest", "init")  # what a run adds to the fields of its recipe: `train_state.run_facts`


def check_allowable(fields: Iterable[str]) -> tuple[str, ...]:
    """The fields, if each can be allowed; UsageError names the one that cannot, and those that can."""
    fields = tuple(fields)
    known = allowable(Recipe)
    for field in fields:
        if field not in known:
            raise UsageError(
                f"--allow {field}: this change cannot be allowed in mid-stage ({nearest(field, known)})",
                remedy="give the changed run a run_dir of its own",
            )
    return fields


def check_same(ours: dict[str, Any], theirs: dict[str, Any], path: Path, *, allow: Sequence[str] = ()) -> list[Change]:
    """What differs between the facts of a run and those of its checkpoint `path`, if all of it is allowed.

    Raises CheckpointMismatch with the rest.
    """
    if theirs.get("stage") != ours["stage"]:
        raise CheckpointMismatch(f"{path} is of stage {theirs.get('stage')}, not {ours['stage']}")
    old, new = _learnt_from(theirs, path), _learnt_from(ours, path)
    is_vit = from_saved(ours["recipe"]).model.is_vit
    changed = changes(old, new, Recipe, batchnorm=not is_vit)
    refused = [change for change in changed if change.path not in allow]
    if not refused:
        return changed
    remedy = "set these fields back, or give the changed run a run_dir of its own"
    if all(change.policy == "allow" for change in refused):
        remedy += f"; to resume with the change: {' '.join(f'--allow {change.path}' for change in refused)}"
    lines = "; ".join(map(describe, refused))
    raise CheckpointMismatch(f"{path} was trained by another recipe: {lines}", remedy=remedy)


def describe(change: Change) -> str:
    """ "stages.pretrain.epochs: 800 in the checkpoint, 900 here"."""
    return f"{change.path}: {_short(change.old)} in the checkpoint, {_short(change.new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


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
