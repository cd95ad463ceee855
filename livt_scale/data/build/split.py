"""Splits a source into two sets: a share of each class is held out for evaluation, the rest is for training.

    photos: {folder: {root: /data/pets}, split: {fraction: 0.1, seed: 0}}         a source in a spec

Of a class with n images, round(fraction · n) are held out: at least one where n is 2 or more, and never all. Which ones
follows from the seed and their keys alone: each has a random rank, and the lowest are held out. So an image that is
added later moves at most one other of its class from one part to the other.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt

from livt_scale.config.runtime import RecipePart
from livt_scale.data.build.sources import Source


class Split(RecipePart):
    """How a source becomes a training and an evaluation part."""

    fraction: Annotated[float, Field(gt=0, lt=1, description="of each class, held out for evaluation")]
    seed: NonNegativeInt = Field(0, description="of the choice")


def held_out(source: Source, split: Split) -> NDArray[np.bool_]:
    """[n] Whether each image of `source` is in the evaluation part."""
    ranks = np.array([_rank(source.key(i), split.seed) for i in range(len(source))], dtype=np.uint64)
    chosen = np.zeros(len(source), dtype=np.bool_)
    for c in range(len(source.class_names)):
        images = np.flatnonzero(source.labels == c)
        n = len(images)
        count = min(max(round(split.fraction * n), 1), n - 1)
        if count > 0:
            chosen[images[np.argsort(ranks[images], kind="stable")[:count]]] = True
    return chosen


def _rank(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{key}".encode(), digest_size=8).digest(), "little")
