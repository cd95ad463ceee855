"""Which changes of a recipe a run may continue with: each field's own policy (`livt_scale.config.resume`), applied.

`livt train --allow FIELD` lets those through that leave every tensor its shape and every sample its place: schedule,
regularisation, augmentation, the groups of the report. `--allow data.quarantine` lets a run continue without samples
that were put into quarantine since. The run is then neither the old recipe's nor the new one's, so each change is
recorded in the facts of all checkpoints that follow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from livt_scale.config.load import from_saved
from livt_scale.config.recipe import Recipe, learnt_from
from livt_scale.config.resume import Change, allowable, changes
from livt_scale.data.shard_set import ShardSet
from livt_scale.util.errors import CheckpointMismatch, LivtError, UsageError, nearest

TEACHER = "stages.finetune.distill.teacher"  # digest of its weights, whose place may change
OF_FILES = ("data.manifest", "init", TEACHER)  # what a run adds to the fields of its recipe: `train_state.run_facts`
QUARANTINE = "data.quarantine"  # allows the training set of the same shards to leave out other samples than before
MAX_LEFT_OUT = 1000  # samples in quarantine that the facts of a checkpoint name
NONE_LEFT_OUT: dict[str, Any] = {"count": 0, "classes": {}, "samples": []}
MAX_LISTED = 5  # samples in one message
REMEDY = "set these fields back, or give the changed run another run_dir"


def check_allowable(fields: Iterable[str]) -> tuple[str, ...]:
    """The fields, if each can be allowed; UsageError names the one that cannot, and those that can."""
    fields = tuple(fields)
    known = (*allowable(Recipe), QUARANTINE)
    for field in fields:
        if field not in known:
            raise UsageError(
                f"--allow {field}: this change cannot be allowed in mid-stage ({nearest(field, known)})",
                remedy="give the changed run another run_dir",
            )
    return fields


def check_same(ours: dict[str, Any], theirs: dict[str, Any], path: Path, *, allow: Sequence[str] = ()) -> list[Change]:
    """What differs between the facts of a run and those of its checkpoint `path`, if all of it is allowed.

    Raises CheckpointMismatch with the rest.
    """
    changed = compare_facts(ours, theirs, path)
    refuse_unallowed(changed, path, allow=allow)
    return changed


def compare_facts(ours: dict[str, Any], theirs: dict[str, Any], path: Path) -> list[Change]:
    """What differs between the facts of a run and those of its checkpoint `path`, by field.

    Raises CheckpointMismatch if they are of different stages, or the checkpoint does not say what it was trained by.
    """
    if theirs.get("stage") != ours["stage"]:
        raise CheckpointMismatch(f"{path} is of stage {theirs.get('stage')}, not {ours['stage']}")
    old, new = _learnt_from(theirs, path), _learnt_from(ours, path)
    has_batchnorm = from_saved(ours["recipe"], where=path).model.has_batchnorm
    changed = changes(old, new, Recipe, batchnorm=has_batchnorm)
    return [_of_quarantine(change, ours, theirs) if change.path == "data.manifest" else change for change in changed]


def refuse_unallowed(changed: Iterable[Change], path: Path, *, allow: Sequence[str]) -> None:
    """Raise CheckpointMismatch if any of the changes is not named in `allow`."""
    refused = [change for change in changed if change.path not in allow]
    if not refused:
        return
    remedy = REMEDY
    if all(change.policy == "allow" for change in refused):
        remedy += f"; to resume with the change: {' '.join(f'--allow {change.path}' for change in refused)}"
    lines = "; ".join(map(describe, refused))
    raise CheckpointMismatch(f"{path} was trained by another recipe: {lines}", remedy=remedy)


def describe(change: Change, *, where: str = "in the checkpoint") -> str:
    """ "stages.pretrain.epochs: 800 in the checkpoint, 900 here"."""
    if change.path == QUARANTINE:
        return _describe_quarantine(change.old, change.new)
    return f"{change.path}: {_short(change.old)} {where}, {_short(change.new)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


# --- a quarantine made in mid-stage ---


def data_facts(train: ShardSet) -> dict[str, Any]:
    """The facts of a training set: its manifest, and what its quarantine leaves out, by class and by sample."""
    names = train.manifest.class_names
    classes = Counter(names[sample.label] for sample in train.quarantine)
    samples = [{"number": q.number, "key": q.key, "class": names[q.label]} for q in train.quarantine[:MAX_LEFT_OUT]]
    left_out = {"count": len(train.quarantine), "classes": dict(sorted(classes.items())), "samples": samples}
    return {"manifest": train.manifest_digest, "left_out": left_out}


def _of_quarantine(change: Change, ours: dict[str, Any], theirs: dict[str, Any]) -> Change:
    """`change`, of the digest of the training set; or what it comes from, if that is the quarantine alone."""
    here, there = ours.get("data"), theirs.get("data")
    if not here:
        return change
    if not there and change.old == here["manifest"]:  # saved before the facts named it, without any quarantine
        there = {"manifest": change.old, "left_out": NONE_LEFT_OUT}
    if not isinstance(there, dict) or not there.keys() >= here.keys() or there["manifest"] != here["manifest"]:
        return change
    return Change(QUARANTINE, there["left_out"], here["left_out"], "allow")


def _describe_quarantine(old: dict[str, Any], new: dict[str, Any]) -> str:
    """ "data.quarantine: 2 samples are left out since: 'cat/003' (cat), 'eel/001' (eel)"."""
    was, now = ({sample["number"]: sample for sample in each["samples"]} for each in (old, new))
    lines = [
        f"{len(numbers)} samples {what}: {_listed([samples[n] for n in sorted(numbers)])}"
        for what, numbers, samples in (
            ("are left out since", now.keys() - was.keys(), now),
            ("are no longer left out", was.keys() - now.keys(), was),
        )
        if numbers
    ]
    counts = f"{old['count']} samples are left out in the checkpoint, {new['count']} here"
    return f"{QUARANTINE}: {'; '.join(lines) or counts}"


def _listed(samples: Sequence[dict[str, Any]]) -> str:
    more = f" and {len(samples) - MAX_LISTED} more" if len(samples) > MAX_LISTED else ""
    return ", ".join(f"{sample['key']!r} ({sample['class']})" for sample in samples[:MAX_LISTED]) + more


def _learnt_from(facts: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the checkpoint `path` was trained by, under today's names: read from its recipe again."""
    stored, recipe = facts.get("learnt_from"), facts.get("recipe")
    if not isinstance(stored, dict) or not isinstance(recipe, dict):
        raise CheckpointMismatch(
            f"{path} does not say what it was trained by", remedy="was it converted without --recipe?"
        )
    trained_by = from_saved(recipe, where=path)
    try:
        learnt = learnt_from(trained_by, facts["stage"])
    except (LivtError, KeyError) as error:
        raise CheckpointMismatch(
            f"{path}: its recipe cannot be read: {error}", remedy="was it written by a newer version?"
        ) from error
    return learnt | {name: stored[name] for name in OF_FILES if name in stored}
