"""What a submission inherits, and what it asks for, on a real Slurm."""

import socket
import sys

import pytest

from livt_scale.distributed.ports import port_of_job
from livt_scale.slurm import commands, inherited
from tests.slurm_real.chains import Chain
from tests.slurm_real.descriptions import LIMITED
from tests.whole_runs import Livt, assert_same_run, spelt

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

# what a site's profile, a user's .bashrc or a debugging session may have exported
HOSTILE = {
    "SBATCH_EXPORT": "NONE",
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_SIGNAL": "B:KILL",
    "SHELLOPTS": "errexit:nounset:noglob:noclobber:pipefail:posix",
    "BASH_FUNC_srun%%": "() { exit 9; }",
    "BASH_FUNC_kill%%": "() { :; }",
}


def test_a_chain_submitted_inside_an_allocation_with_a_hostile_environment_runs_as_planned(
    cluster, reference, tmp_path
):
    chain = Chain(cluster, tmp_path / "a run", slurm__check_nodes="report", slurm__options={"nice": 7})
    chain.sets["slurm.setup"] = ['test -n "$FAULTS"', "export FROM_SETUP=1"]
    sets = [f"--set={name}={spelt(value)}" for name, value in chain.sets.items()]
    allocation = ("salloc", "--nodes=1", "--ntasks=2", "--mem-per-cpu=100", "--time=5")
    submit = (sys.executable, "-m", "livt_scale", "submit", Livt(chain.folder).recipe)
    words = ("env", *(f"{name}={value}" for name, value in HOSTILE.items()), *submit)
    before = cluster.run("sbatch", "--parsable", "--wrap=true", cwd=chain.folder).stdout
    number = int(before) + 2  # after the allocation
    with socket.socket() as taken:  # where the ranks would meet: the nodes are this machine
        taken.bind(("", port_of_job(number)))
        taken.listen()
        told = cluster.run(*allocation, *words, *sets, cwd=chain.folder).stdout
        assert chain.first("pretrain") == str(number)
        ended = cluster.wait(str(number), "COMPLETED", "FAILED", seconds=600)
    assert ended["JobState"] == "COMPLETED", chain.tell()
    assert f"port {port_of_job(number)} is taken on this node" in chain.log(chain.names("pretrain")[0])
    assert "its SLURM_* variables are not passed on" in told
    assert "SBATCH_TIMELIMIT is set and not used: slurm.time_min decides" in told
    of_cpu = cluster.description.mem_per_cpu_mb
    memory = ended["MinMemoryNode"] if of_cpu is None else ended["MinMemoryCPU"]
    assert (ended["TimeLimit"], memory) == ("00:10:00", "0" if of_cpu is None else f"{of_cpu}M")
    assert not (chain.run_dir / "slurm" / "bad-nodes").exists()
    assert_same_run(chain.run_dir, reference, stages=("pretrain",))
    chain.livt("cancel", chain.run_dir, "--now")


def test_more_than_the_partition_has_is_refused_with_its_numbers(cluster, tmp_path):
    most = len(cluster.nodes)
    cluster.cancel_all()  # jobs of an earlier test may still be completing
    told = Chain(cluster, tmp_path / "a run", slurm__nodes=most + 1).submit(expect=2)
    assert f"slurm.nodes is {most + 1}, and {most} is the most (partition normal: {most} nodes, 1440 min)" in told
    assert not cluster.run("squeue", "--noheader").stdout


def test_a_partitions_limits_are_the_defaults_and_what_exceeds_them_is_refused(clusters, tmp_path):
    """A GPU's share of the node's memory for the evaluation, which is one task on one GPU; the rest for training."""
    cluster = clusters(LIMITED)
    one = {"slurm__nodes": 1, "slurm__partition": "short"}
    for name, sets, refused in (
        ("time", {"slurm__time_min": 30}, "slurm.time_min is 30, and 20 is allowed (partition short"),
        ("nodes", {"slurm__nodes": 2}, "slurm.nodes is 2, and 1 is the most (partition short"),
        ("evaluation", {"slurm__evaluate__time_min": 30}, "slurm.evaluate.time_min is 30, and 20 is allowed"),
    ):
        assert refused in Chain(cluster, tmp_path / name, **{**one, **sets}).submit(expect=2)
    assert not cluster.run("squeue", "--noheader").stdout

    of_node = {"slurm__gpus_per_node": 2, "slurm__memory_gib": 4}
    chain = Chain(cluster, tmp_path / "a run", **one, **of_node, slurm__time_min=None)
    chain.submit()
    try:
        shown = {name: cluster.show(job) for name, job in chain.jobs.items()}
        assert [shown[name]["TimeLimit"] for name in ("pretrain", "finetune", "evaluate")] == [
            "00:20:00", "00:20:00", "00:10:00"
        ]  # fmt: skip
        assert (shown["pretrain"]["MinMemoryNode"], shown["evaluate"]["MinMemoryNode"]) == ("4G", "2G")
    finally:
        chain.livt("cancel", chain.run_dir, "--now")


def test_the_controllers_facts_are_read(cluster, monkeypatch):
    for name, value in cluster.environ.items():
        monkeypatch.setenv(name, value)
    facts = commands.cluster_facts()
    description, most = cluster.description, len(cluster.nodes)
    assert {name: (p.total_nodes, p.time_min, p.preempt) for name, p in facts.partitions.items()} == {
        "normal": (most, 1440, description.default.preempt.lower()),
        "spare": (most, 1440, "requeue"),
        "scrap": (most, 1440, "cancel"),
        "urgent": (most, 60, "off"),
    }
    assert set(facts.qos) == ({"normal", "low"} if description.accounting else set())
    assert (facts.accounts is not None and "lab" in facts.accounts) == description.accounting
    assert facts.preempt == description.preempt.lower()
    assert inherited.for_commands(cluster.environ)["SLURM_CONF"] == str(cluster.conf)
