"""What the runs of a claim came to, read from their directories, and what follows from it by the rule of `verdict`.

A run that is missing, half done, failed or of another recipe is named and counts for nothing. What comes out is plain
JSON: the page and the pictures are made of it alone, so that they can be made again where the runs are gone.
"""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from livt_scale import __version__
from livt_scale.errors import LivtError
from livt_scale.recipe import learnt_from
from livt_scale.recipe_file import load_recipe
from livt_scale.study.claims import CLAIMS, SETTINGS, Ask, Setting, runs_of
from livt_scale.study.grid import Run
from livt_scale.study.verdict import Verdict, alike, exceeds, together
from livt_scale.train.rundir import is_done, read_status

GROUPS = ("all", "many", "medium", "few")
Values = dict[str, dict[str, dict[int, float]]]  # arm -> measure -> seed -> value


def collect(claim: str, on: str, folder: Path, *, seeds: Sequence[int], sets: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a claim in a setting, from the runs below `folder`."""
    setting = SETTINGS[on]
    values: Values = {}
    missing: dict[str, str] = {}
    curves: dict[str, list[list[float]]] = {}
    minutes: dict[str, list[float]] = {}
    for (arm, seed), runs in runs_of(CLAIMS[claim], setting, seeds=seeds, sets=sets).items():
        run = runs[-1]
        problem = what_is_wrong(run, folder)
        if problem:
            missing[f"{arm}, seed {seed}"] = problem
            continue
        for measure, value in measures_of(run, folder / run.name).items():
            values.setdefault(arm, {}).setdefault(measure, {})[seed] = value
        curves.setdefault(arm, []).append([line["top1_all"] for line in evaluations(folder / run.name)])
        minutes.setdefault(arm, []).append(training_minutes(folder / run.name / run.stage))
    verdicts = [judge(ask, values) for ask in CLAIMS[claim].asks(setting)]
    return {
        "claim": claim,
        "says": CLAIMS[claim].says,
        "on": on,
        "seeds": list(seeds),
        "sets": dict(sets),
        "budget": _budget(setting, sets),
        "values": {arm: {m: {str(s): v for s, v in by.items()} for m, by in of.items()} for arm, of in values.items()},
        "curves": {arm: lines for arm, lines in curves.items() if any(lines)},
        "minutes": {arm: statistics.fmean(each) for arm, each in minutes.items()},
        "missing": missing,
        "verdicts": [asdict(verdict) for verdict in verdicts],
        "word": together(verdicts),
        "versions": _versions(),
    }


def what_is_wrong(run: Run, folder: Path) -> str:
    """Why the run in `folder` counts for nothing; empty: it is done, and of this recipe."""
    place = folder / run.name
    status = read_status(place, run.stage)
    if status is None:
        return "not run"
    if not is_done(place, run.stage):
        return f"{status.get('state')}: {status.get('why') or 'not at its end'}"[:300]
    try:
        made, wanted = load_recipe(place / "recipe.yaml"), run.load(folder)
    except LivtError as error:
        return f"its recipe cannot be read: {error}"[:300]
    was, should = learnt_from(made, run.stage), learnt_from(wanted, run.stage)
    differs = sorted(path for path in was.keys() | should.keys() if was.get(path) != should.get(path))
    return f"of another recipe: {', '.join(differs[:5])}" if differs else ""


def measures_of(run: Run, place: Path) -> dict[str, float]:
    """What was measured of a finished run."""
    if run.stage == "pretrain":
        from livt_scale.study.held_out import reconstruction_loss  # torch, only where it has to reckon

        return {"reconstruction_loss": reconstruction_loss(place)}
    top1 = json.loads((place / "finetune" / "eval.json").read_bytes())["top1"]
    found = {f"top1_{group}": float(top1[group]) for group in GROUPS if top1[group] is not None}
    by_epoch = [line["top1_all"] for line in evaluations(place)]
    return found | ({"top1_mean_over_epochs": statistics.fmean(by_epoch)} if len(by_epoch) > 1 else {})


def evaluations(place: Path) -> list[dict[str, Any]]:
    file = place / "finetune" / "evaluations.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def training_minutes(folder: Path) -> float:
    """Time in steps, by metrics.jsonl: without start, evaluation and saving."""
    total_s, before = 0.0, 0
    for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        total_s += line["step_s"] * (line["step"] - before)
        before = line["step"]
    return total_s / 60


def judge(ask: Ask, values: Values) -> Verdict:
    """The verdict on one question, over the seeds that both arms have. Differences are better - worse."""
    better, worse = (values.get(arm, {}).get(ask.measure, {}) for arm in (ask.better, ask.worse))
    seeds = sorted(better.keys() & worse.keys())
    name = ask.measure.replace("_", " ")
    if ask.within is not None:
        differences = [(better[s] - worse[s]) / worse[s] for s in seeds]
        return alike(
            differences, says=f"{ask.better} like {ask.worse} in {name}, to {ask.within:.0%}", within=ask.within
        )
    sign = -1 if ask.measure == "reconstruction_loss" else 1
    relation = "below" if sign < 0 else "above"
    differences = [sign * (better[s] - worse[s]) for s in seeds]
    return exceeds(differences, says=f"{ask.better} {relation} {ask.worse} in {name}")


def _budget(setting: Setting, sets: Mapping[str, Any]) -> dict[str, Any]:
    recipe = load_recipe(setting.recipe, sets=[f"{p}={v}" for p, v in {**setting.sets, **sets}.items()])
    pretrain, finetune = recipe.stages.pretrain, recipe.stages.finetune
    assert pretrain is not None
    assert finetune is not None
    return {
        "recipe": f"recipes/{setting.recipe.parent.name}/{setting.recipe.name}",
        "data": recipe.data.train,
        "pretrain_epochs": pretrain.epochs,
        "finetune_epochs": finetune.epochs,
    }


def _versions() -> dict[str, str]:
    import torch

    return {"livt_scale": __version__, "torch": torch.__version__, "python": platform.python_version()}
