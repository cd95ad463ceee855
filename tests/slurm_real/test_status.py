"""One run through every state that `livt status` knows, each of them real: on the cluster, by what happens there."""

import json

import pytest

from tests.slurm_real.chains import Chain
from tests.slurm_real.cluster import wait_for
from tests.slurm_real.descriptions import UNEVEN
from tests.whole_runs import assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.fixture
def chain(cluster, tmp_path):
    return Chain(cluster, tmp_path / "a run", slurm__partition="normal")


def told(chain, state, *, seconds=180):
    """What `livt status --json` says, once the run is in `state`."""
    seen = {}

    def arrived():
        done = chain.livt("status", chain.run_dir, "--json", expect=(0, 1))
        seen.update(json.loads(done.stdout))
        assert done.returncode == int(seen["state"] == "failed")
        return seen["state"] == state

    wait_for(arrived, lambda: f"{state}: {seen}\n{chain.tell()}", seconds=seconds, every_s=1)
    return seen


def test_a_run_is_pending_running_preempted_stalled_failed_and_done(chain, reference):
    # pending: others have the nodes
    full = ("--exclusive", f"--nodes={len(chain.cluster.nodes)}", "--time=10", "--parsable", "--wrap=sleep 600")
    others = chain.cluster.run("sbatch", *full, cwd=chain.folder).stdout.strip()
    chain.cluster.wait(others, "RUNNING")
    chain.lay("pace", "2 99")  # so that no stop below comes after the last step, however long a `livt` takes
    chain.submit()
    pending = told(chain, "pending")
    assert chain.first("pretrain") in pending["why"]
    assert pending["next"].startswith("livt status ")

    def reasons():  # Slurm gives each job its own when it next looks at the queue
        return {job["stage"]: job["reason"] for job in told(chain, "pending")["jobs"] if job["segment"] == 1}

    wait_for(lambda: reasons()["pretrain"] in ("Resources", "Priority"), lambda: f"a reason: {reasons()}", seconds=60)
    wait_for(lambda: reasons()["finetune"] == "Dependency", lambda: f"Dependency: {reasons()}", seconds=60)

    # running
    chain.cluster.run("scancel", others)
    chain.await_steps(2)
    running = told(chain, "running")
    assert running["stage"] == "pretrain"
    assert running["stages"][0]["total_steps"] == 27
    assert running["jobs"][0]["state"] == "RUNNING"
    assert running["jobs"][0]["nodes"] == "livt-n[1-2]"

    # preempted: saved first, and nothing of it is in the queue
    chain.livt("cancel", chain.run_dir)
    preempted = told(chain, "preempted")
    assert preempted["stages"][0]["checkpoint"]["step"] > 0
    assert chain.stages_ended()["finetune"] == "CANCELLED"

    # stalled: a task hangs, so that at the job's end it could not say a word, and no job of it is left
    chain.lay("hang", str(int(chain.lines("steps")[-1].split()[1]) + 3))
    chain.submit()
    chain.await_steps(3)
    told(chain, "running")
    chain.cluster.run("scancel", *chain.jobs.values())
    stalled = told(chain, "stalled")
    assert chain.first("pretrain") in stalled["why"]
    assert "CANCELLED" in stalled["why"]
    chain.mend("hang")

    # failed: by a bug, and the log is named
    chain.lay("bug", str(min(int(chain.lines("steps")[-1].split()[1]) + 3, 26)))
    chain.submit()
    failed = told(chain, "failed")
    assert "a planted bug" in failed["why"]
    assert chain.stages_ended()["finetune"] == "CANCELLED"
    log = next(job["log"] for job in failed["jobs"] if job["stage"] == "pretrain")
    assert "a planted bug" in (chain.run_dir / log).read_text()

    # done
    chain.mend("bug")
    chain.mend("pace")
    chain.submit()
    assert set(chain.ended().values()) == {"COMPLETED"}, chain.tell()
    done = told(chain, "done")
    assert [stage["state"] for stage in done["stages"]] == ["done", "done", "done"]
    top1 = json.loads((chain.run_dir / "export" / "eval.json").read_text())["top1"]
    assert done["accuracy"]["all"] == top1["all"]
    assert_same_run(chain.run_dir, reference)


def test_a_job_that_fails_before_python_starts_is_failed_without_accounting_in_both_modes(clusters, tmp_path):
    chains = [
        Chain(clusters(UNEVEN), tmp_path / mode, slurm__nodes=1, slurm__mode=mode, slurm__modules=["not-there"])
        for mode in ("requeue", "segments")
    ]
    for chain in chains:
        chain.submit()
    for chain in chains:
        seen = told(chain, "failed")
        assert "module load not-there failed" in seen["why"]
        assert seen["jobs"][0]["log"] in seen["why"]
        assert seen["next"].startswith("livt logs ")


def test_no_segment_starts_behind_one_that_was_cancelled_and_killed_before_it_had_saved(cluster, tmp_path):
    """A task hangs, so that saving takes longer than KillWait; the batch script is killed and leaves no record."""
    segments = {"slurm__mode": "segments", "slurm__pretrain__segments": 3}
    chain = Chain(cluster, tmp_path / "a run", slurm__partition="normal", **segments)
    chain.lay("hang", "3")
    chain.submit()
    chain.await_steps(3)
    cluster.run("scancel", chain.jobs["pretrain-1"])
    seen = told(chain, "stalled")
    assert "was cancelled" in seen["why"]
    assert set(chain.ended().values()) <= {"CANCELLED", "FAILED"}, chain.tell()
    assert len(set(chain.lines("starts"))) == 1, "no later segment has trained"
