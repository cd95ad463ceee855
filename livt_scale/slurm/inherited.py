"""What the submitting shell has set for Slurm's commands, and what of it a chain may inherit.

SLURM_*     an allocation's own: inside `salloc`, a new job would inherit its memory and tasks, and srun then fails
SBATCH_*    options of sbatch, which override those in a script: SBATCH_TIMELIMIT=10 would end a job of 720 minutes
SQUEUE_*    and the like: options of the other commands, which would hide jobs from livt status and livt cancel

What says which cluster is meant, and who asks, is kept; so are options that the plan leaves open: SBATCH_ACCOUNT
without slurm.account.
"""

from __future__ import annotations

from collections.abc import Mapping

from livt_scale.config.slurm import CHAIN_OPTIONS, MEMORY_OPTIONS, Slurm

KEPT = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS")
OF_COMMANDS = ("SLURM_", "SALLOC_", "SRUN_", "SQUEUE_", "SACCT_", "SCANCEL_", "SCONTROL_", "SINFO_")
# options with which the plan is the same, unless the recipe has the field
OPEN = {"account": "account", "constraint": "constraint", **dict.fromkeys(MEMORY_OPTIONS, "memory_gib")}
ANYWAY = ("export",)  # some sites set it, and the batch script exports what its tasks need
DECIDED = {**CHAIN_OPTIONS, **dict.fromkeys(MEMORY_OPTIONS, "slurm.memory_gib"), "gres": "slurm.options.gres"}
NAMED_OTHERWISE = {"ARRAY_INX": "array", "MEM_PER_NODE": "mem", "TIMELIMIT": "time"}


def for_commands(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of squeue, scontrol and the like."""
    return {name: value for name, value in environ.items() if name in KEPT or not name.startswith(OF_COMMANDS)}


def for_sbatch(environ: Mapping[str, str], slurm: Slurm) -> dict[str, str]:
    """The environment of sbatch, which the jobs inherit."""
    against = contradictions(environ, slurm)
    return {name: value for name, value in for_commands(environ).items() if name not in against}


def contradictions(environ: Mapping[str, str], slurm: Slurm) -> dict[str, str]:
    """SBATCH_* variables that are not passed on, and the field that decides instead."""
    found = {}
    for name in sorted(environ):
        if not name.startswith("SBATCH_"):
            continue
        word = name.removeprefix("SBATCH_")
        option = NAMED_OTHERWISE.get(word, word.lower().replace("_", "-"))
        is_open = option in ANYWAY or (option in OPEN and getattr(slurm, OPEN[option]) is None)
        if option in slurm.options:
            found[name] = f"slurm.options.{option}"
        elif option in DECIDED and not is_open:
            found[name] = DECIDED[option]
    return found


def notes(environ: Mapping[str, str], slurm: Slurm) -> list[str]:
    """What is not passed on, for a person."""
    told = [f"{name} is set and not used: {field} decides" for name, field in contradictions(environ, slurm).items()]
    dropped = sorted(name for name in environ if name.startswith("SLURM_") and name not in KEPT)
    if "SLURM_JOB_ID" in dropped:
        told.append(f"this is inside job {environ['SLURM_JOB_ID']}: its SLURM_* variables are not passed on")
    elif dropped:
        told.append(f"not passed on: {', '.join(dropped)}; what the jobs need of them goes into slurm.environment")
    return told
