"""What the plots of a report show, before anything draws it: panels of labelled series, from a collected study.

    panels = curve_panels(collected)            # a panel for each size, a series for each run, a colour for each length
    panels[0].series[0].x, .y, .names           # what the page, the PNG pictures and the tables all draw from

So a picture in a paper and the page in a browser cannot differ. Nothing here knows a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Run = Mapping[str, Any]


class Measure(NamedTuple):
    """How a measure is written: its axis, and the factor from what is stored."""

    title: str
    axis: str
    scale: float = 1
    digits: int = 4


MEASURES = {
    "reconstruction_loss": Measure("Reconstruction loss", "reconstruction loss (MSE)"),
    "top1_all": Measure("Accuracy, all classes", "top-1 accuracy, all classes (%)", 100, 1),
    "top1_many": Measure("Many-shot", "top-1 accuracy (%)", 100, 1),
    "top1_medium": Measure("Medium-shot", "top-1 accuracy (%)", 100, 1),
    "top1_few": Measure("Few-shot", "top-1 accuracy (%)", 100, 1),
    "ece": Measure("Calibration error", "expected calibration error (%)", 100, 1),
    "pdc": Measure("PDC", "predictive distribution calibration", 1, 2),
}
SHOTS = ("top1_many", "top1_medium", "top1_few")
OVER = {
    "num_weights": "parameters of the model",
    "epochs": "pretraining epochs",
    "num_images": "training images",
    "images_seen": "images seen in pretraining",
}
CURVES = {
    "pretrain": Measure("Pretraining", "pretraining loss"),
    "finetune": Measure("Fine-tuning", "fine-tuning loss"),
    "evaluations": Measure("Evaluations", "top-1 accuracy, all classes (%)", 100, 1),
}
REPEATS = ("seed",)  # an axis of repetitions: it gets no colour and no separate panel


@dataclass(frozen=True)
class Series:
    """Points (and, if `joined`, a line through them) of one colour; colour is its number in the palette."""

    label: str
    colour: int
    x: list[float]
    y: list[float]
    names: list[str]  # of the run behind each point
    joined: bool = False
    hollow: bool = False  # not used for the fit


@dataclass(frozen=True)
class Band:
    """A fitted law and its interval."""

    label: str
    x: list[float]
    mid: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Panel:
    """One small plot."""

    key: str
    title: str
    x_label: str
    y_label: str
    series: list[Series]
    band: Band | None = None
    x_log: bool = False
    categories: list[str] = field(default_factory=list)  # x then counts them: 0, 1, …
    y_range: tuple[float, float] | None = None

    def summary(self) -> str:
        """The plot's description for readers who cannot see it."""
        values = [(y, name) for of in self.series for y, name in zip(of.y, of.names, strict=True)]
        if not values:
            return f"{self.title}: no run has these values yet."
        (low, low_name), (high, high_name) = min(values), max(values)
        runs = len({name for _, name in values})
        text = f"{self.y_label[:1].upper()}{self.y_label[1:]} over {self.x_label}: "
        text += (
            f"{runs} {'run' if runs == 1 else 'runs'}, from {short(low)} ({low_name}) to {short(high)} ({high_name})."
        )
        return f"{text} {self.band.label}." if self.band else text


def ticks_of(panel: Panel) -> list[float]:
    """Of a logarithmic x axis: the values themselves where they are few and short, else 1, 2, 5 times powers of ten."""
    every = sorted({x for of in panel.series for x in of.x})
    if len(every) <= 8 and all(x == round(x) < 1e4 for x in every):
        return every
    low, high = every[0], every[-1]
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    steps = (1, 2, 5) if high / low < 100 else (1,)
    return [step * 10.0**power for power in range(first, last + 1) for step in steps]


def done(collected: Mapping[str, Any]) -> list[Run]:
    return [run for run in collected["runs"] if run["state"] == "done"]


def value(run: Run, measure: str) -> float | None:
    """As it is shown (accuracies in %); None where the run has none, or none that is a number."""
    found = (run.get("measures") or {}).get(measure)
    return None if found is None or not math.isfinite(found) else MEASURES[measure].scale * found


def varied(collected: Mapping[str, Any]) -> list[str]:
    """The axes with more than one value, repetitions left out; the size first, the pretraining length second."""
    axes = [name for name, values in collected["axes"].items() if len(values) > 1 and name not in REPEATS]
    return sorted(axes, key=lambda name: ("size", "epochs").index(name) if name in ("size", "epochs") else 2)


def values_of(collected: Mapping[str, Any], axis: str) -> list[Any]:
    return list(collected["axes"].get(axis, []))


def curve_panels(collected: Mapping[str, Any]) -> list[Panel]:
    """Loss and accuracy by epoch: for each kind a panel for each value of the first axis, with one y range."""
    axes = varied(collected)
    first, second = [*axes, "", ""][:2]
    panels: list[Panel] = []
    for kind, measure in CURVES.items():
        # one evaluation, at the end, is no curve: it is in the table of runs
        least = 2 if kind == "evaluations" else 1
        runs = [run for run in collected["runs"] if len((run.get("curves") or {}).get(kind) or []) >= least]
        row: list[Panel] = []
        for at in values_of(collected, first) or [None]:
            here = [run for run in runs if not first or run["axes"].get(first) == at]
            series = [_curve(run, kind, measure, second, values_of(collected, second)) for run in here]
            title = f"{measure.title}, {first} {at}" if first else measure.title
            key = f"{kind}-{len(row)}"
            row.append(Panel(key, title, f"epoch of {_stage(kind)}", measure.axis, series))
        panels += [_ranged(panel, row) for panel in row if panel.series]
    return panels


def _stage(kind: str) -> str:
    return "pretraining" if kind == "pretrain" else "fine-tuning"


def _curve(run: Run, kind: str, measure: Measure, axis: str, values: Sequence[Any]) -> Series:
    points = [(float(x), measure.scale * y) for x, y in run["curves"][kind] if y is not None and math.isfinite(y)]
    at = run["axes"].get(axis)
    label = f"{axis} {at}" if axis else str(run["name"])
    colour = values.index(at) if at in values else 0
    names = [str(run["name"])] * len(points)
    return Series(label, colour, [x for x, _ in points], [y for _, y in points], names, joined=True)


def _ranged(panel: Panel, row: Iterable[Panel]) -> Panel:
    """The panel with the y range of its row, so that panels side by side can be compared."""
    every = sorted(y for other in row for of in other.series for y in of.y)
    if not every:
        return panel
    room = 0.06 * (every[-1] - every[0]) or 0.05 * abs(every[-1]) or 1
    limits = (every[0] - room, every[-1] + room)
    return Panel(panel.key, panel.title, panel.x_label, panel.y_label, panel.series, y_range=limits)


def scaling_panels(collected: Mapping[str, Any]) -> list[Panel]:
    """Loss and accuracy over size and length; a law's band where one was fitted."""
    panels = []
    for measure in ("reconstruction_loss", "top1_all"):
        for over, axis in (("num_weights", "size"), ("epochs", "epochs"), ("num_images", "data_fraction")):
            panel = _scaling(collected, measure, over, axis)
            if len({x for of in panel.series for x in of.x}) > 1:
                panels.append(panel)
    return panels


def _scaling(collected: Mapping[str, Any], measure: str, over: str, axis: str) -> Panel:
    colour_axis = next((name for name in varied(collected) if name != axis), "")
    fit = next((f for f in collected.get("fits", []) if f["measure"] == measure and not f["problem"]), None)
    held = held_out_names(fit)
    points = [(run, _place(run, over), value(run, measure)) for run in done(collected)]
    series = []
    for number, at in enumerate(values_of(collected, colour_axis) or [None]):
        for out in (False, True):
            mine = [
                (x, y, str(run["name"]))
                for run, x, y in points
                if x is not None and y is not None and (not colour_axis or run["axes"].get(colour_axis) == at)
                if (run["name"] in held) == out
            ]
            label = (f"{colour_axis} {at}" if colour_axis else "runs") + (", held out" if out else "")
            if mine:
                series.append(_of_points(label, number, mine, hollow=out))
    how = MEASURES[measure]
    title = f"{how.title} over {OVER[over]}"
    return Panel(f"{measure}-{over}", title, OVER[over], how.axis, series, band=_band(fit, axis, how.scale), x_log=True)


def _of_points(label: str, colour: int, points: list[tuple[float, float, str]], *, hollow: bool = False) -> Series:
    """points: x, y and the name of the run."""
    xs, ys, names = [p[0] for p in points], [p[1] for p in points], [p[2] for p in points]
    return Series(label, colour, xs, ys, names, hollow=hollow)


def held_out_names(fit: Mapping[str, Any] | None) -> set[str]:
    return {str(point["name"]) for point in ((fit or {}).get("held_out") or {}).get("points", [])}


def _place(run: Run, over: str) -> float | None:
    found = run["axes"].get("epochs") if over == "epochs" else run.get(over)
    return float(found) if isinstance(found, int | float) and found > 0 else None


def _band(fit: Mapping[str, Any] | None, axis: str, scale: float) -> Band | None:
    drawn = ((fit or {}).get("band") or {}).get(axis)
    if not drawn:
        return None
    at = ", ".join(f"{OVER.get(name, name)} {short(number)}" for name, number in (drawn.get("at") or {}).items())
    label = "Fitted law and its interval" + (f" at {at}" if at else "")
    mid, low, high = ([scale * number for number in drawn[name]] for name in ("mid", "low", "high"))
    return Band(label, list(drawn["x"]), mid, low, high)


def shot_panels(collected: Mapping[str, Any]) -> list[Panel]:
    """Many, medium and few by loss function; by the first varied axis where all runs have one loss."""
    losses = values_of(collected, "loss")
    axis = "loss" if len(losses) > 1 else (varied(collected) or [""])[0]
    names = [str(name) for name in values_of(collected, axis)] or ["all runs"]
    series = []
    for number, measure in enumerate(SHOTS):
        points = [
            (float(names.index(str(run["axes"].get(axis, "all runs")))), found, str(run["name"]))
            for run in done(collected)
            if (found := value(run, measure)) is not None and str(run["axes"].get(axis, "all runs")) in names
        ]
        if points:
            series.append(_of_points(MEASURES[measure].title, number, points))
    title = f"Accuracy by frequency of the class, over {axis or 'all runs'}"
    panel = Panel("shots", title, axis or "runs", MEASURES["top1_all"].axis.replace(", all classes", ""), series)
    return [Panel(**{**panel.__dict__, "categories": names})] if series else []


def cost_panels(collected: Mapping[str, Any]) -> list[Panel]:
    """What a result cost: minutes and FLOPs, against accuracy and loss."""
    panels = []
    axes = varied(collected)
    axis = axes[0] if axes else ""
    for measure in ("top1_all", "reconstruction_loss"):
        for cost, label in (("minutes", "training time (minutes)"), ("flops", "training compute (FLOPs)")):
            points = [(run, cost_of(run, cost), value(run, measure)) for run in done(collected)]
            series = []
            for number, at in enumerate(values_of(collected, axis) or [None]):
                mine = [
                    (x, y, str(run["name"]))
                    for run, x, y in points
                    if x and y is not None and (not axis or run["axes"].get(axis) == at)
                ]
                if mine:
                    series.append(_of_points(f"{axis} {at}" if axis else "runs", number, mine))
            how = MEASURES[measure]
            if series:
                title = f"{how.title} over {'time' if cost == 'minutes' else 'compute'}"
                panels.append(Panel(f"{measure}-{cost}", title, label, how.axis, series, x_log=True))
    return panels


def cost_of(run: Run, cost: str) -> float | None:
    """Minutes of all stages together, or FLOPs; None where it is not known."""
    if cost == "minutes":
        stages = [m for m in (run.get("minutes") or {}).values() if m is not None]
        return sum(stages) if stages else None
    return run.get("flops")


def short(number: float) -> str:
    """Few digits, as in 0.5213, 57.3, 12,300 or 4.62 M."""
    size = abs(number)
    for unit, factor in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if size >= factor:
            return f"{number / factor:.4g} {unit}"
    if size >= 1e4:
        return f"{number / 1e3:.3g} k"
    if size >= 1000:
        return f"{number:,.0f}"
    return f"{number:.1f}".removesuffix(".0") if size >= 10 else f"{number:.4g}"
