"""`livt logs`: what a stage printed, and what its ranks left when they failed or hung."""

from __future__ import annotations

import codecs
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from livt_scale.cli.output import echo
from livt_scale.cli.status import AskedNowAndThen, clean
from livt_scale.util.outside import open_checked

if TYPE_CHECKING:
    from livt_scale.slurm.status import ChainJob, RunView, StageView

POLL_S = 0.5
TAIL_BYTES = 2**22  # however long the lines
OVER_AFTER_S = 5.0  # -f ends when the run is over and nothing has been added for this long


def logs(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run directories.")],
    stage: Annotated[str | None, typer.Option("--stage", help="pretrain, finetune or evaluate; else the last.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=0, help="What this rank printed and recorded.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Print what is added to the logs, until the runs are over.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many lines of each file.")] = 40,
) -> None:
    """Show a stage's log, its error, and the stacks of hung ranks.

    livt logs runs/try --stage pretrain -n 100

    livt logs runs/try --rank 3

    livt logs runs/study-* -f
    """
    from livt_scale.slurm.progress import is_run
    from livt_scale.util.errors import UsageError

    if follow and rank is not None:
        raise UsageError("--rank shows what is there, and -f has no effect on it", remedy="leave one of them out")
    runs = list(dict.fromkeys(runs))
    for run in runs:
        if not is_run(run):
            raise UsageError(f"{run} is not a run directory", remedy="one holds recipe.yaml, or slurm/chain.json")
    with ExitStack() as files:
        grows = []
        for run in runs:
            if len(runs) > 1:
                _say(f"==== {run}")
            try:
                log = _show(run, stage, rank=rank, lines=lines, files=files)
            except UsageError as error:  # of several, the others are shown
                if len(runs) == 1:
                    raise
                _say(f"== {error}")
                continue
            grows += [log] if log is not None else []
        if follow and grows:
            _follow(grows, files)


@dataclass
class _Growing:
    """An open log, read to its end so far. stage: whose logs are followed; None: of the one that started last."""

    run: Path
    stage: str | None
    path: Path
    handle: int
    decoder: codecs.IncrementalDecoder
    over: bool = False


def _show(run: Path, stage: str | None, *, rank: int | None, lines: int, files: ExitStack) -> _Growing | None:
    """Print what there is of one run; its newest log, which may grow."""
    from livt_scale.slurm.status import look_at
    from livt_scale.util.errors import UsageError, nearest

    view = look_at(run)
    names = [each.name for each in view.stages]
    if stage is not None and stage not in names:
        raise UsageError(f"{run} has no stage {stage!r}", remedy=nearest(stage, names))
    chosen = next((each for each in view.stages if each.name == (stage or _last_started(view))), None)
    if chosen is None:
        raise UsageError(f"nothing of {run} was started", remedy=f"livt status {run}")
    log = _log_of(view, chosen.name)
    _say(f"== {chosen.name}: {chosen.state}" + (f", {chosen.why}" if chosen.why else ""))
    if rank is not None:
        _rank(view, chosen, rank, lines=lines, log=log)
        return None
    _failures(view, chosen, lines=lines)
    if log is None:
        _no_log(view, chosen)
        return None
    title, path = log
    _say(f"== {title}: {path}")
    handle = files.enter_context(open_checked(path, "log")).fileno()
    for line in _tail(handle, lines):
        _say(line)
    return _Growing(run, stage, path, handle, codecs.getincrementaldecoder("utf-8")(errors="replace"))


def _last_started(view: RunView) -> str:
    """The stage that is on, or the last one that has something to show."""
    begun = [each.name for each in view.stages if each.record.status or _newest_log(view, each.name)]
    return begun[-1] if begun else view.stage


def _newest_log(view: RunView, stage: str) -> ChainJob | None:
    jobs = [job for job in view.jobs if job.stage == stage and job.log and (view.run_dir / job.log).is_file()]
    return jobs[-1] if jobs else None


def _log_of(view: RunView, stage: str) -> tuple[str, Path] | None:
    """(what it is of, its path): of the stage's newest job, or what a run without jobs keeps itself."""
    job = _newest_log(view, stage)
    if job is not None:
        return f"job {job.id}", view.run_dir / job.log
    from livt_scale.train.run_files import LOG

    own = view.run_dir / LOG
    return ("all starts", own) if own.is_file() else None


def _failures(view: RunView, stage: StageView, *, lines: int) -> None:
    """Each rank's own error, and the files of stacks."""
    for beat in stage.record.beats:
        if beat.state == "failed" and beat.why:
            _say(f"== rank {beat.rank} ({beat.process}): {beat.why}")
    for path in sorted((view.run_dir / stage.name / "stacks").glob("rank-*.txt")):
        _say(f"== {path}")
        _head(path, lines)


def _rank(view: RunView, stage: StageView, rank: int, *, lines: int, log: tuple[str, Path] | None) -> None:
    """Heartbeat and stacks of one rank, and the lines of the job's log that name it."""
    from livt_scale.util.errors import UsageError

    beat = next((b for b in stage.record.beats if b.rank == rank), None)
    stacks = view.run_dir / stage.name / "stacks" / f"rank-{rank}.txt"
    if beat is None and not stacks.is_file():
        known = ", ".join(str(b.rank) for b in stage.record.beats[:16]) or "none"
        raise UsageError(f"rank {rank} of {stage.name} has left nothing", remedy=f"ranks that have: {known}")
    if beat is not None:
        _say(f"== rank {rank}: {beat.state}, {beat.where}" + (f": {beat.why}" if beat.why else ""))
    if stacks.is_file():
        _say(f"== {stacks}")
        _head(stacks, lines)
    if log is not None:
        _, path = log
        with open_checked(path, "log") as file:
            named = [line for line in _tail(file.fileno(), sys.maxsize) if f"rank {rank}:" in line]
        _say(f"== lines of rank {rank} in {path} (all ranks print to it; most lines do not say whose they are)")
        for line in named[-lines:] if lines else []:
            _say(line)


def _no_log(view: RunView, stage: StageView) -> None:
    host, pid = stage.record.status.get("host"), stage.record.status.get("pid")
    if any(job.stage == stage.name for job in view.jobs):
        _say("== none of its jobs has written a log yet")
    else:
        who = f", process {pid} on {host}" if pid is not None else ""
        _say(
            f"== it was not submitted by livt submit{who}: what it printed went to the terminal, or the file, that it "
            "was started with (sbatch by hand: JOB-NAME-ID.log where that was given)"
        )
    shown = [
        p for p in ("status.json", "metrics.jsonl", "anomalies.jsonl") if (view.run_dir / stage.name / p).is_file()
    ]
    if shown:
        _say(f"== what it recorded: {', '.join(str(view.run_dir / stage.name / name) for name in shown)}")


def _tail(handle: int, count: int) -> list[str]:
    """The last `count` lines, of the last TAIL_BYTES; the file is then read to its end."""
    size = os.fstat(handle).st_size
    os.lseek(handle, max(size - TAIL_BYTES, 0), os.SEEK_SET)
    raw = b""
    while part := os.read(handle, 2**16):
        raw += part
    lines = raw.decode(errors="replace").splitlines()
    return lines[-count:] if count else []


def _head(path: Path, count: int) -> None:
    with open_checked(path, "log") as file:
        for _, line in zip(range(count), file, strict=False):
            _say(line.decode(errors="replace").rstrip("\n"))


def _follow(logs: list[_Growing], files: ExitStack) -> None:
    """Print what is added to the logs, until the runs are over and nothing comes any more."""
    shown = logs[-1].path
    try:
        for log, text in _grown(logs, files):
            if log.path != shown:
                _say(f"== {log.path}")
                shown = log.path
            _say(text, end="")
    except KeyboardInterrupt:
        return  # how one leaves it


def _grown(logs: list[_Growing], files: ExitStack) -> Iterator[tuple[_Growing, str]]:
    slurm, quiet = AskedNowAndThen(), time.monotonic()
    while True:
        for log in logs:
            while part := os.read(log.handle, 2**16):
                quiet = time.monotonic()
                yield log, log.decoder.decode(part)
        if time.monotonic() - quiet > OVER_AFTER_S:
            for log, view in zip(logs, slurm.look([log.run for log in logs]), strict=True):
                if not log.over:
                    _look_again(log, view, files)
            if all(log.over for log in logs):
                return
            quiet = time.monotonic()
        time.sleep(POLL_S)


def _look_again(log: _Growing, view: RunView, files: ExitStack) -> None:
    """Take the log of the next job, once there is one; else see whether the run is over."""
    _, path = _log_of(view, log.stage or _last_started(view)) or ("", log.path)
    if path == log.path:
        log.over = view.state not in ("running", "pending")
        return
    log.path, log.handle = path, files.enter_context(open_checked(path, "log")).fileno()
    log.decoder.reset()


def _say(text: str, *, end: str = "\n") -> None:
    """A line for the terminal: without control characters, which a log may hold."""
    echo("".join(c if c in "\n\t" else clean(c) for c in text) + end, nl=False)
