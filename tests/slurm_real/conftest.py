"""The cluster: one for all tests here, started when the first asks for it, gone when the last is done."""

import shutil

import pytest

from tests.slurm_real import cluster as slurm


@pytest.fixture(scope="session")
def _running_cluster():
    if reason := slurm.why_not():
        pytest.skip(reason)
    folder = slurm.short_folder()
    running = slurm.Cluster(folder)
    try:
        running.start()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(_running_cluster):
    """Two idle nodes. A test that ends, however it does, leaves no job behind."""
    yield _running_cluster
    _running_cluster.cancel_all()
    for node in slurm.NODES:
        _running_cluster.bring_back(node)


@pytest.fixture
def sbatch(cluster, tmp_path):
    """`sbatch(body, *options)`: submit a bash script and return the job's number. Its output goes to OUT/NUMBER.out."""

    def submit(body: str, *options: str) -> str:
        script = tmp_path / "job.sh"
        script.write_text(f"#!/bin/bash\n{body}\n")
        words = ("sbatch", "--parsable", "--open-mode=append", f"--output={tmp_path}/%j.out", *options, script)
        return cluster.run(*words, cwd=tmp_path).stdout.strip().split(";")[0]

    return submit
