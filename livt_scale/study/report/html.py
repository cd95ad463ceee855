"""`livt study report`: a collected study as one HTML page that needs no network, pictures, and Markdown for papers.

    write_report(collected, folder)   # report.html, report.md, report-curves.png, report-scaling.png, …

Pure except for reading the reconstructions and writing the files. Text from runs (names, reasons, paths) is untrusted:
it is escaped in the page by jinja2, in its script data and in Markdown, and the page's content security policy forbids
every fetch and every script except the two in the page, which are identified by their SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

from livt_scale.study.report import interactive
from livt_scale.study.report.figures import draw_panels
from livt_scale.study.report.markdown import markdown
from livt_scale.study.report.sections import Section, facts_of, fit_table, lead_of, sections_of
from livt_scale.study.report.series import MEASURES, Panel, cost_of, short, value
from livt_scale.study.report.thumbnails import reconstructions
from livt_scale.study.table import FORMAT, VERSION
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import DataError

TABLE_MEASURES = ("reconstruction_loss", "top1_all", "top1_many", "top1_medium", "top1_few", "ece", "pdc")
HEADS = {
    "reconstruction_loss": "rec. loss", "top1_all": "all %", "top1_many": "many %", "top1_medium": "medium %",
    "top1_few": "few %", "ece": "ECE %", "pdc": "PDC",
}  # fmt: skip


def write_report(collected: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.html, report.md and report-SECTION.png into `folder`; returns their paths, the page first.

    Raises DataError where `collected` is not what `livt study collect` writes, UsageError where Bokeh is missing.
    """
    check(collected)
    sections = sections_of(collected)
    page = html(collected, folder, sections)
    write_atomic(folder / "report.html", page.encode())
    write_atomic(folder / "report.md", markdown(collected, sections, links=lambda run: link(run, folder)).encode())
    drawn = {folder / f"report-{section.id}.png": section.panels for section in sections if section.panels}
    for path, panels in drawn.items():
        draw_panels(panels, path)
    return [folder / "report.html", folder / "report.md", *drawn]


def check(collected: Mapping[str, Any]) -> None:
    """Raises DataError unless `collected` is a collected study of this format and version."""
    if not isinstance(collected, Mapping) or collected.get("format") != FORMAT:
        raise DataError("this is not a collected study", remedy="make one with `livt study collect`")
    if collected.get("version") != VERSION:
        raise DataError(
            f"the collected study has version {collected.get('version')!r}, this livt_scale reads {VERSION}",
            remedy="collect it again with `livt study collect`",
        )
    missing = [name for name in ("name", "recipe", "axes", "runs") if name not in collected]
    if missing:
        raise DataError(
            f"the collected study lacks {', '.join(missing)}", remedy="collect it again with `livt study collect`"
        )


def html(collected: Mapping[str, Any], folder: Path, sections: list[Section]) -> str:
    """The complete page. Links lead from `folder` to the runs' directories."""
    library = interactive.library().replace("</script", "<\\/script")  # first: it reports what is missing

    import bokeh
    from markupsafe import Markup

    script = page_part("report.js")
    panels = [panel for section in sections for panel in section.panels]
    data = interactive.as_script_data({panel.key: interactive.item(panel) for panel in panels})
    columns, rows = _table(collected, folder)
    return render_page(
        "report.html",
        kind="Study",
        name=collected["name"],
        policy=_policy(library, script),
        lead=lead_of(collected),
        facts=facts_of(collected),
        sections=sections,
        fits=[fit_table(fit) for fit in collected.get("fits", [])],
        values=_values,
        grid=reconstructions(collected),
        columns=columns,
        rows=rows,
        how=how(collected),
        bokeh=bokeh.__version__,
        data=Markup(data),  # noqa: S704 - made safe by as_script_data
        library=Markup(library),  # noqa: S704 - Bokeh's, from its wheel
        script=Markup(script),  # noqa: S704 - ours
    )


def link(run: Mapping[str, Any], folder: Path) -> str:
    """The way from `folder` to the run's directory, as a relative URL."""
    return quote("./" + Path(os.path.relpath(run["folder"], folder)).as_posix() + "/")


def how(collected: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader needs to get the same numbers."""
    said = [("study", str(collected["name"])), ("recipe", str(collected["recipe"]))]
    said += [("directory", str(collected.get("folder", ""))), ("command", str(collected.get("command", "")))]
    said += [(f"axis {axis}", ", ".join(map(str, values))) for axis, values in collected["axes"].items()]
    said += [(name, str(version)) for name, version in collected.get("versions", {}).items()]
    return [(what, text) for what, text in said if text]


def render_page(template: str, **values: Any) -> str:
    """A page from its template in page/, which extends base.html."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(page_part))
    css = Markup(page_part("report.css"))  # noqa: S704 - ours
    return environment.get_template(template).render(css=css, **values)


def page_part(name: str) -> str:
    """A file of page/, which the pages of this folder are made of."""
    return resources.files("livt_scale.study.report").joinpath("page", name).read_text(encoding="utf-8")


def _policy(*scripts: str) -> str:
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{each}'" for each in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _values(panel: Panel) -> list[dict[str, str]]:
    """The panel as a table. A curve is shown by its last point: all of it is in metrics.jsonl."""
    rows = []
    for of in panel.series:
        start = len(of.x) - 1 if of.joined else 0
        for x, y, name in list(zip(of.x, of.y, of.names, strict=True))[max(0, start) :]:
            at = panel.categories[round(x)] if panel.categories else short(x)
            rows.append({"name": name, "series": of.label, "x": at, "y": short(y)})
    return rows


def _table(collected: Mapping[str, Any], folder: Path) -> tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]:
    """Heads and cells of the table of runs; a cell's `sort` is its value, as text, or empty without one."""
    runs = collected["runs"]
    axes = list(collected["axes"])
    measures = [m for m in TABLE_MEASURES if any(value(run, m) is not None for run in runs)]
    columns: list[tuple[str, bool]] = [("run", False), ("state", False), *((axis, False) for axis in axes)]
    columns += [("parameters", True), *((HEADS[m], True) for m in measures), ("minutes", True), ("FLOPs", True)]
    rows = []
    for run in runs:
        css = {"done": "done", "failed": "failed"}.get(run["state"], "other")
        row = [{"text": run["name"], "sort": run["name"], "link": link(run, folder), "kind": ""}]
        row.append(
            {"text": run["state"], "sort": run["state"], "kind": "state", "css": css, "why": str(run.get("why", ""))}
        )
        row += [{"text": str(run["axes"].get(a, "")), "sort": str(run["axes"].get(a, "")), "kind": ""} for a in axes]
        row.append(_number(run.get("num_weights")))
        row += [_number(value(run, m), digits=MEASURES[m].digits) for m in measures]
        row += [_number(cost_of(run, "minutes"), digits=1), _number(cost_of(run, "flops"))]
        rows.append(row)
    return [{"title": title, "numeric": numeric} for title, numeric in columns], rows


def _number(number: float | None, *, digits: int | None = None) -> dict[str, Any]:
    if number is None:
        return {"text": "–", "sort": "", "kind": "n"}
    return {"text": short(number) if digits is None else f"{number:.{digits}f}", "sort": repr(number), "kind": "n"}
