"""Long-tailed class counts, the choice of images for them, and values derived from them: priors and shot groups.

    >>> class_counts_exponential(1000, 10, 100)  # imbalance factor 100
    array([1000,  599,  359,  215,  129,   77,   46,   27,   16,   10])
    >>> balanced_counts(2478, 10)  # its balanced twin
    array([248, 248, 248, 248, 248, 248, 248, 248, 247, 247])

Choices nest: with one seed, an image chosen where its class has 10 is also chosen where it has 100, so twins of a
long-tailed set differ from it by as few images as they can. Random order comes from raw Philox words, which NumPy
promises to keep the same from version to version. Profile: Cui et al. 2019 (arXiv 1901.05555).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from livt_scale.util.errors import DataError

Counts = NDArray[np.int64]  # [C] images of each class


def class_counts_exponential(n0: int, num_classes: int, imbalance: float) -> Counts:
    """[C] n_c = int(n0 · imbalance^(−c / (C − 1))): from n0 images down to n0 / imbalance.

    Raises DataError where the last class would have no image.
    """
    if n0 < 1 or num_classes < 1 or imbalance < 1:
        raise DataError(f"no profile from {n0} images, {num_classes} classes and an imbalance factor of {imbalance:g}")
    steps = max(num_classes - 1, 1)
    # the tiny excess keeps an exact integer such as 1000 · 100^(−1) from being truncated to the one below
    counts = np.array([int(n0 * imbalance ** (-c / steps) + 1e-9) for c in range(num_classes)], dtype=np.int64)
    if counts[-1] == 0:
        raise DataError(
            f"{n0} images in the largest class and an imbalance factor of {imbalance:g} leave class "
            f"{int(np.argmin(counts))} with no image",
            remedy=f"take an imbalance factor of at most {n0}, or more images in the largest class",
        )
    return counts


def balanced_counts(total: int, num_classes: int) -> Counts:
    """[C] `total` images over the classes, alike; the first `total % num_classes` classes have one more."""
    if total < num_classes:
        raise DataError(f"{total} images are too few for {num_classes} classes of at least one image")
    counts = np.full(num_classes, total // num_classes, dtype=np.int64)
    counts[: total % num_classes] += 1
    return counts


def choose(labels: ArrayLike, counts: ArrayLike, *, seed: int) -> NDArray[np.int64]:
    """The `counts[c]` images of each class c among `labels` [n], as ascending indices int64 [sum(counts)].

    Raises DataError if a class has fewer images than requested.
    """
    labels = np.asarray(labels, dtype=np.int64)
    chosen = []
    for c, count in enumerate(np.asarray(counts, dtype=np.int64)):
        images = np.flatnonzero(labels == c)
        if len(images) < count:
            raise DataError(
                f"class {c} has {len(images)} images, the profile asks for {count}",
                remedy="ask for fewer images, or order the classes so that the larger ones come first",
            )
        chosen.append(images[shuffled(len(images), seed=seed, stream=1 + c)[:count]])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def shuffled(n: int, *, seed: int, stream: int = 0) -> NDArray[np.int64]:
    """A random order of 0 … n−1, int64 [n]: the same for the same (seed, stream), whatever the NumPy version."""
    words = np.random.Philox(np.random.SeedSequence([seed, stream])).random_raw(n)
    return np.argsort(np.atleast_1d(words), kind="stable").astype(np.int64)


def priors(counts: ArrayLike) -> NDArray[np.float64]:
    """[C] π_c = n_c / N. Raises DataError for a class with no image: its prior of 0 has no logarithm."""
    counts = np.asarray(counts, dtype=np.int64)
    empty = np.flatnonzero(counts <= 0)
    if len(counts) == 0 or len(empty):
        which = f"class {empty[0]} has no image" if len(empty) else "there are no classes"
        raise DataError(
            f"{which}{f' (nor have {len(empty) - 1} more)' if len(empty) > 1 else ''}: no class prior",
            remedy="leave the class out of the set, or give it an image",
        )
    return counts / counts.sum()


def shot_groups(counts: ArrayLike, *, many_over: int = 100, few_under: int = 20) -> dict[str, NDArray[np.int64]]:
    """The classes with many (> many_over), few (< few_under) and medium (the rest) training images.

    Keys "many", "medium", "few", each with ascending class numbers, int64. Thresholds: Liu et al. 2019 (OLTR).
    """
    counts = np.asarray(counts, dtype=np.int64)
    many, few = counts > many_over, counts < few_under
    groups = {"many": many & ~few, "medium": ~many & ~few, "few": few}
    return {name: np.flatnonzero(is_in) for name, is_in in groups.items()}


def imbalance_factor(counts: ArrayLike) -> float:
    """Images of the largest class over those of the smallest; infinite where a class has none."""
    counts = np.asarray(counts, dtype=np.int64)
    if len(counts) == 0 or counts.max() == 0:
        raise DataError("no images, so no imbalance factor")
    return float(counts.max() / counts.min()) if counts.min() else float("inf")
