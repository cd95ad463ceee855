"""Rank and world size from each launcher's variables, as those launchers set them."""

from __future__ import annotations

import pytest
import torch

from livt_scale.distributed.world import World, _slurm_master, _slurm_port, allocator_settings, detect
from livt_scale.util.errors import UsageError
from tests import warm


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


SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0", "SLURM_NODEID": "2"}


@pytest.mark.parametrize(
    ("name", "text", "here"),
    [
        ("SLURM_STEP_TASKS_PER_NODE", "2(x3),1", 2),
        ("SLURM_STEP_TASKS_PER_NODE", "1,4,2", 2),
        ("SLURM_TASKS_PER_NODE", "2(x2),3", 3),
        ("SLURM_NTASKS_PER_NODE", "4", 4),
        ("SLURM_JOB_NAME", "train", 7),  # nothing said: one node
    ],
)
def test_srun_tells_the_tasks_of_each_node(name, text, here):
    assert detect({**SRUN, name: text}) == World(5, 7, 1, here)


@pytest.mark.parametrize("text", ["", "2(x", "a", "2(x3)(x2)", "2;3"])
def test_tasks_by_node_of_another_form_are_named(text):
    with pytest.raises(UsageError, match="tasks by node"):
        detect({**SRUN, "SLURM_STEP_TASKS_PER_NODE": text})


def test_torchrun_inside_a_task_of_srun_has_the_last_word_after_its_restarts_too():
    environ = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "SLURM_PROCID": "0"}
    environ |= {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    environ |= {"TORCHELASTIC_RESTART_COUNT": "2"}
    assert detect(environ) == World(3, 8, 3, 4)


def test_a_batch_script_that_sets_rank_and_world_size_alone_is_helped_by_slurm():
    environ = {**SRUN, "RANK": "5", "WORLD_SIZE": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
    assert detect(environ) == World(5, 7, 1, 2)


def test_without_a_word_on_this_node_all_are_on_it():
    assert detect({"RANK": "1", "WORLD_SIZE": "2"}) == World(1, 2, 1, 2)


def test_mpirun_inside_an_allocation():
    environ = {
        f"OMPI_COMM_WORLD_{k}": v for k, v in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()
    }
    daemon = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"}  # srun started one process a node
    assert detect({**environ, **daemon}) == World(3, 4, 1, 2)


def test_accelerate_that_starts_one_process_for_several_is_refused():
    environ = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(UsageError, match="--multi_gpu"):
        detect(environ)
    assert detect({"ACCELERATE_USE_CPU": "True"}) == World()
    assert detect({**environ, "RANK": "0", "WORLD_SIZE": "2"}) == World(0, 2, 0, 2)


def test_a_place_on_the_node_that_does_not_exist_is_named():
    with pytest.raises(UsageError, match="LOCAL_RANK is 4 with 4 processes"):
        detect({"RANK": "4", "WORLD_SIZE": "8", "LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "4"})


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
    assert _slurm_master({"SLURM_STEP_NODELIST": nodes}) == host


def test_the_port_follows_from_the_job():
    assert [_slurm_port({"SLURM_JOB_ID": job}) for job in ("71", "20071", "3")] == ["12071", "12071", "12003"]
    with pytest.raises(UsageError, match="SLURM_JOB_ID is 'x'"):
        _slurm_port({"SLURM_JOB_ID": "x"})


# --- leaving the process group ---

LEAVES = """
import sys, time
import torch.distributed as dist
from livt_scale.distributed import world
from livt_scale.util.errors import DataError, Preempted

def wait_for_peers():  # as NCCL does
    print("destroyed", flush=True)
    time.sleep({destroy_s})

dist.init_process_group = lambda *_, **__: None
dist.destroy_process_group = wait_for_peers
world.meet = lambda *_, **__: None
world.LEAVE_S = 1.0
with world.process_group(world.World(1, 2, 1, 2), timeout_s=5):
    {body}
print("after it", flush=True)
"""


def leaves(tmp_path, body, destroy_s=600):
    program = tmp_path / "leaves.py"
    program.write_text(LEAVES.format(body=body, destroy_s=destroy_s))
    return warm.run([program], cwd=tmp_path, timeout=30)


@pytest.mark.parametrize(
    ("body", "code", "printed"),
    [
        ("raise DataError('a damaged sample', remedy='build it again')", 1, "a damaged sample. Build it again"),
        ("raise Preempted('stopped and saved')", 85, "stopped and saved"),
        ("raise KeyError('x')", 1, "KeyError: 'x'"),
        ("pass", 1, "the other ranks did not leave the process group within 1 s"),
    ],
)
def test_a_rank_whose_peers_are_gone_prints_its_error_and_ends(tmp_path, body, code, printed):
    done = leaves(tmp_path, body)
    assert (done.returncode, done.stdout) == (code, "destroyed\n")
    assert "livt: error on rank 1: " in done.stderr
    assert printed in done.stderr


def test_a_group_that_can_be_destroyed_leaves_the_error_to_the_caller(tmp_path):
    done = leaves(tmp_path, "raise KeyError('x')", destroy_s=0)
    assert (done.returncode, done.stdout) == (1, "destroyed\n")
    assert "livt: error" not in done.stderr
    assert leaves(tmp_path, "pass", destroy_s=0).stdout == "destroyed\nafter it\n"


# --- the device ---


@pytest.mark.parametrize(("gpus", "local_rank", "index"), [(1, 3, 0), (4, 3, 3), (4, 0, 0)])
def test_each_process_of_a_node_has_a_gpu(monkeypatch, gpus, local_rank, index):
    """One visible GPU: Slurm has shown each task its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert World(local_rank, 4, local_rank, 4).device == torch.device("cuda", index)


def test_processes_that_would_share_a_gpu_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UsageError, match="process 2 of this node, of 4, has no GPU: 2 are visible"):
        _ = World(2, 4, 2, 4).device


def test_gpu_memory_grows_in_place_unless_the_user_says_otherwise():
    settings = allocator_settings({})
    assert settings == "expandable_segments:True"
    assert allocator_settings({"PYTORCH_ALLOC_CONF": "x"}) is None
    assert allocator_settings({"PYTORCH_CUDA_ALLOC_CONF": "x"}) is None
    torch._C._accelerator_setAllocatorSettings(settings)  # without a GPU it has no effect
