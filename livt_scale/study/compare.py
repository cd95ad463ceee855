"""The settings of a study against each other over its seeds: `livt study compare`.

    found = compare_settings(collect_study(loaded))
    found["values"]["lora"]["top1_few"]          {"0": 0.735, "1": …}
    found["verdicts"][0]["says"]                 "lora above all in top1 all"

A setting is a combination of the axes besides `seed`; each is compared with the first by the rule of `comparison`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from livt_scale.study.collect import plain_values, plain_verdict
from livt_scale.study.comparison import Comparison, Measure, judge_all
from livt_scale.study.results_page import COMPARED, COMPARED_VERSION
from livt_scale.util.errors import UsageError

ASKED: tuple[Measure, ...] = ("top1_all", "top1_few")
ASKED_OF_PRETRAINING: tuple[Measure, ...] = ("reconstruction_loss",)


def compare_settings(table: Mapping[str, Any]) -> dict[str, Any]:
    """Values by setting, measure and seed, and the verdicts, as plain JSON. `table`: of `collect_study`.

    Raises UsageError: the study has no axis `seed`, or one setting.
    """
    axes: Mapping[str, list[Any]] = table["axes"]
    varied = [axis for axis, values in axes.items() if axis != "seed" and len(values) > 1]
    if "seed" not in axes or not varied:
        raise UsageError(
            f"the study {table['name']} has {'one setting' if 'seed' in axes else 'no axis seed'}",
            remedy="give it an axis seed and another axis with at least two values",
        )
    first, *others = dict.fromkeys(_setting(run, varied) for run in table["runs"])
    values: dict[str, dict[str, dict[int, float]]] = {}
    minutes: dict[str, list[float]] = defaultdict(list)
    weights: dict[str, int] = {}
    for run in table["runs"]:
        if run["state"] != "done":
            continue
        setting = _setting(run, varied)
        for measure, value in run["measures"].items():
            values.setdefault(setting, {}).setdefault(measure, {})[run["axes"]["seed"]] = value
        minutes[setting].append(sum(run["minutes"].values()))
        weights[setting] = run["num_weights"]
    measured = {measure for of in values.values() for measure in of}
    asked = [m for m in ASKED if m in measured] or ASKED_OF_PRETRAINING
    questions = [Comparison(other, first, measure) for other in others for measure in asked]
    return {
        "format": COMPARED,
        "version": COMPARED_VERSION,
        "name": table["name"],
        "study": table["study"],
        "values": plain_values(values),
        "weights": weights,
        "minutes": {setting: statistics.fmean(each) for setting, each in minutes.items()},
        "missing": {run["name"]: run["why"] or run["state"] for run in table["runs"] if run["state"] != "done"},
        "verdicts": [plain_verdict(asdict(verdict)) for verdict in judge_all(questions, values)],
    }


def _setting(run: Mapping[str, Any], axes: Sequence[str]) -> str:
    return ", ".join(str(run["axes"][axis]) for axis in axes)
