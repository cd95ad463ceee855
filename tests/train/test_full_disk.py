"""A disk that is full for everything that a run writes costs records and saves, never the run."""

from __future__ import annotations

import errno
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from livt_scale.checkpoint.load import list_checkpoints
from livt_scale.train import run_dir as rundir
from livt_scale.train.hooks import Pictures
from livt_scale.train.loop import Hook
from livt_scale.train.run import run_dir_of, train
from livt_scale.train.run_files import read_status
from livt_scale.train.telemetry.metrics_log import MetricsLog
from livt_scale.train.telemetry.tensorboard import TensorBoard
from livt_scale.util.errors import Preempted
from tests.data.tiny_sets import tiny_recipe, tiny_set
from tests.train.disks import FullDisk
from tests.train.loops import a_step, idle_loop

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
writers_thread_dies = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """23 images: 2 steps an epoch."""
    return tiny_set(tmp_path_factory.mktemp("full-disk") / "set")


@pytest.fixture
def recipe(shards, tmp_path):
    """8 steps; each second one is saved, with a picture and TensorBoard."""
    pretrain = {"epochs": 4, "global_batch": 8, "micro_batch": 8, "warmup_epochs": 1}
    saving = {"mode": "sync", "every_steps": 2, "retries": 0, "max_failed_saves": 9}
    made = tiny_recipe(
        shards.folder, stages={"pretrain": pretrain}, checkpoint=saving, model__depth=1,
        model__decoder={"width": 16, "depth": 1, "heads": 2}, log={"every_steps": 1, "num_reconstructions": 2},
    )  # fmt: skip
    return made.model_copy(update={"run_dir": str(tmp_path / "run")})


def no_space(*_args, **_named):
    raise NO_SPACE


class Stop(Hook):
    def __init__(self, step: int) -> None:
        self._step = step

    def after_backward(self, loop, step):
        step.wants_stop = step.number == self._step


@writers_thread_dies
def test_a_run_outlives_a_full_disk_and_each_record_is_missed_once_in_the_log(recipe, caplog):
    with FullDisk(3, 6) as disk:  # the save after step 4 fails
        train(recipe, hooks=[disk])
    run_dir = run_dir_of(recipe)
    status = read_status(run_dir, "pretrain")
    assert (status["state"], status["step"], status["failed_saves"]) == ("done", 8, 1)
    assert [c.position.step for c in list_checkpoints(run_dir / "pretrain" / "checkpoints")] == [6, 8]
    assert [path.name[5:13] for path in sorted((run_dir / "pretrain" / "samples").iterdir())] == [
        f"{step:08d}" for step in (2, 6, 8)
    ]
    paths = (text.partition(" cannot be written: ")[0] for text in caplog.messages if "continues, " in text)
    missed = Counter(Path(path).name for path in paths)
    assert missed == {"pretrain": 1, "status.json": 1, "tensorboard": 1, "step-00000004.png": 1}


@writers_thread_dies
def test_a_run_that_is_stopped_while_the_disk_is_full_is_requeued(recipe):
    with FullDisk(5) as disk, pytest.raises(Preempted, match="it will resume from step 4"):
        train(recipe, hooks=[disk, Stop(5)])
    train(recipe)
    assert rundir.is_done(run_dir_of(recipe), "pretrain")


def test_a_status_that_cannot_be_written_neither_ends_a_run_nor_hides_how_it_ends(tmp_path, monkeypatch, caplog):
    status = rundir.Status(tmp_path / "pretrain", stage="pretrain", writes=True)
    status.write("running", step=1)
    with monkeypatch.context() as disk:
        disk.setattr(rundir, "write_atomic", no_space)
        status.write("running", step=2)
        with pytest.raises(Preempted), status.told():
            raise Preempted("stopped by SIGTERM")
        with pytest.raises(OSError, match="No space left"):
            status.write("done")
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'pretrain' / 'status.json'} cannot be written: No space left on device")
    status.write("preempted")
    assert read_status(tmp_path, "pretrain")["step"] == 2


@pytest.mark.parametrize("call", ["log", "picture", "finish"])
def test_tensorboard_on_a_full_disk_is_given_up_with_one_warning(tmp_path, monkeypatch, caplog, call):
    board = TensorBoard(tmp_path)
    Image.new("L", (2, 3)).save(tmp_path / "a.png")
    calls = {
        "log": lambda: board.log({"loss": 1.0}, step=1),
        "picture": lambda: board.picture("a", tmp_path / "a.png", step=1),
        "finish": board.finish,
    }
    writer = board._tracker.writer
    for owner, name in ((writer, "flush"), (writer.file_writer, "add_summary"), (writer, "close")):
        monkeypatch.setattr(owner, name, no_space)
    calls[call]()
    calls["log"]()
    calls["finish"]()
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'tensorboard'} cannot be written: No space left on device")


def test_pictures_on_a_full_disk_are_missing_with_one_warning(tmp_path, caplog):
    hook = Pictures(no_space, tmp_path, log=MetricsLog(tmp_path))
    loop = idle_loop(hook)
    for number in (1, 2):
        hook.on_save(loop, a_step(number))
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'step-00000001.png'} cannot be written: No space left on device")
