"""What `livt eval` does: run the model or read its logits, make the reports that were asked for, print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from livt_scale.cli.output import echo
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.cpu_cores import share_with_loader
from livt_scale.distributed.world import detect, process_group
from livt_scale.evaluation import adjust
from livt_scale.evaluation.evaluate import BATCH, write_eval
from livt_scale.evaluation.gallery import write_gallery
from livt_scale.evaluation.gallery_page import MARK as GALLERY_MARK
from livt_scale.evaluation.logits import load_outputs, save_outputs
from livt_scale.evaluation.per_class import CSV_MARK
from livt_scale.evaluation.report import EvalReport, make_report, write_reports
from livt_scale.evaluation.results import accuracy_table, calibration_line, sweep_table
from livt_scale.evaluation.tta import Views
from livt_scale.posthoc.evaluate_path import Evaluated, evaluate_path
from livt_scale.train.open_trained import run_of
from livt_scale.train.run_files import read_eval
from livt_scale.util.errors import LivtError, UsageError
from livt_scale.util.outputs import check_output
from livt_scale.util.tables import plain_console

TIMEOUT_S = 1800  # how long ranks wait for the slowest


@dataclass(frozen=True)
class Wanted:
    """What to report and write beyond the plain figures."""

    tau: str | None = None
    temperature: bool = False
    reports: Path | None = None
    gallery: Path | None = None
    save_logits: Path | None = None
    out: Path | None = None
    force: bool = False

    @property
    def needs_logits(self) -> bool:
        return bool(self.temperature or any((self.tau, self.reports, self.gallery, self.save_logits)))


@dataclass(frozen=True)
class Done:
    report: dict[str, Any]
    written: tuple[str, ...] = ()


def evaluated(path: Path, *, data: str | None, run: dict[str, Any], wanted: Wanted) -> Done | None:
    """Evaluate `path` (a run, an export, a file of logits) and write what is `wanted`; None on ranks but the first.

    run: how the model is run, as typed: which, weights, batch, views, average, resize.
    """
    if wanted.tau is not None:
        adjust.parse_taus(wanted.tau)  # now, not after an hour
    _check_outputs(wanted)
    if wanted.out is not None and not wanted.force:
        _refuse_other_report(wanted.out, path, which=run.get("which"))
    if path.is_file():
        return _of_file(path, data=data, run=run, wanted=wanted)
    views = Views(run.get("views", 1), run.get("average", "logits"), run.get("resize"))
    if views.number == 1 and "average" in run:
        raise UsageError("--average has no effect on one view", remedy="give --views 2, 5 or 10, or leave it out")
    world = detect()
    with process_group(world, timeout_s=TIMEOUT_S, loads=True), share_with_loader(world):
        result = evaluate_path(
            path,
            data=data,
            which=run.get("which"),
            weights=run.get("weights", "raw"),
            batch=run.get("batch", BATCH),
            views=views,
            keep=wanted.needs_logits,
            world=world,
        )
    return _finish(result, data=data, wanted=wanted) if world.is_main else None


def _check_outputs(wanted: Wanted) -> None:
    """Raise UsageError if an output file exists that this command did not write."""
    table = wanted.reports / "per_class.csv" if wanted.reports else None
    files = ((wanted.out, b'"livt-eval"'), (wanted.save_logits, b"livt-logits"), (wanted.gallery, GALLERY_MARK))
    for file, mark in (*files, (table, CSV_MARK)):
        if file is not None:
            check_output(file, marks=[mark], command="eval", force=wanted.force)


def _refuse_other_report(out: Path, path: Path, *, which: str | None) -> None:
    """Raise UsageError if `out` is the report on another run than `path`, a run or an export, is of."""
    try:
        there = read_eval(out)["weights"]["run"]
        ours = run_of(path, which=which)
    except (LivtError, LookupError, TypeError):  # missing or damaged: reading `path` reports it
        return
    if there != ours:
        raise UsageError(
            f"{out} is the report on another run ({str(there)[:12]})",
            remedy="give another file, or --force to replace it",
        )


def _of_file(path: Path, *, data: str | None, run: dict[str, Any], wanted: Wanted) -> Done | None:
    idle = [f"--{'checkpoint' if name == 'which' else name}" for name in run]
    if data is not None and wanted.gallery is None:
        idle.append("--data")
    if wanted.save_logits is not None:
        idle.append("--save-logits")
    if idle:
        raise UsageError(
            f"{', '.join(idle)}: no effect on {path}, a file of logits: no model is run",
            remedy="leave it out, or give the run or the export",
        )
    outputs = load_outputs(path)
    return _finish(Evaluated(outputs.report(), outputs), data=data, wanted=wanted) if detect().is_main else None


def _finish(result: Evaluated, *, data: str | None, wanted: Wanted) -> Done:
    """On the main rank: the report as asked for, and its files."""
    if result.outputs is None:
        told, written = result.report, []
    else:
        if wanted.save_logits is not None:
            save_outputs(result.outputs, wanted.save_logits)
        full = make_report(result.outputs, tau=wanted.tau, temperature=wanted.temperature)
        told, written = full.report, _files(full, data=data, wanted=wanted)
    if wanted.out is not None:
        write_eval({k: v for k, v in told.items() if k != "weights"}, wanted.out, weights=told["weights"])
    named = [("logits", wanted.save_logits), ("report", wanted.out)]
    return Done(told, (*written, *(f"{name}: {file}" for name, file in named if file)))


def _files(told: EvalReport, *, data: str | None, wanted: Wanted) -> list[str]:
    written = [] if wanted.reports is None else [f"report: {file}" for file in write_reports(told, wanted.reports)]
    if wanted.gallery is not None:
        shards = ShardSet.open(data or told.report["data"]["folder"])
        images = write_gallery(told.outputs, shards, wanted.gallery)
        written.append(f"gallery: {wanted.gallery}, {images} images, {wanted.gallery.stat().st_size:,} bytes")
    return written


def print_report(done: Done) -> None:
    """The report as tables and lines."""
    report, console = done.report, plain_console()
    console.print(accuracy_table(report))
    if "tau_sweep" in report:
        console.print(sweep_table(report))
    if "adjustment" in report:
        a = report["adjustment"]
        how = f", chosen on {a['chosen_on']} other images by {a['chosen_by']}" if "chosen_on" in a else ""
        echo(f"adjusted: {a['formula']}, tau {a['tau']:g}{how}; the model was trained with {a['trained_with']}")
    echo(calibration_line(report))
    if "temperature" in report:
        t = report["temperature"]
        before, after = t["before"], t["after"]
        bound = ", at its bound: none inside is the best" if t["at_bound"] else ""
        echo(
            f"temperature {t['temperature']:.3f}{bound}, fitted on {t['fitted_on']} images; on the other "
            f"{t['reported_on']}: calibration error {100 * before['ece']:.1f} -> {100 * after['ece']:.1f} %, "
            f"log loss {before['nll']:.3f} -> {after['nll']:.3f}"
        )
    views = report["views"]
    if views["number"] > 1:
        resized = f", of the image at {views['resize_px']} px" if "resize_px" in views else ""
        echo(f"views: {views['number']}, mean of {views['average']}{resized}")
    weights = report["weights"]
    average = " (average)" if "ema" in weights else ""
    echo(f"weights: {weights['checkpoint']}{average} of {weights['read_from']}, recipe {weights['recipe_digest'][:12]}")
    echo(f"data: {report['data']['folder']}, manifest {report['data']['manifest_digest'][:12]}")
    for line in done.written:
        echo(line)
