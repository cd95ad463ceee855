"""Chains on clusters other than the one of most tests: what depends on their settings (`descriptions.py`).

A node is killed at ten drawn moments of one chain by `make test-slurm TEST_FLAGS='-m "slurm and slow"'`.
"""

import json
import random

import pytest

from livt_scale.slurm import commands
from livt_scale.util.host_list import expand
from tests.slurm_real import ordinary
from tests.slurm_real.chains import Chain
from tests.slurm_real.cluster import wait_for
from tests.slurm_real.descriptions import LIMITED, UNEVEN
from tests.slurm_real.test_array import submit_together
from tests.whole_runs import assert_same_run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture
def uneven(clusters):
    running = clusters(UNEVEN)
    yield running
    running.settle()


@pytest.mark.parametrize(
    ("description", "partitions", "has_accounts"),
    [
        (UNEVEN, {"all": (3, None, 1440, "cancel"), "urgent": (3, None, 1440, "off")}, False),
        (LIMITED, {"short": (2, 1, 20, "requeue"), "urgent": (2, 2, 10, "off")}, True),
    ],
    ids=["uneven", "limited"],
)
def test_the_controllers_facts_are_read(clusters, monkeypatch, description, partitions, has_accounts):
    for name, value in clusters(description).environ.items():
        monkeypatch.setenv(name, value)
    facts = commands.cluster_facts()
    found = {name: (p.total_nodes, p.nodes, p.time_min, p.preempt) for name, p in facts.partitions.items()}
    assert found == partitions
    assert (facts.accounts is not None, bool(facts.qos)) == (has_accounts, has_accounts)


def test_preempted_chains_end_like_a_local_run(preempted, local):
    """One is requeued; the other one's jobs are cancelled, so that their next segments continue."""
    ends = {name: chain.ended() for name, chain in preempted.items()}
    assert ends["limited"] == dict.fromkeys(("pretrain", "finetune", "evaluate"), "COMPLETED"), preempted[
        "limited"
    ].tell()
    assert preempted["limited"].restarts("pretrain") == 2
    assert ends["uneven"].pop("pretrain-1") == "PREEMPTED"
    names = ("pretrain-2", "finetune-1", "finetune-2", "evaluate-1", "evaluate-2")
    assert ends["uneven"] == dict.fromkeys(names, "COMPLETED"), preempted["uneven"].tell()
    for chain, starts in ((preempted["limited"], 3), (preempted["uneven"], 2)):
        assert len(chain.lines("starts")) == starts
        assert_same_run(chain.run_dir, local)
        assert (chain.run_dir / "export" / "eval.json").is_file()


def test_a_chain_can_be_an_ordinary_users(preempted, local):
    """Submitted, requeued by itself and by Slurm, evaluated and looked at without root."""
    chain = preempted["limited"]
    if chain.user is None:
        pytest.skip(f"the user {ordinary.NAME} can run no Python that has the packages")
    assert set(chain.ended().values()) == {"COMPLETED"}, chain.tell()
    user = f"{chain.user.name}({chain.user.uid})"
    assert {chain.cluster.show(job)["UserId"] for job in chain.jobs.values()} == {user}
    assert {path.stat().st_uid for path in (chain.run_dir, *chain.run_dir.rglob("*"))} == {chain.user.uid}
    view = json.loads(chain.livt("status", chain.run_dir, "--json").stdout)
    assert (view["state"], view["notes"]) == ("done", [])
    assert_same_run(chain.run_dir, local)


def lose_a_node(chain, name, *, noticed_s):
    """Kill the node of a job that is not its batch node, or its only one."""
    job = chain.cluster.show(chain.jobs[name])
    node = next((node for node in expand(job["NodeList"]) if node != job["BatchHost"]), job["BatchHost"])
    chain.cluster.kill(node, noticed_s=noticed_s)
    return node


def test_a_lost_node_leaves_the_rest_to_the_next_segment(uneven, reference, tmp_path):
    """Of the pretraining the node that is not the batch node, of the evaluation the only one."""
    chain = Chain(uneven, tmp_path / "a run", slurm__finetune__segments=1)
    chain.lay("pace", "1 1")
    chain.lay("hold-export")
    chain.submit()
    chain.await_steps(random.randrange(1, 8))
    lost = lose_a_node(chain, "pretrain-1", noticed_s=3)
    chain.await_state("finetune", "COMPLETED")
    uneven.bring_back(lost)
    chain.await_state("evaluate-1", "RUNNING")
    lose_a_node(chain, "evaluate-1", noticed_s=1)
    chain.mend("hold-export")
    states = chain.ended()
    assert states.pop("pretrain-1") == states.pop("evaluate-1") == "NODE_FAIL"
    assert states == dict.fromkeys(("pretrain-2", "finetune", "evaluate-2"), "COMPLETED"), chain.tell()
    assert "a node of this job is down" in chain.log("pretrain-1")
    assert_same_run(chain.run_dir, reference)
    assert (chain.run_dir / "export" / "eval.json").is_file()


def test_an_array_by_segments_ends_like_local_runs(uneven, local, tmp_path):
    """An element that is preempted continues in its next segment."""
    runs = [Chain(uneven, tmp_path / name, slurm__nodes=1, slurm__finetune__segments=1) for name in ("a", "b")]
    runs[1].sets = {**runs[0].sets, "run_dir": runs[1].run_dir}  # and the faults of the first
    runs[0].lay("pace", "1 2")
    told = json.loads(submit_together(runs, tmp_path, "--json").stdout)
    assert told["mode"] == "segments"
    runs[0].await_steps(6)
    runs[0].preempt(uneven.show(runs[0].jobs["pretrain-1"])["NodeList"])
    for chain in runs:
        states = chain.ended()
        first = states.pop("pretrain-1")
        assert first == "PREEMPTED" if chain is runs[0] else first in ("PREEMPTED", "COMPLETED")
        names = ("pretrain-2", "finetune", "evaluate-1", "evaluate-2")
        assert states == dict.fromkeys(names, "COMPLETED"), chain.tell()
        assert_same_run(chain.run_dir, local)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nodes_that_are_killed_at_ten_drawn_moments_change_nothing(uneven, reference, tmp_path):
    dice = random.Random(seed := random.randrange(10**6))
    print(f"seed {seed}")
    given = {"slurm__pretrain__segments": 12, "slurm__finetune__segments": 1}
    chain = Chain(uneven, tmp_path / "a run", slurm__max_restarts_without_progress=12, **given)
    chain.lay("pace", "2 99")
    chain.submit()
    for number in range(1, 11):
        name = f"pretrain-{number}"
        chain.await_state(name, "RUNNING")
        wait_for(lambda n=number: len(chain.lines("starts")) >= n, chain.tell, seconds=180)
        chain.await_steps(dice.randrange(1, 6))
        lost = lose_a_node(chain, name, noticed_s=dice.uniform(0, 5))
        print(f"{lost} of {name} is lost in step {chain.lines('steps')[-1]}")
        chain.await_state(name, "NODE_FAIL")
        uneven.bring_back(lost)
    chain.mend("pace")
    states = chain.ended()
    assert [states[f"pretrain-{number}"] for number in range(1, 11)] == ["NODE_FAIL"] * 10
    assert {states[name] for name in ("pretrain-11", "finetune", "evaluate-1")} == {"COMPLETED"}, chain.tell()
    assert_same_run(chain.run_dir, reference)
