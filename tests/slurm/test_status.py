"""What is made of a run's record, its processes and Slurm's words: each state, and what is missing or damaged."""

from __future__ import annotations

import json
import os
import time

import pytest

from livt_scale.slurm import commands, processes, progress, status
from livt_scale.slurm.commands import JobState
from livt_scale.train import run_files
from livt_scale.train.run_dir import hold
from tests.slurm.made_runs import CHAIN_NAME, MadeRun, ended, ended_pid, row
from tests.slurm.replayed_slurm import ReplayedSlurm


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return ReplayedSlurm(tmp_path, monkeypatch)


@pytest.fixture
def run(tmp_path):
    return MadeRun(tmp_path / 'runs "a b"')


def test_a_job_that_waits_is_pending_with_slurms_reason(run, fake):
    run.chain(("14", "pretrain"), ("15", "finetune"))
    fake.squeue(row("14", "PENDING", "Resources"), row("15", "PENDING", "Dependency"))
    view = status.look_at(run.dir)
    assert (view.state, view.stage, view.why) == (
        "pending",
        "pretrain",
        "job 14 waits: the nodes that it needs are busy (Resources)",
    )
    assert [call[0] for call in fake.calls] == ["squeue"]  # nothing is gone, so accounting is not asked
    assert "--jobs=14,15" in fake.calls[0]


def test_nothing_started_and_nothing_submitted_is_pending(run):
    assert status.look_at(run.dir).why == "not started, and no job of it is in the queue"


def test_a_living_process_or_a_fresh_heartbeat_or_a_job_bears_running_out(run, fake):
    run.status("running", step=120, total_steps=1000)
    assert status.look_at(run.dir).state == "running"  # this process
    run.status("running", host="gpu07", step=120)
    assert status.look_at(run.dir).state == "running"  # of another host, but heard of a moment ago
    run.status("running", host="gpu07", step=120, old_s=4000)
    assert status.look_at(run.dir).state == "stalled"
    run.chain(("14", "pretrain"), old_s=5000)
    fake.squeue(row("14", "RUNNING", start="2026-11-23T23:06:32", nodes="gpu07"))
    view = status.look_at(run.dir)
    assert (view.state, view.why) == ("running", "job 14 runs, no sign of life for 66 min from its ranks")


def test_a_run_whose_processes_are_gone_is_stalled_at_once(run):
    run.status("running", pid=ended_pid(), step=120)
    run.beat(0, pid=ended_pid())
    view = status.look_at(run.dir)
    assert view.state == "stalled"
    assert view.why.startswith("its processes are gone, no sign of life for ")


def test_a_number_that_was_given_again_is_not_the_run(run):
    run.status("running", pid=os.getpid(), old_s=10**7)  # this process started later than that
    assert status.look_at(run.dir).state == "stalled"


def test_the_record_comes_before_accounting(run, fake):
    """Slurm calls a stopped and saved job COMPLETED or PREEMPTED; neither is the end of the run, nor a failure."""
    run.chain(("14", "pretrain"))
    for said, slurm in (("preempted", "COMPLETED"), ("preempted", "PREEMPTED"), ("done", "FAILED"), ("failed", "")):
        run.status(said, why="SIGUSR2", step=120)
        fake.sacct(*([ended("14", slurm)] if slurm else []))
        stage = status.look_at(run.dir).stages[0]
        assert (stage.name, stage.state, stage.why) == ("pretrain", said, "SIGUSR2")


@pytest.mark.parametrize(
    ("slurm", "state", "why"),
    [
        ("PREEMPTED", "preempted", "job 14 ended as PREEMPTED, exit code 1:0, without a save"),
        ("FAILED", "failed", "job 14 ended as FAILED, exit code 1:0; its log: slurm/logs/pretrain-14.log"),
        ("OUT_OF_MEMORY", "failed", "job 14 ended as OUT_OF_MEMORY, exit code 1:0; its log: "),
        ("NODE_FAIL", "stalled", "job 14 ended as NODE_FAIL, exit code 1:0, and no other job of it is in the queue"),
        ("TIMEOUT", "stalled", "job 14 ended as TIMEOUT"),
        ("CANCELLED by 1000", "stalled", "job 14 ended as CANCELLED"),
    ],
)
def test_accounting_tells_what_the_run_could_not(run, fake, slurm, state, why):
    run.chain(("14", "pretrain"), ("15", "finetune"))
    run.status("running", host="gpu07", step=120, old_s=30)  # its last record, when it was killed
    run.log("14")
    fake.sacct(ended("14", "REQUEUED"), ended("14", slurm, "1:0"))  # a row a start; the last one counts
    view = status.look_at(run.dir)
    assert view.state == state
    assert view.why.startswith(why)
    assert view.why.endswith("; its log: slurm/logs/pretrain-14.log")


def test_a_stage_that_was_preempted_waits_starts_and_runs_again(run, fake):
    run.chain(("14", "pretrain"))
    run.status("preempted", why="SIGUSR2", step=120)
    assert status.look_at(run.dir).state == "preempted"
    fake.squeue(row("14", "PENDING", "BeginTime"))
    view = status.look_at(run.dir)
    assert view.state == "pending"
    assert view.why.startswith("job 14 waits: its time to start has not come; ")
    assert view.why.endswith(" (BeginTime); before it: SIGUSR2")
    fake.squeue(row("14", "RUNNING", start="2026-11-23T23:06:32"))
    view = status.look_at(run.dir)
    assert (view.state, view.why) == ("running", "job 14 is starting")


def test_a_stage_that_failed_stays_so_while_its_dependants_wait(run, fake):
    run.chain(("14", "pretrain"), ("15", "finetune"))
    run.status("failed", why="the loss is nan")
    fake.sacct(ended("14", "FAILED", "1:0"))
    fake.squeue(row("15", "PENDING", "DependencyNeverSatisfied"))
    view = status.look_at(run.dir)
    assert (view.state, view.stage, view.why) == ("failed", "pretrain", "the loss is nan")
    never = "job 15 can never start: the job that it waits for did not end well"
    assert view.stages[1].why == never
    assert never in view.notes
    fake.squeue(row("14", "PENDING", "BeginTime"))  # it was put back into the queue all the same
    assert status.look_at(run.dir).state == "pending"


def test_what_a_job_recorded_is_a_failure_until_somebody_continues_the_run(run, fake):
    run.chain(("14", "pretrain"))
    run.status("preempted", why="SIGUSR2", old_s=60)
    run.end("14", why="no progress: 4 starts of pretrain", old_s=30)
    view = status.look_at(run.dir)
    log = "its log: slurm/logs/pretrain-14.log"
    assert (view.state, view.why) == ("failed", f"job 14: no progress: 4 starts of pretrain; {log}")
    with hold(run.dir):  # by hand, in this process
        assert status.look_at(run.dir).state == "running"
    assert status.look_at(run.dir).state == "failed"  # the lock is free again, its file is there
    run.status("preempted", why="SIGUSR2", old_s=5)  # that start has ended since
    assert status.look_at(run.dir).state == "preempted"


@pytest.mark.parametrize("slurm", ["forgotten", "squeue", "sacct"])
def test_a_failure_before_the_run_itself_wrote_anything_is_known_with_and_without_accounting(run, fake, slurm):
    run.chain(("14", "pretrain"), ("15", "finetune"))
    run.end("14", why="module load cuda failed")
    if slurm == "sacct":
        fake.sacct(ended("14", "FAILED", "1:0"))
    else:
        fake.says("sacct", error="Slurm accounting storage is disabled\n", code=1)
    if slurm == "squeue":
        fake.squeue(row("14", "FAILED", "NonZeroExitCode", end="2026-11-23T23:06:32"))
    view = status.look_at(run.dir)
    why = "job 14: module load cuda failed; its log: slurm/logs/pretrain-14.log"
    assert (view.state, view.stage, view.why) == ("failed", "pretrain", why)
    assert "--states=all" in fake.calls[0]


@pytest.mark.parametrize(
    ("kind", "code", "state"), [("stopped", 85, "preempted"), ("cancelled", 1, "stalled"), ("failed", 1, "failed")]
)
def test_an_evaluation_that_ended_early_is_not_pending(run, fake, kind, code, state):
    """It keeps no status.json: the record of its job is all that there is without accounting."""
    run.chain(("14", "pretrain"), ("15", "finetune"), ("16", "evaluate"))
    run.status("done", old_s=60)
    run.status("done", "finetune", old_s=50)
    run.end("16", kind, "why it ended", code=code)
    view = status.look_at(run.dir)
    assert (view.stage, view.state) == ("evaluate", state)
    assert view.why.startswith("job 16: why it ended")


def test_a_job_that_was_cancelled_by_hand_and_saved_is_preempted(run, fake):
    run.chain(("14", "pretrain"), ("15", "pretrain"))
    run.status("preempted", why="SIGTERM", step=120, old_s=10)
    for job in ("14", "15"):
        run.end(job, "cancelled", "pretrain was cancelled, so it is not restarted")
    view = status.look_at(run.dir)
    assert (view.state, view.why) == ("preempted", "job 14: pretrain was cancelled, so it is not restarted")


@pytest.mark.parametrize("has_log", [True, False])
def test_a_job_that_is_gone_without_any_trace_is_stalled_and_its_log_is_named(run, fake, has_log):
    run.chain(("14", "pretrain"))
    fake.says("sacct", error="Slurm accounting storage is disabled\n", code=1)
    if has_log:
        run.log("14")
    view = status.look_at(run.dir)
    assert view.state == "stalled"
    assert view.why.startswith("job 14 is gone from the queue")
    assert "slurm/logs/pretrain-14.log" in view.why
    assert ("has not started" in view.why) != has_log


@pytest.mark.parametrize("accounting", [True, False])
def test_the_segment_that_was_killed_is_named_not_those_that_were_cancelled_while_they_waited(run, fake, accounting):
    run.chain(("14", "pretrain"), ("15", "pretrain"), ("16", "finetune"))
    run.status("running", host="gpu07", step=120, old_s=30)
    run.log("14")
    now, ids = time.strftime("%Y-%m-%dT%H:%M:%S"), ("14", "15", "16")
    if accounting:
        fake.sacct(*(ended(job, "CANCELLED") for job in ids))
    else:
        fake.squeue(*(row(job, "CANCELLED", end=now) for job in ids))
        fake.says("sacct", error="Slurm accounting storage is disabled\n", code=1)
    view = status.look_at(run.dir)
    assert view.state == "stalled"
    assert view.why.startswith("job 14 ended as CANCELLED, and no other job of it is in the queue")
    assert view.why.endswith("; its log: slurm/logs/pretrain-14.log")


@pytest.mark.parametrize(("slurm", "state"), [("TIMEOUT", "stalled"), ("PREEMPTED", "preempted"), ("FAILED", "failed")])
def test_what_squeue_still_knows_of_an_ended_job_is_used_where_there_is_no_accounting(run, fake, slurm, state):
    run.chain(("14", "pretrain"))
    fake.says("sacct", error="Slurm accounting storage is disabled\n", code=1)
    fake.squeue(row("14", slurm, end="2026-11-23T23:06:32"))
    view = status.look_at(run.dir)
    assert view.state == state
    assert f"job 14 ended as {slurm}" in view.why
    assert view.notes == []  # nothing is missing


@pytest.mark.parametrize("kind", ["stopped", "failed"])
def test_the_record_of_an_earlier_start_does_not_count(run, fake, kind):
    run.chain(("14", "pretrain"))
    run.end("14", kind, "back in the queue", code=85, old_s=60)
    fake.squeue(row("14", "PENDING", "BeginTime"))
    assert status.look_at(run.dir).state == "pending"
    fake.squeue(row("14", "RUNNING", start=time.strftime("%Y-%m-%dT%H:%M:%S")))
    assert status.look_at(run.dir).state == "running"


def test_a_job_that_slurm_still_completes_has_ended_by_its_record(run, fake):
    run.chain(("14", "pretrain"))
    run.end("14", why="module load cuda failed")
    fake.squeue(row("14", "COMPLETING", start="2026-11-23T23:06:32"))
    assert status.look_at(run.dir).state == "failed"


def test_the_evaluation_is_done_when_its_file_is_there(run, fake):
    run.chain(("14", "pretrain"), ("15", "finetune"), ("16", "evaluate"))
    run.status("done", step=10)
    run.status("done", "finetune", step=5)
    fake.sacct(ended("16", "FAILED", "1:0"))
    assert (status.look_at(run.dir).stage, status.look_at(run.dir).state) == ("evaluate", "failed")
    made = run.dir / "export" / "eval.json"
    made.parent.mkdir()
    made.write_text("{}")
    assert status.look_at(run.dir).state == "done"
    os.utime(made, (1, 1))  # of weights before these
    assert status.look_at(run.dir).state == "failed"


def test_the_accuracy_of_an_export_of_weights_before_these_is_not_the_runs(run):
    run.status("done")
    run.status("done", "finetune")
    for folder, top1 in (("export", 0.9), ("finetune", 0.5)):
        (run.dir / folder).mkdir(exist_ok=True)
        (run.dir / folder / "eval.json").write_text(json.dumps({"top1": {"all": top1}}))
    assert status.look_at(run.dir).accuracy == {"all": 0.9}
    os.utime(run.dir / "export" / "eval.json", (1, 1))
    assert status.look_at(run.dir).accuracy == {"all": 0.5}


def test_jobs_of_another_chain_with_the_same_number_do_not_count(run, fake):
    run.chain(("14", "pretrain"), old_s=600)
    fake.squeue(row("14", "RUNNING").replace(CHAIN_NAME, "livt 0123456789abcdef"))
    fake.sacct(ended("14", "FAILED", "1:0", old_s=5000))  # before this chain was submitted
    view = status.look_at(run.dir)
    assert view.state == "stalled"
    assert view.jobs[0].now == JobState("14", "")


def test_an_end_of_before_this_start_does_not_count(run, fake):
    run.chain(("14", "pretrain"), old_s=1000)
    fake.sacct(ended("14", "FAILED", "1:0", old_s=300))
    run.status("running", host="gpu07", old_s=5)  # gone on with by hand
    assert status.look_at(run.dir).state == "running"


# --- Slurm that is not there, or does not answer ---


@pytest.mark.parametrize(
    ("command", "said", "note"),
    [
        (
            "sacct",
            {"error": "Slurm accounting storage is disabled\n", "code": 1},
            "Slurm accounting storage is disabled",
        ),
        ("squeue", {"error": "slurm_load_jobs error: Unable to contact slurm controller\n", "code": 1}, "Unable to"),
        ("squeue", {"sleeps": 30}, "squeue did not answer within 1 s"),
        ("squeue", {"out": "a|b\n|||||||\n\x00\xff\n" * 3}, None),
        ("sacct", {"out": "14\n14|FAILED\n|||||||\n"}, None),
    ],
)
def test_what_slurm_cannot_say_is_told_and_the_rest_shown(run, fake, monkeypatch, command, said, note):
    if "sleeps" in said:
        monkeypatch.setattr(commands, "ASK_S", 1.0)
    run.chain(("14", "pretrain"))
    run.status("preempted", why="SIGUSR2", step=120)
    fake.says(command, **said)
    view = status.look_at(run.dir)
    assert (view.state, view.jobs[0].now.state) == ("preempted", "")
    assert [n for n in view.notes if note and note in n] if note else view.notes == []


def test_without_slurm_it_is_said_which_command_is_missing(run, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    run.chain(("14", "pretrain"))
    assert status.look_at(run.dir).notes == ["there is no squeue here", "there is no sacct here"]


def test_a_single_job_that_squeue_has_forgotten_is_no_error(run, fake):
    run.chain(("14", "pretrain"))
    run.status("done")
    fake.says("squeue", error="slurm_load_jobs error: Invalid job id specified\n", code=1)
    assert status.look_at(run.dir).notes == []


# --- files that are missing, half written, damaged ---


def test_whatever_is_damaged_is_told_and_nothing_raised(run):
    run.status("running", step=120, total_steps=1000)
    run.metrics(1.0, 0.5)
    run.chain(("14", "pretrain"))
    run.beat(0)
    checkpoint = run.dir / "pretrain" / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{")
    (run.dir / "pretrain" / "anomalies.jsonl").write_text('{"step": 3}\n[]\n{"what": 1}\n{"step": "x"}\n{"ste')
    files = [p for p in run.dir.rglob("*") if p.is_file()]
    assert len(files) >= 6
    contents = (
        b"",
        b"\0" * 40,
        b"[1, 2]",
        b'{"state": 3}',
        b"{",
        b"\xff\xfe",
        b"[" * 5000,
        b"null",
        b'{"jobs": [3]}',
    )
    for path in files:
        kept = path.read_bytes()
        for content in contents:
            path.write_bytes(content)
            view = status.look_at(run.dir)
            if path.name in ("status.json", "chain.json"):
                assert [note for note in view.notes if str(path) in note], (path, content)
        path.unlink()
        path.mkdir()  # not even a file
        status.look_at(run.dir)
        path.rmdir()
        status.look_at(run.dir)
        path.write_bytes(kept)
    assert "is damaged" in " ".join(status.look_at(run.dir).notes)
    assert "3 lines of" in " ".join(status.look_at(run.dir).notes)


@pytest.mark.parametrize("name", ["step", "total_steps", "pid", "host", "since", "at", "why", "history", "ranks"])
@pytest.mark.parametrize("value", [None, "x", -1, [], {}, float("nan"), 1e400, True])
def test_fields_of_another_kind_are_no_error(run, name, value):
    run.status("running")
    path = run.dir / "pretrain" / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert status.look_at(run.dir).stage == "pretrain"


@pytest.mark.parametrize("text", ["[" * 200_000, "- " * 200_000, "a: {" * 150])
def test_a_recipe_that_is_nested_too_deep_is_reported(run, text):
    """libyaml's loader would end the process: it calls itself for each level."""
    (run.dir / "recipe.yaml").write_text(text)
    notes = status.look_at(run.dir).notes
    assert any("recipe.yaml cannot be read: it is nested more than 100 deep" in note for note in notes)


def test_a_brief_look_reads_the_end_of_the_metrics_alone(run):
    run.status("running", step=100, total_steps=60_000)
    run.metrics(*[1.0] * 2000)
    brief, whole = (status.look_at(run.dir, brief=brief).current.record for brief in (True, False))
    assert len(brief.lines) < 200 < len(whole.lines)
    assert brief.to_finish_s == whole.to_finish_s


def test_a_half_line_of_metrics_is_not_damage(run):
    run.metrics(1.0, None, 0.5)
    path = run.dir / "pretrain" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 80, "lo')
    record = progress.read_record(run.dir, "pretrain")
    assert (len(record.lines), record.step, record.damage) == (3, 60, [])


def test_long_files_are_read_from_their_end(run, monkeypatch):
    monkeypatch.setattr(run_files, "TAIL_BYTES", 2000)
    run.metrics(*[1.0] * 500)
    record = progress.read_record(run.dir, "pretrain")
    assert record.step == 10_000
    assert 5 < len(record.lines) < 20
    assert record.damage == []


def test_ranks_that_an_earlier_start_had_are_not_counted(run):
    run.status("running", old_s=100)
    for rank, old_s in ((0, 1), (1, 2), (2, 5000)):
        run.beat(rank, old_s=old_s)
    (run.dir / "pretrain" / "heartbeats" / "rank-3.json").write_text("{")
    assert [beat.rank for beat in progress.read_record(run.dir, "pretrain").beats] == [0, 1]


def test_the_time_to_finish_counts_saves_and_the_steps_of_this_number_of_ranks(run):
    run.status("running", step=40, total_steps=1040)
    run.metrics(*[1.0] * 2, step_s=0.5, checkpoint_stall_s=0.1, evaluation_s=0.2)
    assert progress.read_record(run.dir, "pretrain").to_finish_s == pytest.approx(1000 * 0.8)
    path = run.dir / "pretrain" / "metrics.jsonl"
    line = json.loads(path.read_text().splitlines()[-1]) | {"step": 60, "world_size": 16, "step_s": 0.3}
    path.write_text(path.read_text() + json.dumps(line) + "\n")  # went on with twice the ranks
    assert progress.read_record(run.dir, "pretrain").to_finish_s == pytest.approx(980 * 0.6)


@pytest.mark.parametrize("count", [1, 29, 30, 31, 1000])
def test_samples_keep_order_and_mean(count):
    values = [float(n) for n in range(count)]
    means = progress.sampled(values, count=30)
    assert len(means) == min(count, 30)
    assert means == sorted(means)
    assert means[0] >= values[0]
    assert means[-1] <= values[-1]


def test_a_process_is_known_by_number_host_start_and_owner():
    began = processes.started_at(os.getpid())
    assert began is not None
    assert began <= time.time() + 1
    host = os.uname().nodename
    assert processes.may_be_signalled(os.getpid(), host, wrote_at=time.time())
    assert not processes.may_be_signalled(os.getpid(), host, wrote_at=began - 60)  # it had the number before us
    assert not processes.may_be_signalled(os.getpid(), "gpu07", wrote_at=time.time())
    assert not processes.may_be_signalled(1, host, wrote_at=time.time())
    assert not processes.may_be_signalled(ended_pid(), host, wrote_at=time.time())
    assert processes.is_there(os.getpid(), "gpu07", wrote_at=None) is None
    assert "python" in processes.command_of(os.getpid())
