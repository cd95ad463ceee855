"""Training sets of a study's data fractions and imbalance factors, as separate shards, built from one spec.

The counts of a class follow the spec's set: a fraction takes that share of each (rounded down, one image at least), an
imbalance factor keeps the first class and lets the others fall exponentially. Choices nest (`longtail.choose`), so a
smaller fraction has no image that the larger one lacks. A set that exists and is complete is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import CountsProfile, Spec, load_spec
from livt_scale.longtail import Counts, class_counts_exponential
from livt_scale.study.definition import LoadedStudy, Point
from livt_scale.util.errors import UsageError, nearest


def wanted_subsets(loaded: LoadedStudy, points: Iterable[Point]) -> dict[Path, Mapping[str, Any]]:
    """The folders of those sets, each with the axes' values that it is for."""
    found = {loaded.subset(point.axes): point.axes for point in points}
    return {where: axes for where, axes in found.items() if where is not None}


def build_subsets(loaded: LoadedStudy, points: Iterable[Point]) -> list[Path]:
    """Build the training sets that `points` need and the recipe does not name. Raises UsageError, SourceError."""
    wanted = wanted_subsets(loaded, points)
    if not wanted or loaded.spec is None or loaded.study.shards is None:
        return []
    spec, name = load_spec(loaded.spec), loaded.study.shards.set
    if name not in spec.build.sets:
        raise UsageError(
            f"{loaded.path}: shards.set is {name!r}, which {loaded.spec} has not",
            remedy=nearest(name, spec.build.sets),
        )
    whole = spec.class_counts(name, spec.open_part(name))
    for where, axes in wanted.items():
        counts = subset_counts(
            whole, fraction=axes.get("data_fraction", 1.0), imbalance=axes.get("imbalance_factor")
        )  # fmt: skip
        build(_only(spec, name, counts, where.name), where.parent)
    return list(wanted)


def subset_counts(whole: Counts, *, fraction: float, imbalance: float | None) -> Counts:
    """[C] images of each class, int64."""
    counts = whole if imbalance is None else class_counts_exponential(int(whole[0]), len(whole), imbalance)
    return np.maximum((counts * fraction + 1e-9).astype(np.int64), 1)


def _only(spec: Spec, name: str, counts: Counts, called: str) -> Spec:
    """The spec with one set alone, of these counts."""
    own = spec.build.sets[name].model_copy(
        update={
            "exponential": None, "balanced": None, "expected": None,
            "counts": CountsProfile(values=[int(c) for c in counts]),
        }
    )  # fmt: skip
    return spec.model_copy(update={"build": spec.build.model_copy(update={"sets": {called: own}})})
