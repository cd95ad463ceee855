"""The clusters: each description has one for all tests, started when the first asks for it, stopped after the last."""

import shutil

import pytest

from tests.slurm_real import cluster as slurm
from tests.slurm_real.chains import RECIPE, Chain
from tests.slurm_real.cluster import Cluster
from tests.slurm_real.descriptions import OTHERS, TWO_NODES, Description
from tests.whole_runs import Livt


@pytest.fixture(scope="session")
def clusters():
    """`clusters(description)`: the cluster of that description, started when it is first asked for."""
    if reason := slurm.why_not():
        pytest.skip(reason)
    running: dict[Description, Cluster] = {}

    def get(description: Description) -> Cluster:
        if description not in running:
            running[description] = Cluster(slurm.short_folder(), description)
            running[description].start()
        return running[description]

    yield get
    for each in running.values():
        each.stop()
        shutil.rmtree(each.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def _running_cluster(clusters):
    return clusters(TWO_NODES)


@pytest.fixture
def cluster(_running_cluster):
    """Two idle nodes. A test that ends, however it does, leaves no job behind."""
    yield _running_cluster
    _running_cluster.settle()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """Both stages by torchrun, two processes, undisturbed. Read only."""
    livt = Livt(tmp_path_factory.mktemp("torchrun"))
    livt.train(livt.folder / "run", processes=2, **{k.replace(".", "__"): v for k, v in RECIPE.items()})
    return livt.folder / "run"


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """Both stages in one process, undisturbed. Read only."""
    livt = Livt(tmp_path_factory.mktemp("local"))
    livt.train(livt.folder / "run", **{k.replace(".", "__"): v for k, v in RECIPE.items()})
    return livt.folder / "run"


@pytest.fixture(scope="session")
def preempted(clusters, tmp_path_factory):
    """Chains of one task on the other clusters, preempted while they pretrain. They run beside the tests that wait."""
    folder = tmp_path_factory.mktemp("preempted")
    chains = {name: Chain(clusters(which), folder / name, slurm__nodes=1) for name, which in OTHERS.items()}
    for chain in chains.values():
        chain.lay("pace", "1 1")
        chain.submit()
    for chain in chains.values():
        chain.await_steps(4)
        (pretrain, *_) = chain.jobs.values()
        chain.preempt(chain.cluster.show(pretrain)["NodeList"])
    return chains


@pytest.fixture
def sbatch(cluster, tmp_path):
    """`sbatch(body, *options)`: submit a bash script and return the job's number. Its output goes to OUT/NUMBER.out."""

    def submit(body: str, *options: str) -> str:
        script = tmp_path / "job.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        words = ("sbatch", "--parsable", "--open-mode=append", f"--output={tmp_path}/%j.out", *options, script)
        return cluster.run(*words, cwd=tmp_path).stdout.strip().split(";")[0]

    return submit
