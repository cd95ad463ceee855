"""How likely each class is drawn: the recipe's part `stages.*.sampling`, and the registry that adds a policy to it.

    @SAMPLERS.register("cubic_root")
    class CubicRoot(Sampler):
        policy: Literal["cubic_root"] = "cubic_root"

        def shares(self, counts, progress):       # int64 [C], t/T in 0 … 1
            weights = counts ** (1 / 3)
            return weights / weights.sum()        # float64 [C], together 1

The policies that ship: Kang et al. 2020 (arXiv 1910.09217), n_c^q / Σ n^q with q = 1, 1/2, 0, and progressive,
(1 − t/T) · from + t/T · to in epoch t of T. With counts (90, 10): instance 0.9 and 0.1, sqrt 0.75 and 0.25,
class_balanced 0.5 each. `livt_scale.data.order.class_balanced` turns shares into an order. Knows no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import AfterValidator, Field, create_model
from pydantic_core import PydanticCustomError

from livt_scale.util.choices import UNKNOWN_NAME, Chosen, Options
from livt_scale.util.errors import nearest
from livt_scale.util.registry import Registry

Counts = npt.NDArray[np.int64]
Shares = npt.NDArray[np.float64]


class Sampler(Options):
    """A policy and its options, as `stages.*.sampling` of a recipe has them."""

    policy: str

    @property
    def each_image_once(self) -> bool:
        """Whether an epoch shows each image once, in the order of `data.order.instance`, and no class is drawn."""
        return False

    def shares(self, counts: Counts, progress: float) -> Shares:
        """[C] Each class's share of an epoch's draws, together 1; none for a class without an image.

        counts: images of each class. progress: t/T at epoch t of the stage's T. The same on every machine, to the bit.
        """
        raise NotImplementedError(f"{type(self).__name__}.shares")


SAMPLERS: Registry[type[Sampler]] = Registry("sampler")


@SAMPLERS.register("instance")
class Instance(Sampler):
    """Each image once an epoch."""

    policy: Literal["instance"] = "instance"

    @property
    def each_image_once(self) -> bool:
        return True

    def shares(self, counts: Counts, progress: float) -> Shares:  # noqa: ARG002
        return normalized(counts.astype(np.float64))


@SAMPLERS.register("class_balanced")
class ClassBalanced(Sampler):
    """The same share for each class that has an image."""

    policy: Literal["class_balanced"] = "class_balanced"

    def shares(self, counts: Counts, progress: float) -> Shares:  # noqa: ARG002
        return normalized((counts > 0).astype(np.float64))


@SAMPLERS.register("sqrt")
class SquareRoot(Sampler):
    """In proportion to the square root of a class's number of images."""

    policy: Literal["sqrt"] = "sqrt"

    def shares(self, counts: Counts, progress: float) -> Shares:  # noqa: ARG002
        return normalized(np.sqrt(counts))


def _without_options(policy: str) -> str:
    names = [name for name, sampler in SAMPLERS.items() if list(sampler.model_fields) == ["policy"]]
    if policy not in names:
        hint = f"give a policy without options: {nearest(policy, names)}"
        raise PydanticCustomError(UNKNOWN_NAME, "{hint}", {"hint": hint})
    return policy


_End = Annotated[str, AfterValidator(_without_options)]

# `from` is a keyword of Python, so these two fields cannot be written as the others are
_FromTo: Any = create_model(  # type: ignore[call-overload]
    "_FromTo",
    __base__=Sampler,
    **{
        "from": (_End, Field(description="the policy that the stage begins with")),
        "to": (_End, Field(description="the policy that it moves towards")),
    },
)


@SAMPLERS.register("progressive")
class Progressive(_FromTo):
    """Moves from one policy to another, epoch by epoch."""

    policy: Literal["progressive"] = "progressive"

    @property
    def _ends(self) -> tuple[Sampler, Sampler]:
        begin, end = (SAMPLERS[getattr(self, name)](policy=getattr(self, name)) for name in ("from", "to"))
        return begin, end

    @property
    def each_image_once(self) -> bool:
        begin, end = self._ends
        return begin == end and begin.each_image_once

    def shares(self, counts: Counts, progress: float) -> Shares:
        begin, end = self._ends
        if begin == end:
            return begin.shares(counts, progress)
        return (1 - progress) * begin.shares(counts, progress) + progress * end.shares(counts, progress)


Sampling = Annotated[Sampler, Chosen(SAMPLERS, key="policy", default="instance")]


def normalized(weights: Shares) -> Shares:
    """`weights` [C] over their sum, added one after the other: np.sum adds in an order that machines differ in."""
    return weights / np.cumsum(weights)[-1]
