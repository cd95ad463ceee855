"""Half of an evaluation set to choose on, the other half to report on.

What is chosen on a set (a τ, a temperature) looks better there than it is. So whatever `livt eval` chooses, it chooses
on the first half and reports on the second. The halves are the same for every model and world size: they are a function
of the labels in the set's order and of a fixed seed, and split each class evenly (they differ by one image at most).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from livt_scale.evaluation.logits import Outputs
from livt_scale.longtail import shuffled
from livt_scale.util.errors import DataError

SEED = 2022


def halves(outputs: Outputs) -> tuple[Outputs, Outputs]:
    """(to choose on, to report on). Raises DataError where there are not two images."""
    chosen, reported = half_rows(outputs.labels.numpy())
    return outputs.part(chosen), outputs.part(reported)


def half_rows(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of the two halves, ascending, of labels int64 [N]."""
    if len(labels) < 2:
        raise DataError(f"{len(labels)} images cannot be halved", remedy="evaluate on a larger set")
    order = shuffled(len(labels), seed=SEED)
    by_class = order[np.argsort(labels[order], kind="stable")]  # every other one: halves each class and the set
    return np.sort(by_class[0::2]), np.sort(by_class[1::2])
