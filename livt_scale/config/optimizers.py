"""The interface of an optimizer: a class of options with `build`, in the registry OPTIMIZERS. Needs no torch.

    @OPTIMIZERS.register("heavy_ball")
    class HeavyBall(OptimizerOptions):
        name: str = "heavy_ball"
        momentum: float = 0.9

        def build(self, groups): ...       # groups of `optim.param_groups`, to a torch.optim.Optimizer

In a recipe, `optimizer: adamw` and `optimizer: {name: adamw}` are the same. Those that ship are built by
`livt_scale.optim`; adamw and lars take their options from the stage (`betas`, `momentum`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from livt_scale.util.choices import Chosen, Options
from livt_scale.util.registry import Registry

if TYPE_CHECKING:
    import torch


class OptimizerOptions(Options):
    """An optimizer and its options, as `stages.finetune.optimizer` of a recipe has them."""

    name: str

    # tensors of its size that are kept of each parameter, from which `livt plan` estimates memory
    moments: ClassVar[int] = 2

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over `groups`, of `optim.param_groups`. Their rates are set at every step.

        What it keeps of a parameter is made here, as tensors in `optimizer.state[parameter]`: a checkpoint is read into
        these tensors, before the first step.
        """
        raise NotImplementedError(f"{type(self).__name__}.build")


OPTIMIZERS: Registry[type[OptimizerOptions]] = Registry("optimizer")


@OPTIMIZERS.register("adamw")
class AdamW(OptimizerOptions):
    """AdamW with the stage's `betas`."""

    name: Literal["adamw"] = "adamw"


@OPTIMIZERS.register("lars")
class Lars(OptimizerOptions):
    """LARS with the stage's `momentum`."""

    name: Literal["lars"] = "lars"
    moments: ClassVar[int] = 1


@OPTIMIZERS.register("sgd")
class Sgd(OptimizerOptions):
    """SGD with momentum."""

    name: Literal["sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="how much of the last step's stays")
    moments: ClassVar[int] = 1


AnyOptimizer = Annotated[OptimizerOptions, Chosen(OPTIMIZERS, default="adamw", short=True)]
