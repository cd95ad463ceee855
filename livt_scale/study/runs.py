"""The runs of a study: names, recipes and overrides, determined before anything is started.

    Run("losses/bce/seed-1", recipe, {"seed": 1, "stages.finetune.loss.name": "bce"}, stage="finetune",
        after="pretrain/lt/seed-1")

A run is one stage. A fine-tuning run names its pretraining: many runs share one, and the runner puts a copy of it into
each run's directory, so that a run is complete when it is moved. Names are folders below the study's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe, Stage, learnt_from
from livt_scale.train.resume_rules import TEACHER
from livt_scale.util.errors import UsageError


@dataclass(frozen=True)
class Run:
    """One stage of one recipe. sets: overrides by dotted path, as `--set` has them."""

    name: str
    recipe: Path
    sets: Mapping[str, Any] = field(default_factory=dict)
    stage: Stage = "finetune"
    after: str | None = None  # name of the run whose pretraining this one starts from
    teacher: str | None = None  # name of the run whose model teaches this one
    place: str | None = None  # its folder below the study's; None: its name. Both stages of one run share a folder

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the runs that come before it."""
        return tuple(name for name in (self.after, self.teacher) if name is not None)

    def at(self, folder: Path) -> Path:
        """Its run directory, for a study in `folder`."""
        return folder / (self.place or self.name)

    def words(self, folder: Path) -> list[str]:
        """What `livt` is started with."""
        return ["train", str(self.recipe), "--stage", self.stage, *(f"--set={s}" for s in self.all_sets(folder))]

    def all_sets(self, folder: Path) -> list[str]:
        taught = {} if self.teacher is None else {TEACHER: folder / self.teacher}
        return [*as_words({**self.sets, **taught}), f"run_dir={self.at(folder)}"]

    def load(self, folder: Path) -> Recipe:
        """The recipe as the run will have it. Raises RecipeError."""
        return load_recipe(self.recipe, sets=self.all_sets(folder))


def laid_over(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """All of `layers`, of one field the last, which comes after an earlier `stages.*` that would change it."""
    found: dict[str, Any] = {}
    for layer in layers:
        for path, value in layer.items():
            found.pop(path, None)
            found[path] = value
    return found


def as_words(sets: Mapping[str, Any]) -> list[str]:
    """Overrides as `--set` takes them, "a.b=c"."""
    return [f"{path}={spelt(value)}" for path, value in sets.items()]


def spelt(value: object) -> str:
    """As a user would write it behind --set: text as it is, anything else as YAML (of which JSON is a part)."""
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def learns_differently(one: Recipe, other: Recipe, stage: Stage) -> list[str]:
    """The fields, dotted, by which `stage` learns something else in `one` than in `other`."""
    was, should = learnt_from(one, stage), learnt_from(other, stage)
    return sorted(path for path in was.keys() | should.keys() if was.get(path) != should.get(path))


def in_order(runs: Iterable[Run]) -> list[Run]:
    """Each run once, in the order given, but after those that it needs.

    If the runs are given seed by seed, a study that is stopped early has complete seeds to report.
    Raises UsageError for two runs of one name that differ, or a start that is not one of the runs.
    """
    known: dict[str, Run] = {}
    for run in runs:
        if known.setdefault(run.name, run) != run:
            raise UsageError(f"two different runs are called {run.name}", remedy="give each of them another name")
    ordered: dict[str, Run] = {}
    for run in known.values():
        for name in run.needs:
            if name not in known:
                raise UsageError(f"{run.name} starts from {name}, which is not one of the runs")
        for one in [*(known[name] for name in run.needs), run]:
            ordered.setdefault(one.name, one)
    return list(ordered.values())
