"""One run through every state that `livt status` knows, each of them real: on the cluster, by what happens there."""

import json

import pytest

from tests.slurm_real.chains import Chain
from tests.slurm_real.cluster import wait_for

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


def test_a_run_is_pending_running_preempted_stalled_failed_and_done(chain):
    # pending: others have the nodes
    full = ("--exclusive", "--nodes=2", "--time=10", "--parsable", "--wrap=sleep 600")
    others = chain.cluster.run("sbatch", *full, cwd=chain.folder).stdout.strip()
    chain.cluster.wait(others, "RUNNING")
    chain.lay("pace", "1 99")
    chain.submit()
    pending = told(chain, "pending")
    assert chain.jobs["pretrain"] in pending["why"]
    assert {job["stage"]: job["reason"] for job in pending["jobs"]}["finetune"] == "Dependency"
    wait_for(lambda: told(chain, "pending")["jobs"][0]["reason"] in ("Resources", "Priority"), "a reason", seconds=60)

    # running
    chain.cluster.run("scancel", others)
    chain.await_steps(4)
    running = told(chain, "running")
    assert running["stage"] == "pretrain"
    assert running["stages"][0]["total_steps"] == 27
    assert running["jobs"][0]["state"] == "RUNNING"
    assert running["jobs"][0]["nodes"] == "livt-n[1-2]"

    # preempted: saved first, and nothing of it is in the queue
    chain.livt("cancel", chain.run_dir)
    preempted = told(chain, "preempted")
    assert preempted["stages"][0]["checkpoint"]["step"] > 0
    assert chain.ended()["finetune"] == "CANCELLED"

    # stalled: a task hangs, so that at the job's end it could not say a word, and no job of it is left
    chain.lay("hang", str(int(chain.lines("steps")[-1].split()[1]) + 3))
    chain.submit()
    chain.await_steps(3)
    told(chain, "running")
    chain.cluster.run("scancel", *chain.jobs.values())
    stalled = told(chain, "stalled")
    assert chain.jobs["pretrain"] in stalled["why"]
    assert "CANCELLED" in stalled["why"]
    chain.mend("hang")

    # failed: by a bug, and the log is named
    chain.lay("bug", str(min(int(chain.lines("steps")[-1].split()[1]) + 3, 26)))
    chain.submit()
    failed = told(chain, "failed")
    assert "a planted bug" in failed["why"]
    assert chain.ended()["finetune"] == "CANCELLED"
    log = next(job["log"] for job in failed["jobs"] if job["stage"] == "pretrain")
    assert "a planted bug" in (chain.run_dir / log).read_text()

    # done
    chain.mend("bug")
    chain.mend("pace")
    chain.submit()
    assert set(chain.ended().values()) == {"COMPLETED"}, chain.tell()
    done = told(chain, "done")
    assert [stage["state"] for stage in done["stages"]] == ["done", "done", "done"]
