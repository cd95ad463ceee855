"""Model soups: the mean of several models' weights, one model to run.

    uniform    the mean of all members
    greedy     members by accuracy, the best first; each next one stays in if the mean with it is no worse

Members are fine-tuned from the same start (checkpoints of one run; runs from one pretraining): models with different
starts have no useful mean. Greedy makes its choices on half of the evaluation set; the figures are of the other half.
Sums are computed in float64, so the order of members does not show.

Source: Wortsman et al. 2022, Model soups, arXiv 2203.05482, algorithm 1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from livt_scale.checkpoint import load
from livt_scale.checkpoint.manifest import MANIFEST, differences
from livt_scale.config.recipe import digest
from livt_scale.data.shard_set import ShardSet
from livt_scale.evaluation.holdout import half_rows
from livt_scale.export.write_export import check_target, write_export
from livt_scale.models.classifier import AnyClassifier
from livt_scale.posthoc import features
from livt_scale.posthoc.features import LabelledOutputs
from livt_scale.train.load_trained import Trained, Weights, read_trained
from livt_scale.train.open_trained import open_trained
from livt_scale.util.errors import CheckpointMismatch, RunError, UsageError

Method = Literal["uniform", "greedy"]


@dataclass(frozen=True)
class Ingredient:
    path: Path
    trained: Trained


def mean_of(models: Sequence[AnyClassifier]) -> AnyClassifier:
    """A classifier whose every tensor is the mean of the models', summed in float64. All have the same tensors."""
    states = [model.state_dict() for model in models]
    assert all(state.keys() == states[0].keys() for state in states)
    mean: dict[str, Tensor] = {}
    for name, first in states[0].items():
        total = torch.zeros_like(first, dtype=torch.float64)
        for state in states:
            total += state[name]
        mean[name] = (total / len(states)).to(first.dtype)
    mixed = copy.deepcopy(models[0])
    mixed.load_state_dict(mean)
    return mixed


def read_members(paths: Sequence[Path], *, all_checkpoints: bool = False, weights: Weights = "raw") -> list[Ingredient]:
    """What to average: each path is a run (its final checkpoint, or all complete ones), a checkpoint or an export.

    Every byte is checked. Raises CheckpointMismatch where models, classes or pixel statistics differ; UsageError for
    fewer than two.
    """
    members = []
    for path in paths:
        places = [path]
        if all_checkpoints:
            places = [c.path for c in load.list_checkpoints(path / "finetune" / "checkpoints", quick=True) if c.whole]
            if not places:
                raise RunError(
                    f"there is no complete fine-tuning checkpoint in {path}", remedy="see `livt ckpt ls RUN`"
                )
        for place in places:
            is_checkpoint = (place / MANIFEST).is_file()
            trained = read_trained(place, weights=weights) if is_checkpoint else open_trained(place, weights=weights)
            members.append(Ingredient(place, trained))
    if len(members) < 2:
        raise UsageError("a soup has at least two members", remedy="give more paths, or --all-checkpoints")
    if members[0].trained.recipe.model.has_batchnorm:
        raise UsageError(
            f"{members[0].path} is of {members[0].trained.recipe.model.name}: for the mean of weights, batch norm's "
            "statistics would have to be computed again, which is not supported",
            remedy="make soups of models without batch norm",
        )
    for other in members[1:]:
        _check_alike(members[0], other)
    return members


def make_soup(
    members: Sequence[Ingredient],
    out: Path,
    *,
    method: Method = "uniform",
    data: str | None = None,
    run: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Export the soup of `members`; `run`: whose evaluation set is taken where `data` is None.

    Returns each member's accuracy on the half that choices are made on, which stayed in, and on the other half top-1 of
    the best single member (`before`) and of the soup (`after`).
    """
    first = members[0].trained
    of_all = _run_of(members)
    check_target(out, weights={"run": of_all, "baseline": {"method": f"{method} soup"}}, force=force)
    shards = features.held_out_set(first, run or members[0].path, data)
    alone = [features.model_outputs(member.trained.model, shards, first.recipe) for member in members]
    rows = half_rows(alone[0].labels.numpy())
    scores = [_score(outputs.rows(rows[0]), first) for outputs in alone]
    ranked = sorted(range(len(members)), key=lambda k: -scores[k])
    chosen = list(range(len(members)))
    if method == "greedy":
        chosen = _greedy(members, ranked, scores[ranked[0]], shards, rows[0])
    model = mean_of([members[k].trained.model for k in chosen])
    mixed_outputs = features.model_outputs(model, shards, first.recipe)
    ended = mixed_outputs.rows(rows[1])
    calibration = features.calibration(mixed_outputs.values, mixed_outputs.labels, shards)
    before = alone[ranked[0]].rows(rows[1])
    table = [
        {**_named(member), "mean_class": score, "in": k in chosen}
        for k, (member, score) in enumerate(zip(members, scores, strict=True))
    ]
    made = {"method": f"{method} soup", "members": table, "held_out": features.about_halves(shards, *rows)}
    own = replace(first, model=model, calibration=calibration)
    mixed = _lineage([members[k] for k in chosen], own, made, run=of_all)
    write_export(mixed, out, force=force)
    about = (first.classes, first.recipe)
    return {
        "out": str(out),
        **made,
        # paths are for the caller alone: an export says the same wherever it was made
        "members": [{"path": str(member.path), **row} for member, row in zip(members, table, strict=True)],
        "before": features.figures(before.values, before.labels, *about)["top1"],
        "after": features.figures(ended.values, ended.labels, *about)["top1"],
    }


def _greedy(members: Sequence[Ingredient], ranked: list[int], best: float, shards: ShardSet, rows: Any) -> list[int]:
    """The numbers of the members that stay in, the best first."""
    chosen, first = ranked[:1], members[0].trained
    for k in ranked[1:]:
        mixed = mean_of([members[j].trained.model for j in [*chosen, k]])
        score = _score(features.model_outputs(mixed, shards, first.recipe).rows(rows), first)
        if score >= best:
            chosen, best = [*chosen, k], score
    return chosen


def _score(outputs: LabelledOutputs, trained: Trained) -> float:
    return features.mean_class_accuracy(outputs.values, outputs.labels, trained.classes, trained.recipe)


def _check_alike(first: Ingredient, other: Ingredient) -> None:
    wrong = differences(_shape_of(other.trained), _shape_of(first.trained))
    if wrong:
        lines = [line.replace("in the checkpoint", "in this one").replace("here", "in the first") for line in wrong]
        raise CheckpointMismatch(
            f"{other.path} and {first.path} cannot be averaged: {'; '.join(lines[:8])}",
            remedy="give models of one shape, fine-tuned on the same classes",
        )


def _shape_of(trained: Trained) -> dict[str, Any]:
    data = trained.recipe.data
    part = trained.recipe.stages.finetune
    about: dict[str, Any] = {
        "model": trained.recipe.model.model_dump(mode="json"),
        "classes": list(trained.classes.names),
    }
    about["cosine_scale"] = part.cosine_scale if part is not None else None
    about["adapters"] = trained.tuning.model_dump(mode="json")  # those that are not merged into the weights
    return {**about, "mean": list(data.mean), "std": list(data.std), "class_counts": list(trained.classes.counts)}


def _named(member: Ingredient) -> dict[str, Any]:
    weights = member.trained.weights
    return {"checkpoint": weights["checkpoint"], "recipe_digest": weights["recipe_digest"], "ema": "ema" in weights}


def _run_of(members: Sequence[Ingredient]) -> str:
    """What identifies a soup: the runs of all that it was chosen from."""
    return digest({"runs": sorted({str(member.trained.weights.get("run")) for member in members})})


def _lineage(members: Sequence[Ingredient], mixed: Trained, made: dict[str, Any], *, run: str) -> Trained:
    """What the members learnt from in common, and a digest of all that made the soup."""
    learnt = [member.trained.learnt_from for member in members]
    common = {k: v for k, v in learnt[0].items() if all(k in other and other[k] == v for other in learnt[1:])}
    weights = {
        **{name: value for name, value in mixed.weights.items() if name != "checkpoint_digest"},
        "run": run,
        "checkpoint": f"soup of {len(members)}",
        "position": None,
        "recipe_digest": digest({"members": [_named(member) for member in members]}),
        "baseline": made,
    }
    return replace(mixed, weights=weights, learnt_from=common)
