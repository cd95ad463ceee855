"""`livt logs`: what it shows of a run, and how it follows logs that grow."""

from __future__ import annotations

import os

from livt_scale.cli import logs
from livt_scale.util.errors import UsageError
from tests.cli.commands import livt, pauses
from tests.slurm.made_runs import MadeRun, ended


def test_logs_show_the_end_of_the_newest_log_and_why_it_failed(run, fake):
    run.chain(("14", "pretrain"), ("15", "finetune"))
    run.status("failed", why="rank 1 stopped: shard x")
    run.beat(1, state="failed", why="shard x is cut")
    fake.sacct(ended("14", "FAILED", "1:0"))
    log = run.dir / "slurm" / "logs" / "pretrain-14.log"
    log.parent.mkdir()
    log.write_text("".join(f"line {n}\n" for n in range(100)) + "rank 1: \x1b[2Jboom\n")
    stacks = run.dir / "pretrain" / "stacks" / "rank-1.txt"
    stacks.parent.mkdir()
    stacks.write_text("in loop.py\n" * 9)
    told = livt("logs", run.dir, "-n", "3").stdout.splitlines()
    assert told[0] == "== pretrain: failed, rank 1 stopped: shard x"
    assert told[1].startswith("== rank 1 (process ")
    assert told[1].endswith(": shard x is cut")
    assert told[2:6] == [f"== {stacks}", *["in loop.py"] * 3]
    assert told[6:] == [f"== job 14: {log}", "line 98", "line 99", "rank 1:  [2Jboom"]
    of_rank = livt("logs", run.dir, "--rank", "1", "--stage", "pretrain").stdout
    assert "== rank 1: failed, step 120" in of_rank
    assert of_rank.splitlines()[-1] == "rank 1:  [2Jboom"
    assert "line 99" not in of_rank
    assert isinstance(livt("logs", run.dir, "--rank", "7").exception, UsageError)
    assert "Did you mean 'finetune'?" in str(livt("logs", run.dir, "--stage", "finetun").exception)


def test_logs_of_a_local_run_are_those_that_it_keeps(run):
    run.status("running", step=3)
    (run.dir / "log.txt").write_text("one\ntwo\nrank 1: three\n")
    told = livt("logs", run.dir, "-n", "2").stdout.splitlines()
    assert told[-3:] == [f"== all starts: {run.dir / 'log.txt'}", "two", "rank 1: three"]


def test_logs_of_a_run_without_any_say_where_to_look(run):
    run.status("running", step=3)
    run.metrics(1.0)
    told = livt("logs", run.dir).stdout
    assert f"it was not submitted by livt submit, process {os.getpid()} on " in told
    assert str(run.dir / "pretrain" / "metrics.jsonl") in told


def test_logs_of_several_runs_are_shown_one_after_the_other(tmp_path, fake):
    runs = [MadeRun(tmp_path / "runs" / name) for name in "abc"]
    for run in runs[:2]:
        run.chain(("14", "pretrain"))
        run.status("failed", why="x")
        (run.dir / "slurm" / "logs").mkdir()
        (run.dir / "slurm" / "logs" / "pretrain-14.log").write_text(f"of {run.dir.name}\n")
    told = livt("logs", *(run.dir for run in runs)).stdout.splitlines()
    heads = [line for line in told if line.startswith("==== ")]
    assert heads == [f"==== {run.dir}" for run in runs]
    assert [line for line in told if line.startswith("of ")] == ["of a", "of b"]
    assert isinstance(livt("logs", runs[0].dir, tmp_path).exception, UsageError)


def test_logs_of_several_runs_are_followed_with_the_name_of_the_one_that_grew(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(logs, "OVER_AFTER_S", 0.0)
    runs = [MadeRun(tmp_path / "runs" / name) for name in "ab"]
    paths = [run.dir / "slurm" / "logs" / "pretrain-14.log" for run in runs]
    for run, path in zip(runs, paths, strict=True):
        run.chain(("14", "pretrain"))
        run.status("running")
        path.parent.mkdir()
        path.write_text("old\n")
    late = [(0, "one\n"), (1, "two\n"), (1, "three\n"), (0, "four\n")]

    def passes(_s: float) -> None:
        if not late:
            for run in runs:
                run.status("failed", why="x")
            return
        number, text = late.pop(0)
        with paths[number].open("a") as file:
            file.write(text)

    pauses(logs, monkeypatch, passes)
    told = livt("logs", *(run.dir for run in runs), "-f").stdout.splitlines()
    assert told[-7:] == [f"== {paths[0]}", "one", f"== {paths[1]}", "two", "three", f"== {paths[0]}", "four"]


def test_logs_follow_a_run_into_the_job_of_its_next_stage(run, fake, monkeypatch):
    monkeypatch.setattr(logs, "OVER_AFTER_S", 0.0)
    run.chain(("14", "pretrain"), ("15", "finetune"))
    run.status("running")
    folder = run.dir / "slurm" / "logs"
    folder.mkdir()
    (folder / "pretrain-14.log").write_text("one\n")

    def pretrain_ends() -> None:
        run.status("done")
        run.status("running", "finetune")
        (folder / "finetune-15.log").write_text("two\n")

    late = [pretrain_ends, lambda: None, lambda: run.status("failed", "finetune", why="x")]
    pauses(logs, monkeypatch, lambda _s: late.pop(0)() if late else None)
    told = livt("logs", run.dir, "-f").stdout
    assert told.splitlines()[-4:] == [
        f"== job 14: {folder / 'pretrain-14.log'}",
        "one",
        f"== {folder / 'finetune-15.log'}",
        "two",
    ]


def test_logs_that_are_quiet_ask_slurm_no_more_often_than_status_does(run, fake, monkeypatch):
    monkeypatch.setattr(logs, "OVER_AFTER_S", 0.0)
    run.chain(("14", "pretrain"))
    run.status("running")
    (run.dir / "slurm" / "logs").mkdir()
    (run.dir / "slurm" / "logs" / "pretrain-14.log").write_text("one\n")
    quiet = 9 * [lambda: None]
    pauses(logs, monkeypatch, lambda _s: quiet.pop()() if quiet else run.status("failed", why="x"))
    livt("logs", run.dir, "-f")
    assert len([call for call in fake.calls if call[0] == "squeue"]) == 2  # at first, and once since


def test_logs_follow_what_is_added_until_the_run_is_over(run, fake, monkeypatch):
    monkeypatch.setattr(logs, "OVER_AFTER_S", 0.0)
    run.chain(("14", "pretrain"))
    run.status("running")
    log = run.dir / "slurm" / "logs" / "pretrain-14.log"
    log.parent.mkdir()
    log.write_text("one\ntwo\n")
    late = ["thr", "ee: é"[:4] + "\n", None]

    def passes(_s: float) -> None:
        text = late.pop(0)
        if text is None:
            run.status("failed", why="x")
            late.append("")
        else:
            with log.open("a") as file:
                file.write(text)

    pauses(logs, monkeypatch, passes)
    told = livt("logs", run.dir, "-f", "-n", "1").stdout
    assert told.splitlines()[-2:] == ["two", "three: "]
