"""95 % intervals of accuracies on a finite number of images.

    wilson(right=31, images=40)                     # (0.625, 0.877)
    of_mean([31, 1, 2], [40, 1, 4])                 # of the mean over three classes, each counting the same

Of a share it is Wilson's (1927). Of a mean over classes it is normal, from the variances of the classes' shares with
one more right and one more wrong image each: a class of which all images are right still counts as uncertain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Z95 = 1.959964


def wilson(right: float, images: int) -> tuple[float, float] | None:
    """None where there are no images."""
    if images <= 0:
        return None
    share, z2 = right / images, Z95**2 / images
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / images + z2 / (4 * images)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def of_mean(right: Sequence[float], images: Sequence[int]) -> tuple[float, float] | None:
    """Of the mean of right/images over the classes that have images; None where no class has any."""
    seen = [(r, n) for r, n in zip(right, images, strict=True) if n > 0]
    if not seen:
        return None
    mean = sum(r / n for r, n in seen) / len(seen)
    smoothed = [((r + 1) / (n + 2), n) for r, n in seen]
    half = Z95 * math.sqrt(sum(p * (1 - p) / n for p, n in smoothed)) / len(seen)
    return max(0.0, mean - half), min(1.0, mean + half)
