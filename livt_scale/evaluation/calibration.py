"""Temperature scaling: one number T by which all logits are divided, so that confidence is nearer to accuracy.

    fit_temperature(logits, labels).value     # T above 1: the model was overconfident

Fine-tuning ends with such a fit, in eval.json; `Calibration` is what exports and predictions take from there.

T minimises the mean negative log likelihood of softmax(z / T) on images that nothing is reported on. In β = 1 / T that
is a convex problem of one dimension, so Newton's method in float64, kept inside a bracket, finds its one minimum in a
few passes over the logits; no learning rate, no iterations to tune. Accuracy does not change: the order of the logits
is the same. Source: Guo et al., arXiv 1706.04599, section 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, PositiveFloat, ValidationError, model_validator
from torch import Tensor

from livt_scale.evaluation.holdout import SEED, halves
from livt_scale.evaluation.logits import CHUNK, Outputs

SMALLEST, LARGEST = 1e-3, 1e3  # of T; a model that is always right would have T = 0
PRECISE = 1e-10  # relative, of β
MAX_PASSES = 100


@dataclass(frozen=True)
class Temperature:
    """at_bound: no T inside (1e-3, 1e3) is the best: the likelihood falls or grows without end."""

    value: float
    at_bound: bool = False


class Calibration(BaseModel):
    """What logits are divided by before softmax, and where that is from.

    temperature: None: logits are taken as they are. why: the reason for that. images: how many the fit saw, of the
    set `data` (its name, and the digest of its manifest).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    temperature: PositiveFloat | None = None
    why: str | None = None
    images: int | None = None
    data: str | None = None
    manifest_digest: str | None = None

    @model_validator(mode="after")
    def _has_a_temperature_or_a_reason(self) -> Self:
        if (self.temperature is None) == (self.why is None):
            raise ValueError("either temperature or why is given")
        return self

    def __str__(self) -> str:
        if self.temperature is None:
            return f"no temperature: {self.why}"
        return f"temperature {self.temperature:.3f}, fitted on {self.images} held-out images of {self.data}"


NOT_FITTED = Calibration(why="none was fitted to these weights")


def fit_calibration(logits: Tensor, labels: Tensor, *, data: Mapping[str, Any]) -> Calibration:
    """The fit on float logits [N, C] of images that nothing is reported on; `data`: of which set (`data_lineage`)."""
    fitted = fit_temperature(logits, labels)
    return _calibration({"temperature": fitted.value, "at_bound": fitted.at_bound, "fitted_on": len(labels)}, data)


def recorded_calibration(
    report: Mapping[str, Any], *, checkpoint_digest: str, weights: Literal["raw", "ema"] = "raw"
) -> Calibration:
    """The fit in an eval.json, if it is of exactly this checkpoint and of plain logits.

    `report` is from a file: whatever it holds, the worst outcome is a Calibration without a temperature.
    """
    try:
        evaluated = report["weights"]
        if evaluated["checkpoint_digest"] != checkpoint_digest:
            return Calibration(why=f"eval.json is of {evaluated['checkpoint']}, another checkpoint")
        if report["views"]["number"] != 1 or "adjustment" in report:
            return Calibration(why="eval.json is of averaged views or adjusted logits")
        part = report if weights == "raw" else report["ema"]
        if "temperature" not in part:
            return Calibration(why="eval.json has no fit")
        return _calibration(part["temperature"], report["data"])
    except (KeyError, TypeError, ValidationError):
        return Calibration(why="eval.json has no fit that can be read")


def _calibration(fitted: Mapping[str, Any], data: Mapping[str, Any]) -> Calibration:
    if fitted["at_bound"]:
        return Calibration(why=f"the best one for {fitted['fitted_on']} images is outside {SMALLEST:g} to {LARGEST:g}")
    return Calibration(
        temperature=fitted["temperature"],
        images=fitted["fitted_on"],
        data=data["name"],
        manifest_digest=data["manifest_digest"],
    )


def fit_temperature(logits: Tensor, labels: Tensor) -> Temperature:
    """The T that fits float logits [N, C] to int64 labels [N]."""
    slope, curvature = _derivatives(logits, labels, 1.0)
    if slope == 0:  # no T is better than another, or 1 is the best
        return Temperature(1.0)
    low, high, beta = 1 / LARGEST, 1 / SMALLEST, 1.0
    for bound, is_outside in ((low, lambda s: s >= 0), (high, lambda s: s <= 0)):
        if is_outside(_derivatives(logits, labels, bound)[0]):
            return Temperature(1 / bound, at_bound=True)
    for _ in range(MAX_PASSES):
        low, high = (low, beta) if slope > 0 else (beta, high)
        after = beta - slope / curvature if curvature > 0 else 0.0
        if not low < after < high:
            after = math.sqrt(low * high)
        if abs(after - beta) <= PRECISE * beta:
            break
        beta = after
        slope, curvature = _derivatives(logits, labels, beta)
    return Temperature(1 / beta)


def log_loss(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> float:
    """Mean negative log likelihood, in nats, of float logits [N, C] over `temperature`; in float64."""
    total = 0.0
    for rows, own in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        total += float(torch.nn.functional.cross_entropy(rows.double() / temperature, own, reduction="sum"))
    return total / len(labels)


def temperature_report(outputs: Outputs) -> dict[str, Any]:
    """T fitted on one half; ECE, bins and negative log likelihood before and after on the other. JSON values."""
    chosen, reported = halves(outputs)
    return {"seed": SEED, **fitted_and_reported(chosen, reported)}


def fitted_and_reported(chosen: Outputs, reported: Outputs) -> dict[str, Any]:
    fitted = fit_temperature(chosen.logits, chosen.labels)
    result: dict[str, Any] = {
        "temperature": fitted.value,
        "at_bound": fitted.at_bound,
        "fitted_on": len(chosen.keys),
        "reported_on": len(reported.keys),
    }
    for name, value in (("before", 1.0), ("after", fitted.value)):
        calibration = reported.report(scale=1 / value)["calibration"]
        result[name] = {**calibration, "nll": log_loss(reported.logits, reported.labels, value)}
    return result


def _derivatives(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, float]:
    """First and second derivative by β of the summed log loss of β z: Σ (E z - z_y) and Σ Var z, under softmax(β z)."""
    slope = curvature = 0.0
    for rows, own in zip(logits.split(CHUNK), labels.split(CHUNK), strict=True):
        z = rows.double()
        z = z - z.amax(dim=1, keepdim=True)  # neither changes by a shift
        shares = (beta * z).softmax(dim=1)
        mean = (shares * z).sum(dim=1)
        slope += float((mean - z.gather(1, own[:, None])[:, 0]).sum())
        curvature += float((shares * (z - mean[:, None]).square()).sum())
    return slope, curvature
