"""Where pretraining begins to pay: the gain of the two stages over labels alone for the same compute, and its zero.

    found = crossings_of(collect_study(loaded))      of a study with the axis start, and both of its values
    found["lines"][0]                                {"over": "pretrain_epochs", "at_zero": 71.3, "low": 50.2, …}

The gain of a seed is its top-1 after both stages less its top-1 from scratch. Over an axis that grows (epochs of
pretraining, images, weights), the line gain = a + b · ln x is fitted by least squares to all seeds, and crosses 0 at
exp(-a / b). Its interval is Fieller's (1954): those x at which the line's own 95 % interval, by Student's t, holds 0.
Where b is not different from 0 with that confidence, no part of the axis can be left out, and there is no interval.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from livt_scale.study.collect import plain_verdict
from livt_scale.study.comparison import CONFIDENCE, interval
from livt_scale.study.definition import FROM_SCRATCH
from livt_scale.study.results_page import CROSSINGS, CROSSINGS_VERSION
from livt_scale.util.errors import UsageError

MEASURES = ("top1_all", "top1_few")
GROWING = {"epochs": "pretrain_epochs", "data_fraction": "num_images", "size": "num_weights"}  # an axis: a row's field


@dataclass(frozen=True)
class Crossing:
    """at_zero: x of gain 0, None for a flat line; low, high: its interval, None if no part of the axis is excluded."""

    at_zero: float | None
    low: float | None
    high: float | None
    slope: float  # of the gain, for an x that is e times as large


def crossing(xs: Sequence[float], gains: Sequence[float]) -> Crossing | None:
    """xs, gains: of each seed, x > 0. None: fewer than two different x, or three points."""
    x, y = np.log(np.asarray(xs, dtype=np.float64)), np.asarray(gains, dtype=np.float64)
    spread = float(((x - x.mean()) ** 2).sum())
    if len(x) < 3 or spread == 0:
        return None
    slope = float(((x - x.mean()) * y).sum()) / spread if np.ptp(y) > 0 else 0.0
    middle, mean = float(x.mean()), float(y.mean())
    residuals = y - mean - slope * (x - middle)
    variance = float((residuals**2).sum()) / (len(x) - 2)
    bound = float(stdtrit(len(x) - 2, (1 + CONFIDENCE) / 2)) ** 2 * variance
    # (mean + slope v)² = bound (1/n + v²/spread), with v = ln x - middle
    leading = slope**2 - bound / spread
    inside = bound * (mean**2 / spread + leading / len(x))  # of the root: never below 0 where leading is not
    at = None if slope == 0 else _exp(middle - mean / slope)
    if leading <= 0:
        return Crossing(at, None, None, slope)
    ends = [(-mean * slope + sign * math.sqrt(inside)) / leading for sign in (-1, 1)]
    low, high = (_exp(middle + end) for end in ends)
    return Crossing(at, low, high, slope)


def _exp(value: float) -> float:
    return math.exp(min(max(value, -700.0), 700.0))


def crossings_of(table: Mapping[str, Any], kept: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gains by setting, and a line for each growing quantity and setting of the rest, as plain JSON.

    table: of `collect_study`. kept: what this returned before, for runs that are on another machine, or gone: counted
    where the recipe and the images are the same. Raises UsageError: the study has not both starts.
    """
    axes: Mapping[str, list[Any]] = table["axes"]
    if set(axes.get("start", ())) != {"pretraining", FROM_SCRATCH}:
        raise UsageError(
            f"the study {table['name']} does not compare pretraining with labels alone",
            remedy=f"give it axes.start: [pretraining, {FROM_SCRATCH}]",
        )
    rest = [axis for axis, values in axes.items() if axis not in ("seed", "start") and len(values) > 1]
    pairs: dict[str, list[Mapping[str, Any]]] = defaultdict(list)  # by setting and seed; the two stages come first
    for run in sorted(table["runs"], key=lambda run: run["axes"]["start"] == FROM_SCRATCH):
        pairs[_key({axis: run["axes"][axis] for axis in rest}, run["axes"].get("seed", 0))].append(run)
    own = [_gain(rest, *pair) for pair in pairs.values() if not any(map(_why_not, pair, reversed(pair)))]
    by_key = {_key(gain["setting"], gain["seed"]): gain for gain in (*_still_true(kept or {}, pairs, own), *own)}
    gains = [by_key[key] for key in pairs if key in by_key]
    lost = [pair for key, pair in pairs.items() if key not in by_key]
    missing = {
        run["name"]: _why_not(run, other) for pair in lost for run, other in zip(pair, reversed(pair), strict=True)
    }
    return {
        "format": CROSSINGS,
        "version": CROSSINGS_VERSION,
        "name": table["name"],
        "study": table["study"],
        "settings": _settings(gains),
        "lines": [line for axis in GROWING if axis in rest for line in _lines(axis, gains)],
        "missing": {name: why for name, why in missing.items() if why},
        "gains": gains,
    }


def _key(setting: Mapping[str, Any], seed: int) -> str:
    return json.dumps([setting, seed], sort_keys=True)


def _why_not(run: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Why a run does not count beside the other of its pair; empty: it does."""
    if run["state"] != "done":
        return run["why"] or run["state"]
    differ = other["state"] == "done" and run["images"] != other["images"]
    return f"it read other images than {other['name']}" if differ else ""


def _gain(rest: Sequence[str], run: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, Any]:
    """Of one seed: what its pretraining was of, both accuracies, and the minutes of training steps of both."""
    measures = [m for m in MEASURES if m in run["measures"] and m in alone["measures"]]
    return {
        "setting": {axis: run["axes"][axis] for axis in rest},
        "seed": run["axes"].get("seed", 0),
        **{field: run[field] for field in GROWING.values()},
        "labels_epochs": alone["finetune_epochs"],
        "both": {m: run["measures"][m] for m in measures},
        "labels": {m: alone["measures"][m] for m in measures},
        "recipes": [run["recipe"], alone["recipe"]],
        "images": run["images"],
        "minutes": sum(sum(one["minutes"].values()) for one in (run, alone)),
    }


def _still_true(
    kept: Mapping[str, Any], pairs: Mapping[str, Sequence[Mapping[str, Any]]], own: Sequence[Mapping[str, Any]]
) -> list[Mapping[str, Any]]:
    """Those gains of `kept` whose runs would be the same now: their recipes, and the images of the same setting."""
    images = {str(gain["setting"]): gain["images"] for gain in own}
    found = []
    for gain in kept.get("gains", ()):
        pair = pairs.get(_key(gain["setting"], gain["seed"]), ())
        same = [run["recipe"] for run in pair] == gain["recipes"]
        untouched = all(run["state"] in ("done", "not run") for run in pair)  # one that failed here stays named
        if same and untouched and images.get(str(gain["setting"]), gain["images"]) == gain["images"]:
            found.append(gain)
    return found


def _settings(gains: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each setting, and the interval of its gain."""
    by_setting: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in gains:
        by_setting[str(one["setting"])].append(one)
    found = []
    for of in by_setting.values():
        row: dict[str, Any] = {name: of[0][name] for name in ("setting", *GROWING.values(), "labels_epochs")} | {
            "seeds": len(of)
        }
        for measure in of[0]["both"]:
            differences = [one["both"][measure] - one["labels"][measure] for one in of]
            means = {side: statistics.fmean(one[side][measure] for one in of) for side in ("both", "labels")}
            mean, low, high = interval(differences)
            row[measure] = plain_verdict({**means, "gain": mean, "low": low, "high": high})
        found.append(row)
    return found


def _lines(axis: str, gains: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Over `axis`, one for each setting of the other axes and each measure."""
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in gains:
        groups[str(_without(axis, one["setting"]))].append(one)
    found = []
    for group in groups.values():
        for measure in MEASURES:
            of = [one for one in group if measure in one["both"]]  # a set may have no few-shot class
            xs = [one[GROWING[axis]] for one in of]
            line = crossing(xs, [one["both"][measure] - one["labels"][measure] for one in of]) if of else None
            if line is not None:
                found.append({
                    "over": GROWING[axis], "at": _without(axis, group[0]["setting"]), "measure": measure,
                    "from": min(xs), "to": max(xs), "num_points": len(xs), **asdict(line),
                })  # fmt: skip
    return found


def _without(axis: str, setting: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in setting.items() if name != axis}
