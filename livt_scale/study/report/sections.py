"""The text and numbers of a report besides its plots: sections, the facts at the top, the tables of fitted laws."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from livt_scale.study.report.series import (
    MEASURES,
    OVER,
    Panel,
    cost_of,
    cost_panels,
    curve_panels,
    done,
    scaling_panels,
    short,
    shot_panels,
    value,
)


class Section(NamedTuple):
    """A part of the report with a heading and plots."""

    id: str
    title: str
    text: str
    panels: list[Panel]


class Fact(NamedTuple):
    """One number on top of the page."""

    what: str
    value: str
    more: str


def sections_of(collected: Mapping[str, Any]) -> list[Section]:
    """The sections for which this study has data; the one on scaling also if only a law was requested."""
    scaling = scaling_panels(collected)
    found = [
        Section(
            "scaling",
            "Scaling",
            _scaling_text(scaling),
            scaling,
        ),
        Section(
            "shots",
            "Many, medium and few-shot classes",
            "Classes by their number of training images. Each point is a run.",
            shot_panels(collected),
        ),
        Section(
            "curves",
            "Curves",
            "Drag over a part of a plot to enlarge it, or scroll with Ctrl held down; the circular arrow resets it. "
            "Click a name below a plot to hide its curve. Plots of one kind share their vertical axis.",
            curve_panels(collected),
        ),
        Section(
            "cost",
            "Cost",
            "Time and compute of a run (all stages) and its result.",
            cost_panels(collected),
        ),
    ]
    laws = bool(collected.get("fits"))
    return [section for section in found if section.panels or (section.id == "scaling" and laws)]


def _scaling_text(panels: list[Panel]) -> str:
    text = "Each point is a run."
    if any(panel.band for panel in panels):
        text += " The grey line is the law fitted to all runs, and its shade the 95 % interval."
    if any(of.hollow for panel in panels for of in panel.series):
        text += " Hollow points are the runs of the largest size: a law of the smaller sizes was checked against them."
    return text


def lead_of(collected: Mapping[str, Any]) -> str:
    counts = Counter(str(run["state"]) for run in collected["runs"])
    num = len(collected["runs"])
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items(), key=lambda c: (c[0] != "done", c)))
    axes = " × ".join(f"{axis} ({len(values)})" for axis, values in collected["axes"].items())
    return f"{num} {'run' if num == 1 else 'runs'} of {collected['recipe']} ({states}), over {axes}."


def facts_of(collected: Mapping[str, Any]) -> list[Fact]:
    """The best of each measure, the total cost, and the error of the law on runs that it was not fitted to."""
    facts = []
    for measure, best, what in (
        ("top1_all", max, "Best accuracy"),
        ("reconstruction_loss", min, "Lowest reconstruction loss"),
    ):
        found = [(v, str(run["name"])) for run in done(collected) if (v := value(run, measure)) is not None]
        if found:
            number, name = best(found)
            text = f"{number:.{MEASURES[measure].digits}f}" + (" %" if MEASURES[measure].scale == 100 else "")
            facts.append(Fact(what, text, name))
    minutes = [m for run in collected["runs"] if (m := cost_of(run, "minutes")) is not None]
    if minutes:
        flops = [f for run in collected["runs"] if (f := cost_of(run, "flops")) is not None]
        text = f"{sum(minutes) / 60:.1f} h" if sum(minutes) >= 90 else f"{sum(minutes):.0f} min"
        facts.append(Fact("Training time", text, f"{short(sum(flops))} FLOPs" if flops else f"{len(minutes)} runs"))
    for fit in collected.get("fits", []):
        points = (fit.get("held_out") or {}).get("points", [])
        if points and not fit["problem"] and any(p["relative_error"] is not None for p in points):
            error = max((p["relative_error"] for p in points if p["relative_error"] is not None), key=abs)
            what = f"Law of the {MEASURES[fit['measure']].title.lower()}: error on held-out runs"
            facts.append(
                Fact(what, f"{100 * error:+.1f} %", f"largest of {len(points)}, {fit['held_out'].get('who', '')}")
            )
    return facts


def fit_table(fit: Mapping[str, Any]) -> dict[str, Any]:
    """A fit as the page and the Markdown write it."""
    measure = MEASURES[fit["measure"]]
    over = " and ".join(OVER.get(name, name) for name in fit.get("over", []))
    title = f"{measure.title} over {over}" if over else measure.title
    if fit["problem"]:
        return {"title": title, "problem": str(fit["problem"])}
    intervals = fit.get("intervals") or {}
    held = fit.get("held_out") or {}
    return {
        "title": title,
        "problem": "",
        "law": str(fit["law"]),
        "num_points": fit["num_points"],
        "constants": [
            {"name": _greek(name), "value": f"{number:.4g}", "interval": _interval(intervals.get(name))}
            for name, number in fit["parameters"].items()
        ],
        "who": str(held.get("who", "")),
        "held_out": [
            {
                "name": str(point["name"]),
                "predicted": _shown(point["predicted"], measure.scale),
                "interval": _interval([point.get("low"), point.get("high")], measure.scale),
                "measured": _shown(point["measured"], measure.scale),
                "error": "–" if point["relative_error"] is None else f"{100 * point['relative_error']:+.1f} %",
            }
            for point in held.get("points", [])
        ],
    }


def _shown(number: float, scale: float) -> str:
    return f"{number:.4f}" if scale == 1 else f"{scale * number:.1f} %"


def _interval(ends: Any, scale: float = 1) -> str:
    if not ends or any(end is None for end in ends):
        return "–"
    low, high = (f"{scale * end:.4g}" for end in ends)
    return f"{low} to {high}"


def _greek(name: str) -> str:
    return {"alpha": "α", "beta": "β", "gamma": "γ"}.get(name, name)
