"""Whole chains by `livt submit`, on a real Slurm: they come to the weights of an undisturbed torchrun.

The chains whose time limits are too short are submitted first and judged late: they sleep most of their steps. What
takes a node from every job stands behind them.
"""

import json
import os
import random
import re
import signal
import time

import pytest

from livt_scale.config.load import load_saved
from livt_scale.slurm import commands
from livt_scale.util.host_list import expand
from tests.slurm_real.chains import ENDED, Chain, rank_pid
from tests.slurm_real.cluster import ClusterError, wait_for
from tests.whole_runs import assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]

LOST_S = 120.0  # from kill -9 of a task to the end of its job; a few seconds on a quiet machine
SHORT = {"slurm__time_min": 2, "slurm__signal_lead_s": 30}
PACE = "7 2"  # two starts of 2 minutes at 7 s a step cannot do 27 steps; the third has time for them


@pytest.fixture(scope="module")
def short_chains(_running_cluster, tmp_path_factory):
    """Time limits that take at least 3 segments: by requeue (spare), by numbered segments (scrap), without a signal."""
    folder = tmp_path_factory.mktemp("short")
    silent = {**SHORT, "slurm__partition": "normal"}
    named = {"spare": {**SHORT, "slurm__partition": "spare"}, "silent": silent}
    named["scrap"] = {**SHORT, "slurm__partition": "scrap", "slurm__pretrain__segments": 6}
    chains = {}
    for name, sets in named.items():
        chains[name] = Chain(_running_cluster, folder / name, slurm__finetune__time_min=10, **sets)
        chains[name].lay("pace", PACE)
        chains[name].submit()
    yield chains
    _running_cluster.cancel_all()


@pytest.fixture(scope="module")
def silent_job(short_chains):
    """One whose script lacks the line --signal; submitted by hand, as anybody may."""
    chain = short_chains["silent"]
    chain.cluster.run("scancel", *chain.jobs.values())
    chain.ended()
    text = min((chain.run_dir / "slurm" / "scripts").glob("*pretrain*")).read_text()
    lines = [line for line in text.splitlines(keepends=True) if not line.startswith("#SBATCH --signal")]
    assert len(lines) == len(text.splitlines()) - 1
    (chain.folder / "silent.sbatch").write_text("".join(lines))
    return chain.cluster.run(
        "sbatch", "--parsable", f"--chdir={chain.run_dir}", chain.folder / "silent.sbatch"
    ).stdout.strip()


@pytest.fixture(scope="module", autouse=True)
def _short_ones_first(request):
    """The slow ones run beside the others, where any of them is asked for."""
    if any("short_chains" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("silent_job")


@pytest.fixture
def chain(_running_cluster, tmp_path):
    """A chain on the normal partition, not yet submitted. Its jobs are gone when the test ends."""
    made = Chain(_running_cluster, tmp_path / "it's a $(run)", slurm__partition="normal")
    yield made
    if (made.run_dir / "slurm" / "chain.json").exists():
        _running_cluster.run("scancel", *made.jobs.values(), check=False)


def test_one_command_brings_both_stages_evaluation_and_export_over_two_nodes_to_torchruns_weights(chain, reference):
    local = chain.folder / "local disk"  # of both nodes, which are on one machine
    local.mkdir()
    chain.sets |= {"slurm.stage_in": True, "slurm.stage_in_dir": local}
    chain.submit()
    states = dict.fromkeys(("pretrain", "finetune", "evaluate"), "COMPLETED")
    assert chain.stages_ended() == states, chain.tell()
    assert chain.requeues == (chain.cluster.description.default.preempt != "CANCEL")
    assert_same_run(chain.run_dir, reference)
    assert sorted(p.name for p in (chain.run_dir / "export").iterdir()) == [
        "config.json",
        "eval.json",
        "model.safetensors",
    ]
    assert 0 < json.loads((chain.run_dir / "export" / "eval.json").read_text())["top1"]["all"] < 1
    assert len(chain.lines("starts")) == 1
    assert str(local) in chain.log("pretrain")
    assert list(local.iterdir()) == []
    assert load_saved(chain.run_dir / "recipe.yaml").data.train == str(chain.sets["data.train"])
    assert "done" in chain.submit(), "a chain that is done is not submitted again"
    assert set(chain.cluster.run("squeue", "--noheader", "--format=%i").stdout.split()).isdisjoint(chain.jobs.values())


def test_a_second_submission_joins_the_first_and_another_recipe_is_refused(short_chains):
    chain = short_chains["spare"]
    before = chain.jobs
    assert "In the queue already" in chain.submit()
    chain.sets["seed"] = 7
    # it depends on the moment: before its first checkpoint, between that and the end of the stage, after that
    refused = chain.submit(expect=(1, 2))
    place = "the queue|the checkpoint|the finished pretrain"
    assert re.search(f"another recipe.*seed: 0 in ({place}), 7 here", refused, re.DOTALL), refused
    assert chain.jobs == before


def test_requeue_signal_and_a_killed_task_at_random_moments_come_to_the_same_weights(chain, reference):
    """Pains 15 and 17. After the kill -9 the job has failed, and a second `livt submit` goes on.

    Where preemption cancels jobs, each is a segment that may not be requeued.
    """
    cluster, dice = chain.cluster, random.Random(seed := random.randrange(10**6))
    chain.sets["slurm.pretrain.segments"] = 4
    chain.lay("pace", "1 99")
    chain.submit()
    print(f"seed {seed}")
    for disturb in dice.sample(["requeue", "signal", "kill"], 3):
        chain.await_steps(2)
        name = chain.running("pretrain")
        job, before = chain.jobs[name], chain.restarts(name)
        time.sleep(dice.uniform(0, 2))  # in all, the three take less than the 27 steps
        print(f"{disturb} in step {chain.lines('steps')[-1]}")
        if disturb == "requeue" and not chain.requeues:
            with pytest.raises(ClusterError, match="Requested operation is presently disabled"):
                cluster.run("scontrol", "requeue", job)
            continue
        if disturb == "requeue":
            cluster.run("scontrol", "requeue", job)
        elif disturb == "signal":
            cluster.run("scancel", "--signal=USR2", *dice.choice([[], ["--batch"]]), job)
        else:
            began = time.monotonic()
            os.kill(rank_pid(chain.run_dir, "pretrain", dice.choice([0, 1])), signal.SIGKILL)
            cluster.wait(job, "FAILED", seconds=LOST_S)
            print(f"the job ended {time.monotonic() - began:.1f} s after its task")
            states = chain.stages_ended()
            left = () if chain.requeues else ("COMPLETED FAILED",)  # to this segment, by the one before
            assert states.pop("pretrain") in ("FAILED", *left)
            assert states == {"finetune": "CANCELLED", "evaluate": "CANCELLED"}
            chain.submit()
            continue
        if chain.requeues:
            chain.await_restart(name, more_than=before)
        else:
            chain.await_state(name, "COMPLETED")
    chain.mend("pace")
    assert set(chain.ended().values()) == {"COMPLETED"}, chain.tell()
    assert len(chain.lines("starts")) >= (4 if chain.requeues else 3)
    logs = (log.read_text() for log in (chain.run_dir / "slurm" / "logs").glob("pretrain-*.log"))
    assert not any("could not be put back" in log for log in logs)
    assert_same_run(chain.run_dir, reference)


def test_a_bug_fails_its_stage_k_times_its_dependants_never_run_and_mended_the_chain_goes_on(chain, reference):
    chain.lay("bug", "5")
    for k in (1, 2):  # each time a person submits it, and never by itself
        chain.submit()
        states = chain.stages_ended()
        assert states == {"pretrain": "FAILED", "finetune": "CANCELLED", "evaluate": "CANCELLED"}, chain.tell()
        assert len(chain.lines("starts")) == k, "the chain does not submit itself again"
        assert chain.restarts(chain.names("pretrain")[0]) == 0
        view = json.loads(chain.livt("status", chain.run_dir, "--json", expect=1).stdout)
        assert view["state"] == "failed"
        assert "a planted bug" in view["why"]
        log = next(job["log"] for job in view["jobs"] if job["stage"] == "pretrain")
        assert "a planted bug" in (chain.run_dir / log).read_text()
        assert not chain.cluster.run("squeue", "--noheader", f"--jobs={','.join(chain.jobs.values())}").stdout
        assert not (chain.run_dir / "finetune").exists()
    chain.mend("bug")
    chain.submit()
    chain.assert_pretrains_like(reference)


def test_a_task_that_hangs_ends_its_job_within_the_bound_and_is_named(chain):
    chain.sets |= {"faults.stall_timeout_s": 10, "faults.heartbeat_s": 1}
    chain.lay("hang", "5")
    chain.submit()
    wait_for(lambda: any(line.endswith(" 5") for line in chain.lines("steps")), "the 5th step", seconds=120)
    chain.cluster.wait(chain.first("pretrain"), "FAILED", seconds=LOST_S)
    assert chain.stages_ended()["finetune"] == "CANCELLED"
    assert "rank 1" in chain.status("pretrain")["why"]


def test_a_run_that_comes_no_further_over_k_restarts_ends_with_its_reason(chain, tmp_path):
    """Pain 17: a crash loop that would go on for ever."""
    chains = {mode: Chain(chain.cluster, tmp_path / mode, slurm__mode=mode) for mode in ("requeue", "segments")}
    chains["segments"].sets |= {"slurm.pretrain.segments": 6, "slurm.finetune.segments": 1}
    for chain in chains.values():
        chain.sets["slurm.max_restarts_without_progress"] = 2
        chain.lay("leave")
        chain.submit()
    for (mode, chain), last in zip(chains.items(), ("pretrain", "pretrain-4"), strict=True):
        states = chain.ended()
        assert len(set(chain.lines("starts"))) == 3, chain.tell()
        assert {states[name] for name in states if not name.startswith("pretrain")} == {"CANCELLED"}
        assert states[last] == "FAILED"
        assert "no progress: 3 starts of pretrain in a row found the same newest checkpoint" in chain.log(last)
        if mode == "segments":
            assert states["pretrain-5"] == states["pretrain-6"] == "FAILED"
            assert "pretrain failed in an earlier segment" in chain.log("pretrain-6")


def test_the_time_limit_itself_makes_a_job_save_where_no_signal_comes(short_chains, silent_job):
    """Pain 12."""
    chain = short_chains["silent"]

    def saved() -> bool:
        shown = chain.cluster.show(silent_job)
        return shown["Restarts"] != "0" if chain.requeues else shown["JobState"] in ENDED

    wait_for(saved, lambda: f"a save\n{chain.tell()}", seconds=240)
    chain.cluster.run("scancel", silent_job)
    chain.cluster.wait(silent_job, *ENDED)
    log = (chain.run_dir / "slurm" / "logs" / f"{chain.names('pretrain')[0]}-{silent_job}.log").read_text()
    assert "stopped by the clock" in log
    assert "stopped by SIG" not in log


@pytest.mark.parametrize("name", ["spare", "scrap"])
def test_a_time_limit_too_short_takes_at_least_three_segments_and_comes_to_the_same_weights(
    short_chains, reference, name
):
    """Pain 14: on scrap, which cancels what it preempts, `submit` has taken numbered segments by itself."""
    chain = short_chains[name]
    states = chain.ended()
    assert set(states.values()) == {"COMPLETED"}, chain.tell()
    starts = chain.lines("starts")
    assert len(starts) >= 3, starts
    if name == "spare":
        assert list(states) == ["pretrain", "finetune", "evaluate"]
        assert chain.restarts("pretrain") >= len(starts) - 1  # one more where the last signal came after the last step
    else:
        assert len({line.split()[0] for line in starts}) == len(starts), "each start is a job of its own"
        assert "pretrain is already done" in chain.log("pretrain-6")
    assert_same_run(chain.run_dir, reference)


def test_a_lost_node_costs_a_restart_and_nothing_else(chain, reference):
    """Pain 15: it goes on from its newest checkpoint, by itself. Then it is preempted, where that cancels jobs."""
    cancels = chain.cluster.description.default.preempt == "CANCEL"
    chain.sets["slurm.pretrain.segments"] = 3
    chain.lay("pace", "1 2" if cancels else "1 1")
    chain.submit()
    chain.await_steps(6)
    job = chain.first("pretrain")
    lost = list(expand(chain.cluster.show(job)["NodeList"]))[1]
    chain.cluster.lose(lost)
    chain.cluster.wait(job, "NODE_FAIL" if cancels else "PENDING", seconds=60)
    chain.cluster.bring_back(lost)
    if cancels:
        chain.await_steps(random.randrange(1, 8))
        chain.preempt(*expand(chain.cluster.show(chain.jobs["pretrain-2"])["NodeList"]))
        print(f"preempted in step {chain.lines('steps')[-1]}")
        chain.await_state("pretrain-2", "PREEMPTED")
    chain.assert_pretrains_like(reference)
    assert len(chain.lines("starts")) == (3 if cancels else 2)


def test_a_suspended_chain_continues_in_the_same_job(chain, reference):
    chain.sets |= {"faults.stall_timeout_s": 10, "faults.heartbeat_s": 1}
    chain.lay("pace", "0.5 1")
    chain.submit()
    chain.await_steps(4)
    job = chain.first("pretrain")
    chain.cluster.run("scontrol", "suspend", job)
    time.sleep(16)  # and 2 s in which Slurm asks by SIGTSTP, before SIGSTOP
    assert chain.cluster.show(job)["JobState"] == "SUSPENDED"
    chain.cluster.run("scontrol", "resume", job)
    resumed = time.time()
    chain.assert_pretrains_like(reference)
    assert len(chain.lines("starts")) == 1
    shown = commands.seconds(chain.cluster.show(job)["SuspendTime"])
    assert abs(shown - resumed) < 10, "SuspendTime is the time of the resumption"
