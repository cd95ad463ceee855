"""A study as its YAML file defines it: a recipe, and what is varied over it.

    name: sizes
    recipe: ../../recipes/fashion_mnist_lt/claims.yaml
    sizes: {nano: {model.width: 48, model.depth: 2}}        # what a size overrides; vit_b and such need none
    axes:
      size: [nano, vit_micro]
      epochs: [4, 8, 16]                                    # of pretraining
      seed: [0, 1]
    sets: {stages.finetune.epochs: 3}                       # overrides for all runs

Each combination of the axes' values is a point with a separate run directory (`points`, `runs`). Paths are relative
to the file. Points that differ only in fine-tuning share one pretraining: the first of them trains it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from livt_scale.config.load import load_recipe
from livt_scale.config.model import MODEL_SIZES
from livt_scale.config.recipe import Recipe, Stage
from livt_scale.config.runtime import RecipePart
from livt_scale.config.tuning import TUNINGS
from livt_scale.config.yaml import read_file, validated
from livt_scale.data.build.spec import PlainName
from livt_scale.extensions import load_extensions
from livt_scale.losses import LOSSES
from livt_scale.study.claims import SCRATCH, epochs_of_equal_compute, loss_sets
from livt_scale.study.runs import Run, as_words, laid_over, learns_differently
from livt_scale.util.errors import UsageError, nearest
from livt_scale.util.outside import real_path
from livt_scale.util.resources import named

Sets = dict[str, JsonValue]
Fraction = Annotated[float, Field(gt=0, le=1)]
AXES = (
    "size",
    "epochs",
    "data_fraction",
    "imbalance_factor",
    "learning_rate",
    "finetune_epochs",
    "finetune_learning_rate",
    "loss",
    "train",
    "start",
    "seed",
)
ABOUT: dict[str, Stage] = {  # axes of one stage alone
    "epochs": "pretrain",
    "learning_rate": "pretrain",
    "finetune_epochs": "finetune",
    "finetune_learning_rate": "finetune",
    "loss": "finetune",
    "train": "finetune",
    "start": "finetune",
}
# runs that differ in these alone share one pretraining
FINETUNE_ONLY = tuple(axis for axis, stage in ABOUT.items() if stage == "finetune")
FROM_SCRATCH: Final = "scratch-equal-compute"
Start = Literal["pretraining", "scratch-equal-compute"]
WORDS = ("size", "loss", "train", "start")  # axes whose values are names
MAX_RUNS = 2000


class Axes(RecipePart):
    """What is varied. An axis that is left out stays as the recipe has it."""

    size: tuple[PlainName, ...] | None = Field(None, min_length=1, description="names of `sizes`, or of the recipe's")
    epochs: tuple[PositiveInt, ...] | None = Field(None, min_length=1, description="of pretraining")
    data_fraction: tuple[Fraction, ...] | None = Field(
        None, min_length=1, description="share of each class's images; smaller shares lie in larger ones"
    )
    imbalance_factor: tuple[Annotated[float, Field(ge=1)], ...] | None = Field(
        None, min_length=1, description="images of the largest class over those of the smallest, exponential between"
    )
    learning_rate: tuple[PositiveFloat, ...] | None = Field(None, min_length=1, description="pretraining's base_lr")
    finetune_epochs: tuple[PositiveInt, ...] | None = Field(
        None, min_length=1, description="of fine-tuning; those of start scratch-equal-compute follow"
    )
    finetune_learning_rate: tuple[PositiveFloat, ...] | None = Field(
        None, min_length=1, description="fine-tuning's base_lr"
    )
    loss: tuple[PlainName, ...] | None = Field(
        None, min_length=1, description="of fine-tuning: names of `losses`, or of docs/losses.md"
    )
    train: tuple[PlainName, ...] | None = Field(
        None, min_length=1, description="names of `trains`, or of stages.finetune.train"
    )
    start: tuple[Start, ...] | None = Field(
        None,
        min_length=1,
        description="of fine-tuning; scratch-equal-compute: from scratch, in epochs of the same compute",
    )
    seed: tuple[NonNegativeInt, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _each_value_once(self) -> Self:
        for name, values in self.given.items():
            if len(set(values)) < len(values):
                raise ValueError(f"{name} has a value twice: {', '.join(map(str, values))}")
        return self

    @property
    def given(self) -> dict[str, tuple[Any, ...]]:
        return {name: getattr(self, name) for name in AXES if getattr(self, name) is not None}


class Shards(RecipePart):
    """From which spec the training sets of other fractions and imbalance factors are built."""

    spec: str
    set: PlainName = Field(description="the set of the spec that the recipe trains on: fraction 1")


class WidthRate(RecipePart):
    """Learning rates that were found at one width, carried over: base_lr · (at / width) ** power, in both stages."""

    at: PositiveInt = Field(description="width (of the encoder) at which the recipe's rates were found")
    power: PositiveFloat = Field(1.0, description="1: the rate of hidden weights under muP with Adam; 0.5: its root")


class Study(RecipePart):
    """The contents of the file."""

    name: PlainName
    recipe: str
    folder: str | None = Field(None, description="where the runs lie; None: runs/studies/NAME")
    axes: Axes
    sizes: dict[PlainName, Sets] = Field({}, description="what a size lays over the recipe, by dotted paths")
    losses: dict[PlainName, Sets] = Field(
        {}, description="overrides of a loss with options, by dotted paths; a name of docs/losses.md needs none"
    )
    trains: dict[PlainName, Sets] = Field(
        {}, description="overrides of each way of training a few parameters, by dotted paths; lora and such need none"
    )
    starts: dict[Start, Sets] = Field(
        {}, description="overrides of each value of axes.start, by dotted paths: a rate of its own, say"
    )
    sets: Sets = Field({}, description="laid over every run, by dotted paths")
    shards: Shards | None = Field(None, description="needed for data_fraction and imbalance_factor")
    width_rate: WidthRate | None = Field(None, description="None: every size has the same learning rates")
    stages: tuple[Stage, ...] = Field(("pretrain", "finetune"), min_length=1, description="of the recipe, that are run")
    measures: tuple[Literal["reconstruction_loss", "top1_all", "top1_few"], ...] = Field(
        ("reconstruction_loss", "top1_all", "top1_few"), description="to which laws are fitted"
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        given = self.axes.given
        for size in self.axes.size or ():
            if size not in self.sizes and size not in MODEL_SIZES:
                raise ValueError(
                    f"axes.size has {size!r}, which is not a size: {nearest(size, [*self.sizes, *MODEL_SIZES])}"
                )
        for loss in self.axes.loss or ():
            if loss not in self.losses and loss not in LOSSES:
                known = nearest(loss, [*self.losses, *LOSSES])
                raise ValueError(f"axes.loss has {loss!r}, which is not a loss: {known}")
        for train in self.axes.train or ():
            if train not in self.trains and train not in TUNINGS:
                known = nearest(train, [*self.trains, *TUNINGS])
                raise ValueError(f"axes.train has {train!r}, which is not a way of training: {known}")
        if not self.shards and (needs := sorted(given.keys() & {"data_fraction", "imbalance_factor"})):
            raise ValueError(f"axes.{needs[0]} needs `shards`: the spec that its sets are built from")
        for axis, stage in ABOUT.items():
            if axis in given and stage not in self.stages:
                raise ValueError(f"axes.{axis} is about {stage}, which is not among the stages")
        if "start" in given and "pretrain" not in self.stages:
            raise ValueError("axes.start needs both stages: the compute of scratch-equal-compute is theirs together")
        if "run_dir" in self.sets:
            raise ValueError("sets has run_dir, and each run has a directory of its own: set `folder`")
        if fixed := sorted({"stages.finetune.epochs", "stages.*.epochs"} & self.starts.get(FROM_SCRATCH, {}).keys()):
            raise ValueError(f"starts.{FROM_SCRATCH} has {fixed[0]}, which follows from the compute of both stages")
        if self.stages == ("finetune", "pretrain"):
            raise ValueError("stages has them in the wrong order: pretrain comes first")
        return self


@dataclass(frozen=True)
class Point:
    """One combination: its name (a folder), the axes' values, and what it lays over the recipe.

    pretraining: the name of the point whose pretraining it starts from; its own for the first of those that share one.
    None: it has none.
    """

    name: str
    axes: Mapping[str, Any]
    sets: Mapping[str, Any]
    pretraining: str | None


@dataclass(frozen=True)
class LoadedStudy:
    """A study and the places that its relative paths mean."""

    study: Study
    path: Path
    recipe: Path
    folder: Path
    spec: Path | None

    def load(self, sets: Mapping[str, Any]) -> Recipe:
        """The study's recipe with `sets` over it. Raises RecipeError, UsageError."""
        return load_recipe(self.recipe, sets=as_words(sets))

    def subset(self, axes: Mapping[str, Any]) -> Path | None:
        """The folder of the training set of this fraction and imbalance; None: the recipe's own set."""
        other = {axis: axes[axis] for axis in SUBSETS if axis in axes and (axis, axes[axis]) != ("data_fraction", 1)}
        words = [f"{SUBSETS[axis]}{in_digits(value)}".replace(".", "p") for axis, value in other.items()]
        return self.folder / "shards" / "-".join(words) if words else None


SUBSETS = {"imbalance_factor": "if", "data_fraction": "fraction"}


def load_study(path: Path, *, folder: Path | None = None) -> LoadedStudy:
    """The study in `path`, or the shipped one that `livt:NAME` means, each of its runs' recipes checked.

    Raises UsageError: field, file and line, nearest name.
    """
    path = named(path, kind="studies")
    tree = read_file(path, "study", what="study")
    load_extensions()
    study = validated(tree, path, Study)
    beside = real_path(path).parent
    loaded = LoadedStudy(
        study, path, real_path(beside / study.recipe), folder or Path(study.folder or f"runs/studies/{study.name}"),
        beside / study.shards.spec if study.shards else None,
    )  # fmt: skip
    _check(loaded)
    return loaded


def _check(loaded: LoadedStudy) -> None:
    """Report mistakes in the file before anything is trained: every recipe is read."""
    recipes: dict[str, Recipe] = {}
    same: dict[str, str] = {}  # recipe: the first point of it
    for point in points(loaded):
        try:
            recipe = loaded.load(point.sets)
        except UsageError as error:
            raise UsageError(f"{loaded.path}: {point.name}: {error.message}", remedy=error.remedy) from None
        for stage in loaded.study.stages:
            if stage not in recipe.stage_names:
                raise UsageError(
                    f"{loaded.path}: {loaded.recipe} has no stage {stage}",
                    remedy=f"set stages: [{', '.join(recipe.stage_names)}]",
                )
        first = same.setdefault(recipe.model_dump_json(), point.name)
        if first != point.name or point.name in recipes:
            raise UsageError(
                f"{loaded.path}: {first} and {point.name} would be the same run",
                remedy="take out of `sets`, which count over sizes and losses, what the axis is to vary",
            )
        recipes[point.name] = recipe
        if point.pretraining is not None:
            _check_shared(loaded, point, recipe, recipes[point.pretraining])


def _check_shared(loaded: LoadedStudy, point: Point, recipe: Recipe, first: Recipe) -> None:
    """Raise UsageError if `point` changes the pretraining of `first`, which it starts from."""
    changed = learns_differently(first, recipe, "pretrain")
    if changed:
        raise UsageError(
            f"{loaded.path}: {point.name} starts from the pretraining of {point.pretraining}, and has another "
            f"{', '.join(changed[:5])}",
            remedy="vary it by an axis of pretraining, such as size",
        )


def points(loaded: LoadedStudy) -> list[Point]:
    """All combinations, seed after seed, so that a study that is stopped early has complete seeds."""
    study, given = loaded.study, loaded.study.axes.given
    order = [name for name in dict.fromkeys(("seed", *AXES)) if name in given]
    number = math.prod(map(len, given.values()))
    if number > MAX_RUNS:
        raise UsageError(f"{loaded.path}: {number} combinations", remedy=f"at most {MAX_RUNS}; vary less")
    found: list[Point] = []
    shared: dict[tuple[Any, ...], str] = {}
    for combination in product(*(given[name] for name in order)):
        chosen = dict(zip(order, combination, strict=True))
        axes = {name: chosen[name] for name in AXES if name in chosen}
        name = name_of(axes, study.axes)
        pretraining = None
        if "pretrain" in study.stages and axes.get("start") != FROM_SCRATCH:
            key = tuple(value for axis, value in axes.items() if axis not in FINETUNE_ONLY)
            pretraining = shared.setdefault(key, name)
        found.append(Point(name, axes, _sets(loaded, axes), pretraining))
    return found


def name_of(axes: Mapping[str, Any], of: Axes) -> str:
    """nano-epochs-4-seed-0: the axes that have more than one value; all of them where none has."""
    given = of.given
    varied = [axis for axis in axes if len(given[axis]) > 1] or list(axes)
    short = {"data_fraction": "fraction", "imbalance_factor": "if", "learning_rate": "lr"}
    short |= {"finetune_learning_rate": "finetune-lr", "finetune_epochs": "finetune"}
    words = [str(axes[a]) if a in WORDS else f"{short.get(a, a)}-{in_digits(axes[a])}" for a in varied]
    return "-".join(words) or "all"


def in_digits(value: float) -> str:
    """4, 0.25, 1e-05, 20220101: with as many digits as distinguish it from any other number."""
    short = f"{value:g}"
    return short if float(short) == value else str(value)


def _sets(loaded: LoadedStudy, axes: Mapping[str, Any]) -> dict[str, Any]:
    """What the combination lays over the recipe, the study's own `sets` last but for the data that it is about."""
    study = loaded.study
    layers: list[Mapping[str, Any]] = []
    if "size" in axes:
        layers.append(study.sizes.get(axes["size"], {"model.size": axes["size"]}))
    if "loss" in axes:
        plain = loss_sets(axes["loss"]) or {"stages.finetune.loss.name": axes["loss"]}
        layers.append(study.losses.get(axes["loss"], plain))
    if "train" in axes:
        layers.append(study.trains.get(axes["train"], {"stages.finetune.train": axes["train"]}))
    layers.append(study.sets)
    start = study.starts.get("pretraining", {}) if "start" in axes else {}
    both = _with_axes(loaded, axes, laid_over(*layers, start))
    if axes.get("start") != FROM_SCRATCH:
        return both
    # One class: the head's operations, which are next to nothing, are left out.
    epochs = epochs_of_equal_compute(loaded.load(both), num_classes=1)
    alone = _with_axes(loaded, axes, laid_over(*layers, SCRATCH, study.starts.get(FROM_SCRATCH, {})))
    return laid_over(alone, {"stages.finetune.init": "scratch", "stages.finetune.epochs": epochs})


def _with_axes(loaded: LoadedStudy, axes: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    """`sets`, below those values of the axes that are fields."""
    direct = {"epochs": "stages.pretrain.epochs", "finetune_epochs": "stages.finetune.epochs", "seed": "seed"}
    sets = laid_over(sets, {path: axes[axis] for axis, path in direct.items() if axis in axes})
    return laid_over(sets, _data(loaded, axes, sets), _rates(loaded, axes, sets))


def _rates(loaded: LoadedStudy, axes: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, float]:
    """The learning rates: those of the axes or the recipe, scaled to the width if the study requests it."""
    own = {"pretrain": axes.get("learning_rate"), "finetune": axes.get("finetune_learning_rate")}
    rule, rates = loaded.study.width_rate, {}
    recipe = loaded.load(sets) if rule else None
    for stage in loaded.study.stages:
        rate = own[stage]
        if rule and recipe:
            rate = rate if rate is not None else recipe.stage(stage).base_lr
            rate = float(f"{rate * (rule.at / recipe.model.dims.width) ** rule.power:.6g}")
        if rate is not None:
            rates[f"stages.{stage}.base_lr"] = rate
    return rates


def _data(loaded: LoadedStudy, axes: Mapping[str, Any], sets: Mapping[str, Any]) -> dict[str, Any]:
    """The training set of this fraction and imbalance; the bounds of many and few go down with the fraction."""
    folder = loaded.subset(axes)
    if folder is None:
        return {}
    found: dict[str, Any] = {"data.train": str(folder.absolute())}
    fraction = axes.get("data_fraction", 1.0)
    if fraction != 1:
        data = loaded.load(sets).data
        found["data.many_over"] = max(round(data.many_over * fraction), 1)
        found["data.few_under"] = max(round(data.few_under * fraction), 1)
    return found


def points_named(loaded: LoadedStudy, patterns: Sequence[str] | None) -> list[Point]:
    """Those of `points` that a pattern (* and ? as in a shell) fits, and those whose pretraining they start from.

    None: all. Raises UsageError for a pattern that fits none.
    """
    every = points(loaded)
    if patterns is None:
        return every
    names: set[str] = set()
    for pattern in patterns:
        found = {p.name for p in every if fnmatchcase(p.name, pattern)}
        if not found:
            raise UsageError(
                f"no point of {loaded.path} is called {pattern}", remedy=nearest(pattern, [p.name for p in every])
            )
        names |= found
    names |= {p.pretraining for p in every if p.name in names and p.pretraining is not None}
    return [p for p in every if p.name in names]


def stages_of(loaded: LoadedStudy, point: Point) -> tuple[Stage, ...]:
    """The study's stages, without a pretraining that `point` does not start from."""
    return tuple(stage for stage in loaded.study.stages if stage == "finetune" or point.pretraining is not None)


def runs(loaded: LoadedStudy, chosen: Sequence[Point] | None = None) -> list[Run]:
    """What the runner starts for `chosen` (None: all points): one run per stage. Both share the point's directory."""
    found: list[Run] = []
    for point in points(loaded) if chosen is None else chosen:
        if point.pretraining == point.name:  # the first of those that share it
            found.append(_pretraining(loaded, point))
        if "finetune" in loaded.study.stages:
            found.append(_fine_tuning(loaded, point))
    return found


def last_run(loaded: LoadedStudy, point: Point) -> Run:
    """The run whose end is the end of `point`."""
    return (_fine_tuning if "finetune" in loaded.study.stages else _pretraining)(loaded, point)


def _pretraining(loaded: LoadedStudy, point: Point) -> Run:
    return Run(_name_of_pretraining(point.name), loaded.recipe, point.sets, "pretrain", place=point.name)


def _fine_tuning(loaded: LoadedStudy, point: Point) -> Run:
    after = None if point.pretraining is None else _name_of_pretraining(point.pretraining)
    return Run(point.name, loaded.recipe, point.sets, "finetune", after)


def _name_of_pretraining(point: str) -> str:
    return f"{point} (pretrain)"
