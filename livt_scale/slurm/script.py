"""The batch script of a job: slurm/job.sbatch, with its #SBATCH lines and settings replaced by the recipe's.

    render(template, job, settings)   pure: the text that `livt submit` gives to sbatch

    #SBATCH lines    words that need no quoting; `livt_scale.config.slurm` and `_word` check that
    settings         shell variables, each value by shlex.quote: a name with quotes, newlines or $( ) is a name

The run directory may contain any character and cannot be quoted in an #SBATCH line, so it is an argument of sbatch
(`livt_scale.slurm.submit`); the log's path is relative to it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from livt_scale.config.recipe import Recipe
from livt_scale.config.slurm import Option, Slurm
from livt_scale.slurm.records import ENDS
from livt_scale.slurm.sites import JobKind, Resources, Site, gpu_options
from livt_scale.slurm.srun import mounts
from livt_scale.util.errors import ClusterError, UsageError

LOGS = "slurm/logs"
_FIRST, _LAST = "# --- settings", "# --- end of settings"
WhenStopped = Literal["requeue", "next", "last"]  # next: another segment of the stage follows; last: none does


@dataclass(frozen=True)
class JobPlan:
    """One job of the chain: a segment of a stage, or the evaluation."""

    job: JobKind
    resources: Resources
    segment: int = 1
    segments: int = 1
    when_stopped: WhenStopped = "requeue"

    @property
    def name(self) -> str:
        return self.job if self.segments == 1 else f"{self.job}-{self.segment}"


@dataclass(frozen=True)
class ChainSettings:
    """What all jobs of a chain have in common."""

    recipe: Recipe
    recipe_path: str  # of the file that the jobs read
    recipe_sha256: str  # of that file; empty: it is not frozen
    run_dir: str
    work_dir: str  # that relative paths of the recipe are relative to
    python: str
    code: str  # what the jobs import
    code_sha256: str  # of its SHA256SUMS; empty: it is not frozen
    slurm: Slurm  # the recipe's, with the nodes excluded that were found bad
    site: Site | None
    allow: tuple[str, ...] = ()  # fields that may have changed since a checkpoint that is there

    @property
    def stage_in_dir(self) -> str | None:
        """The folder to which shards are copied, by recipe or profile; None: decided on the node."""
        return self.slurm.stage_in_dir or (self.site.stage_in_dir if self.site else None)


@dataclass(frozen=True)
class ArraySettings:
    """Runs that are submitted together: element k of each array job is the k-th one's."""

    runs: tuple[ChainSettings, ...]
    max_parallel: int  # of the runs, in each stage


def render(template: str, job: JobPlan, chain: ChainSettings, *, array: ArraySettings | None = None) -> str:
    """The batch script of `job`. Raises UsageError for a value that the script cannot contain.

    array: the same job for several runs; `chain` is the first of them, and the others differ in `_own` alone.
    """
    lines = template.splitlines()
    try:
        first = next(i for i, line in enumerate(lines) if line.startswith(_FIRST))
        last = next(i for i, line in enumerate(lines) if line.startswith(_LAST))
    except StopIteration:
        raise ClusterError(
            "the batch script's template has no settings to replace", remedy=f"between '{_FIRST}' and '{_LAST}'"
        ) from None
    head = [line for line in lines[1:first] if not line.startswith("#SBATCH")]
    script = [lines[0], *directives(job, chain, array=array), *head, "# --- settings of this run ---"]
    script += [*settings(job, chain), *_by_element(job, array)]
    return "\n".join([*script, *lines[last:]]) + "\n"


def directives(job: JobPlan, chain: ChainSettings, *, array: ArraySettings | None = None) -> list[str]:
    """The #SBATCH lines."""
    resources, slurm = job.resources, chain.slurm
    wanted = {
        "job-name": f"livt-{re.sub(r'[^A-Za-z0-9._-]', '_', _name(chain, array))[:60]}-{job.name}",
        "nodes": resources.nodes,
        "ntasks-per-node": resources.tasks_per_node,
        **gpu_options(resources, slurm.options, chain.site),
        "cpus-per-task": resources.cpus_per_task,
        "mem": f"{resources.memory_gib}G" if resources.memory_gib else None,
        "time": resources.time_min,
        "partition": resources.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "exclude": slurm.exclude,
        "signal": f"B:USR2@{slurm.signal_lead_s}",
        "open-mode": "append",
        "output": f"{LOGS}/{log_name(job, array=array is not None)}",
        "array": f"0-{len(array.runs) - 1}%{array.max_parallel}" if array else None,
    }
    lines = [f"#SBATCH --{name}={_word(name, str(value))}" for name, value in wanted.items() if value is not None]
    lines.append("#SBATCH --requeue" if job.when_stopped == "requeue" else "#SBATCH --no-requeue")
    further = {name: value for name, value in slurm.options.items() if name != "gres"}
    return [
        *lines,
        *(f"#SBATCH --{name}{_value(name, value)}" for name, value in further.items() if value is not False),
    ]


def _value(name: str, value: Option) -> str:
    return "" if value is True else f"={_word(name, str(value))}"


def log_name(job: JobPlan, *, array: bool) -> str:
    """In Slurm's notation: %j is the job's id, %A_%a those of an array and its element."""
    return f"{job.name}-{'%A_%a' if array else '%j'}.log"


def _word(name: str, value: str) -> str:
    """Nothing can be quoted reliably in an #SBATCH line, so what would need it is refused."""
    if not re.fullmatch(r"[A-Za-z0-9_.,:&|*()\[\]@/=+%-]+", value):
        raise UsageError(f"slurm.{name} is {value!r}: an #SBATCH line cannot hold that", remedy="give one plain word")
    return value


def _name(chain: ChainSettings, array: ArraySettings | None) -> str:
    return f"{chain.recipe.name}-and-{len(array.runs) - 1}" if array else chain.recipe.name


def settings(job: JobPlan, chain: ChainSettings) -> list[str]:
    """The shell variables of the script. Raises UsageError for a folder that a container cannot mount."""
    site, slurm = chain.site, chain.slurm
    staging = (chain.stage_in_dir or "/tmp") if slurm.stage_in else None  # noqa: S108 - checked, not written to
    mounts(chain.recipe, Path(chain.run_dir), Path(chain.code), stage_in_dir=staging)
    return [
        f"work_dir={shlex.quote(chain.work_dir)}",
        f"python={shlex.quote(chain.python)}",
        f"code={shlex.quote(chain.code)}",
        f"code_sha256={shlex.quote(chain.code_sha256)}",
        *_own(job, chain),
        _array("modules", (*(site.modules if site else ()), *slurm.modules)),
        _array("setup", (*(site.setup if site else ()), *slurm.setup)),
        "set_environment() {",
        "  :",
        *(f"  export {name}={shlex.quote(value)}" for name, value in environment(slurm, site).items()),
        "}",
    ]


def _own(job: JobPlan, chain: ChainSettings) -> list[str]:
    """What differs between the runs of an array."""
    options = {
        "when-stopped": job.when_stopped,
        "segment": job.segment,
        "segments": job.segments,
        "exclude": chain.slurm.exclude,
        "stage-in-dir": chain.stage_in_dir if chain.slurm.stage_in else None,
    }
    words = [f"--{name}={value}" for name, value in options.items() if value is not None]
    words += [f"--allow={field}" for field in chain.allow if job.job != "evaluate"]
    return [
        _array("job", (job.job, chain.recipe_path, *words)),
        f"recipe_sha256={shlex.quote(chain.recipe_sha256)}",
        f"ends={shlex.quote(f'{chain.run_dir}/{ENDS}')}",
    ]


def _by_element(job: JobPlan, array: ArraySettings | None) -> list[str]:
    """The settings of the run that an element of an array is for, which override those of the first one."""
    if array is None:
        return [""]
    cases = [
        line
        for k, run in enumerate(array.runs)
        for line in (f"  {k})", *(f"    {own}" for own in _own(job, run)), "    ;;")
    ]
    return ["case ${SLURM_ARRAY_TASK_ID:?} in", *cases, "esac", ""]


def environment(slurm: Slurm, site: Site | None) -> Mapping[str, str]:
    """What is exported in the job: the network by the profile, then the profile's own, then the recipe's."""
    network = site.interface if site else None
    named = {"NCCL_SOCKET_IFNAME": network, "GLOO_SOCKET_IFNAME": network} if network else {}
    return {**named, **(site.environment if site else {}), **slurm.environment}


def _array(name: str, words: Iterable[str]) -> str:
    return f"{name}=({' '.join(map(shlex.quote, words))})"
