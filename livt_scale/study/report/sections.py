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
    found = [
        Section(
            "scaling",
            "Scaling",
            "Each point is a run. The grey line is the law of all runs, its shade the interval; hollow points are the "
            "size that a law of the smaller ones foretold.",
            scaling_panels(collected),
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
            "Drag over a part to enlarge it, or turn the wheel with Ctrl held down; the circling arrow goes back. "
            "A click on a name below a plot hides it. Plots of one kind share their vertical axis.",
            curve_panels(collected),
        ),
        Section(
            "cost", "Cost", "What a run took, all its stages together, and what came of it.", cost_panels(collected)
        ),
    ]
    laws = bool(collected.get("fits"))
    return [section for section in found if section.panels or (section.id == "scaling" and laws)]


def lead_of(collected: Mapping[str, Any]) -> str:
    counts = Counter(str(run["state"]) for run in collected["runs"])
    num = len(collected["runs"])
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items(), key=lambda c: (c[0] != "done", c)))
    axes = " × ".join(f"{axis} ({len(values)})" for axis, values in collected["axes"].items())
    return f"{num} {'run' if num == 1 else 'runs'} of {collected['recipe']} ({states}), over {axes}."


def facts_of(collected: Mapping[str, Any]) -> list[Fact]:
    """The best of each measure, what it all took, and how well the law foretold what it had not seen."""
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
        if points and not fit.get("problem") and any(p["relative_error"] is not None for p in points):
            error = max((p["relative_error"] for p in points if p["relative_error"] is not None), key=abs)
            what = f"Law of the {MEASURES[fit['measure']].title.lower()}: error on what was held out"
            facts.append(
                Fact(what, f"{100 * error:+.1f} %", f"largest of {len(points)}, {fit['held_out'].get('who', '')}")
            )
    return facts


def fit_table(fit: Mapping[str, Any]) -> dict[str, Any]:
    """A fit as the page and the Markdown write it."""
    measure = MEASURES[fit["measure"]]
    over = " and ".join(OVER.get(name, name) for name in fit.get("over", []))
    title = f"{measure.title} over {over}"
    if fit.get("problem"):
        return {"title": title, "problem": str(fit["problem"])}
    intervals = fit.get("intervals") or {}
    held = fit.get("held_out") or {}
    return {
        "title": title,
        "problem": "",
        "note": str(fit.get("note") or ""),
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
