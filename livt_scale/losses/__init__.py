"""The losses of balanced fine-tuning: logits `[B, C]` and soft targets `[B, C]` to a scalar.

| name    | logits become                             | then                                                       |
| ce      | z                                         | soft cross entropy, mean over the batch                    |
| ls_ce   | z                                         | as ce, targets smoothed by 0.1                             |
| bce     | z                                         | binary cross entropy, sum over classes, mean over batch    |
| bal_ce  | z + τ·log π         (balanced softmax)    | as ce                                                      |
| bal_bce | z + τ·(log π - log(1 - π))    (LiVT)      | as bce                                                     |
| cb_ce   | z                                         | as ce, weighted by (1 - β) / (1 - β^n), with mean 1        |
| cb_bce  | z                                         | as bce, the term of class c weighted as in cb_ce           |
| ldam    | s·z, less s·m on the true class           | as ce; m ∝ n^(-1/4), the largest 0.5                       |
| mislas  | z                                         | as ce, smoothed by 0.3 (largest class) to 0 (smallest)     |
| lade    | z + log π                                 | as ce, plus 0.1 times a regulariser over the batch         |
| focal   | z                                         | as bce, each term weighted by (1 - its probability)^γ      |

π_c = n_c / N is the share of class c in the training set. What a loss does to logits it does in training alone;
prediction uses z. With counts (90, 10) the Bal-BCE margins are ±log 9: the frequent class must earn its odds.
Half-precision logits are computed in float32, numbers by class in float64. `builtin` has each loss with its options,
`formulas` the formulas on tensors. docs/losses.md has the derivation, the options, and which targets each takes;
docs/extending.md shows how to add one.

Source: LiVT, arXiv 2212.02015, equations 6 to 13, and its public code; balanced softmax, 2007.10740; logit adjustment,
2007.07314; class-balanced, 1901.05555; LDAM, 1906.07413; MiSLAS, 2104.00466; LADE, 2012.00321; focal, 1708.02002.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from pydantic import ValidationError

from livt_scale.losses import builtin  # noqa: F401 - registers the losses that ship
from livt_scale.losses.options import LOSSES, Criterion, LossOptions
from livt_scale.losses.options import formulas as on_tensors
from livt_scale.util.choices import UNKNOWN_OPTION, choose
from livt_scale.util.errors import UsageError

if TYPE_CHECKING:
    from livt_scale.losses.formulas import ClassLoss

__all__ = ["LOSSES", "Criterion", "LossOptions", "make", "make_loss"]


def make(name: str, class_counts: Sequence[int] | npt.ArrayLike, **options: Any) -> ClassLoss:
    """The loss of that name as an nn.Module, for a training set with `class_counts` [C] images of each class.

    The module takes logits, float [B, C], with soft targets, float [B, C], or labels, int64 [B], and returns a scalar
    in float32 or better. It has no parameters; what it keeps of the classes follows the logits to their device.
    `options`: as of `make_loss`. Raises UsageError for an unknown name or option and an impossible value, DataError for
    a class without images; calling the module raises UsageError for other shapes.
    """
    criterion, f = make_loss(name, class_counts, **options), on_tensors()
    loss: ClassLoss = criterion if isinstance(criterion, f.ClassLoss) else f.CustomLoss(name, criterion)
    return loss


def make_loss(name: str, class_counts: Sequence[int] | npt.ArrayLike, **options: Any) -> Criterion:
    """The loss of that name for a training set with `class_counts` images of each class.

    `options`: the fields of the loss's class, as `tau` (strength of the margin, 1 by default) for `bal_ce` and
    `bal_bce`; an option that is None counts as not given. Raises UsageError for an unknown name or option and an
    impossible value, DataError for a class without images.
    """
    LOSSES.find(name)
    try:
        loss = choose(LOSSES, {**options, "name": name})
    except ValidationError as error:
        raise _usage_error(name, error) from None
    return loss.criterion(class_counts)


def _usage_error(name: str, error: ValidationError) -> UsageError:
    first = error.errors(include_url=False)[0]
    option = ".".join(map(str, first["loc"]))
    if first["type"] == UNKNOWN_OPTION:
        return UsageError(f"the loss {name!r} does not take {option!r}", remedy=str(first["ctx"]["hint"]))
    if first["type"] == "missing":
        return UsageError(f"the loss {name!r} needs the option {option!r}, which has no default", remedy="give it")
    return UsageError(f"{option} is {first['input']}", remedy=first["msg"].replace("Input should be", "give a value"))
