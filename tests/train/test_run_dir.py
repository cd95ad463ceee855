"""One process a run directory; how a run stands is told however it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from livt_scale.train import run_dir as rundir
from livt_scale.train.run_files import read_status
from livt_scale.util.errors import Preempted, RunBusyError, RunError

HOLD = "import sys, pathlib; from livt_scale.train import run_dir as rundir\n"
HOLD += "with rundir.hold(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


def test_a_second_process_is_refused_and_told_who_is_there(tmp_path):
    run_dir = tmp_path / 'a run\'s "dir"\nwith lines'
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(RunBusyError, match=f"process {first.pid} on "), rundir.hold(run_dir):
            pass
        first.kill()  # it cleans nothing up
    with rundir.hold(run_dir):
        pass


def test_a_run_directory_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"), rundir.hold(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (Preempted("stopped by SIGTERM"), "preempted", "stopped by SIGTERM"),
        (RunError("it broke", remedy="mend it"), "failed", "it broke. Mend it"),
        (ZeroDivisionError("x"), "failed", "ZeroDivisionError: x"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt: "),
    ],
)
def test_status_tells_how_the_stage_ended(tmp_path, error, state, why):
    status = rundir.Status(tmp_path / "pretrain", stage="pretrain", writes=True)

    @status.told()
    def train() -> None:
        status.write("running", step=3, total_steps=9)
        raise error

    with pytest.raises(type(error)):
        train()
    written = read_status(tmp_path, "pretrain")
    assert (written["state"], written["why"], written["step"]) == (state, why, 3)
    assert not rundir.is_done(tmp_path, "pretrain")


def test_since_is_when_the_state_changed(tmp_path, monkeypatch):
    status = rundir.Status(tmp_path / "finetune", stage="finetune", writes=True)
    for moment, state in (("1", "running"), ("2", "running"), ("3", "done")):
        monkeypatch.setattr(time, "strftime", lambda _format, moment=moment: moment)
        status.write(state)
    written = json.loads((tmp_path / "finetune" / "status.json").read_text())
    assert (written["since"], written["at"]) == ("3", "3")
    assert rundir.is_done(tmp_path, "finetune")


def test_each_start_keeps_how_the_ones_before_it_ended(tmp_path):
    for state, why in (("preempted", "SIGUSR2 came"), ("running", ""), ("failed", "x" * 1000)):
        rundir.Status(tmp_path, stage="pretrain", writes=True).write(state, why=why, step=3)
    survivor = rundir.Status(tmp_path, stage="pretrain", writes=False)
    survivor.take_over()
    survivor.write("failed", why="rank 0 is gone")
    written = json.loads((tmp_path / "status.json").read_text())
    assert (tmp_path / "status.json").read_text().count('"state": ') == 1  # what batch scripts look for is the stage's
    assert written["starts"] == 3  # the rank that takes over is of the same start
    assert [(h["ended"], h["why"], h["step"]) for h in written["history"]] == [
        ("preempted", "SIGUSR2 came", 3),
        ("running", "", 3),
    ]
    for _ in range(rundir.MAX_HISTORY + 5):
        rundir.Status(tmp_path, stage="pretrain", writes=True).write("failed", why="x" * 1000)
    written = json.loads((tmp_path / "status.json").read_text())
    assert len(written["history"]) == rundir.MAX_HISTORY
    assert written["starts"] == rundir.MAX_HISTORY + 8
    assert len(written["history"][-1]["why"]) == rundir.MAX_WHY


def test_a_status_that_is_no_record_starts_a_new_one(tmp_path):
    for damaged in ("[1, 2]", "{", '{"starts": "two", "state": "failed"}', '{"history": 3}'):
        (tmp_path / "status.json").write_text(damaged)
        rundir.Status(tmp_path, stage="pretrain", writes=True).write("running")
        assert json.loads((tmp_path / "status.json").read_text())["starts"] == 1


def test_other_ranks_write_nothing(tmp_path):
    rundir.Status(tmp_path / "pretrain", stage="pretrain", writes=False).write("running")
    assert list(tmp_path.iterdir()) == []
