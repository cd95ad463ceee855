"""What `livt eval` reports beyond the plain figures: τ, temperature, and the files that it can write.

All of it is computed from `Outputs` alone (the gallery also reads the images), so it is the same for a model that is
run now and for saved logits.

    --tau 1        the report is about the adjusted logits
    --tau 0,0.5,1  the report is about the plain ones; `tau_sweep` has a row for each
    --tau auto     τ is chosen on one half of the set; everything else is about the other half
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livt_scale.evaluation import adjust, holdout, plots
from livt_scale.evaluation.calibration import fitted_and_reported, temperature_report
from livt_scale.evaluation.logits import About, Outputs
from livt_scale.evaluation.per_class import class_rows, write_csv

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvalReport:
    """The report (JSON values), and the outputs that it is about: adjusted, and of a half where τ was chosen."""

    report: dict[str, Any]
    outputs: Outputs


def make_report(outputs: Outputs, *, tau: str | None = None, temperature: bool = False) -> EvalReport:
    """The report of `outputs`; `tau` as on the command line. UsageError, DataError (no prior, too few images)."""
    taus = (0.0,) if tau is None else adjust.parse_taus(tau)
    about, more = outputs.about, dict[str, Any]()
    baseline = (about.facts.get("weights") or {}).get("baseline") or {}
    if tau is not None and baseline.get("sampling") == "class_balanced":
        _log.warning("the head was trained on class-balanced samples: tau corrects for counts that it did not see")
    if taus is None:
        chosen, reported = holdout.halves(outputs)
        rows = adjust.sweep(chosen, adjust.AUTO_TAUS)
        value = adjust.best(rows)
        chosen, outputs = adjust.adjusted(chosen, value), adjust.adjusted(reported, value)
        more["adjustment"] = _facts(value, about) | {
            "chosen_on": len(chosen.keys),
            "chosen_by": f"top1.{adjust.CRITERION}",
            "seed": holdout.SEED,
        }
        more["tau_sweep"] = rows
        if temperature:
            more["temperature"] = {"seed": holdout.SEED, **fitted_and_reported(chosen, outputs)}
        return EvalReport({**outputs.report(), **more}, outputs)
    if len(taus) == 1 and tau is not None:
        outputs = adjust.adjusted(outputs, taus[0])
        more["adjustment"] = _facts(taus[0], about)
    elif len(taus) > 1:
        more["tau_sweep"] = adjust.sweep(outputs, taus)
    if temperature:
        more["temperature"] = temperature_report(outputs)
    return EvalReport({**outputs.report(), **more}, outputs)


def write_reports(told: EvalReport, folder: Path) -> list[Path]:
    """Write per_class.csv, per_class.png and reliability.png to `folder`; what was written."""
    rows = class_rows(told.outputs)
    table, picture, diagram = folder / "per_class.csv", folder / "per_class.png", folder / "reliability.png"
    write_csv(rows, table)
    plots.classes_by_frequency(rows, picture)
    fitted = told.report.get("temperature")
    if fitted is None:
        panels = {"as it is": told.report["calibration"]}
    else:
        panels = {"T = 1": fitted["before"], f"T = {fitted['temperature']:.3f}": fitted["after"]}
    plots.reliability(panels, diagram)
    return [table, picture, diagram]


def _facts(tau: float, about: About) -> dict[str, Any]:
    formula = adjust.formula(about.loss, about.logit_scale)
    return {"tau": tau, "formula": formula, "trained_with": about.loss}
