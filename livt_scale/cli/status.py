"""`livt status`: one screen for a run, one line each for all of them."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from livt_scale.cli.options import check_needs
from livt_scale.cli.output import echo
from livt_scale.util.errors import EXIT_FAILED

if TYPE_CHECKING:
    from livt_scale.slurm.commands import Queue
    from livt_scale.slurm.status import RunView, StageView

RUNS = Path("runs")
WIDTH = 30  # characters of the line that the losses draw
BARS, PLAIN_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
WATCH_EVERY_S = 10.0
ASK_SLURM_EVERY_S = 30.0  # controllers are shared: however often the screen is drawn
JSON_VERSION = 1


def status(
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="A run directory; or a folder of them. Without it: all below ./runs."),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Redraw until the run is over.")] = False,
    every_s: Annotated[
        float | None, typer.Option("--every-s", min=0.2, help="With --watch: seconds between two.", show_default="10")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for scripts; with --watch an object a line.")
    ] = False,
) -> None:
    """Show progress, speed, checkpoints, jobs and the end of runs.

    livt status runs/try --watch

    Exit codes: 0; 1 where the run has failed (of several: where any has).
    """
    from livt_scale.slurm.progress import is_run
    from livt_scale.util.errors import UsageError

    check_needs("--every-s", "--watch", given=every_s is not None, there=watch)
    place = run if run is not None else RUNS
    if not place.is_dir():
        what = "no such folder" if run else "there is no folder runs here"
        raise UsageError(f"{place}: {what}", remedy="give a run directory")
    single = run is not None and is_run(place)
    slurm, views = AskedNowAndThen(), []
    try:
        while True:
            places = [place] if single else [p for p in sorted(place.iterdir()) if is_run(p)]
            views = slurm.look(places, brief=not single and not as_json)
            if not views and run is not None:
                raise UsageError(f"{place} is no run directory, and holds none", remedy="one holds recipe.yaml")
            text = _as_json(views, single=single) if as_json else _as_text(views, single=single, place=place)
            _put(text, clear=watch and not as_json)
            if not watch or all(view.state in ("done", "failed") for view in views):
                break
            time.sleep(WATCH_EVERY_S if every_s is None else every_s)
    except KeyboardInterrupt:  # how one leaves --watch
        if not watch:
            raise
    if any(view.state == "failed" for view in views):
        raise typer.Exit(EXIT_FAILED)


class AskedNowAndThen:
    """Looks at runs each time it is called, at Slurm every ASK_SLURM_EVERY_S."""

    def __init__(self) -> None:
        self._asked = -math.inf
        self._queues: dict[Path, Queue] = {}

    def look(self, places: list[Path], *, brief: bool = False) -> list[RunView]:
        from livt_scale.slurm.commands import look
        from livt_scale.slurm.status import chain_of, look_at

        if time.monotonic() - self._asked >= ASK_SLURM_EVERY_S or any(place not in self._queues for place in places):
            self._queues = dict(zip(places, look([chain_of(place)[0] for place in places]), strict=True))
            self._asked = time.monotonic()
        return [look_at(place, queue=self._queues[place], brief=brief) for place in places]


def _put(text: str, *, clear: bool) -> None:
    """On the terminal, with what it cannot show replaced: a name in a file must not move the cursor."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(str.maketrans(BARS, PLAIN_BARS)).encode(encoding, "replace").decode(encoding)
    if clear and sys.stdout.isatty():
        typer.echo("\x1b[H\x1b[2J", nl=False)
    echo(text)


def _as_json(views: list[RunView], *, single: bool) -> str:
    told = [as_dict(view) for view in views]
    return json.dumps(_finite(told[0] if single else {"version": JSON_VERSION, "runs": told}), allow_nan=False)


def _finite(value: Any) -> Any:
    """As JSON has it: python reads NaN in a file, and strict readers of ours would not."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(views: list[RunView], *, single: bool, place: Path) -> str:
    if single:
        return screen(views[0])
    if not views:
        return f"no runs in {place}"
    rows = [overview(view) for view in views]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def overview(view: RunView) -> list[str]:
    """The cells of a run's line."""
    now = view.current
    if now is None:
        return [clean(view.run_dir.name), view.state, "", "", "", clean(view.why)]
    record = now.record
    total, share = (f"/{record.total}", f" {record.step / record.total:.0%}") if record.total else ("", "")
    left = ""
    if now.state == "running" and record.to_finish_s is not None:
        from livt_scale.slurm.status import span

        left = f"{span(record.to_finish_s)} left"
    if view.accuracy is not None:
        left = f"top-1 {view.accuracy['all']:.1%}" if "all" in view.accuracy else ""
    rate = _last(now, "images_per_s")
    speed = f"{rate:.0f} images/s" if rate is not None and now.state == "running" else ""
    return [
        clean(view.run_dir.name),
        view.state,
        f"{now.name} {record.step}{total}{share}" if record.step or total else now.name,
        speed,
        left,
        shortened(view.why, 80),
    ]


def screen(view: RunView) -> str:
    """All that is known of one run, for people."""
    from livt_scale.slurm.next_step import next_line
    from livt_scale.slurm.status import span

    rows = [("run", f"{view.run_dir}" + (f" ({view.name})" if view.name != view.run_dir.name else ""))]
    where = f": {view.stage}" if view.stage else ""
    rows.append(("state", view.state + where + (f", {view.why}" if view.why else "")))
    if view.accuracy is not None:
        rows.append(("accuracy", accuracy_of(view.accuracy)))
    if view.state == "pending" and any(job.now.waits and not job.now.never_starts for job in view.jobs):
        rows.append(("start", _expected_start(view)))
    if view.current is not None:
        rows += _progress_rows(view.current, view)
    for stage in view.stages:
        if stage.name != view.stage:
            took = f", {stage.record.step} steps" if stage.record.step else ""
            rows.append(("", f"{stage.name}: {stage.state}{took}" + (f", {stage.why}" if stage.why else "")))
    for number, job in enumerate(view.jobs):
        segment = f" {job.segment}/{job.segments}" if job.segments > 1 else ""
        state = job.now.state or (f"ended: {job.end.kind}" if job.end else "not known to Slurm")
        more = [job.now.reason if job.now.waits else job.now.nodes, f"{job.now.left} left" if job.now.runs else ""]
        more += [f"exit code {job.now.exit_code}" if job.now.exit_code not in ("", "0:0") else ""]
        told = ", ".join(part for part in more if part)
        rows.append(("" if number else "jobs", f"{job.id:>8}  {job.stage + segment:<13} {state:<10} {told}"))
    rows.append(("next", next_line(view)))
    rows += [("note", note) for note in dict.fromkeys(view.notes)]
    rows.append(("seen", f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(view.at))}"))
    if view.current is not None and view.state == "running" and view.current.record.wrote_at is not None:
        rows[-1] = ("seen", f"{rows[-1][1]}, last sign of life {span(view.at - view.current.record.wrote_at)} ago")
    return "\n".join(f"{name:<9} {clean(text)}".rstrip() for name, text in rows)


def accuracy_of(accuracy: dict[str, float]) -> str:
    """all 45.2%, many 60.1%, medium 40.0%, few 12.3%."""
    return ", ".join(f"{group} {value:.1%}" for group, value in accuracy.items())


def _expected_start(view: RunView) -> str:
    from livt_scale.slurm.status import span

    if view.starts_at is None:
        return "Slurm has made no estimate yet"
    return f"in {span(view.starts_at - view.at)} ({_minute(view.starts_at)}), by Slurm's estimate"


def _minute(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def _progress_rows(stage: StageView, view: RunView) -> list[tuple[str, str]]:
    """What the current stage has recorded."""
    from livt_scale.slurm.status import span

    record, rows = stage.record, []
    if record.step or record.total:
        total = record.total
        share = f", {record.step / total:.0%}" if total else ""
        epoch = _last(stage, "epoch")
        epochs = f", epoch {epoch:.2f}" + (f" of {stage.epochs}" if stage.epochs else "") if epoch is not None else ""
        rows.append(("progress", f"step {record.step}" + (f" of {total}" if total else "") + epochs + share))
    if (speed := _speed(stage)) is not None:
        rows.append(("speed", speed))
    losses = losses_of(stage)
    if losses:
        rows.append(("loss", f"{losses[-1]:.4f}  {sparkline(losses)}"))
    if stage.state == "running" and record.to_finish_s is not None:
        ready = _minute(view.at + record.to_finish_s)
        behind = [other.name for other in view.stages[view.stages.index(stage) + 1 :] if other.state != "done"]
        then = f"; then {', '.join(behind)}" if behind else ""
        rows.append(("finish", f"in {span(record.to_finish_s)} ({ready}), by the time of its last steps{then}"))
    saved = record.saved
    if saved is not None:
        rows.append(("saved", f"{saved.name}, {span(view.at - saved.at)} ago"))
    elif record.status and stage.state != "done":
        rows.append(("saved", "no checkpoint yet"))
    if failures := record.status.get("failed_saves"):
        last = record.status.get("last_failed_save", "")
        rows.append(("", f"{failures} saves have failed, the last: {shortened(str(last), 160)}"))
    return [*rows, *_rank_rows(stage), *_history_rows(stage)]


def _speed(stage: StageView) -> str | None:
    rate, step_s = _last(stage, "images_per_s"), _last(stage, "step_s")
    if rate is None or step_s is None:
        return None
    told = [f"{rate:.0f} images/s", f"{step_s:.3g} s a step"]
    mfu, waits_s = _last(stage, "mfu"), _last(stage, "data_wait_s")
    told += [f"MFU {mfu:.1%}"] if mfu is not None else []
    told += [f"waits for data {waits_s / step_s:.0%}"] if waits_s is not None and step_s > 0 else []
    return ", ".join(told)


def _rank_rows(stage: StageView) -> list[tuple[str, str]]:
    from livt_scale.slurm.status import span
    from livt_scale.train.heartbeat import slowest

    beats = stage.record.beats
    if not beats or stage.state == "done":
        return []
    behind = slowest(beats)
    if behind is None:
        told = [f"rank {b.rank} {b.state}: {shortened(b.why, 160)}" for b in beats if b.state == "failed"]
        return [("ranks", f"{len(beats)}" + (f", {told[0]}" if told else ""))]
    where = f"rank {behind.rank} on {behind.host}, step {behind.step}, {behind.phase} for "
    return [("ranks", f"{len(beats)}, slowest: {where}{span(behind.at - behind.since)}")]


def _history_rows(stage: StageView) -> list[tuple[str, str]]:
    rows, history = [], history_of(stage)
    if history:
        starts = stage.record.status.get("starts")
        count = starts - 1 if isinstance(starts, int) else len(history)
        rows.append(("restarts", f"{count}, the last: {_ended(history[-1])}"))
        rows += [("", f"before it: {_ended(entry)}") for entry in history[-3:-1][::-1]]
    anomalies = stage.record.anomalies
    if anomalies:
        last = anomalies[-1]
        told = f"step {last['step']}: {last.get('what', '?')}, {last.get('policy', '?')}"
        rows.append(("steps not", f"taken as they were: {len(anomalies)}, the last: {told}"))
    return rows


def _ended(entry: dict[str, Any]) -> str:
    state, why = str(entry.get("ended", "?")), shortened(str(entry.get("why") or ""), 120)
    word = "ended without a record" if state == "running" else state
    step = f" at step {entry['step']}" if "step" in entry else ""
    return f"{word}{step}, {str(entry.get('at', '?'))[:19].replace('T', ' ')}" + (f" ({why})" if why else "")


def history_of(stage: StageView) -> list[dict[str, Any]]:
    return stage.record.status.get("history", [])


def losses_of(stage: StageView) -> list[float]:
    return [line.loss for line in stage.record.lines if line.loss is not None]


def sparkline(values: list[float], *, width: int = WIDTH) -> str:
    """The values as a row of bars, from their lowest to their highest."""
    from livt_scale.slurm.progress import sampled

    means = sampled(values, count=width)
    low, high = min(means), max(means)
    if high <= low:
        return BARS[0] * len(means)
    return "".join(BARS[int((value - low) / (high - low) * (len(BARS) - 1) + 0.5)] for value in means)


def _last(stage: StageView, name: str) -> float | None:
    return getattr(stage.record.lines[-1], name) if stage.record.lines else None


def clean(text: str) -> str:
    """Without control characters: what a file holds must not write elsewhere on the screen."""
    return "".join(c if c.isprintable() else " " for c in text)


def shortened(text: str, most: int) -> str:
    text = " ".join(clean(text).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def as_dict(view: RunView) -> dict[str, Any]:
    """The keys of --json (docs/runs.md): none is ever left out; null: not known."""
    from livt_scale.slurm.next_step import next_line

    return {
        "version": JSON_VERSION,
        "run": str(view.run_dir),
        "name": view.name,
        "state": view.state,
        "why": view.why,
        "next": next_line(view),
        "accuracy": view.accuracy,
        "starts_at": view.starts_at,
        "stage": view.stage or None,
        "at": round(view.at, 3),
        "mode": view.mode or None,
        "stages": [_stage_dict(stage, view) for stage in view.stages],
        "jobs": [
            {
                "id": job.id,
                "stage": job.stage,
                "segment": job.segment,
                "segments": job.segments,
                "state": job.now.state or None,
                "reason": job.now.reason or None,
                "nodes": job.now.nodes or None,
                "left": job.now.left or None,
                "exit_code": job.now.exit_code or None,
                "log": job.log or None,
            }
            for job in view.jobs
        ],
        "notes": view.notes,
    }


def _stage_dict(stage: StageView, view: RunView) -> dict[str, Any]:
    from livt_scale.slurm.progress import sampled
    from livt_scale.train.heartbeat import slowest

    record, behind = stage.record, slowest(stage.record.beats)
    saved, losses = record.saved, losses_of(stage)
    return {
        "stage": stage.name,
        "state": stage.state,
        "why": stage.why,
        "since": record.status.get("since"),
        "step": record.step,
        "total_steps": record.total,
        "epoch": _last(stage, "epoch"),
        "epochs": stage.epochs,
        "images_per_s": _last(stage, "images_per_s"),
        "step_s": _last(stage, "step_s"),
        "data_wait_s": _last(stage, "data_wait_s"),
        "mfu": _last(stage, "mfu"),
        "loss": losses[-1] if losses else None,
        "losses": sampled(losses, count=WIDTH),
        "to_finish_s": record.to_finish_s if stage.state != "done" else 0.0,
        "starts": record.status.get("starts"),
        "history": history_of(stage),
        "anomalies": len(record.anomalies),
        "last_anomaly": record.anomalies[-1] if record.anomalies else None,
        "checkpoint": saved and {"name": saved.name, "step": saved.step, "age_s": round(view.at - saved.at, 1)},
        "failed_saves": record.status.get("failed_saves", 0),
        "ranks": len(record.beats),
        "slowest": behind
        and {
            "rank": behind.rank,
            "host": behind.host,
            "step": behind.step,
            "phase": behind.phase,
            "for_s": round(behind.at - behind.since, 1),
        },
        "silent_s": None if record.wrote_at is None else round(max(view.at - record.wrote_at, 0.0), 1),
    }
