"""`livt status`: its lines, its JSON and its exit codes; a real run that it looks at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from livt_scale.cli import status
from livt_scale.cli.status import sparkline
from livt_scale.train.run_files import read_status
from livt_scale.util.errors import UsageError
from tests.cli.commands import livt, pauses
from tests.slurm.made_runs import MadeRun, ended_pid
from tests.whole_runs import Livt


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
RUN_KEYS = [
    *("version", "run", "name", "state", "why", "next", "accuracy", "starts_at", "stage", "at", "mode", "stages"),
    *("jobs", "notes"),
]
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


def test_all_runs_below_runs_one_line_each(busy, tmp_path, monkeypatch, fake):
    other = MadeRun(tmp_path / "runs" / "another")
    other.status("failed", why="the loss\nis nan", step=7, total_steps=9)
    other.chain(("21", "pretrain"))
    (tmp_path / "runs" / "no run").mkdir()
    monkeypatch.chdir(tmp_path)
    result = livt("status")
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["another", "failed", "pretrain", "7/9", "78%", "the", "loss", "is", "nan"],
        ["little", "running", "pretrain", "120/1000", "12%", "5120", "images/s", "44", "s", "left"],
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
