"""Published sizes of the long-tailed sets, for a plan that is made where the shards are not.

Sources: ImageNet-LT and Places-LT, arXiv 1904.05160; iNaturalist 2018's own annotations; LiVT, arXiv 2212.02015.
"""

from __future__ import annotations

PUBLISHED: dict[str, tuple[str, int, int]] = {  # a word of data.train: name, training images, classes
    "imagenet-lt": ("ImageNet-LT", 115_846, 1000),
    "imagenet-bal": ("ImageNet-BAL", 160_000, 1000),
    "inat18": ("iNaturalist 2018", 437_513, 8142),
    "places-lt": ("Places-LT", 62_500, 365),
}


def published(location: str) -> tuple[str, int, int] | None:
    """(name, images, classes) of the set that a folder or URL of shards is named after; None: of none."""
    name = location.lower().replace("_", "-")
    return next((found for word, found in PUBLISHED.items() if word in name), None)
