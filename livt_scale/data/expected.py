"""Is a set what was published under its name? Compared by the images of each class, before a shard is written.

A list file of another version, a folder that lacks images or classes in another order would all build, and train, and
be found out months later by a number that nobody can reproduce.
"""

from __future__ import annotations

import numpy as np

from livt_scale.errors import SourceError
from livt_scale.longtail import Counts

REMEDY = "compare list file and folder with what the authors publish; to build it all the same: --ignore-expected"
SHOWN = 5  # classes that a complaint names


def check_expected(
    name: str,
    counts: Counts,
    *,
    images: int,
    classes: int,
    known: Counts | None = None,
    largest: int | None = None,
    smallest: int | None = None,
) -> None:
    """Raise SourceError where `counts` [C] are not the published ones.

    known [C]: those of each class, where there are; largest, smallest: images of these classes, for sets whose numbers
    are published no closer.
    """
    if len(counts) != classes:
        raise SourceError(f"set {name} has {len(counts)} classes, the published set {classes}", remedy=REMEDY)
    total = int(counts.sum())
    if known is not None and (differ := np.flatnonzero(counts != known)).size:
        same = np.array_equal(np.sort(counts), np.sort(known))
        order = "; the same numbers in another order, so the classes are numbered otherwise" if same else ""
        raise SourceError(
            f"set {name} has {total:,} images, the published set {int(known.sum()):,}; "
            f"{differ.size} of {classes} classes differ ({_first(counts, known, differ)}){order}",
            remedy=REMEDY,
        )
    if total != images:
        raise SourceError(f"set {name} has {total:,} images, the published set {images:,}", remedy=REMEDY)
    for which, wanted, found, c in (
        ("largest", largest, counts.max(), counts.argmax()),
        ("smallest", smallest, counts.min(), counts.argmin()),
    ):
        if wanted is not None and found != wanted:
            raise SourceError(
                f"set {name} has {total:,} images as the published set, but its {which} class, {c}, has {found} "
                f"of them and the published one's {wanted}",
                remedy=REMEDY,
            )


def _first(counts: Counts, known: Counts, differ: Counts) -> str:
    first = ", ".join(f"class {c}: {counts[c]} instead of {known[c]}" for c in differ[:SHOWN])
    return first + (f" and {differ.size - SHOWN} more" if differ.size > SHOWN else "")
