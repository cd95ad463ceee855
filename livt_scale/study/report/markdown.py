"""A report as Markdown: the same words, tables and pictures as the page's, for a paper or a repository."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from livt_scale.study.report.sections import Section, facts_of, fit_table, lead_of
from livt_scale.study.report.series import MEASURES, cost_of, short, value

Run = Mapping[str, Any]
MEASURED = ("reconstruction_loss", "top1_all", "top1_many", "top1_medium", "top1_few")


def markdown(collected: Mapping[str, Any], sections: list[Section], *, links: Callable[[Run], str]) -> str:
    """The document. Pictures are named as `write_report` names them; `links` gives a run's directory as a URL."""
    lines = [f"# Study {text(collected['name'])}", "", text(lead_of(collected)), ""]
    lines += [f"- {text(f.what)}: **{text(f.value)}** ({text(f.more)})" for f in facts_of(collected)]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        if section.panels:
            lines.append(f"![{section.title}](report-{section.id}.png)")
        lines += [""] + [f"- {text(panel.title)}. {text(panel.summary())}" for panel in section.panels]
        if section.id == "scaling":
            lines += [line for fit in collected.get("fits", []) for line in _fit(fit)]
    lines += ["", "## Runs", "", *_runs(collected, links), "", "## How the numbers came about", ""]
    lines += [f"- recipe: {text(collected['recipe'])}", f"- command: {text(collected.get('command', ''))}"]
    lines += [f"- axis {text(axis)}: {text(', '.join(map(str, of)))}" for axis, of in collected["axes"].items()]
    lines += [f"- {text(name)} {text(version)}" for name, version in collected.get("versions", {}).items()]
    return "\n".join(lines) + "\n"


def text(said: object) -> str:
    """Untrusted text as plain text in Markdown: no HTML, no markup, no line breaks."""
    one_line = re.sub(r"\s+", " ", str(said))
    return re.sub(r"([\\`*\[\]<>|#&~$])", r"\\\1", one_line).replace("_", r"\_")


def _fit(fit: Mapping[str, Any]) -> list[str]:
    table = fit_table(fit)
    lines = ["", f"### {table['title']}", ""]
    if table["problem"]:
        return [*lines, f"No law: {text(table['problem'])}"]
    lines += [f"{text(table['law'])}, fitted to {table['num_points']} runs.", ""]
    lines += ["| constant | value | interval |", "| --- | ---: | ---: |"]
    lines += [f"| {text(row['name'])} | {row['value']} | {row['interval']} |" for row in table["constants"]]
    if table["held_out"]:
        lines += ["", f"Held out from the fit: {text(table['who'])}.", ""]
        lines += ["| run | predicted | interval | measured | error |", "| --- | ---: | ---: | ---: | ---: |"]
        lines += [
            f"| {text(r['name'])} | {r['predicted']} | {r['interval']} | {r['measured']} | {r['error']} |"
            for r in table["held_out"]
        ]
    return lines


def _runs(collected: Mapping[str, Any], links: Callable[[Run], str]) -> list[str]:
    measures = [m for m in MEASURED if any(value(run, m) is not None for run in collected["runs"])]
    heads = [MEASURES[m].title + (" %" if MEASURES[m].scale == 100 else "") for m in measures]
    lines = ["| " + " | ".join(["run", "state", "parameters", *heads, "minutes", "why"]) + " |"]
    lines.append("| --- | --- |" + " ---: |" * (len(heads) + 2) + " --- |")
    for run in collected["runs"]:
        cells = [f"[{text(run['name'])}]({links(run)})", text(run["state"])]
        cells.append(short(run["num_weights"]) if run.get("num_weights") else "–")
        for m in measures:
            number = value(run, m)
            cells.append("–" if number is None else f"{number:.{MEASURES[m].digits}f}")
        minutes = cost_of(run, "minutes")
        cells += ["–" if minutes is None else f"{minutes:.1f}", text(run.get("why", ""))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines
