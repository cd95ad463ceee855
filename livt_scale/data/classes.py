"""The classes that a model is trained on: names, images of each, and the counts that make them many, medium or few.

    classes = TrainingClasses.of(train, recipe.data)
    classes.counts           # of the training set: class priors and the losses' margins
    classes.group_counts     # those that data.group_counts names: a balanced twin has its tail's groups; None: counts
    check_same_classes(val, classes)

The names decide which sets go together, and their order does too: a label is a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from livt_scale.config.data import Data
from livt_scale.data.manifest import MANIFEST
from livt_scale.data.shard_set import SetFacts
from livt_scale.util.errors import DataError
from livt_scale.util.outside import read_json
from livt_scale.util.resources import named
from livt_scale.util.urls import is_url


@dataclass(frozen=True)
class TrainingClasses:
    """The classes that the model was trained on, and the number of images of each."""

    names: tuple[str, ...]
    counts: tuple[int, ...]  # usable images of the training set
    where: str  # for messages: the folder, or the export that has the names
    group_counts: tuple[int, ...] | None = None  # None: `counts` decide the groups

    @classmethod
    def of(cls, train: SetFacts, data: Data | None = None) -> TrainingClasses:
        """Those of the set `train`. Raises DataError, UsageError for what data.group_counts names."""
        classes = cls(tuple(train.manifest.class_names), tuple(int(n) for n in train.class_counts), train.where)
        groups = read_group_counts(data, classes) if data and data.group_counts else None
        return cls(classes.names, classes.counts, classes.where, groups)


def check_same_classes(shards: SetFacts, classes: TrainingClasses) -> None:
    """Raise DataError where there is nothing to evaluate, or the classes are not `classes`, in that order."""
    if not shards.num_samples:
        raise DataError(f"{shards.where} has no usable sample to evaluate on", remedy="give another set")
    difference = _difference(tuple(shards.manifest.class_names), classes.names)
    if difference:
        raise DataError(
            f"{shards.where} and {classes.where} do not have the same classes: {difference}",
            remedy="build the evaluation set from the same list of classes as the training set",
        )


def read_group_counts(data: Data, classes: TrainingClasses) -> tuple[int, ...]:
    """The counts that `data.group_counts` names, one for each of `classes`. Raises DataError, UsageError."""
    place = data.group_counts
    assert place is not None
    path = named(place, kind="counts")
    if is_url(place) or path.is_dir() or path.name == MANIFEST:
        other = SetFacts.read(path.parent if path.name == MANIFEST and not is_url(place) else place, data=data)
        difference = _difference(tuple(other.manifest.class_names), classes.names)
        if difference:
            raise DataError(
                f"{other.where} and {classes.where} do not have the same classes: {difference}",
                remedy="give a set of the same classes, or a JSON list of counts in the order of the training set's",
            )
        return tuple(int(n) for n in other.class_counts)
    counts = _listed_counts(path)
    if len(counts) != len(classes.names):
        raise DataError(
            f"{path} has {len(counts)} counts, but {classes.where} has {len(classes.names)} classes",
            remedy="give one count for each class, in the order of the training set's classes",
        )
    return counts


def _listed_counts(path: Path) -> tuple[int, ...]:
    remedy = "give a JSON file with a list of whole numbers, a folder of shards, or livt:NAME for a shipped list"
    try:
        counts = read_json(path, "counts")
    except FileNotFoundError:
        raise DataError(f"there is no {path}", remedy=remedy) from None
    except OSError as error:
        raise DataError(f"the counts in {path} cannot be read: {error.strerror}", remedy=remedy) from error
    except ValueError as error:
        raise DataError(f"the counts in {path} cannot be read: {error}", remedy=remedy) from error
    if not isinstance(counts, list) or not all(type(n) is int and n >= 0 for n in counts):
        raise DataError(f"{path} is not a list of whole numbers from 0 up", remedy=remedy)
    return tuple(counts)


def _difference(these: tuple[str, ...], those: tuple[str, ...]) -> str:
    """How the class names of two sets differ; empty: they do not."""
    if these == those:
        return ""
    if sorted(these) == sorted(those):
        first = next(k for k, pair in enumerate(zip(these, those, strict=True)) if pair[0] != pair[1])
        return f"the same names in another order: class {first} is {these[first]!r} against {those[first]!r}"
    extra, lacking = _some(set(these) - set(those)), _some(set(those) - set(these))
    return f"{len(these)} against {len(those)}; only in the first: {extra}; only in the second: {lacking}"


def _some(names: set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:5])
    return f"{shown}{', …' if len(names) > 5 else ''}" or "none"
