"""What a batch job decides: its next step, the meaning of exit codes, its end. The shell's part: test_script.py."""

import os
import random
import re
import socket
import subprocess
import time

import pytest

from livt_scale.distributed.ports import is_free, port_of_job
from livt_scale.slurm import commands
from livt_scale.slurm import job as job_module
from livt_scale.slurm.bad_nodes import read_bad_nodes
from livt_scale.slurm.causes import was_cancelled
from livt_scale.slurm.commands import Answer
from livt_scale.slurm.job import meaning_of, parse_ended
from livt_scale.slurm.records import read_end
from livt_scale.slurm.srun import Srun
from tests.slurm.batch import Batch
from tests.slurm.test_script_text import recipe

REQUEUED = ["scontrol", "requeue", "77"]


@pytest.fixture
def batch(tmp_path, monkeypatch, capsys):
    return Batch(tmp_path, monkeypatch, capsys)


def test_a_step_that_ends_well_ends_the_job_well(batch):
    assert batch()[0] == 0
    ((name, words),) = batch.steps
    assert name == "train"
    assert words.startswith("srun --kill-on-bad-exit=1 ")
    assert words.endswith(" -P -m livt_scale train /code/recipe.yaml --stage pretrain")
    assert batch.changes == []


@pytest.mark.parametrize(
    ("stage", "stages"),
    [("pretrain", {"finetune": {"init": "scratch"}}), ("finetune", {"pretrain": {}}), ("evaluate", {"pretrain": {}})],
)
def test_a_stage_that_only_other_runs_of_an_array_have_is_done(batch, stage, stages):
    code, log = batch(stage, stages=stages)
    assert code == 0
    assert "nothing to do" in log
    assert batch.steps == []


def test_only_85_is_put_back_into_the_queue(batch):
    batch.ends["train"] = 85
    assert batch()[0] == 85
    assert batch.changes == [REQUEUED]


@pytest.mark.parametrize("code", [1, 2, 84, 86, 134, 137, 140, 143, 255])
def test_any_other_end_is_a_failure(batch, code):
    batch.ends["train"] = code
    returned, log = batch()
    assert returned == 1
    assert f"failed with exit code {code}. The lines above" in log
    assert batch.changes == []


def test_where_srun_killed_the_last_tasks_on_their_way_out_the_runs_own_record_says_that_it_is_saved(batch):
    batch.status("preempted", at="before")
    batch.ends["train"] = lambda: batch.status("preempted", at="later") or 137
    assert batch()[0] == 85


def test_an_old_record_of_a_preemption_does_not_hide_a_failure(batch):
    batch.status("preempted")
    batch.ends["train"] = 137
    assert batch()[0] == 1


def test_a_status_that_cannot_be_read_does_not_end_the_job(batch):
    (batch.run / "pretrain" / "status.json").write_text('{"state": "do')
    assert batch()[0] == 0


@pytest.mark.parametrize("seed", range(30))
def test_the_meaning_of_an_exit_code(seed):
    """Against the table of docs/slurm.md, over drawn codes and records."""
    dice = random.Random(seed)
    code = dice.choice([0, 85, 137, 140, 143, dice.randrange(256)])
    state, asked = dice.choice(["", "running", "preempted", "failed", "done"]), dice.random() < 0.5
    saved = code == 85 or state == "preempted" or (code in (140, 143) and asked and state != "failed")
    expected = "done" if code == 0 else "stopped" if saved else "failed"
    assert meaning_of(code, new_state=state, was_asked=lambda: asked) == expected


# what `scontrol --oneliner show job` said to the script of a job that was ended, by Slurm 22.05
CANCELLED = (
    "JobId=77 JobState=CANCELLED Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1",
    "JobId=77 JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1",
)
ENDED_OTHERWISE = (
    "JobId=77 JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1",  # scontrol requeue
    "JobId=77 JobState=COMPLETING Reason=TimeLimit Dependency=(null) Requeue=0 Restarts=0 BatchFlag=1",
    "JobId=77 JobState=COMPLETING Reason=None Restarts=0 BatchFlag=1 PreemptTime=2026-11-26T12:21:04",
    "JobId=77 JobState=RUNNING Reason=None Dependency=(null) Requeue=1 Restarts=0 BatchFlag=1",
)


@pytest.mark.parametrize("shows", CANCELLED)
@pytest.mark.parametrize("when_stopped", ["requeue", "next"])
def test_a_job_that_somebody_cancelled_does_not_come_back(batch, when_stopped, shows):
    """scancel sends SIGTERM to the tasks first: they save and exit with 85, as at a preemption."""
    batch.ends["train"] = 85
    batch.shows = shows
    code, log = batch(when_stopped=when_stopped, segments=1 if when_stopped == "requeue" else 2)
    assert code == 1
    assert "was cancelled" in log
    assert batch.changes == []
    assert read_end(batch.run, "77").kind == "cancelled"


@pytest.mark.parametrize("shows", ENDED_OTHERWISE)
def test_a_job_that_slurm_ends_for_another_reason_was_not_cancelled(batch, shows):
    batch.ends["train"] = 85
    batch.shows = shows
    assert batch(when_stopped="next", segments=2)[0] == 0
    assert batch()[0] == 85
    assert batch.changes == ([] if "Restarts=1" in shows else [REQUEUED])  # Slurm has put it back already


# what it said when srun ended, after slurmd, slurmstepd and task were killed on the node that is not the batch node
NODE_LOST = (
    "JobId=77 JobState=COMPLETING Reason=NodeDown Dependency=(null) Requeue=0 Restarts=0 BatchFlag=1 ExitCode=0:0",
    "JobId=77 JobState=NODE_FAIL Reason=NodeDown Dependency=(null) Requeue=0 Restarts=0 BatchFlag=1 ExitCode=0:9",
)
NODE_LOST_AND_REQUEUED = "JobId=77 JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=1 BatchFlag=1"


@pytest.mark.parametrize("shows", NODE_LOST)
@pytest.mark.parametrize("signalled", [True, False], ids=["with the shell's SIGTERM", "before it"])
@pytest.mark.parametrize(("stage", "step"), [("pretrain", "train"), ("evaluate", "export"), ("evaluate", "eval")])
def test_a_lost_node_leaves_the_rest_to_the_next_segment(batch, stage, step, signalled, shows):
    """The rank that is left records its lost peer as a failure: it cannot know that the node is down."""
    batch.status("running")
    batch.ends[step] = lambda: batch.status("failed") or 1
    batch.signal_in = step if signalled else ""
    batch.shows = shows
    code, log = batch(stage, when_stopped="next", segments=2)
    assert code == 0
    assert f"a node of this job is down: {step} ended with exit code 1" in log
    batch.ends[step], batch.signal_in, batch.shows = 0, "", ""
    assert batch(stage, when_stopped="last", segment=2, segments=2)[0] == 0, "the next segment starts"


def test_a_node_lost_in_the_last_segment_leaves_the_rest_to_a_submission(batch):
    batch.ends["train"], batch.shows = 143, NODE_LOST[0]
    assert batch(when_stopped="last", segment=2, segments=2)[0] == 85


def test_a_node_lost_during_the_check_is_no_bad_node(batch):
    batch.environ["SLURM_JOB_NODELIST"] = "n[1-2]"
    batch.ends["check"], batch.shows = 1, NODE_LOST[0]
    assert batch(slurm={"check_nodes": "report"}, when_stopped="next", segments=2)[0] == 0
    assert read_bad_nodes(batch.run) == []


def test_a_job_that_slurm_has_put_back_because_of_a_lost_node_has_not_failed(batch):
    batch.ends["train"], batch.shows = 1, NODE_LOST_AND_REQUEUED
    assert batch()[0] == 85
    batch.environ["SLURM_RESTART_COUNT"] = "1"
    assert batch()[0] == 1, "the same report in the restart is of the time before it"


SUSPENDED = "JobId=77 JobState=RUNNING Reason=None Requeue=0 Restarts=0 BatchFlag=1 SuspendTime={} SecsPreSuspend=9"


@pytest.mark.parametrize(("resumed_s", "code"), [(5, 0), (3600, 1)])
def test_ranks_that_lose_one_another_when_their_job_is_resumed_have_not_failed(batch, resumed_s, code):
    batch.ends["train"] = lambda: batch.status("failed") or 1
    batch.shows = SUSPENDED.format(time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - resumed_s)))
    assert batch(when_stopped="next", segments=2)[0] == code


def test_a_bug_is_a_failure_where_all_nodes_are_up(batch):
    batch.ends["train"], batch.shows = 1, ENDED_OTHERWISE[-1]
    assert batch(when_stopped="next", segments=2)[0] == 1


def test_a_restart_that_is_cancelled_was_cancelled():
    facts = {"JobState": "COMPLETING", "Reason": "None", "Restarts": "3"}
    assert was_cancelled(facts, restarts=3)
    assert not was_cancelled(facts, restarts=2)
    assert not was_cancelled({}, restarts=0)


def test_an_element_of_an_array_reads_its_own_record_and_requeues_itself_alone(batch):
    """The last element of an array has the array's id, and Slurm then shows and requeues all of them."""
    batch.environ |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "4"}
    batch.shows = "JobId=75 JobState=CANCELLED Restarts=0\nJobId=77 JobState=RUNNING Reason=None Restarts=0"
    batch.ends["train"] = 85
    assert batch()[0] == 85
    assert batch.changes == [["scontrol", "requeue", "77_4"]]


def test_a_job_that_cannot_be_put_back_says_so(batch):
    batch.ends["train"] = 85
    batch.refused["requeue"] = Answer("", "scontrol failed with exit code 1 and printed: disabled", 1)
    code, log = batch()
    assert code == 85
    assert "could not be put back into the queue: scontrol failed with exit code 1" in log


@pytest.mark.parametrize("number", [-1, -2, -9, -15])
def test_a_requeue_that_ends_scontrol_itself_is_no_problem(batch, number):
    batch.ends["train"] = 85
    batch.refused["requeue"] = Answer("", "scontrol failed", number)
    assert "could not" not in batch()[1]


def test_a_stage_that_is_done_ends_immediately_without_a_step(batch):
    batch.status("done")
    code, log = batch()
    assert code == 0
    assert "already done" in log
    assert batch.steps == []


# --- segments ---


def test_a_segment_that_stopped_early_leaves_the_rest_to_the_next(batch):
    batch.ends["train"] = 85
    code, log = batch(segment=1, segments=3, when_stopped="next")
    assert code == 0
    assert "segment 1 of 3 ended; the next one continues" in log
    assert batch.changes == []


def test_the_last_segment_is_no_success_as_long_as_the_stage_is_not_done(batch):
    batch.ends["train"] = 85
    code, log = batch(segment=3, segments=3, when_stopped="last")
    assert code == 85
    assert "livt submit continues" in log


def test_a_segment_behind_a_failed_one_does_not_start(batch):
    batch.ends["train"] = 1
    assert batch(segment=1, segments=3, when_stopped="next")[0] == 1
    code, log = batch(segment=2, segments=3, when_stopped="next")
    assert code == 1
    assert "failed in an earlier segment" in log
    assert "exit code 1" in log
    assert batch.names == ["train"]


def test_a_failure_of_one_stage_is_no_failure_of_another(batch):
    batch.ends["train"] = 1
    assert batch(segments=2, when_stopped="next")[0] == 1
    batch.ends["train"] = 0
    assert batch("finetune", segments=2, when_stopped="next")[0] == 0


# --- no progress ---


def test_restarts_without_a_new_checkpoint_are_counted_and_end(batch):
    batch.ends["train"] = 85
    slurm = {"max_restarts_without_progress": 2}
    assert [batch(slurm=slurm)[0] for _ in range(3)] == [85, 85, 85]  # the first start, and two more
    code, log = batch(slurm=slurm)
    assert code == 1
    assert "no progress: 3 starts of pretrain in a row found the same newest checkpoint (none)" in log
    assert batch.names == ["train"] * 3
    assert batch.changes == [REQUEUED] * 3


def test_a_new_checkpoint_resets_the_count(batch):
    batch.ends["train"] = 85
    slurm = {"max_restarts_without_progress": 1}
    for step in range(1, 6):
        assert batch(slurm=slurm)[0] == 85
        assert batch(slurm=slurm)[0] == 85
        batch.checkpoint(step)
    assert batch(slurm=slurm)[0] == 85


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"newest": null}', '{"newest": null, "without_progress": "x"}'])
def test_a_damaged_record_of_the_last_start_counts_as_none(batch, text):
    (batch.run / "slurm").mkdir()
    (batch.run / "slurm" / "starts-pretrain.json").write_text(text)
    assert batch()[0] == 0


# --- signals ---


@pytest.mark.parametrize("code", [85, 140, 143])
def test_a_signal_that_ends_tasks_saved_or_before_they_handle_it_is_no_failure(batch, code):
    batch.ends["train"], batch.signal_in = code, "train"
    assert batch()[0] == 85
    assert batch.changes == [REQUEUED]


def test_a_failure_that_the_run_itself_recorded_stays_one_in_spite_of_a_signal(batch):
    batch.ends["train"], batch.signal_in = lambda: batch.status("failed") or 143, "train"
    assert batch()[0] == 1


def test_a_preemption_of_which_only_the_tasks_heard_is_seen_in_slurms_record(batch):
    batch.ends["train"] = 143
    batch.shows = "JobId=77 PreemptTime=2026-01-01T00:00:00 End"
    assert batch()[0] == 85
    batch.shows = "JobId=77 PreemptTime=None End"
    assert batch()[0] == 1


def test_a_signal_before_the_first_step_starts_none(batch):
    batch.signal_in = "before"
    assert batch()[0] == 85
    assert batch.steps == []
    assert batch.changes == [REQUEUED]


def test_a_signal_in_the_last_step_of_a_stage_that_is_done_does_not_start_it_again(batch):
    batch.signal_in = "train"
    assert batch()[0] == 0


# --- shards on the nodes, evaluation ---

STAGES_IN = {"slurm": {"stage_in": True}, "stage_in_dir": "/scratch/x y"}


def test_staged_shards_are_copied_once_a_node_read_there_and_removed(batch):
    assert batch(**STAGES_IN)[0] == 0
    (_, copy), (_, train), (_, remove) = batch.steps
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in copy
    assert copy.endswith("livt_scale.slurm.stage_in /scratch/x y/livt-shards-77 pretrain /code/recipe.yaml")
    assert train.startswith('env LIVT_STAGED={"/set/train": "/scratch/x y/livt-shards-77/train"} srun ')
    assert train.endswith(" train /code/recipe.yaml --stage pretrain")
    assert remove.endswith("rm -rf -- /scratch/x y/livt-shards-77 /scratch/x y/livt-shards-77.lock")


def test_staged_validation_shards_are_read_where_they_are(batch, tmp_path):
    (tmp_path / "livt-shards-77" / "val").mkdir(parents=True)
    batch(slurm={"stage_in": True}, stage_in_dir=str(tmp_path))
    staged = tmp_path / "livt-shards-77"
    copies = f'{{"/set/train": "{staged}/train", "/set/val": "{staged}/val"}}'
    assert batch.steps[1][1].startswith(f"env LIVT_STAGED={copies} srun ")


@pytest.mark.parametrize("fails", ["stage-in", "train"])
@pytest.mark.parametrize("clean_up", [0, 1])
def test_staged_shards_are_removed_where_something_fails(batch, fails, clean_up):
    batch.ends |= {fails: 3, "clean-up": clean_up}
    assert batch(**STAGES_IN)[0] == 1
    assert batch.names[-2:] == [fails, "clean-up"]


def test_staged_shards_are_removed_before_the_job_is_put_back(batch):
    batch.ends |= {"train": 85, "clean-up": lambda: batch.changes.append(["removed"]) or 0}
    assert batch(**STAGES_IN)[0] == 85
    assert batch.changes == [["removed"], REQUEUED]


@pytest.mark.parametrize("code", [85, 140, 143])
def test_a_signal_while_shards_are_copied_is_no_failure(batch, code):
    batch.ends["stage-in"], batch.signal_in = code, "stage-in"
    assert batch(**STAGES_IN)[0] == 85
    assert batch.names == ["stage-in", "clean-up"]


def test_the_evaluation_is_of_the_export(batch):
    assert batch("evaluate", val="/shards/val")[0] == 0
    (_, export), (_, evaluation) = batch.steps
    assert export.endswith(f"livt_scale export {batch.run}")
    assert evaluation.endswith(f"eval {batch.run}/export --data /shards/val --out {batch.run}/export/eval.json")
    assert all("--ntasks=1" in words for words in (export, evaluation))


def test_the_second_segment_of_an_evaluation_does_what_the_first_has_left(batch):
    """It starts however the first one ended. An earlier submission's result is of other weights."""
    made = batch.run / "export" / "eval.json"
    for folder in (made.parent, batch.run / "finetune"):
        folder.mkdir()
    made.write_text("{}")
    os.utime(made, (1000, 1000))
    batch.status("done", stage="finetune")
    second = {"when_stopped": "last", "segment": 2, "segments": 2}
    assert batch("evaluate", **second)[0] == 0
    assert batch.names == ["export", "eval"]
    os.utime(made)
    batch.steps.clear()
    code, log = batch("evaluate", **second)
    assert (code, batch.names) == (0, [])
    assert "evaluate is already done" in log
    assert batch("evaluate")[0] == 0
    assert batch.names == ["export", "eval"], "by hand it is evaluated again"


def test_an_export_that_fails_is_not_evaluated(batch):
    batch.ends["export"] = 1
    assert batch("evaluate")[0] == 1
    assert batch.names == ["export"]


def test_a_run_without_evaluation_shards_is_exported_alone(batch):
    assert batch("evaluate", val=None)[0] == 0
    assert batch.names == ["export"]


def test_an_evaluation_copies_no_shards(batch):
    batch("evaluate", **STAGES_IN)
    assert batch.names == ["export", "eval"]


# --- what the tasks find ---


def test_tasks_get_the_time_limit_where_slurm_does_not_give_it(batch):
    batch.shows = "JobId=77 EndTime=2026-01-02T03:04:05 Deadline=N/A"
    batch()
    at = int(time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1)))
    assert batch.steps[0][1].startswith(f"env LIVT_STOP_AT={at} srun ")
    batch.environ["SLURM_JOB_END_TIME"] = "1767323045"
    batch()
    assert batch.steps[1][1].startswith("srun ")


def test_the_cpus_of_a_task_are_passed_to_srun(batch):
    batch.environ["SLURM_CPUS_PER_TASK"] = "12"
    batch()
    assert " --cpus-per-task=12 " in batch.steps[0][1]


# --- where the ranks meet ---


def test_a_port_that_is_taken_is_replaced_by_another_one(batch):
    with socket.socket() as taken:
        taken.bind(("", port_of_job(77)))
        taken.listen()
        _, log = batch()
    words = batch.steps[0][1]
    assert "port 12077 is taken on this node" in log
    port = int(re.match(r"env MASTER_PORT=(\d+) srun ", words)[1])
    assert port != 12077
    assert is_free(port)


def test_a_job_whose_ports_are_all_taken_fails_and_its_record_names_them(batch, monkeypatch):
    monkeypatch.setattr(job_module, "free_port", lambda number: None)
    assert batch()[0] == 1
    assert batch.steps == []
    end = read_end(batch.run, "77")
    assert (end.kind, end.code) == ("failed", 1)
    assert end.why.startswith("port 12077 and 50 others are taken on ")


# --- the code that runs ---


def test_each_task_knows_the_code_that_it_has_to_import(batch):
    batch.environ |= {"LIVT_CODE": "/run it's/code/0123", "SLURM_JOB_NODELIST": "n1"}
    batch.ends["check"] = lambda: (batch.run / "slurm" / "nodes" / "77" / "n1").write_text("ok\n") * 0
    batch(**STAGES_IN)
    assert batch.names == ["check", "stage-in", "train", "clean-up"]
    for _, words in batch.steps[:3]:
        assert re.search(r" env LIVT_CODE=/run it's/code/0123 \S+ -P -m livt_scale", words)


# --- bad nodes ---


@pytest.fixture
def three(batch):
    """A job on n1, n2, n3. `answers(n1="ok")`: what the check leaves; a node that is not named leaves nothing."""
    batch.environ["SLURM_JOB_NODELIST"] = "n[1-3]"

    def answers(**answers):
        def check():
            for node, text in answers.items():
                (batch.run / "slurm" / "nodes" / "77" / node).write_text(f"{text}\n")
            return int(set(answers.values()) != {"ok"})

        batch.ends["check"] = check

    batch.answers = answers
    return batch


def test_a_node_that_fails_its_check_or_does_not_answer_ends_the_job_and_is_named(three):
    three.answers(n1="ok", n2="gpus: Slurm gave this job 8 GPUs here, and torch sees 7\njpeg: none")
    returned, log = three()
    assert returned == 1
    assert "node n2 is bad: gpus: Slurm gave this job 8 GPUs here, and torch sees 7; jpeg: none" in log
    assert "node n3 is bad: no answer from its check, which has 5 min" in log
    assert "--set slurm.exclude=n2,n3" in log
    assert [node.name for node in read_bad_nodes(three.run)] == ["n2", "n3"]
    assert three.names == ["check"]
    assert three.changes == []


def test_good_nodes_train(three):
    three.answers(n1="ok", n2="ok", n3="ok")
    assert three()[0] == 0
    assert three.names == ["check", "train"]
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --time=5 " in three.steps[0][1]
    assert not (three.run / "slurm" / "bad-nodes").exists()


def test_answers_of_an_earlier_start_do_not_count(three):
    three.answers(n1="ok", n2="ok", n3="ok")
    three()
    three.answers(n1="ok", n2="ok")
    code, log = three()
    assert (code, "node n3 is bad" in log) == (1, True)


@pytest.mark.parametrize("check", ["report", "exclude"])
@pytest.mark.parametrize("nodes", ["n1", "n[1-2]"])
def test_where_srun_fails_no_node_is_bad(batch, check, nodes):
    """As where the job has a memory limit that contradicts an inherited one."""
    batch.environ["SLURM_JOB_NODELIST"] = nodes
    batch.ends["check"] = 1
    code, log = batch(slurm={"check_nodes": check})
    assert code == 1
    assert "srun failed with exit code 1 and started the check on no node" in log
    assert read_bad_nodes(batch.run) == []
    assert batch.changes == []


def test_a_node_on_which_the_check_began_and_left_no_answer_is_bad(batch):
    batch.environ["SLURM_JOB_NODELIST"] = "n1"
    mark = batch.run / "slurm" / "nodes" / "77" / "n1.started"
    batch.ends["check"] = lambda: mark.write_text("started\n") and 1
    assert batch()[0] == 1
    assert [node.name for node in read_bad_nodes(batch.run)] == ["n1"]


def test_the_check_marks_its_node_before_python_starts(tmp_path):
    """With a Python that fails: the node has begun, and left no answer."""
    words = Srun(recipe(), tmp_path, tmp_path, {"SLURMD_NODENAME": "n7"}).check(tmp_path / "it's here")
    (tmp_path / "it's here").mkdir()
    command = words[words.index("sh") :]
    command[command.index("-P") - 1] = "false"
    assert subprocess.run(command, env={"PATH": "/usr/bin:/bin", "SLURMD_NODENAME": "n7"}).returncode == 1
    assert [path.name for path in (tmp_path / "it's here").iterdir()] == ["n7.started"]


def test_a_bad_node_is_found_without_an_answer_of_slurm(three, monkeypatch):
    monkeypatch.setattr(commands, "query", lambda *words: Answer("", f"{words[0]} gave no answer within 60 s"))
    three.answers(n1="ok", n2="gpu 2: a product of whole numbers came out wrong", n3="ok")
    code, log = three()
    assert (code, "node n2 is bad: gpu 2" in log) == (1, True)
    assert three.names == ["check"]


@pytest.mark.parametrize("node_list", ["n[1-", ","])
def test_a_list_that_names_no_node_is_no_check_that_was_passed(batch, node_list):
    batch.environ["SLURM_JOB_NODELIST"] = node_list
    code, log = batch()
    assert code == 1
    assert f"SLURM_JOB_NODELIST is {node_list!r}, which names no node" in log
    assert batch.names == ["check"]


def test_where_no_node_passes_the_nodes_are_not_the_cause(three):
    three.answers(n1="jpeg: none")
    returned, log = three(slurm={"check_nodes": "exclude"})
    assert returned == 1
    assert "none of the 3 nodes passes the check" in log
    assert not (three.run / "slurm" / "bad-nodes").exists()


def test_the_job_comes_back_without_its_bad_nodes_and_waiting_jobs_exclude_them_too(three):
    three.answers(n1="ok", n3="ok")
    three.squeue = {"--jobs=77": "livt abc\n", "--states=PENDING": "78|livt abc\n79|another\n"}
    returned, log = three(slurm={"check_nodes": "exclude"}, exclude="old[1-2]")
    assert returned == 85
    assert "continues without n2" in log
    assert three.changes == [
        ["scontrol", "update", "JobId=78", "ExcNodeList=n2,old[1-2]"],
        REQUEUED,
        ["scontrol", "update", "JobId=77", "ExcNodeList=n2,old[1-2]"],
    ]


def test_of_an_array_the_waiting_jobs_of_this_run_alone_are_changed(three):
    """Another run has found other nodes bad, and one list of Slurm's replaces the other."""
    three.environ |= {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1"}
    rows = "".join(f"{job}|livt abc\n" for job in ("71_0", "71_1", "71_11", "72_1"))
    three.squeue = {"--jobs=77": "livt abc\n", "--states=PENDING": rows}
    three.answers(n1="ok", n3="ok")
    assert three(slurm={"check_nodes": "exclude"})[0] == 85
    assert [call[2] for call in three.changes if call[1] == "update"] == ["JobId=71_1", "JobId=72_1", "JobId=70_1"]


def test_waiting_jobs_that_cannot_be_changed_are_reported(three):
    three.answers(n1="ok", n3="ok")
    three.squeue = {"--jobs=77": "livt abc\n", "--states=PENDING": "78|livt abc\n"}
    three.refused["update"] = Answer("", "scontrol failed", 1)
    code, log = three(slurm={"check_nodes": "exclude"}, when_stopped="next", segments=2)
    assert code == 0
    assert "could not be changed to exclude them" in log


def test_a_signal_during_the_check_is_no_bad_node(three):
    three.answers()
    three.signal_in = "check"
    assert three()[0] == 85
    assert not (three.run / "slurm" / "bad-nodes").exists()
    assert three.changes == [REQUEUED]


def test_without_the_check_no_node_is_asked(three):
    assert three(slurm={"check_nodes": "no"})[0] == 0
    assert three.names == ["train"]


def test_names_of_steps_and_codes_are_parsed():
    assert parse_ended(["check:0", "stage-in:85"]) == [("check", 0), ("stage-in", 85)]
