"""Logit adjustment after training: removes the prior of the training set from the logits, with strength τ.

    softmax losses     z - τ · log π                         Menon et al., arXiv 2007.07314, section 4.1
    sigmoid losses     z - τ · (log π - log(1 - π))          the same for odds: LiVT's margin with the other sign
    ldam               z - τ · log π / s                     its softmax is over s · z

A softmax trained with plain cross entropy models P(c | x) of the training set; over π it is the posterior under a
uniform prior, so τ = 1 is what theory says for a balanced evaluation. Training counts (90, 10), z = (1, 0): τ = 1 gives
(1 - log 0.9, 0 - log 0.1) = (1.11, 2.30), so the rare class wins.

A model that was trained with the prior beside its logits (`bal_ce`, `lade`, `bal_bce`) has it taken out already, for
its z is what is left. For it τ = 0 is the balanced answer, τ = -1 puts the training prior back (at the τ of its
training, the answer for data that are distributed as the training set), and τ = 1 corrects twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from livt_scale.evaluation.logits import Outputs
from livt_scale.longtail import priors
from livt_scale.losses import LOSSES
from livt_scale.util.errors import DataError, UsageError

AUTO = "auto"
AUTO_TAUS = tuple(round(-1 + 0.1 * k, 1) for k in range(31))  # -1 to 2, the range of every published one
CRITERION = "mean_class"  # what `auto` maximises: mean over classes, as a balanced set would count


def parse_taus(text: str) -> tuple[float, ...] | None:
    """ "0,0.5,1" as numbers; None for "auto". Raises UsageError."""
    if text.strip() == AUTO:
        return None
    try:
        taus = tuple(float(part) for part in text.split(","))
    except ValueError:
        taus = ()
    if not taus or not all(math.isfinite(tau) for tau in taus):
        raise UsageError(f"--tau {text!r} is no number", remedy="give one, several as 0,0.5,1, or auto")
    return tuple(dict.fromkeys(taus))


def margin(loss: str, class_counts: ArrayLike) -> NDArray[np.float64]:
    """[C] what τ = 1 subtracts from the logits of a model trained with `loss`. DataError for a class without images."""
    counts = np.asarray(class_counts, dtype=np.int64)
    log_priors = np.log(priors(counts))
    if LOSSES.find(loss).link == "softmax":
        return log_priors
    if len(counts) == 1:
        raise DataError("a single class has no odds to adjust", remedy="leave --tau out")
    return log_priors - (np.log(counts.sum() - counts) - math.log(counts.sum()))  # 1 - π would lose all digits


def formula(loss: str, logit_scale: float = 1.0) -> str:
    plain = "z - tau * (log(prior) - log(1 - prior))" if LOSSES.find(loss).link == "sigmoid" else "z - tau * log(prior)"
    return plain if logit_scale == 1 else f"{plain} / {logit_scale:g}"


def adjust(logits: Tensor, tau: float, *, loss: str, class_counts: ArrayLike, logit_scale: float = 1.0) -> Tensor:
    """Float [B, C] less τ times the margin, of the same dtype and device."""
    return logits + _shift(tau, loss=loss, class_counts=class_counts, logit_scale=logit_scale).to(logits)


def adjusted(outputs: Outputs, tau: float) -> Outputs:
    """`outputs` with the logits adjusted."""
    return outputs.with_logits(outputs.logits + _shift(tau, **_trained_with(outputs)))


def sweep(outputs: Outputs, taus: Sequence[float]) -> list[dict[str, Any]]:
    """For each τ: {"tau", "top1", "top5"}, the accuracies as `Tally.report` gives them."""
    rows = []
    for tau in taus:
        report = outputs.report(shift=_shift(tau, **_trained_with(outputs)))
        rows.append({"tau": tau, "top1": report["top1"], "top5": report["top5"]})
    return rows


def best(rows: Sequence[dict[str, Any]]) -> float:
    """The τ with the highest `CRITERION`; of equal ones the nearest to 0."""
    return float(min(rows, key=lambda row: (-row["top1"][CRITERION], abs(row["tau"]), row["tau"]))["tau"])


def _trained_with(outputs: Outputs) -> dict[str, Any]:
    about = outputs.about
    return {"loss": about.loss, "class_counts": about.class_counts, "logit_scale": about.logit_scale}


def _shift(tau: float, *, loss: str, class_counts: ArrayLike, logit_scale: float) -> Tensor:
    return torch.from_numpy(-tau * margin(loss, class_counts) / logit_scale).float()
