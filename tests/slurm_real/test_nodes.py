"""Bad nodes on a real Slurm: found before the tasks start, named, and left out of what comes after."""

import json

import pytest

from tests.slurm_real.chains import Chain
from tests.whole_runs import assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def one_node(cluster, tmp_path):
    """A chain of two tasks on one node; each job would start on the bad one."""
    chain = Chain(cluster, tmp_path / "a run", slurm__nodes=1, slurm__tasks_per_node=2)
    chain.lay(f"bad-{bad_node(cluster)}")
    return chain


def bad_node(cluster):
    """Where Slurm starts a job that fits on any node: on the smallest, of equal ones on the first."""
    return min(zip(cluster.description.cpus, cluster.nodes, strict=True))[1]


def test_a_job_goes_on_without_its_bad_node_and_so_does_the_chain(one_node, reference):
    one_node.sets["slurm.check_nodes"] = "exclude"
    one_node.submit()
    assert set(one_node.ended().values()) == {"COMPLETED"}, one_node.tell()
    assert_same_run(one_node.run_dir, reference)
    bad = bad_node(one_node.cluster)
    shown = {name: one_node.cluster.show(job) for name, job in one_node.jobs.items()}
    first = one_node.names("pretrain")[0]
    assert f"node {bad} is bad" in one_node.log(first)
    if one_node.requeues:
        restarts = {name: job["Restarts"] for name, job in shown.items()}
        assert restarts == {"pretrain": "1", "finetune": "0", "evaluate": "0"}
    else:  # what is left of the stage is its next segment's
        assert shown.pop(first)["NodeList"] == bad
    assert {job["NodeList"] for job in shown.values()} <= set(one_node.cluster.nodes) - {bad}
    assert {job["ExcNodeList"] for job in shown.values()} == {bad}, "what waited was told too"
    view = json.loads(one_node.livt("status", one_node.run_dir, "--json").stdout)
    assert any(f"node {bad} failed the check" in note for note in view["notes"])


def test_a_bad_node_ends_the_chain_where_it_is_not_to_be_left_out_and_a_new_submission_may_leave_it_out(one_node):
    one_node.sets["slurm.check_nodes"] = "report"
    one_node.submit()
    states = one_node.stages_ended()
    assert states == {"pretrain": "FAILED", "finetune": "CANCELLED", "evaluate": "CANCELLED"}, one_node.tell()
    bad = bad_node(one_node.cluster)
    assert f"--set slurm.exclude={bad}" in one_node.log(one_node.names("pretrain")[0])
    assert not one_node.lines("starts"), "no task has started"
    one_node.sets["slurm.check_nodes"] = "exclude"
    assert f"node {bad} was bad" in one_node.submit()
    assert {one_node.cluster.show(job)["ExcNodeList"] for job in one_node.jobs.values()} == {bad}
    one_node.livt("cancel", one_node.run_dir, "--now")
