"""Bad nodes on a real Slurm: found before the tasks start, named, and left out of what comes after."""

import json

import pytest

from tests.slurm_real.chains import Chain
from tests.slurm_real.descriptions import TWO_NODES
from tests.whole_runs import assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def one_node(cluster, tmp_path):
    """A chain of two tasks on one node; each job would start on the first one, which is bad."""
    chain = Chain(cluster, tmp_path / "a run", slurm__nodes=1, slurm__tasks_per_node=2)
    chain.lay(f"bad-{TWO_NODES.nodes[0]}")
    return chain


def test_a_job_goes_on_without_its_bad_node_and_so_does_the_chain(one_node, reference):
    one_node.sets["slurm.check_nodes"] = "exclude"
    one_node.submit()
    assert set(one_node.ended().values()) == {"COMPLETED"}, one_node.tell()
    assert_same_run(one_node.run_dir, reference)
    shown = {name: one_node.cluster.show(job) for name, job in one_node.jobs.items()}
    assert {job["NodeList"] for job in shown.values()} == {TWO_NODES.nodes[1]}
    assert {job["ExcNodeList"] for job in shown.values()} == {TWO_NODES.nodes[0]}, "what waited was told too"
    assert {name: job["Restarts"] for name, job in shown.items()} == {"pretrain": "1", "finetune": "0", "evaluate": "0"}
    assert f"node {TWO_NODES.nodes[0]} is bad" in one_node.log("pretrain")
    view = json.loads(one_node.livt("status", one_node.run_dir, "--json").stdout)
    assert any(f"node {TWO_NODES.nodes[0]} failed the check" in note for note in view["notes"])


def test_a_bad_node_ends_the_chain_where_it_is_not_to_be_left_out_and_a_new_submission_may_leave_it_out(one_node):
    one_node.sets["slurm.check_nodes"] = "report"
    one_node.submit()
    assert one_node.ended() == {"pretrain": "FAILED", "finetune": "CANCELLED", "evaluate": "CANCELLED"}, one_node.tell()
    assert f"--set slurm.exclude={TWO_NODES.nodes[0]}" in one_node.log("pretrain")
    assert not one_node.lines("starts"), "no task has started"
    one_node.sets["slurm.check_nodes"] = "exclude"
    assert f"node {TWO_NODES.nodes[0]} was bad" in one_node.submit()
    shown = one_node.cluster.show(one_node.jobs["pretrain"])
    assert shown["ExcNodeList"] == TWO_NODES.nodes[0]
    one_node.livt("cancel", one_node.run_dir, "--now")
