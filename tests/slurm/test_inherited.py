"""What the submitting shell has set reaches the chain only where it cannot change what was planned."""

import pytest

from livt_scale.config.slurm import Slurm
from livt_scale.slurm.inherited import contradictions, for_commands, for_sbatch, notes

# what `salloc --mem-per-cpu=500 --gpus-per-node=1` of Slurm 22.05 has set, in part
ALLOCATION = {
    "SLURM_JOB_ID": "41", "SLURM_MEM_PER_CPU": "500", "SLURM_NTASKS": "2", "SLURM_GPUS_PER_NODE": "1",
    "SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_JWT": "abc", "PATH": "/usr/bin",
}  # fmt: skip


def test_an_allocations_variables_are_not_passed_on_but_for_what_names_the_cluster():
    kept = {"SLURM_CONF": "/etc/slurm/slurm.conf", "SLURM_JWT": "abc", "PATH": "/usr/bin"}
    assert for_sbatch(ALLOCATION, Slurm()) == for_commands(ALLOCATION) == kept
    assert notes(ALLOCATION, Slurm()) == ["this is inside job 41: its SLURM_* variables are not passed on"]
    assert notes(kept, Slurm()) == []


def test_other_slurm_variables_are_named():
    (note,) = notes({"SLURM_CPU_BIND": "none", "SLURM_TIME_FORMAT": "relative"}, Slurm())
    assert "SLURM_CPU_BIND, SLURM_TIME_FORMAT" in note
    assert "slurm.environment" in note


def test_what_would_hide_jobs_from_squeue_and_scancel_is_not_passed_on():
    hides = {"SQUEUE_PARTITION": "x", "SCANCEL_STATE": "PENDING", "SACCT_FEDERATION": "1", "SLURM_TIME_FORMAT": "%s"}
    assert for_commands(hides | {"HOME": "/h"}) == {"HOME": "/h"}


@pytest.mark.parametrize(
    ("name", "slurm", "decides"),
    [
        ("SBATCH_TIMELIMIT", {}, "slurm.time_min"),
        ("SBATCH_PARTITION", {}, "slurm.partition"),
        ("SBATCH_QOS", {}, "slurm.qos"),
        ("SBATCH_GPUS_PER_NODE", {}, "slurm.gpus_per_node"),
        ("SBATCH_GRES", {}, "slurm.options.gres"),
        ("SBATCH_NO_REQUEUE", {}, "slurm.mode"),
        ("SBATCH_SIGNAL", {}, "slurm.signal_lead_s"),
        ("SBATCH_ACCOUNT", {"account": "lab"}, "slurm.account"),
        ("SBATCH_ACCOUNT", {}, None),
        ("SBATCH_MEM_PER_NODE", {}, "slurm.memory_gib"),
        ("SBATCH_MEM_PER_CPU", {"memory_gib": 5}, "slurm.memory_gib"),
        ("SBATCH_MEM_PER_CPU", {}, None),
        ("SBATCH_RESERVATION", {}, None),
        ("SBATCH_RESERVATION", {"options": {"reservation": "x"}}, "slurm.options.reservation"),
        ("SBATCH_EXPORT", {}, None),
        ("SBATCH_WCKEY", {}, None),
    ],
)
def test_an_option_of_sbatch_that_contradicts_the_plan_is_removed_and_reported(name, slurm, decides):
    slurm, environ = Slurm.model_validate(slurm), {name: "7", "PATH": "/usr/bin"}
    assert contradictions(environ, slurm) == ({name: decides} if decides else {})
    assert (name in for_sbatch(environ, slurm)) == (decides is None)
    assert notes(environ, slurm) == ([f"{name} is set and not used: {decides} decides"] if decides else [])
