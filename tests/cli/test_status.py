"""`livt status`, `livt cancel`, `livt logs`: what they print, what they signal, and a real run that they look at."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types

import pytest
from typer.testing import CliRunner

from livt_scale.cli import logs, main, status
from livt_scale.cli.status import sparkline
from livt_scale.slurm import cancel
from livt_scale.train.run_files import read_status
from livt_scale.util.errors import LivtError, UsageError
from tests.slurm.made_runs import CHAIN_NAME, MadeRun, ended, ended_pid, row
from tests.slurm.replayed_slurm import ReplayedSlurm
from tests.whole_runs import Livt


def livt(*words: object):
    return CliRunner().invoke(main.app, [str(w) for w in words])


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return ReplayedSlurm(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path):
    return MadeRun(tmp_path / "runs" / "little")


@pytest.fixture
def busy(run, fake):
    """A run in its third start, two ranks, with a chain whose fine-tuning waits."""
    run.status("preempted", why="SIGUSR2 came; saved", step=40)
    run.status("running", step=80)
    run.status("running", step=120, total_steps=1000, failed_saves=2, last_failed_save="disk full")
    run.beat(0)
    run.beat(1, step=119, phase="data")
    run.metrics(4.0, 3.0, None, 2.0, 1.0, 0.5)
    (run.dir / "pretrain" / "anomalies.jsonl").write_text(
        json.dumps({"step": 33, "what": "the loss is nan", "policy": "skip", "loss": float("nan")}) + "\n"
    )
    run.chain(("14", "pretrain"), ("15", "finetune"))
    fake.squeue(row("14", "RUNNING", nodes="livt-n[1-2]"), row("15", "PENDING", "Dependency"))
    return run


def pauses(module, monkeypatch, instead) -> None:
    """The module's own pauses become `instead`; subprocess, which pauses too, keeps its own."""
    named = {name: getattr(time, name) for name in ("time", "monotonic", "strftime", "localtime")}
    monkeypatch.setattr(module, "time", types.SimpleNamespace(**named, sleep=instead))


# --- livt status ---


def test_one_screen_tells_all_of_it(busy):
    result = livt("status", busy.dir)
    assert result.exit_code == 0
    lines = {line[:9].strip(): line[10:] for line in result.stdout.splitlines() if line[:9].strip()}
    assert lines["run"] == f"{busy.dir}"
    assert lines["state"] == "running: pretrain"
    assert lines["progress"] == "step 120 of 1000, epoch 1.20 of 50, 12%"
    assert lines["speed"] == "5120 images/s, 0.05 s a step, MFU 41.2%, waits for data 2%"
    assert lines["loss"] == "0.5000  █▆▄▂▁"
    assert lines["finish"].startswith("in 44 s (")
    assert lines["finish"].endswith("then finetune")
    assert lines["saved"] == "no checkpoint yet"
    assert lines["ranks"].startswith("2, slowest: rank 1 on ")
    assert "step 119, data for 2 s" in lines["ranks"]
    assert lines["restarts"].startswith("2, the last: ended without a record at step 80, ")
    assert "before it: preempted at step 40" in result.stdout
    assert "2 saves have failed, the last: disk full" in result.stdout
    assert "1, the last: step 33: the loss is nan, skip" in result.stdout
    assert "      14  pretrain      RUNNING    livt-n[1-2], 0:51 left" in result.stdout
    assert "      15  finetune      PENDING    Dependency" in result.stdout


STAGE_KEYS = [
    *("stage", "state", "why", "since", "step", "total_steps", "epoch", "epochs", "images_per_s", "step_s"),
    *("data_wait_s", "mfu", "loss", "losses", "to_finish_s", "starts", "history", "anomalies", "last_anomaly"),
    *("checkpoint", "failed_saves", "ranks", "slowest", "silent_s"),
]
RUN_KEYS = ["version", "run", "name", "state", "why", "stage", "at", "mode", "stages", "jobs", "notes"]
JOB_KEYS = ["id", "stage", "segment", "segments", "state", "reason", "nodes", "left", "exit_code", "log"]


def test_the_keys_of_json_are_those_of_the_docs_and_always_there(busy, tmp_path, request):
    told = json.loads(livt("status", busy.dir, "--json").stdout)
    empty = MadeRun(tmp_path / "empty")
    for view in (told, json.loads(livt("status", empty.dir, "--json").stdout)):
        assert list(view) == RUN_KEYS
        assert all(list(stage) == STAGE_KEYS for stage in view["stages"])
        assert all(list(job) == JOB_KEYS for job in view["jobs"])
    assert (told["state"], told["stage"], told["version"]) == ("running", "pretrain", 1)
    first = told["stages"][0]
    assert (first["step"], first["total_steps"], first["starts"], first["loss"]) == (120, 1000, 3, 0.5)
    assert first["to_finish_s"] == pytest.approx(880 * 0.05)
    assert first["last_anomaly"]["loss"] is None  # NaN is not JSON
    assert first["slowest"]["rank"] == 1
    assert told["jobs"][1]["reason"] == "Dependency"
    documented = (request.config.rootpath / "docs" / "runs.md").read_text()
    assert [key for key in (*RUN_KEYS, *STAGE_KEYS, *JOB_KEYS) if f"`{key}`" not in documented] == []


@pytest.mark.parametrize(
    ("state", "code"),
    [("pending", 0), ("running", 0), ("preempted", 0), ("failed", 1), ("stalled", 0), ("done", 0)],
)
def test_each_state_and_its_exit_code(run, state, code):
    if state == "stalled":
        run.status("running", pid=ended_pid())
    elif state == "done":
        run.status("done")
        run.status("done", "finetune")
    elif state != "pending":
        run.status(state, why="so it is")
    result = livt("status", run.dir)
    assert result.exit_code == code
    assert f"state     {state}: " in result.stdout
    assert ("livt logs" in result.stdout) == (state in ("failed", "stalled"))


def test_all_runs_below_runs_one_line_each(busy, tmp_path, monkeypatch, fake):
    other = MadeRun(tmp_path / "runs" / "another")
    other.status("failed", why="the loss\nis nan", step=7, total_steps=9)
    other.chain(("21", "pretrain"))
    (tmp_path / "runs" / "no run").mkdir()
    monkeypatch.chdir(tmp_path)
    result = livt("status")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["another", "failed", "pretrain", "7/9", "the", "loss", "is", "nan"],
        ["little", "running", "pretrain", "120/1000", "5120", "images/s", "44", "s", "left"],
    ]
    assert result.exit_code == 1
    assert [call[0] for call in fake.calls] == ["squeue", "sacct"]  # once for all runs
    told = json.loads(livt("status", tmp_path / "runs", "--json").stdout)
    assert [view["state"] for view in told["runs"]] == ["failed", "running"]


def test_what_is_no_run_is_wrong_usage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["status"], ["status", "nowhere"], ["status", "."], ["logs", "."], ["cancel", "."]):
        error = livt(*words).exception
        assert isinstance(error, UsageError), words
    (tmp_path / "runs").mkdir()
    assert livt("status").stdout == "no runs in runs\n"


def test_a_screen_cannot_be_written_over_by_what_a_file_says(run):
    run.status("failed", why="\x1b[2J\x1b[31mgone\r\n\x07")
    out = livt("status", run.dir).stdout
    assert "gone" in out
    assert not [c for c in out if c not in "\n" and not c.isprintable()]


def test_a_terminal_without_the_bars_gets_others(busy):
    command = [sys.executable, "-m", "livt_scale", "status", str(busy.dir)]
    environ = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert "0.5000  #+-._" in done.stdout


def test_watch_ends_when_the_run_is_over_and_asks_slurm_now_and_then(busy, fake, monkeypatch):
    drawn = []

    def passes(_s: float) -> None:
        drawn.append(_s)
        if len(drawn) == 3:
            busy.status("failed", why="the loss is nan")

    pauses(status, monkeypatch, passes)
    result = livt("status", busy.dir, "--watch", "--json", "--every-s", "7")
    states = [json.loads(line)["state"] for line in result.stdout.splitlines()]
    assert states == ["running"] * 3 + ["failed"]
    assert drawn == [7.0] * 3
    assert [call[0] for call in fake.calls] == ["squeue"]
    assert result.exit_code == 1


def test_watch_is_left_by_ctrl_c(busy, monkeypatch):
    def pressed(_s: float) -> None:
        raise KeyboardInterrupt

    pauses(status, monkeypatch, pressed)
    assert livt("status", busy.dir, "--watch").exit_code == 0


def test_a_sparkline_goes_from_lowest_to_highest():
    assert sparkline([0.0, 7.0]) == "▁█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline([float(n) for n in range(1000)])) == 30


def test_none_of_them_imports_torch(busy):
    code = (
        "import sys\nfrom livt_scale.cli import main as cli\n"
        f"for words in (['status', {str(busy.dir)!r}], ['logs', {str(busy.dir)!r}]):\n"
        "    sys.argv = ['livt', *words]\n"
        "    try:\n        cli.main()\n    except SystemExit as end:\n        assert not end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_shell_words_of_a_run_directory_can_be_pasted(tmp_path):
    run = MadeRun(tmp_path / 'it\'s a "run" $(x)')
    run.status("failed", why="x")
    line = next(text for text in livt("status", run.dir).stdout.splitlines() if text.startswith("look at"))
    assert shlex.split(line)[-1] == str(run.dir)


# --- livt cancel ---


def test_cancel_saves_first_and_leaves_nothing_that_starts_again(busy, fake, monkeypatch):
    monkeypatch.setattr(cancel, "POLL_S", 0.01)
    fake.says("scancel", on={"--signal=USR2": {"squeue": row("14", "PENDING", "BeginTime") + "\n"}})
    fake_user(fake)
    result = livt("cancel", busy.dir)
    words = [call for call in fake.calls if call[0] in ("scancel", "scontrol")]
    assert words == [
        ["scancel", "15"],  # what waits goes first: it would take the place of what runs
        ["scontrol", "update", "JobId=14", "Requeue=0"],
        ["scancel", "--signal=USR2", "--full", "14"],
        ["scancel", "14"],  # it was put back into the queue all the same
    ]
    assert "cancelled, they had not started: 15" in result.stdout
    assert "asked to save and stop: 14" in result.stdout
    assert "pretrain: not saved at the end (it ended without a record); it has no checkpoint" in result.stdout
    assert result.exit_code == 1  # nobody wrote `preempted` here


def fake_user(fake: ReplayedSlurm) -> None:
    """`alive` reads other columns of squeue than status does: id, state, comment."""
    script = fake.folder / "squeue"
    text = script.read_text()
    script.write_text(
        text.replace(
            'sys.stdout.write(told["out"])',
            'rows = [line.split("|") for line in told["out"].splitlines()]\n'
            'short = any("%i|%T|%k" in word for word in sys.argv)\n'
            'sys.stdout.write("".join("|".join([r[0], r[1], r[7]] if short else r) + "\\n" for r in rows))',
        )
    )


def test_cancel_says_when_the_save_takes_longer_than_it_waits(busy, fake, monkeypatch):
    fake_user(fake)
    result = livt("cancel", busy.dir, "--wait-s", "0")
    assert "job 14 still runs 0 s after it was asked to stop" in str(result.exception)
    assert "--now" in str(result.exception)
    assert busy.dir.is_dir()


def test_cancel_now_kills_and_does_not_wait(busy, fake):
    fake_user(fake)
    result = livt("cancel", busy.dir, "--now")
    words = [call for call in fake.calls if call[0] == "scancel"]
    assert words == [["scancel", "15"], ["scancel", "--signal=KILL", "14"], ["scancel", "14"]]
    assert "the newest checkpoint stays as it is" in result.stdout
    assert result.exit_code == 0


def test_cancel_tells_in_slurms_words_why_it_cannot(busy, fake):
    fake_user(fake)
    fake.says("scancel", error="scancel: error: Kill job error on job id 15: Access/permission denied\n", code=1)
    assert "Access/permission denied" in str(livt("cancel", busy.dir).exception)


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])


def test_cancel_signals_the_local_process_that_wrote_status_json(run):
    process = sleeper()
    try:
        run.status("running", pid=process.pid)
        out = livt("cancel", run.dir, "--wait-s", "30")
        assert process.wait(timeout=10) == -signal.SIGUSR2
        assert f"SIGUSR2 to process {process.pid}: " in out.stdout
        assert out.exit_code == 1  # it did not save
    finally:
        process.kill()
        process.wait()


def test_cancel_signals_nobody_else(run):
    """Another host's process, one that only has the number now, or one that is gone."""
    process = sleeper()
    try:
        run.status("running", pid=process.pid, host="gpu07")
        error = livt("cancel", run.dir).exception
        assert isinstance(error, LivtError)
        assert f"runs as process {process.pid} on gpu07" in str(error)
        assert "Give the same command on gpu07" in str(error)
        run.status("running", pid=process.pid, old_s=10**6)  # written before this process was started
        for words in ([], ["--now"]):
            out = livt("cancel", run.dir, *words)
            assert "nothing of" in out.stdout, out
        run.status("running", pid=ended_pid())
        assert "nothing of" in livt("cancel", run.dir).stdout
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_cancel_of_what_is_over_does_nothing(run, fake):
    run.chain(("14", "pretrain"))
    run.status("done")
    result = livt("cancel", run.dir)
    assert result.exit_code == 0
    assert [call[0] for call in fake.calls] == ["squeue"]


def test_cancel_asks_all_runs_before_it_waits_for_any_and_one_that_cannot_be_ended_stops_no_other(tmp_path, fake):
    runs = [MadeRun(tmp_path / "runs" / name) for name in "abcd"]
    first, second = sleeper(), sleeper()
    try:
        runs[0].status("running", pid=first.pid)
        runs[1].status("running", pid=first.pid, host="gpu07")
        runs[2].status("running", pid=second.pid)
        out = livt("cancel", *(run.dir for run in runs), "--wait-s", "30")
        assert {first.wait(timeout=10), second.wait(timeout=10)} == {-signal.SIGUSR2}
        assert f"{runs[0].dir}: SIGUSR2 to process {first.pid}: " in out.stdout
        assert f"{runs[1].dir}: pretrain runs as process {first.pid} on gpu07" in out.stderr
        assert f"{runs[2].dir}: pretrain: not saved at the end" in out.stdout
        assert f"nothing of {runs[3].dir} runs" in out.stdout
        assert out.exit_code == 1
    finally:
        for process in (first, second):
            process.kill()
            process.wait()


def test_cancel_of_several_runs_asks_slurm_once_at_each_look(tmp_path, fake, monkeypatch):
    monkeypatch.setattr(cancel, "POLL_S", 0.01)
    fake_user(fake)
    runs = [MadeRun(tmp_path / "runs" / name) for name in "ab"]
    for number, run in enumerate(runs):
        run.status("running")
        run.chain((f"1{number}", "pretrain"), chain=f"livt {number}")
    rows = [row(f"1{n}", "RUNNING").replace(CHAIN_NAME, f"livt {n}") for n in range(2)]
    fake.squeue(*rows)
    fake.says("scancel", on={"11": {"squeue": rows[0] + "\n"}})
    out = livt("cancel", *(run.dir for run in runs), "--wait-s", "0.2")
    assert f"{runs[0].dir}: job 10 still runs 0 s after it was asked to stop" in out.stderr
    assert f"{runs[1].dir}: pretrain: not saved" in out.stdout
    asked = [call for call in fake.calls if call[:2] == ["scancel", "--signal=USR2"]]
    looks = [number for number, call in enumerate(fake.calls) if call[0] == "squeue"]
    assert [call[-1] for call in asked] == ["10", "11"]
    assert fake.calls.index(asked[1]) < looks[2], "both are asked before the first is waited for"


# --- livt logs ---


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


# --- a real run ---


@pytest.mark.slow
def test_a_real_run_is_watched_saved_and_stopped_goes_on_is_killed_and_told_as_stalled(tmp_path):
    livt_ = Livt(tmp_path)
    run_dir = tmp_path / "my run"
    words = livt_.train_words(run_dir, stages__pretrain__epochs=500)
    process = livt_.start(*words)
    try:
        until(lambda: (read_status(run_dir, "pretrain") or {}).get("total_steps"))
        until(lambda: "images/s" in screen(run_dir))
        assert "state     running: pretrain" in screen(run_dir)
        out = livt("cancel", run_dir, "--wait-s", "100")
        assert out.exit_code == 0, (out.stdout, out.exception)
        assert f"SIGUSR2 to process {process.pid}" in out.stdout
        assert "pretrain: preempted, its newest checkpoint: step-" in out.stdout
        assert process.wait(timeout=60) == 85
        assert "state     preempted: pretrain" in screen(run_dir)
    finally:
        process.kill()
        process.communicate()
    process = livt_.start(*words)
    try:
        until(lambda: read_status(run_dir, "pretrain").get("starts") == 2)
        until(lambda: read_status(run_dir, "pretrain")["state"] == "running")
        process.kill()
        process.communicate()
        told = screen(run_dir)
        assert "state     stalled: pretrain, its processes are gone" in told
        assert "restarts  1, the last: preempted at step" in told
        assert "SIGUSR2" in told
    finally:
        process.kill()
        process.communicate()


def screen(run_dir) -> str:
    return livt("status", run_dir).stdout


def until(condition, *, limit_s: float = 150) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
