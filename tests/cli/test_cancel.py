"""`livt cancel`: what it signals, which jobs it ends, and whom it leaves alone."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from livt_scale.slurm import cancel
from livt_scale.util.errors import ClusterError, LivtError
from tests.cli.commands import fake_user, livt
from tests.slurm.made_runs import CHAIN_NAME, MadeRun, ended_pid, row


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


@pytest.mark.parametrize("failures", [1, 1000])
def test_cancel_waits_for_a_controller_that_does_not_answer_for_a_while(busy, fake, monkeypatch, failures):
    monkeypatch.setattr(cancel, "POLL_S", 0.01)
    fake_user(fake)
    fake.says("scancel", on={"--signal=USR2": {"squeue": ""}})
    looks, answered = [], cancel.commands.alive

    def alive(chains):
        looks.append(chains)
        if 1 < len(looks) <= 1 + failures:
            raise ClusterError("squeue failed: Socket timed out")
        return answered(chains)

    monkeypatch.setattr(cancel.commands, "alive", alive)
    result = livt("cancel", busy.dir, "--wait-s", "0.5")
    assert result.stdout.count("note: squeue failed: Socket timed out") == 1
    if failures == 1:
        assert "pretrain: not saved at the end" in result.stdout
    else:
        assert "whether job 14 has saved and ended is not known: squeue failed" in str(result.exception)
