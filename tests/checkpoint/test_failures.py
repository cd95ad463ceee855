"""A save that fails is told, leaves the old ones, and ends the run only when a limit is reached."""

from __future__ import annotations

import errno

import pytest

from livt_scale.checkpoint import io, saver
from livt_scale.checkpoint.load import Position, Retention, Saver, newest_whole, verify
from livt_scale.checkpoint.saver import Failures
from livt_scale.util.errors import CheckpointError, PruneFailed, RankLostError, SaveFailed

real_free = io.free_bytes


@pytest.fixture
def full(monkeypatch):
    """full(True): the disk has no room; full(False): it has again."""

    def set_full(is_full: bool) -> None:
        monkeypatch.setattr(io, "free_bytes", (lambda folder: 0) if is_full else real_free)

    return set_full


@pytest.fixture(params=["sync", "async"])
def saving(request, tmp_path, state):
    """saving(step, …): one save by one Saver, settled; `.saver` is it."""

    def start(failures: Failures, **options: object):
        made = Saver(tmp_path, mode=request.param, retention=Retention(keep_last=1), failures=failures, **options)

        def save(step: int, **more: object) -> None:
            made.save(state(step), position=Position(0, step), facts={}, **more)
            made.wait()

        return save

    return start


def test_the_run_ends_at_the_limit_and_a_good_save_counts_anew(tmp_path, saving, full, caplog):
    failures = Failures(limit=3)
    save = saving(failures)
    save(1)
    for step in (2, 3):
        full(True)
        save(step)
        assert "was not saved" in caplog.messages.pop()
        assert verify(tmp_path / "step-00000001") == []
        assert (failures.in_a_row, failures.durable_step) == (step - 1, 1)
    assert failures.report() == {
        "failed_saves": 2,
        "failed_saves_in_a_row": 2,
        "last_failed_save": failures.last,
    }
    full(False)
    save(4)
    assert (failures.in_a_row, failures.total, failures.durable_step) == (0, 2, 4)
    full(True)
    save(5)
    save(6)
    with pytest.raises(
        SaveFailed, match=r"step-00000007 was not saved.*the last 3 saves have failed.*max_failed_saves"
    ):
        save(7)
    assert newest_whole(tmp_path).name == "step-00000004"


def test_without_a_failure_there_is_nothing_to_report(saving):
    failures = Failures(limit=3)
    saving(failures)(1)
    assert failures.report() == {}


def test_the_last_save_of_a_stage_must_succeed(saving, full):
    save = saving(Failures(limit=None))
    full(True)
    save(1)
    with pytest.raises(SaveFailed, match="step-00000002"):
        save(2, final=True)


def test_the_run_ends_when_what_is_durable_has_grown_too_old(saving, full):
    now = [0.0]
    failures = Failures(limit=9, max_age_s=600, clock=lambda: now[0])
    save = saving(failures)
    now[0] = 5000.0
    save(1)  # however long the steps took: a save that succeeds ends nothing
    full(True)
    now[0] += 590
    save(2)
    now[0] += 20
    with pytest.raises(SaveFailed, match=r"nothing was saved for 10 min \(checkpoint\.max_unsaved_min: 10\)"):
        save(3)


def test_a_write_that_fails_once_is_tried_again_from_the_copy(tmp_path, state, saving, monkeypatch, caplog):
    monkeypatch.setattr(saver, "FIRST_PAUSE_S", 0.0)
    real, calls = io.HashedFile.write, []

    def once(self, data):
        calls.append(1)
        if len(calls) == 3:
            self.error = OSError(errno.EIO, "Input/output error")
            raise self.error
        return real(self, data)

    monkeypatch.setattr(io.HashedFile, "write", once)
    failures = Failures(limit=1)
    saving(failures, retries=1)(1)
    assert verify(tmp_path / "step-00000001") == []
    assert failures.total == 0
    [warning] = caplog.messages
    assert "Input/output error" in warning
    assert "retrying" in warning


def test_an_old_one_that_cannot_be_removed_is_told_and_the_new_one_counts(saving, monkeypatch, caplog):
    failures = Failures(limit=2)
    save = saving(failures)
    save(1)
    real = io.remove_folder

    def refused(folder):
        if folder.name.endswith("pruned") and folder.exists():
            raise PermissionError(errno.EACCES, "Permission denied")
        real(folder)

    monkeypatch.setattr(io, "remove_folder", refused)
    for step in (2, 3, 4):
        save(step)
    assert len(caplog.messages) == 3
    assert all("could not be removed" in text for text in caplog.messages)
    assert (failures.total, failures.in_a_row, failures.durable_step) == (3, 0, 4)
    with pytest.raises(PruneFailed):
        saving(Failures(limit=1))(5)


def test_an_error_of_our_own_is_never_tolerated(saving, monkeypatch):
    def broken(path, data):
        raise ValueError("a bug")

    monkeypatch.setattr(io, "write_synced", broken)
    with pytest.raises((CheckpointError, ValueError), match="a bug") as caught:
        saving(Failures(limit=9))(1)
    assert not isinstance(caught.value, SaveFailed)


@pytest.mark.parametrize(
    ("failure", "note"),
    [
        (RuntimeError("Connection closed by peer\nmore"), "may not be saved (RuntimeError): Connection closed by peer"),
        (SaveFailed("step-2: no room"), "was not saved: step-2: no room"),
    ],
)
def test_what_ends_the_run_is_raised_although_the_save_in_flight_fails_too(tmp_path, state, monkeypatch, failure, note):
    """A rank that is gone breaks a step, and then the save: the step's error names the rank."""

    def fails(job, peers):
        raise failure

    monkeypatch.setattr(saver, "publish", fails)
    failures, lost = Failures(limit=1), RankLostError("rank 0 is gone")
    with pytest.raises(RankLostError) as caught, Saver(tmp_path, mode="async", failures=failures) as made:  # noqa: PT012
        made.save(state(1), position=Position(0, 1), facts={})
        raise lost
    assert caught.value is lost
    assert any(note in text and "more" not in text for text in lost.__notes__)


def test_without_another_error_the_save_in_flight_raises_its_own(tmp_path, state, monkeypatch):
    def fails(job, peers):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(saver, "publish", fails)
    with (
        pytest.raises(RuntimeError, match="closed by peer"),
        Saver(tmp_path, mode="async", failures=Failures(limit=1)) as made,
    ):
        made.save(state(1), position=Position(0, 1), facts={})
