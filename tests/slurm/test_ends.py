"""How a job ended is recorded, read by later segments, and not mistaken for another end."""

from datetime import UTC, datetime

import pytest

from livt_scale.slurm import commands
from livt_scale.slurm.commands import Answer
from livt_scale.slurm.records import ENDS, EndRecord, parse_end, read_end
from tests.slurm.batch import Batch

NEXT = {"segments": 3, "when_stopped": "next"}


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    return Batch(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("2026-11-29T19:40:00+0000 1 failed\nmodule load\n cuda failed\n", ("failed", 1, "module load cuda failed")),
        ("2026-11-29T19:40:00+0000 0 done\n\n", ("done", 0, "")),
        ("2026-11-29T19:40:00+0000 0 stopped\nsegment 1", ("stopped", 0, "segment 1")),
        ("2026-11-29T19:40:00+0000 1 cancelled\nby you", ("cancelled", 1, "by you")),
        ("2026-11-29T19:40:00+0000 127 \n\n", ("failed", 127, "")),  # a script that ended without a word of ours
        ("2026-11-29T19:40:00+0000 85 nonsense\n", ("stopped", 85, "")),
    ],
)
def test_a_record_of_an_end_is_read(text, end):
    assert parse_end(text) == EndRecord(*end, at=datetime(2026, 11, 29, 19, 40, tzinfo=UTC).timestamp())


@pytest.mark.parametrize("text", ["", "x", "1", "{}", "2026-11-29T19:40:00+0000 x\n"])
def test_what_is_no_record_is_none(text):
    assert parse_end(text) is None


@pytest.mark.parametrize("job", ["", "../77", "77/..", "7 7", "77_1_2"])
def test_a_job_without_a_number_has_no_record(tmp_path, job):
    assert read_end(tmp_path, job) is None


# --- segments ---


def test_no_segment_starts_behind_one_that_failed(batch):
    batch.ends["train"] = 1
    assert batch(segment=1, **NEXT)[0] == 1
    batch.ends["train"] = 0
    for segment in (2, 3):
        code, log = batch(segment=segment, **NEXT)
        assert code == 1
        assert "failed in an earlier segment" in log
        assert "exit code 1" in log
        assert read_end(batch.run, str(76 + segment)).kind == "failed"
    assert batch.names == ["train"]


@pytest.mark.parametrize("by", ["scontrol", "sacct"])
def test_no_segment_starts_behind_one_that_was_cancelled_and_killed_before_it_had_saved(batch, by):
    """Saving took longer than KillWait: the batch shell was killed too, and left no record."""
    batch.ended = {by: "CANCELLED"}
    code, log = batch(segment=2, **NEXT)
    assert code == 1
    assert "job 77, the segment before this one, was cancelled" in log
    batch.ended = {}
    assert batch(segment=3, **NEXT)[0] == 1
    assert batch.names == []
    assert [read_end(batch.run, job).kind for job in ("78", "79")] == ["cancelled", "cancelled"]


def test_the_end_of_an_element_is_found_by_the_name_that_the_chain_has(monkeypatch):
    """It has a number of its own too, which is its JobId."""
    rows = "JobId=15 ArrayJobId=12 ArrayTaskId=3 JobState=CANCELLED\n"
    rows += "JobId=12 ArrayJobId=12 ArrayTaskId=4 JobState=FAILED\n"
    monkeypatch.setattr(commands, "query", lambda *words: Answer(rows if words[0] == "scontrol" else ""))
    assert [commands.end_state(job) for job in ("12_3", "12_4", "12", "12_5")] == ["CANCELLED", "FAILED", "FAILED", ""]


@pytest.mark.parametrize("state", ["PREEMPTED", "NODE_FAIL", "TIMEOUT", "COMPLETED", "FAILED", ""])
@pytest.mark.parametrize("by", ["scontrol", "sacct"])
def test_a_segment_that_slurm_ended_otherwise_without_a_record_is_continued(batch, by, state):
    batch.ended = {by: state}
    assert batch(segment=2, **NEXT)[0] == 0
    assert batch.names == ["train"]


def test_slurm_is_not_asked_where_there_is_a_record(batch):
    batch.ends["train"] = 85
    assert batch(segment=1, **NEXT)[0] == 0
    batch.ended = {"scontrol": "CANCELLED"}
    batch.ends["train"] = 0
    assert batch(segment=2, **NEXT)[0] == 0


def test_the_first_segment_asks_nobody(batch):
    batch.ended = {"scontrol": "CANCELLED"}
    assert batch(segment=1, **NEXT)[0] == 0


# --- requeue ---


@pytest.mark.parametrize("asked_first", [True, False])
def test_a_job_that_somebody_else_has_put_back_is_not_reported_as_lost(batch, asked_first):
    """After `scontrol requeue` Slurm refuses a second one, and the job is in the queue all the same."""
    batch.ends["train"] = 85
    requeued = "JobId=77 JobState=COMPLETING Reason=None Restarts=1"
    batch.shows = requeued if asked_first else ""
    batch.refused["requeue"] = Answer("", "scontrol failed with exit code 1 and printed: disabled", 1)
    batch.on_change = lambda: setattr(batch, "shows", requeued)
    code, log = batch()
    assert code == 85
    assert "could not" not in log
    assert len(batch.changes) == (0 if asked_first else 1)
    assert read_end(batch.run, "77").kind == "stopped"


def test_a_job_that_could_not_be_put_back_has_that_in_its_record(batch):
    batch.ends["train"] = 85
    batch.refused["requeue"] = Answer("", "scontrol failed with exit code 1 and printed: disabled", 1)
    assert batch()[0] == 85
    end = read_end(batch.run, "77")
    assert (end.kind, end.code) == ("stopped", 85)
    assert "could not be put back into the queue" in end.why


def test_a_failure_is_recorded_in_both_modes(batch):
    batch.ends["train"] = 1
    for plan in ({}, NEXT):
        assert batch(**plan)[0] == 1
        assert read_end(batch.run, "77") == EndRecord("failed", 1, "pretrain failed with exit code 1", 1767225600.0)
        (batch.run / ENDS / "77").unlink()
