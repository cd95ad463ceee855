"""The clusters: each description has one for all tests, started when the first asks for it, stopped after the last.

LIVT_TEST_CLUSTER names the one that most tests run on (`descriptions.FOR_ALL_TESTS`).
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm_real import cluster as slurm
from tests.slurm_real.chains import RECIPE, Chain
from tests.slurm_real.cluster import Cluster
from tests.slurm_real.descriptions import FOR_ALL_TESTS, LIMITED, UNEVEN, Description
from tests.slurm_real.ordinary import ordinary_user
from tests.whole_runs import Livt

CHOSEN = os.environ.get("LIVT_TEST_CLUSTER") or "two_nodes"


def pytest_collection_finish():
    if CHOSEN not in FOR_ALL_TESTS:
        names = ", ".join(FOR_ALL_TESTS)
        raise pytest.UsageError(f"LIVT_TEST_CLUSTER is {CHOSEN!r}: the tests know the clusters {names}")


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
    return clusters(FOR_ALL_TESTS[CHOSEN])


@pytest.fixture
def cluster(_running_cluster):
    """Its nodes are idle. A test that ends, however it does, leaves no job behind."""
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
    """Chains of one task on the other clusters, preempted while they pretrain. They run beside the tests that wait.

    The one that is requeued is an ordinary user's, where there is one who can run it. Before it is preempted it is
    asked to save, and requeues itself.
    """
    readable = Path(tempfile.mkdtemp(prefix="livt-ordinary-"))
    readable.chmod(0o755)
    limited = Chain(clusters(LIMITED), readable / "a run", slurm__nodes=1, user=ordinary_user())
    uneven = Chain(clusters(UNEVEN), tmp_path_factory.mktemp("preempted") / "a run", slurm__nodes=1)
    for chain, pace in ((limited, "1 2"), (uneven, "1 1")):
        chain.lay("pace", pace)
        chain.submit()
    limited.await_steps(4)
    limited.signal("pretrain")
    uneven.await_steps(4)
    uneven.preempt(uneven.cluster.show(uneven.jobs["pretrain-1"])["NodeList"])
    limited.await_restart("pretrain")
    limited.await_steps(2)
    limited.preempt(limited.cluster.show(limited.jobs["pretrain"])["NodeList"])
    yield {"limited": limited, "uneven": uneven}
    shutil.rmtree(readable)


@pytest.fixture
def sbatch(cluster, tmp_path):
    """`sbatch(body, *options)`: submit a bash script and return the job's number. Its output goes to OUT/NUMBER.out."""

    def submit(body: str, *options: str) -> str:
        script = tmp_path / "job.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        words = ("sbatch", "--parsable", "--open-mode=append", f"--output={tmp_path}/%j.out", *options, script)
        return cluster.run(*words, cwd=tmp_path).stdout.strip().split(";")[0]

    return submit
