"""The report that `livt train` leaves in the run directory at its end.

    run_dir = livt.train(recipe)
    write_at_end(run_dir)          # RUN/report.html, by rank 0 alone; nothing where it is newer than the run's status

A problem is logged in one line and fails nothing: the weights are saved by then, and `livt report RUN` writes the page.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path

from livt_scale.config.recipe import STAGES
from livt_scale.distributed.world import detect
from livt_scale.study.report.run_page import MARK, REPORT, write_run_report
from livt_scale.train.run_files import STATUS
from livt_scale.util.errors import LivtError
from livt_scale.util.outputs import check_output

_log = logging.getLogger(__name__)


def write_at_end(run_dir: Path) -> None:
    """Write the report of `run_dir` on rank 0, unless it is up to date. Raises nothing."""
    if not detect().is_main:
        return
    path = run_dir / REPORT
    try:
        if _is_up_to_date(path):
            return
        check_output(path, marks=[MARK], command="report", force=False)
        write_run_report(run_dir, path)
    except LivtError as error:
        _log.warning("no report: %s", error.message)
    except Exception as error:  # a fault of the page must not fail the training
        again = f"livt --debug report {shlex.quote(str(run_dir))}"
        _log.warning("no report: %s: %s; %s shows where", type(error).__name__, error, again)
    else:
        _log.info("report: %s", path)


def _is_up_to_date(path: Path) -> bool:
    """Whether the report was written after the last change of a stage's status."""
    changed = [file.stat().st_mtime_ns for stage in STAGES if (file := path.parent / stage / STATUS).is_file()]
    return path.is_file() and path.stat().st_mtime_ns >= max(changed, default=0)
