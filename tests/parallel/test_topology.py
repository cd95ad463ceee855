"""Rank and world size from each launcher's variables, as those launchers set them."""

from __future__ import annotations

import pytest

from livt_scale.errors import UsageError
from livt_scale.parallel.topology import World, _slurm_master, detect


def test_alone_without_a_launcher():
    assert detect({}) == World()


def test_torchrun():
    environ = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert detect(environ) == World(5, 8, 1, 4)


def test_srun_with_several_tasks():
    environ = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}
    assert detect(environ).rank == 3
    assert detect(environ).world_size == 4


def test_a_shell_inside_an_allocation_is_alone():
    assert detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}) == World()
    assert detect({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "3"}) == World()  # the batch script itself, no step


@pytest.mark.parametrize(
    "environ", [{"RANK": "8", "WORLD_SIZE": "8"}, {"RANK": "-1", "WORLD_SIZE": "8"}, {"RANK": "x", "WORLD_SIZE": "8"}]
)
def test_contradicting_variables_are_named(environ):
    with pytest.raises(UsageError, match="RANK"):
        detect(environ)


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("gpu[03-07,12],cpu1", "gpu03"), ("node7", "node7"), ("a-b[1,5]", "a-b1"), ("x1,x2", "x1"), ("", "127.0.0.1")],
)
def test_the_master_is_the_first_node_of_the_step(nodes, host):
    assert _slurm_master({"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "71"}) == (host, "20071")
