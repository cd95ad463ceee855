"""Several runs by one submission, as arrays on a real Slurm: bounded, each on its own, known to livt status."""

import json
import sys

import pytest

from tests.slurm_real.chains import FAULTY, PYTHON, Chain, by_stage
from tests.slurm_real.cluster import wait_for
from tests.whole_runs import Livt, assert_same_run, spelt

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

OWN_FAULTS = """\
  export FAULTS="${5%/run/slurm/*}/faults"
  shift 3"""  # the recipe is FOLDER/run/slurm/submitted.yaml


@pytest.fixture
def runs(cluster, tmp_path):
    """Three runs of two tasks on one node, that ask Slurm for the same; the second has a bug in its pretraining."""
    python = tmp_path / "python of all"
    python.write_text(PYTHON.format(python=sys.executable, faulty=FAULTY).replace("  shift 3", OWN_FAULTS))
    python.chmod(0o755)
    asked = {"slurm.nodes": 1, "slurm.tasks_per_node": 2, "slurm.python": python}
    asked["slurm.environment"] = {"OMP_NUM_THREADS": "1"}
    chains = [Chain(cluster, tmp_path / name) for name in ("a", "b", "c")]
    for chain in chains:
        chain.sets |= asked
    chains[1].lay("bug", "5")
    return chains


def submit_together(runs, folder, *words, expect=0):
    """By one command: what a recipe says stands in a file of its own, and the faults come by its environment."""
    recipes = []
    for k, chain in enumerate(runs):
        sets = [f"--set={name}={spelt(value)}" for name, value in chain.sets.items() if not name.startswith("slurm.")]
        text = chain.livt("recipe", "show", Livt(chain.folder).recipe, *sets).stdout
        recipes.append(folder / f"{k}.yaml")
        recipes[-1].write_text(text)
    slurm = [f"--set={name}={spelt(value)}" for name, value in runs[0].sets.items() if name.startswith("slurm.")]
    return runs[0].livt("submit", *recipes, *slurm, *words, expect=expect)


def states(chain):
    return {name: chain.cluster.show(job)["JobState"] for name, job in chain.jobs.items()}


def test_three_runs_by_one_command_two_at_once_and_the_one_that_fails_stops_no_other(runs, reference, tmp_path):
    first = runs[0]
    told = json.loads(submit_together(runs, tmp_path, "--jobs=2", "--json").stdout)
    arrays = [job["id"] for job in told["jobs"]]
    most = 0

    def over():
        nonlocal most
        rows = first.cluster.run("squeue", "--noheader", "--array", "--format=%F %T").stdout.splitlines()
        running = [row.split()[0] for row in rows if row.endswith("RUNNING")]
        most = max([most, *(running.count(array) for array in arrays)])
        return not rows

    wait_for(over, lambda: "\n".join(chain.tell() for chain in runs), seconds=500, every_s=0.5)
    assert most <= 2
    for chain, ends in zip(runs, ("COMPLETED", "CANCELLED", "COMPLETED"), strict=True):
        found = by_stage(states(chain))
        assert found["finetune"] == found["evaluate"] == ends, (found, chain.tell())
        view = json.loads(chain.livt("status", chain.run_dir, "--json", expect=int(ends == "CANCELLED")).stdout)
        assert view["state"] == ("done" if ends == "COMPLETED" else "failed")
    assert "a planted bug" in first.livt("logs", runs[1].run_dir, "--stage", "pretrain").stdout
    for chain in (runs[0], runs[2]):
        assert_same_run(chain.run_dir, reference)
    assert (runs[2].run_dir / "export" / "eval.json").is_file()

    # the second submission is of the one that is not done; cancelled, it leaves nothing in the queue
    runs[1].mend("bug")
    runs[1].lay("pace", "1 99")
    again = json.loads(submit_together(runs[1:], tmp_path, "--json").stdout)
    assert again["runs"] == [str(runs[1].run_dir)]
    first.cluster.wait(runs[1].first("pretrain"), "RUNNING")
    runs[1].await_steps(2)
    runs[1].livt("cancel", runs[1].run_dir)
    queue = ("squeue", "--noheader", "--array")
    wait_for(lambda: not first.cluster.run(*queue).stdout, runs[1].tell, seconds=60)
    assert json.loads(runs[1].livt("status", runs[1].run_dir, "--json").stdout)["state"] == "preempted"
