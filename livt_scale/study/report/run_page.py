"""`livt report`: one run as one HTML page that needs no network and no script.

    write_run_report(Path("runs/a"), Path("runs/a/report.html"))

Text from the run (names of classes and sets, reasons) is untrusted: jinja2 escapes it, characters that are not seen are
shown by their numbers, and the content security policy of the page forbids every fetch and script.
"""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from livt_scale import __version__
from livt_scale.study.report.html import render_page
from livt_scale.study.report.run_record import RunRecord, read_run
from livt_scale.study.report.run_sections import facts_of_run, sections_of_run
from livt_scale.util.atomic import plain_disk_errors, write_atomic
from livt_scale.util.errors import UsageError
from livt_scale.util.text import visible

POLICY = Markup("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
REPORT = "report.html"  # in the run directory
MARK = b'content="livt report"'  # near the start of every page


def write_run_report(run: Path, out: Path) -> Path:
    """Write the page of the run directory `run`, in any state, to `out`.

    Raises UsageError (not a run; `out` is a folder), RecipeError and RunError (files of the run that cannot be read).
    """
    if out.is_dir():
        raise UsageError(f"{out} is a folder", remedy="give a file as --out, such as report.html")
    page = run_page(read_run(run))
    with plain_disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, page.encode("utf-8", errors="backslashreplace"))
    return out


def run_page(run: RunRecord) -> str:
    """The complete page."""
    return render_page(
        "run.html",
        kind="Run",
        name=visible(run.recipe.name),
        policy=POLICY,
        facts=facts_of_run(run),
        sections=sections_of_run(run),
        version=__version__,
    )
