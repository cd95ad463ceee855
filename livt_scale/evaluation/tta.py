"""Test-time views: the model sees several views of an image, and its outputs for them are averaged.

    --views 1     the centre crop: the evaluation of the papers
    --views 2     the centre crop and its mirror image
    --views 5     the centre crop and the four corners of the resized image, T x T px each
    --views 10    those five and their mirror images ("ten-crop", Krizhevsky et al. 2012)

All are cut from the evaluation's one resized image (shorter side T / 0.875; above 224 px it is T, and the corners of a
square image are then its centre again). `--resize` sets its shorter side: 248 with 5 views of 224 px is LIFT's
test-time ensembling (arXiv 2309.10019; `tte` of its public code), whose crops do not start at the border of a patch.
They are averaged on the rank that has the image, before anything is counted, so each image still counts once, whatever
the world size. Two ways to average:

    logits   mean of z: up to normalisation the geometric mean of the softmax probabilities, and of the odds of sigmoids
    probs    mean of softmax(z); what is handed on is its logarithm, so that softmax gives the mean back
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from livt_scale.config.recipe import Data
from livt_scale.data.loader import normalise
from livt_scale.data.settings import ImageSettings
from livt_scale.util.errors import UsageError, nearest

Average = Literal["logits", "probs"]
NUMBERS = {1: (1, False), 2: (1, True), 5: (5, False), 10: (5, True)}  # views: (crops, each of them mirrored too)


@dataclass(frozen=True)
class Views:
    """How many views of each image, and how they are averaged. Raises UsageError for other numbers or words."""

    number: int = 1
    average: Average = "logits"
    resize_px: int | None = None  # shorter side of the image that views are cut from; None: as the evaluation has it

    def __post_init__(self) -> None:
        if self.number not in NUMBERS:
            known = ", ".join(map(str, NUMBERS))
            raise UsageError(f"{self.number} views of an image are not defined", remedy=f"give --views one of {known}")
        if self.average not in get_args(Average):
            raise UsageError(
                f"views cannot be averaged by {self.average!r}", remedy=nearest(self.average, get_args(Average))
            )

    @property
    def crops(self) -> int:
        return NUMBERS[self.number][0]

    @property
    def mirrored(self) -> bool:
        return NUMBERS[self.number][1]

    def facts(self) -> dict[str, Any]:
        """For reports, as JSON values."""
        resized = {} if self.resize_px is None else {"resize_px": self.resize_px}
        return {"number": self.number, "average": self.average, **resized}

    def settings(self, settings: ImageSettings) -> ImageSettings:
        """`settings` with the image resized as these views want it. UsageError: it would be smaller than a crop."""
        if self.resize_px is None:
            return settings
        if self.resize_px < settings.image_px:
            raise UsageError(
                f"--resize {self.resize_px}: the model takes {settings.image_px} px",
                remedy=f"give at least {settings.image_px}",
            )
        crop_pct = settings.image_px / (self.resize_px + 0.5)  # the resized side is rounded down
        return replace(settings, data=settings.data.model_copy(update={"crop_pct": crop_pct}))

    def logits(self, infer: Callable[[Tensor], Tensor], images: Tensor, data: Data) -> Tensor:
        """The output of `infer` for each image, averaged over its views: float `[B, C]`, by `number` calls of `infer`.

        images: uint8 `[B · crops, C, T, T]`, the crops of an image neighbours, as `eval_batches` gives them.
        """
        answers = (infer(view) for view in self._each(images, data))
        if self.number == 1:
            return next(answers)
        if self.average == "logits":
            total = sum((a.double() for a in answers), start=torch.zeros((), dtype=torch.float64))
            return (total / self.number).float()
        shares = [a.double().log_softmax(dim=1) for a in answers]
        return (torch.stack(shares).logsumexp(dim=0) - math.log(self.number)).float()

    def _each(self, images: Tensor, data: Data) -> Iterator[Tensor]:
        """The views one after another, normalised: each float32 [B, C, T, T]."""
        for crop in images.unflatten(0, (-1, self.crops)).unbind(dim=1):
            view = normalise(crop, data.mean, data.std, torch.float32)
            yield view
            if self.mirrored:
                yield view.flip(-1)
