"""What a batch script does, by really running it: Slurm's commands are small programs that write down what came."""

import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from livt_scale.slurm.bad_nodes import read_bad_nodes
from livt_scale.slurm.code_snapshot import freeze
from livt_scale.slurm.script import JobPlan, render
from livt_scale.slurm.sites import ask
from tests.slurm.test_script_text import recipe, shared, template

PRETRAIN_STATUS = '{{\n  "stage": "pretrain",\n  "state": "{state}",\n  "at": "{at}"\n}}\n'


class Job:
    """A rendered script in a folder of its own, with `srun` and `scontrol` as the test writes them in shell."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run it's"
        (self.run / "pretrain" / "checkpoints").mkdir(parents=True)
        (folder / "bin").mkdir()
        self.program("srun", "exit 0")
        self.program("scontrol", "exit 0")
        self.environ: dict[str, str] = {}

    def program(self, name: str, body: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "{name} $*" >>"$CALLS"\n{body}\n')
        path.chmod(0o755)

    def status(self, state: str, at: str = "now") -> None:
        (self.run / "pretrain" / "status.json").write_text(PRETRAIN_STATUS.format(state=state, at=at))

    def checkpoint(self, step: int) -> None:
        (self.run / "pretrain" / "checkpoints" / f"step-{step:08d}").mkdir()

    def start(self, job: str = "pretrain", *, slurm: dict | None = None, **plan) -> subprocess.Popen:
        of = recipe(slurm or {}, run_dir=str(self.run))
        files = {"work_dir": str(self.folder), "code": "", "code_sha256": ""}
        files |= {name: plan.pop(name) for name in list(plan) if name in ("code", "code_sha256", "evaluation_data")}
        text = render(template(job), JobPlan(job, ask(of.slurm, None, job), **plan), shared(of, **files))
        script = self.folder / "script.sbatch"
        script.write_text(text)
        env = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "2"}
        env |= {"CALLS": str(self.folder / "calls"), "RUN": str(self.run)} | self.environ
        return subprocess.Popen(["bash", str(script)], env=env, stderr=subprocess.PIPE, text=True)

    def __call__(self, *args, **kwargs) -> tuple[int, str]:
        process = self.start(*args, **kwargs)
        _, said = process.communicate(timeout=60)
        return process.returncode, said

    def calls(self, name: str = "") -> list[str]:
        path = self.folder / "calls"
        return [line for line in path.read_text().splitlines() if line.startswith(name)] if path.exists() else []


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_a_step_that_ends_well_ends_the_job_well(job):
    assert job()[0] == 0
    (srun,) = job.calls("srun")
    assert "--kill-on-bad-exit=1" in srun
    assert srun.endswith("train /shared/runs/a run/code/0123456789abcdef/recipe.yaml --stage pretrain")
    assert not job.calls("scontrol requeue")


def test_only_85_is_put_back_into_the_queue(job):
    job.program("srun", "exit 85")
    assert job()[0] == 85
    assert job.calls("scontrol requeue") == ["scontrol requeue 77"]


@pytest.mark.parametrize("code", [1, 2, 84, 86, 134, 137, 140, 143])
def test_any_other_end_is_a_failure(job, code):
    job.program("srun", f"exit {code}")
    returned, said = job()
    assert returned == 1
    assert f"failed with exit code {code}" in said
    assert not job.calls("scontrol requeue")


def test_where_srun_killed_the_last_tasks_on_their_way_out_the_runs_own_record_says_that_it_is_saved(job):
    job.program(
        "srun",
        f"printf '{PRETRAIN_STATUS.format(state='preempted', at='later')}' >\"$RUN\"/pretrain/status.json; exit 137",
    )
    job.status("preempted", at="before")
    assert job()[0] == 85


def test_an_old_record_of_a_preemption_does_not_hide_a_failure(job):
    job.status("preempted")
    job.program("srun", "exit 137")
    assert job()[0] == 1


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


@pytest.mark.parametrize("told", CANCELLED)
@pytest.mark.parametrize("when_stopped", ["requeue", "next"])
def test_a_job_that_somebody_cancelled_does_not_come_back(job, when_stopped, told):
    """scancel tells the tasks first, by SIGTERM: they save and leave with 85, as at a preemption."""
    job.program("srun", "exit 85")
    job.program("scontrol", f'case $* in *show*) echo "{told}" ;; esac')
    code, said = job(when_stopped=when_stopped, segments=2)
    assert code == 1
    assert "was cancelled" in said
    assert not job.calls("scontrol requeue")
    job.program("scontrol", "exit 0")
    assert job(when_stopped="last", segment=2, segments=2)[0] == (1 if when_stopped == "next" else 85)


@pytest.mark.parametrize("told", ENDED_OTHERWISE)
def test_a_job_that_slurm_ends_for_another_reason_was_not_cancelled(job, told):
    job.program("srun", "exit 85")
    job.program("scontrol", f'case $* in *show*) echo "{told}" ;; esac')
    assert job(when_stopped="next", segments=2)[0] == 0
    assert job()[0] == 85
    assert job.calls("scontrol requeue")


def test_a_job_that_cannot_be_put_back_says_so(job):
    job.program("srun", "exit 85")
    job.program("scontrol", "exit 1")
    code, said = job()
    assert code == 85
    assert "could not be put back into the queue" in said


def test_a_stage_that_is_done_ends_at_once_without_a_step(job):
    job.status("done")
    code, said = job()
    assert code == 0
    assert "done already" in said
    assert not job.calls("srun")


# --- segments ---


def test_a_segment_that_stopped_early_leaves_the_rest_to_the_next(job):
    job.program("srun", "exit 85")
    code, said = job(segment=1, segments=3, when_stopped="next")
    assert code == 0
    assert "segment 1 of 3; the next one goes on" in said
    assert not job.calls("scontrol requeue")


def test_the_last_segment_is_no_success_as_long_as_the_stage_is_not_done(job):
    job.program("srun", "exit 85")
    code, said = job(segment=3, segments=3, when_stopped="last")
    assert code == 85
    assert "livt submit goes on" in said


def test_a_segment_behind_a_failed_one_does_not_start(job):
    job.program("srun", "exit 1")
    assert job(segment=1, segments=3, when_stopped="next")[0] == 1
    code, said = job(segment=2, segments=3, when_stopped="next")
    assert code == 1
    assert "failed in an earlier segment" in said
    assert "exit code 1" in said
    assert len(job.calls("srun")) == 1


def test_a_segment_behind_one_that_was_killed_goes_on(job):
    job.program("srun", 'kill -9 "$PPID"')  # as Slurm does with a preempted job that it cancels, or at a lost node
    assert job(segment=1, segments=3, when_stopped="next")[0] == -signal.SIGKILL
    job.program("srun", "exit 0")
    assert job(segment=2, segments=3, when_stopped="next")[0] == 0
    assert len(job.calls("srun")) == 2


# --- no progress ---


def test_restarts_without_a_new_checkpoint_are_counted_and_end(job):
    job.program("srun", "exit 85")
    slurm = {"max_restarts_without_progress": 2}
    assert [job(slurm=slurm)[0] for _ in range(3)] == [85, 85, 85]  # the first start, and two more
    code, said = job(slurm=slurm)
    assert code == 1
    assert "no progress" in said
    assert len(job.calls("srun")) == 3
    assert len(job.calls("scontrol requeue")) == 3


def test_a_new_checkpoint_begins_the_count_anew(job):
    job.program("srun", "exit 85")
    slurm = {"max_restarts_without_progress": 1}
    for step in range(1, 6):
        assert job(slurm=slurm)[0] == 85
        assert job(slurm=slurm)[0] == 85
        job.checkpoint(step)
    assert job(slurm=slurm)[0] == 85


# --- signals ---

WAITS = """trap 'echo "$(basename "$0") was told" >>"$CALLS"; exit 85' USR2
touch "$RUN/started"
for _ in $(seq 300); do sleep 0.1; done
exit 0"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_for_the_batch_shell_reaches_srun_and_the_shell_waits_for_the_save(job, number):
    job.program("srun", WAITS.replace("exit 85'", "sleep 1; exit 85'"))
    process = job.start()
    wait_for(job.run / "started")
    process.send_signal(number)
    time.sleep(0.3)
    process.send_signal(number)  # Slurm sends them again
    process.communicate(timeout=60)
    assert process.returncode == 85
    assert "srun was told" in job.calls()
    assert job.calls("scontrol requeue")


def test_a_signal_that_kills_tasks_which_do_not_listen_yet_is_no_failure(job):
    job.program("srun", 'touch "$RUN/started"; sleep 30 & trap "kill $!; exit 140" USR2; wait')
    process = job.start()
    wait_for(job.run / "started")
    time.sleep(0.2)
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=60)
    assert process.returncode == 85


def test_a_preemption_that_only_the_tasks_were_told_of_is_seen_in_slurms_record(job):
    job.program("srun", "exit 143")
    job.program("scontrol", 'case $* in *show*) echo "JobId=77 PreemptTime=2026-01-01T00:00:00 End" ;; esac')
    assert job()[0] == 85
    job.program("scontrol", 'case $* in *show*) echo "JobId=77 PreemptTime=None End" ;; esac')
    assert job()[0] == 1


def wait_for(path: Path) -> None:
    until = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < until, f"no {path}"
        time.sleep(0.02)


# --- the code that was submitted ---


@pytest.fixture
def frozen(tmp_path):
    package = tmp_path / "checkout" / "livt_scale"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return freeze("name: x\n", tmp_path / "run it's", package=package)


def test_code_that_is_as_it_was_submitted_runs_and_comes_first_in_the_path(job, frozen):
    job.program("srun", 'echo "path $PYTHONPATH" >>"$CALLS"')
    assert job(code=str(frozen.folder), code_sha256=frozen.sha256)[0] == 0
    assert job.calls("path") == [f"path {frozen.folder}"]


@pytest.mark.parametrize("name", ["livt_scale/__init__.py", "recipe.yaml", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_code_that_was_changed_since_is_refused(job, frozen, name, how):
    path = frozen.folder / name
    path.chmod(0o644)
    path.unlink() if how == "gone" else path.write_text(path.read_text() + "\n# edited\n")
    code, said = job(code=str(frozen.folder), code_sha256=frozen.sha256)
    assert code == 1
    assert "is not what was submitted" in said
    assert not job.calls("srun")


# --- shards on the nodes, evaluation ---


def test_staged_shards_are_copied_once_a_node_read_there_and_removed(job):
    assert job(slurm={"stage_in": True, "stage_in_dir": "/scratch/x y"})[0] == 0
    copy, train, remove = job.calls("srun")
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1" in copy
    assert "livt_scale.slurm.stage_in /scratch/x y/livt-shards-77 pretrain" in copy
    assert train.endswith("--set data.train=/scratch/x y/livt-shards-77/train")
    assert remove.endswith("rm -rf -- /scratch/x y/livt-shards-77 /scratch/x y/livt-shards-77.lock")


@pytest.mark.parametrize(("fails", "code"), [("stage_in", 1), ("train", 1)])
def test_staged_shards_are_removed_where_something_fails(job, fails, code):
    job.program("srun", f"case $* in *{fails}*) exit 3 ;; esac")
    assert job(slurm={"stage_in": True, "stage_in_dir": "/scratch"})[0] == code
    assert job.calls("srun")[-1].endswith("rm -rf -- /scratch/livt-shards-77 /scratch/livt-shards-77.lock")


def test_staged_shards_are_removed_before_the_job_is_put_back(job):
    job.program("srun", "case $* in *train*) exit 85 ;; esac")
    job(slurm={"stage_in": True, "stage_in_dir": "/scratch"})
    lines = job.calls()
    removed = next(i for i, line in enumerate(lines) if "rm -rf" in line)
    assert removed < lines.index("scontrol requeue 77")
    assert len([line for line in lines if "rm -rf" in line]) == 1


def test_the_evaluation_is_of_the_export(job):
    assert job("evaluate", evaluation_data="/shards/val")[0] == 0
    export, evaluation = job.calls("srun")
    assert export.endswith(f"livt_scale export {job.run}")
    assert evaluation.endswith(f"eval {job.run}/export --data /shards/val --out {job.run}/export/eval.json")
    assert all("--ntasks=1" in call for call in (export, evaluation))


def test_an_export_that_fails_is_not_evaluated(job):
    job.program("srun", "case $* in *export*) exit 1 ;; esac")
    assert job("evaluate", evaluation_data="/shards/val")[0] == 1
    assert len(job.calls("srun")) == 1


def test_a_run_without_evaluation_shards_is_exported_alone(job):
    assert job("evaluate", evaluation_data=None)[0] == 0
    assert len(job.calls("srun")) == 1


# --- what the tasks find in their environment ---


def test_the_time_limit_is_told_where_slurm_does_not_and_another_launchers_rank_is_forgotten(job):
    job.environ = {"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "elsewhere"}
    job.program("scontrol", 'echo "JobId=77 EndTime=2026-01-02T03:04:05 Deadline=N/A"')
    job.program("srun", 'echo "limit $LIVT_STOP_AT rank ${RANK-none} at ${MASTER_ADDR-none}" >>"$CALLS"')
    job()
    at = int(time.mktime(time.strptime("2026-01-02T03:04:05", "%Y-%m-%dT%H:%M:%S")))
    assert job.calls("limit") == [f"limit {at} rank none at none"]


def test_the_sum_in_the_script_is_that_of_the_list(frozen):
    assert hashlib.sha256((frozen.folder / "SHA256SUMS").read_bytes()).hexdigest() == frozen.sha256
    assert json.loads((frozen.folder / "git.json").read_text())["commit"] is None


# --- bad nodes ---

HOSTNAMES = 'if [ "$1 $2" = "show hostnames" ]; then printf "n1\\nn2\\nn3\\n"; fi'


def answers(job, **told):
    """srun leaves what each node's `livt doctor` would; a node that is not named says nothing. Training ends with 0."""
    job.environ["SLURM_JOB_NODELIST"] = "n[1-3]"
    job.program("scontrol", HOSTNAMES)
    written = "; ".join(f"printf '%s\\n' '{said}' >\"${{!#}}/{node}\"" for node, said in told.items())
    job.program("srun", f'case "$*" in *doctor*) {written};; esac')


def test_a_node_that_fails_its_check_or_does_not_answer_ends_the_job_and_is_named(job):
    answers(job, n1="ok", n2="gpus: Slurm gave this job 8 GPUs here, and torch sees 7")
    returned, said = job()
    assert returned == 1
    assert "node n2 is bad: gpus: Slurm gave this job 8 GPUs here, and torch sees 7" in said
    assert "node n3 is bad: no answer within 5 min" in said
    assert "--set slurm.exclude=n2,n3" in said
    assert [node.name for node in read_bad_nodes(job.run)] == ["n2", "n3"]
    assert not [call for call in job.calls("srun") if " train " in call]
    assert not job.calls("scontrol requeue")


def test_good_nodes_train(job):
    answers(job, n1="ok", n2="ok", n3="ok")
    assert job()[0] == 0
    check, train = job.calls("srun")
    assert "--kill-on-bad-exit=0 --time=5" in check
    assert " train " in train
    assert not (job.run / "slurm" / "bad-nodes").exists()


def test_where_no_node_passes_it_is_not_for_the_nodes(job):
    answers(job, n1="jpeg: none")
    returned, said = job(slurm={"check_nodes": "exclude"})
    assert returned == 1
    assert "none of the 3 nodes passes the check" in said
    assert not (job.run / "slurm" / "bad-nodes").exists()


def test_the_job_comes_back_without_its_bad_nodes_and_what_waits_leaves_them_out_too(job):
    answers(job, n1="ok", n3="ok")
    job.program(
        "squeue", """case "$*" in *--jobs=77*) echo "livt abc";; *) printf '78|livt abc\n79|another\n';; esac"""
    )
    returned, said = job(slurm={"check_nodes": "exclude", "exclude": "old[1-2]"})
    assert returned == 85
    assert "goes on without n2" in said
    assert [call for call in job.calls("scontrol") if " show " not in call] == [
        "scontrol update JobId=78 ExcNodeList=n2,old[1-2]",
        "scontrol requeue 77",
        "scontrol update JobId=77 ExcNodeList=n2,old[1-2]",
    ]


def test_a_signal_during_the_check_is_no_bad_node(job):
    answers(job)
    job.program("srun", 'case "$*" in *doctor*) kill -USR2 $PPID; sleep 1; exit 1;; esac')
    assert job()[0] == 85
    assert not (job.run / "slurm" / "bad-nodes").exists()
    assert job.calls("scontrol requeue")


def test_without_the_check_nobody_is_asked(job):
    answers(job)
    assert job(slurm={"check_nodes": "no"})[0] == 0
    assert len(job.calls("srun")) == 1
