"""`livt study`: many runs over sizes, lengths, data and losses; their results, and the scaling laws they follow."""

from __future__ import annotations

import json
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import COST_DEVICE, AsJson, CostDevice, Price, check_cost_options
from livt_scale.cli.output import echo
from livt_scale.util.errors import EXIT_FAILED
from livt_scale.util.outside import read_checked, read_note

if TYPE_CHECKING:
    from livt_scale.study.definition import LoadedStudy, Point
    from livt_scale.study.runs import Run

app = typer.Typer(help="Train a grid of runs, collect, fit scaling laws, report.", no_args_is_help=True)
TABLE = "table.json"

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="A YAML file, or livt:NAME for a shipped one.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the runs.", show_default="the study's")]
ONE_POINT = "Train only this point, or those that fit a pattern. Repeatable."
Points = Annotated[list[str] | None, typer.Option("--point", metavar="<name>", help=ONE_POINT, show_default="all")]


@app.command("submit")
def submit(
    study: StudyFile,
    out: Out = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, help="Number of runs in parallel.", show_default="1; with --slurm, all"),
    ] = None,
    point: Points = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit Slurm arrays instead of running here.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print runs and cost; start nothing.")] = False,
    device: CostDevice = None,
    price: Price = None,
    as_json: AsJson = False,
) -> None:
    """Train every run of a study; skip finished ones, resume the rest.

    livt study submit studies/fashion_mnist_lt/sizes.yaml --jobs 2

    livt study submit studies/imagenet_lt/sizes.yaml --slurm --jobs 4

    livt study submit studies/fashion_mnist_lt/when.yaml --point '*-fraction-0.1667-*'
    """
    from livt_scale.study.definition import load_study, points_named, runs
    from livt_scale.study.study_folder import check_folder

    check_cost_options(dry_run=dry_run, device=device, price=price)
    loaded = load_study(study, folder=out)
    chosen = points_named(loaded, point)
    wanted = runs(loaded, chosen)
    if dry_run:
        _tell_cost(loaded, wanted, device=device or COST_DEVICE, price=price, as_json=as_json)
        return
    from livt_scale.study.local_runner import check_runs, run_all
    from livt_scale.study.subsets import build_subsets, wanted_subsets

    check_folder(loaded)
    check_runs(wanted, loaded.folder, to_build=list(wanted_subsets(loaded, chosen)))
    for where in build_subsets(loaded, chosen):
        echo(f"{where}: there", err=as_json)
    check_runs(wanted, loaded.folder)
    _write_command(loaded)
    if slurm:
        _submit_arrays(loaded, chosen, jobs=jobs, as_json=as_json)
        return
    outcome = run_all(wanted, loaded.folder, jobs=jobs or 1)
    failed = outcome.failed | dict.fromkeys(outcome.waited, "what it starts from has failed")
    if as_json:
        echo(json.dumps({"done": outcome.done, "failed": failed}))
    else:
        echo(f"{len(outcome.done)} done, {len(failed)} failed; next: livt study report {study}")
    for name, why in failed.items():
        echo(f"failed: {name}: {why}", err=True)
    if failed:
        raise typer.Exit(EXIT_FAILED)


def _tell_cost(loaded: LoadedStudy, runs: list[Run], *, device: str, price: float | None, as_json: bool) -> None:
    from dataclasses import asdict

    from livt_scale.study.cost import summarize_cost
    from livt_scale.study.table import Sets
    from livt_scale.util.errors import DataError

    sets = Sets()

    def size_of(run: Run) -> tuple[int, int]:
        recipe = run.load(loaded.folder)
        images, classes = sets.of(recipe)
        if images is None or classes is None:
            raise DataError(
                f"{run.name}: {recipe.data.train} is not built, so its number of images is not known",
                remedy="build it first (livt shards build); sets of fractions are built by livt study submit",
            )
        return images, classes

    summary = summarize_cost(runs, loaded.folder, size_of, device=device)
    echo(json.dumps(asdict(summary)) if as_json else "\n".join(summary.lines(price=price)))


def _write_command(loaded: LoadedStudy) -> None:
    """Save the study's file and the command with the runs: the report shows how its numbers were made."""
    from livt_scale.study.study_folder import KEPT
    from livt_scale.util.atomic import write_atomic

    loaded.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(loaded.folder / KEPT, read_checked(loaded.path, "study"))
    write_atomic(loaded.folder / "command.txt", f"{shlex.join(['livt', *sys.argv[1:]])}\n".encode())


def _submit_arrays(loaded: LoadedStudy, points: list[Point], *, jobs: int | None, as_json: bool) -> None:
    from livt_scale.slurm.array import submit_array
    from livt_scale.study.slurm_runner import prepare, ready

    now = ready(loaded, points)
    told: dict[str, Any] = {"jobs": []}
    if now.points:
        told = submit_array(prepare(loaded, now.points, max_parallel=jobs))
    told |= {"submitted": [p.name for p in now.points], "waits": now.waits, "done": now.done}
    if as_json:
        echo(json.dumps(told))
        return
    verb = "in the queue already" if told.get("joined") else "submitted"
    echo(f"{len(now.points)} runs {verb}, {len(now.done)} done")
    if now.waits:
        echo(f"{len(now.waits)} start from a pretraining that is not done: give this command again when it is")
    echo(f"next: livt study status {loaded.path}")


@app.command("status")
def status(study: StudyFile, out: Out = None, as_json: AsJson = False) -> None:
    """Show the state of each run.

    livt study status studies/fashion_mnist_lt/sizes.yaml

    Exit codes: 0; 1 if a run has failed.
    """
    from livt_scale.study.definition import points
    from livt_scale.study.table import state_of

    loaded = _in_its_folder(study, out)
    rows = [(point.name, *state_of(loaded, point)) for point in points(loaded)]
    if as_json:
        echo(json.dumps({"runs": [dict(zip(("name", "state", "why"), row, strict=True)) for row in rows]}))
    else:
        width = max(len(name) for name, _, _ in rows)
        for name, state, why in rows:
            echo(f"{name:<{width}}  {state:<11} {why}".rstrip())
        echo(", ".join(f"{count} {state}" for state, count in Counter(state for _, state, _ in rows).items()))
    if any(state == "failed" for _, state, _ in rows):
        raise typer.Exit(EXIT_FAILED)


@app.command("collect")
def collect(study: StudyFile, out: Out = None, as_json: AsJson = False) -> None:
    """Write the results of all runs to table.json and table.csv.

    A run that is not counted is listed with its reason.

    livt study collect studies/fashion_mnist_lt/sizes.yaml
    """
    loaded = _in_its_folder(study, out)
    table = _collected(loaded)
    if as_json:
        echo(json.dumps(table))
        return
    _tell_table(loaded, table)


def _in_its_folder(study: Path, out: Path | None) -> LoadedStudy:
    """The study, whose folder is not another study's, and not a second one of its own."""
    from livt_scale.study.definition import load_study
    from livt_scale.study.study_folder import check_folder

    loaded = load_study(study, folder=out)
    check_folder(loaded)
    return loaded


def _collected(loaded: LoadedStudy, *, fit: bool = False) -> dict[str, Any]:
    """The table of all runs, with the laws of its measures if requested; saved with the runs."""
    from livt_scale.study.scaling_law import fit_table
    from livt_scale.study.table import as_csv, collect_study
    from livt_scale.util.atomic import write_atomic

    kept = loaded.folder / "command.txt"
    command = read_note(kept) if kept.is_file() else ""
    table = collect_study(loaded, command=command)
    if fit:
        table["fits"] = fit_table(table, measures=loaded.study.measures)
    loaded.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(loaded.folder / TABLE, (json.dumps(table, indent=1, allow_nan=False) + "\n").encode())
    write_atomic(loaded.folder / "table.csv", as_csv(table).encode())
    return table


def _tell_table(loaded: LoadedStudy, table: dict[str, Any]) -> None:
    counts = Counter(run["state"] for run in table["runs"])
    echo(", ".join(f"{count} {state}" for state, count in counts.items()))
    for run in table["runs"]:
        if run["state"] != "done":
            echo(f"not counted: {run['name']}: {run['state']}{': ' + run['why'] if run['why'] else ''}")
    echo(f"{loaded.folder / TABLE}, {loaded.folder / 'table.csv'}")


@app.command("fit")
def fit(study: StudyFile, out: Out = None, as_json: AsJson = False) -> None:
    """Collect, then fit L = E + A·N^−α + B·D^−β to each measure.

    The largest size is held out to check the fit.

    livt study fit studies/fashion_mnist_lt/sizes.yaml
    """
    loaded = _in_its_folder(study, out)
    fits = _collected(loaded, fit=True)["fits"]
    echo(json.dumps({"fits": fits}) if as_json else "\n".join(line for one in fits for line in _law_lines(one)))


def _law_lines(fit: dict[str, Any]) -> list[str]:
    over = f" over {' and '.join(fit['over'])}" if fit["over"] else ""
    head = f"{fit['measure']}{over}, {fit['num_points']} runs"
    if fit["problem"]:
        return [f"{head}: no law: {fit['problem']}"]
    lines = [f"{head}: {fit['law']}"]
    for name, value in fit["parameters"].items():
        low, high = fit["intervals"].get(name, (None, None))
        lines.append(f"  {name:<6} {value:.4g}" + (f"  ({low:.4g} to {high:.4g})" if low is not None else ""))
    held = fit.get("held_out") or {}
    for point in held.get("points", []):
        lines.append(
            f"  held out {point['name']}: predicted {point['predicted']:.4f} ({point['low']:.4f} to "
            f"{point['high']:.4f}), measured {point['measured']:.4f}"
            + ("" if point["relative_error"] is None else f", off by {point['relative_error']:+.1%}")
        )
    return lines


@app.command("compare")
def compare(study: StudyFile, out: Out = None, as_json: AsJson = False) -> None:
    """Collect, then compare each setting with the first over seeds.

    Prints accuracy with its deviation, and each difference with its 95 % interval and verdict.

    livt study compare studies/fashion_mnist_lt/tuning.yaml
    """
    from livt_scale.study.compare import compare_settings
    from livt_scale.study.results_page import comparison_lines

    found = compare_settings(_collected(_in_its_folder(study, out)))
    echo(json.dumps(found) if as_json else "\n".join(comparison_lines(found)))


@app.command("crossing")
def crossing(
    study: StudyFile,
    out: Out = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="Also draw the gains to this PNG file.")] = None,
    kept: Annotated[
        Path | None, typer.Option("--kept", help="Also count the runs that this output of --json had, gone since.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Collect, then find where pretraining begins to pay.

    For a study with the axis start: the gain over labels alone for the same compute, and where it is 0.

    livt study crossing studies/fashion_mnist_lt/when.yaml
    """
    from livt_scale.study.crossing import crossings_of
    from livt_scale.study.results_figure import draw_crossings
    from livt_scale.study.results_page import crossing_lines, read_crossings

    earlier = read_crossings(kept) if kept is not None else None
    found = crossings_of(_collected(_in_its_folder(study, out)), earlier)
    if picture is not None:
        draw_crossings(found, picture)
    echo(json.dumps(found) if as_json else "\n".join(crossing_lines(found)))


@app.command("report")
def report(study: StudyFile, out: Out = None) -> None:
    """Collect, fit, then write report.html, report.md and pictures.

    livt study report studies/fashion_mnist_lt/sizes.yaml
    """
    from livt_scale.study.report.html import write_report

    loaded = _in_its_folder(study, out)
    for written in write_report(_collected(loaded, fit=True), loaded.folder):
        echo(str(written))
