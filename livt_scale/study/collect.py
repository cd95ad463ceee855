"""The results of a claim's runs, read from their directories, and the verdicts that follow by the rule of `comparison`.

A run that is missing, unfinished, failed, of another recipe, from another pretraining or of other images is reported
and not counted. The result is plain JSON: the page and the plots are made from it alone, so that they can be made again
when the runs are gone.
"""

from __future__ import annotations

import copy
import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from livt_scale import __version__
from livt_scale.checkpoint.manifest import read_manifest
from livt_scale.config.load import from_saved, load_saved
from livt_scale.config.recipe import Recipe, Stage, digest, learnt_from
from livt_scale.data.shard_set import ShardSet
from livt_scale.plan.parameters import weights_of
from livt_scale.study.claims import CLAIMS, SETTINGS, Claim, Setting, runs_of
from livt_scale.study.comparison import Values, combined_outcome, judge_all
from livt_scale.study.runs import Run, learns_differently
from livt_scale.train.resume_rules import TEACHER
from livt_scale.train.run_dir import is_done
from livt_scale.train.run_files import (
    EVAL,
    EVALUATIONS,
    METRICS,
    EvaluationLine,
    read_eval,
    read_evaluations,
    read_metrics,
    read_status,
    training_seconds,
)
from livt_scale.util.errors import LivtError
from livt_scale.util.resources import root

FORMAT, VERSION = "livt-claim-results", 3
NOT_RUN = "not run"
GROUPS = ("all", "many", "medium", "few")


def collect(claim: str, on: str, folder: Path, *, seeds: Sequence[int], sets: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a claim in a setting, from the runs below `folder`."""
    setting = SETTINGS[on]
    found, recipes = _Found(), {}
    for (arm, seed), runs in runs_of(CLAIMS[claim], setting, seeds=seeds, sets=sets).items():
        found.add(arm, seed, runs, folder, num_classes=setting.num_classes)
        if seed == seeds[0]:
            recipes[arm] = _recipe_digest(runs, folder)
    told = {
        "format": FORMAT,
        "version": VERSION,
        "claim": claim,
        "says": CLAIMS[claim].says,
        "on": on,
        "seeds": list(seeds),
        "sets": dict(sets),
        "budget": _budget(CLAIMS[claim], setting, sets),
        "recipes": recipes,
        "images": {beside_the_recipes(where): read for where, (read, _) in found.images.digests.items()},
        "weights": found.weights,
        "values": plain_values(found.values),
        "curves": {arm: by_seed for arm, by_seed in found.curves.items() if any(by_seed.values())},
        "minutes": {arm: statistics.fmean(each) for arm, each in found.minutes.items()},
        "run_minutes": found.run_minutes,
        "missing": found.missing,
        "versions": _versions(),
    }
    return _judged(told)


def _judged(told: dict[str, Any]) -> dict[str, Any]:
    setting = SETTINGS[told["on"]].with_sets(told["sets"])
    values = {
        arm: {measure: {int(seed): value for seed, value in of.items()} for measure, of in by.items()}
        for arm, by in told["values"].items()
    }
    verdicts = judge_all(CLAIMS[told["claim"]].questions(setting), values)
    judged = {"verdicts": [plain_verdict(asdict(verdict)) for verdict in verdicts], "word": combined_outcome(verdicts)}
    return told | judged


def with_kept(found: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """`found` with those runs of `kept`, the same claim's results, that are not in its folder, judged together.

    They may lie on another machine, or be gone. Taken are those of the same recipe and images; `found` is first.
    """
    told = copy.deepcopy(dict(found))
    if any(kept["images"].get(where, read) != read for where, read in told["images"].items()):
        return told
    for arm, recipe in told["recipes"].items():
        if arm in kept["values"] and kept["recipes"].get(arm) == recipe:
            _take_arm(told, kept, arm)
    told["run_minutes"] = _minutes_of_counted(told, kept.get("run_minutes", {}) | told["run_minutes"])
    told["images"] = kept["images"] | told["images"]
    told["values"] = {arm: told["values"][arm] for arm in told["recipes"] if arm in told["values"]}  # in their order
    return _judged(told)


def _minutes_of_counted(told: Mapping[str, Any], minutes: Mapping[str, float]) -> dict[str, float]:
    """Those of `minutes` whose run is of an arm and a seed that count; older kept results have none."""
    setting = SETTINGS[told["on"]].with_sets(told["sets"])
    every = runs_of(CLAIMS[told["claim"]], setting, seeds=told["seeds"], sets={})
    counted = [
        run.name for (arm, s), runs in every.items() if str(s) in _seeds(told["values"].get(arm, {})) for run in runs
    ]
    return {name: minutes[name] for name in dict.fromkeys(counted) if name in minutes}


def _take_arm(told: dict[str, Any], kept: Mapping[str, Any], arm: str) -> None:
    """The seeds that did not run in the folder of `told`; one that ran and does not count stays named."""
    own = _seeds(told["values"].get(arm, {}))
    left_out = {
        seed for seed in map(str, told["seeds"]) if told["missing"].get(f"{arm}, seed {seed}", NOT_RUN) != NOT_RUN
    }
    new = _seeds(kept["values"][arm]) - own - left_out
    if not new:
        return
    minutes = (told["minutes"].get(arm, 0.0), kept["minutes"][arm])
    told["minutes"][arm] = statistics.fmean(minutes, weights=(len(own), len(new)))
    told["weights"][arm] = kept["weights"][arm]
    for measure, by_seed in kept["values"][arm].items():
        _take(told["values"].setdefault(arm, {}).setdefault(measure, {}), by_seed, new)
    if arm in kept["curves"]:
        _take(told["curves"].setdefault(arm, {}), kept["curves"][arm], new)
    told["missing"] = {who: why for who, why in told["missing"].items() if who not in {f"{arm}, seed {s}" for s in new}}
    told["seeds"] = sorted({*told["seeds"], *map(int, new)})


def _seeds(measures: Mapping[str, Mapping[str, float]]) -> set[str]:
    return set().union(*measures.values())


def _take(into: dict[str, Any], by_seed: Mapping[str, Any], seeds: set[str]) -> None:
    """Also brings the seeds in order."""
    into |= {seed: value for seed, value in by_seed.items() if seed in seeds}
    for seed in sorted(into, key=int):
        into[seed] = into.pop(seed)


def plain_values(values: Values) -> dict[str, dict[str, dict[str, float]]]:
    """JSON's keys are text: the seeds."""
    return {arm: {m: {str(s): v for s, v in of.items()} for m, of in by.items()} for arm, by in values.items()}


def plain_verdict(verdict: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity (of an interval) and no NaN (of a mean over no seed): null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in verdict.items()}


class _Found:
    """What is read of run after run. values: arm -> measure -> seed -> value; missing: why a run does not count."""

    def __init__(self) -> None:
        self.values: dict[str, dict[str, dict[int, float]]] = {}
        self.curves: dict[str, dict[str, list[float]]] = {}
        self.minutes: dict[str, list[float]] = {}
        self.run_minutes: dict[str, float] = {}  # by run, pretrainings too: other claims may share it
        self.weights: dict[str, int] = {}
        self.missing: dict[str, str] = {}
        self.images = SameImages()

    def add(self, arm: str, seed: int, runs: Sequence[Run], folder: Path, *, num_classes: int) -> None:
        run = runs[-1]
        place, who = run.at(folder), f"{arm}, seed {seed}"
        problem = what_is_wrong(run, folder) or self._other_images(run, place, folder, who)
        if problem:
            self.missing[who] = problem
            return
        for measure, value in measures_of(run, place).items():
            self.values.setdefault(arm, {}).setdefault(measure, {})[seed] = value
        self.curves.setdefault(arm, {})[str(seed)] = [line.top1_all for line in evaluations(place)]
        self.run_minutes |= {one.name: training_minutes(place / one.stage) for one in runs}
        self.minutes.setdefault(arm, []).append(self.run_minutes[run.name])
        if arm not in self.weights:
            self.weights[arm] = num_weights(run.load(folder), num_classes=num_classes)

    def _other_images(self, run: Run, place: Path, folder: Path, who: str) -> str:
        data = run.load(folder).data
        return self.images.differ(sets_read(run, place, train=data.train, val=data.val), who)


class SameImages:
    """Whether runs read the same images: a recipe names its sets by folder, and the set there may be another now.

    digests: by folder: of a set's manifest, and where it was read.
    """

    def __init__(self) -> None:
        self.digests: dict[str, tuple[str, str]] = {}

    def differ(self, sets: Mapping[str, str], who: str) -> str:
        """Why `who`, which read `sets` (see `sets_read`), does not count; empty: it read what the others have."""
        for where, read in sets.items():
            expected, whose = self.digests.setdefault(where, _digest_here(where) or (read, who))
            if read != expected:
                return f"it read other images than {whose}, in {where}"
        return ""


def sets_read(run: Run, place: Path, *, train: str, val: str | None) -> dict[str, str]:
    """The digest of the manifest (and quarantine) that a finished run read as each set."""
    if run.stage == "pretrain":
        from livt_scale.study.reconstruction_loss import reconstruction_loss  # torch
        from livt_scale.train.finetune import final_pretraining

        read = {train: read_manifest(final_pretraining(place)).facts["learnt_from"]["data.manifest"]}
        return read if val is None else {**read, val: reconstruction_loss(place).data}
    told = read_eval(place / "finetune" / EVAL)
    return {train: told["weights"]["trained_on"], str(val): told["data"]["manifest_digest"]}


def _digest_here(where: str) -> tuple[str, str] | None:
    """The digest of the set in the folder `where` and what to call it; None where it is not on this machine."""
    try:
        return ShardSet.open(where).digest, "is there now"
    except LivtError:
        return None


def what_is_wrong(run: Run, folder: Path) -> str:
    """Why the run in `folder` counts for nothing; empty: it is done, and of this recipe."""
    place = run.at(folder)
    status = read_status(place, run.stage)
    if status is None:
        return NOT_RUN
    if not is_done(place, run.stage):
        return f"{status.get('state')}: {status.get('why') or 'not at its end'}"[:300]
    try:
        wanted = run.load(folder)
        differs = _differs(load_saved(place / "recipe.yaml"), wanted, run.stage)
        return differs or (_other_pretraining(place, wanted) if run.after is not None else "")
    except (LivtError, LookupError) as error:
        return f"what it is cannot be read: {' '.join(str(error).split())}"[:300]


def _recipe_digest(runs: Sequence[Run], folder: Path) -> str:
    """Of all that an arm learns from but the seed: its stages, and not where sets and a teacher lie."""
    parts: dict[str, Any] = {run.stage: learnt_from(run.load(folder), run.stage) for run in runs}
    for part in parts.values():
        part.pop("seed")
        part.pop(TEACHER, None)
    return digest(parts)


def _differs(made: Recipe, wanted: Recipe, stage: Stage) -> str:
    differs = learns_differently(made, wanted, stage)
    return f"of another recipe: {', '.join(differs[:5])}" if differs else ""


def _other_pretraining(place: Path, wanted: Recipe) -> str:
    """A run's recipe does not record the initial weights; its evaluation and the pretraining next to it do."""
    from livt_scale.train.finetune import final_pretraining  # torch

    path = final_pretraining(place)
    facts = read_manifest(path).facts
    problem = _differs(from_saved(facts.get("recipe"), where=path), wanted, "pretrain")
    if problem:
        return f"its pretraining is {problem}"
    began = read_eval(place / "finetune" / EVAL)["weights"]["init"]
    same = began is not None and began["recipe_digest"] == facts["recipe_digest"]
    return "" if same else "it did not begin with the pretraining that is beside it"


def num_weights(recipe: Recipe, *, num_classes: int) -> int:
    """Of the classifier, with its head."""
    return sum(weight.numel for weight in weights_of(recipe.model, "finetune", num_classes=num_classes))


def measures_of(run: Run, place: Path) -> dict[str, float]:
    """What was measured of a finished run."""
    if run.stage == "pretrain":
        from livt_scale.study.reconstruction_loss import (
            reconstruction_loss,
        )  # torch, and only if it was not measured before

        return {"reconstruction_loss": reconstruction_loss(place).loss}
    report = read_eval(place / "finetune" / EVAL)
    top1, calibration = report["top1"], report.get("calibration", {})
    found = {f"top1_{group}": float(top1[group]) for group in GROUPS if top1[group] is not None}
    found |= {name: float(calibration[name]) for name in ("ece", "pdc") if calibration.get(name) is not None}
    by_epoch = [line.top1_all for line in evaluations(place)]
    return found | ({"top1_mean_over_epochs": statistics.fmean(by_epoch)} if len(by_epoch) > 1 else {})


def evaluations(place: Path) -> list[EvaluationLine]:
    """Those during fine-tuning."""
    return read_evaluations(place / "finetune" / EVALUATIONS)


def training_minutes(folder: Path) -> float:
    """Time in steps, by metrics.jsonl: without start, evaluation and saving."""
    return training_seconds(read_metrics(folder / METRICS, strict=True).lines) / 60


def beside_the_recipes(place: str) -> str:
    """A path as the recipe has it, if it is in the project's folder: the page is read on other machines."""
    project = root()
    return str(Path(place).relative_to(project)) if Path(place).is_relative_to(project) else place


def _budget(claim: Claim, setting: Setting, sets: Mapping[str, Any]) -> dict[str, Any]:
    """The budget of the claim's first arm; an arm with other epochs has them in its name."""
    first = next(iter(runs_of(claim, setting, seeds=[0], sets=sets).values()))[-1]
    recipe = first.load(Path())
    pretrain = recipe.stages.pretrain
    return {
        "recipe": f"recipes/{setting.name}.yaml",
        "data": beside_the_recipes(recipe.data.train),
        "pretrain_epochs": pretrain.epochs if pretrain else None,
        "finetune_epochs": recipe.stage("finetune").epochs,
    }


def _versions() -> dict[str, str]:
    import torch

    return {"livt_scale": __version__, "torch": torch.__version__, "python": platform.python_version()}
