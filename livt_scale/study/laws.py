"""A study's table and the laws of its measures: what is N, what is D, and the answers as plain JSON for the report.

N is the number of weights of the classifier; D the epochs of pretraining, or the images of the training set, or, where
both vary, the images seen. An accuracy falls short of 1 by an error, and it is the error that the law is about;
predictions are told as accuracies again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from livt_scale.study.fit import Fit, Run, fit_law, held_out

BAND_POINTS = 24
LAWS = {("n",): "E + A·N^−α", ("d",): "E + B·D^−β", ("n", "d"): "E + A·N^−α + B·D^−β"}


def fit_table(table: Mapping[str, Any], *, measures: Sequence[str]) -> list[dict[str, Any]]:
    """One answer a measure. Runs that are not done are left out, and so are those that differ in another axis."""
    return [_fit_measure(table, measure) for measure in measures]


def _fit_measure(table: Mapping[str, Any], measure: str) -> dict[str, Any]:
    is_accuracy = measure.startswith("top1")
    amount, runs, problem = _runs_of(table, measure, is_accuracy=is_accuracy)
    fit = Fit(tuple(runs), problem=problem) if problem else fit_law(runs)
    told: dict[str, Any] = {
        "measure": measure,
        "over": [],
        "law": "",
        "parameters": {},
        "intervals": {},
        "num_points": len(runs),
        "band": {},
        "held_out": {"who": "", "points": []},
        "problem": "" if fit.law else fit.problem,  # why there is no law
        "note": fit.problem if fit.law else "",  # what to know of the one there is
    }
    if fit.law is None:
        return told
    left = f"1 − {measure}" if is_accuracy else "L"
    told |= {
        "over": [{"n": "num_weights", "d": amount}[name] for name in fit.law.over],
        "law": f"{left} = {LAWS[fit.law.over]}",
        "parameters": fit.law.constants,
        "intervals": {name: list(of) for name, of in fit.intervals.items()},
        "band": _bands(fit, amount, is_accuracy=is_accuracy),
        "held_out": _check(runs, is_accuracy=is_accuracy),
    }
    return told


def _runs_of(table: Mapping[str, Any], measure: str, *, is_accuracy: bool) -> tuple[str, list[Run], str]:
    """(what D is, runs with what they fell short of or lost, why they cannot be put together)."""
    done = [run for run in table["runs"] if run["state"] == "done" and measure in run["measures"]]
    epochs = [run["pretrain_epochs"] or run["finetune_epochs"] for run in done]
    images = [run["num_images"] for run in done]
    amount = "epochs" if len(set(images)) < 2 else "num_images" if len(set(epochs)) < 2 else "images_seen"
    seen = {"epochs": epochs, "num_images": images, "images_seen": [e * i for e, i in zip(epochs, images, strict=True)]}
    others = sorted({a for run in done for a in run["axes"]} - {"size", "epochs", "data_fraction", "seed"})
    varied = [axis for axis in others if len({run["axes"].get(axis) for run in done}) > 1]
    runs = []
    for run, d in zip(done, seen[amount], strict=True):
        value = run["measures"][measure]
        runs.append(Run(run["num_weights"], d, 1 - value if is_accuracy else value, run["name"]))
    if not done:
        return amount, [], f"no finished run has {measure}"
    if varied:
        return amount, runs, f"the runs differ in {', '.join(varied)} too: a law is of runs that are alike in all else"
    return amount, runs, ""


def _bands(fit: Fit, amount: str, *, is_accuracy: bool) -> dict[str, Any]:
    """The law along each of its variables, the other one at its largest."""
    assert fit.law is not None
    n, d = (sorted({getattr(run, name) for run in fit.runs}) for name in ("n", "d"))
    found = {}
    of_d = {"num_images": "data_fraction"}.get(amount, amount)  # the axis along which D is drawn
    for name, along, key in (("n", n, "size"), ("d", d, of_d)):
        if name not in fit.law.over:
            continue
        x = np.geomspace(along[0], along[-1] * 2, BAND_POINTS)  # on to what a doubling would bring
        others = np.full(BAND_POINTS, d[-1] if name == "n" else n[-1])
        predicted = fit.predict(*((x, others) if name == "n" else (others, x)))
        mid, low, high = _as_measured(predicted, is_accuracy=is_accuracy)
        at = {amount: d[-1]} if name == "n" else {"num_weights": n[-1]}
        found[key] = {"x": x.tolist(), "mid": mid.tolist(), "low": low.tolist(), "high": high.tolist(), "at": at}
    return found


def _check(runs: Sequence[Run], *, is_accuracy: bool) -> dict[str, Any]:
    """The largest size, predicted from the smaller ones. `problem` where those are too few for a law."""
    fit, largest = held_out(runs)
    if fit.law is None or "n" not in fit.law.over:
        return {
            "who": f"the largest size, {largest[0].n:,.0f} weights",
            "points": [],
            "problem": fit.problem or "one size alone",
        }
    n, d = [run.n for run in largest], [run.d for run in largest]
    mid, low, high = _as_measured(fit.predict(n, d, of_a_run=True), is_accuracy=is_accuracy)
    points = []
    for k, run in enumerate(largest):
        measured = 1 - run.loss if is_accuracy else run.loss
        points.append(
            {
                "name": run.name, "predicted": float(mid[k]), "low": float(low[k]), "high": float(high[k]),
                "measured": measured, "relative_error": float(mid[k] / measured - 1) if measured else None,
            }
        )  # fmt: skip
    return {"who": f"the largest size, {largest[0].n:,.0f} weights", "points": points, "problem": ""}


def _as_measured(predicted: tuple[Any, Any, Any], *, is_accuracy: bool) -> tuple[Any, Any, Any]:
    mid, low, high = predicted
    return (1 - mid, 1 - high, 1 - low) if is_accuracy else (mid, low, high)
