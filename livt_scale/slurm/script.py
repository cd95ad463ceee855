"""A batch script from one that a person can read: the lines of #SBATCH and the settings are replaced, the rest stays.

    render(template, job, shared)   pure: the text of slurm/pretrain.sbatch, with the recipe's values in it

    #SBATCH lines    words that need no quoting; `livt_scale.config.slurm` and `_word` see to that
    settings         shell variables, each value by shlex.quote: a name with quotes, newlines or $( ) is a name

What can hold anything and cannot be quoted in an #SBATCH line, the run directory, goes to sbatch as an argument
(`livt_scale.slurm.submit`); the log's path is relative to it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from livt_scale.config.slurm import Container, Slurm
from livt_scale.slurm.sites import Ask, Job, Site
from livt_scale.util.errors import ClusterError, UsageError

LOGS = "slurm/logs"
_FIRST, _LAST = "# --- settings", "# --- end of settings"
WhenStopped = Literal["requeue", "next", "last"]


@dataclass(frozen=True)
class JobPlan:
    """One job of the chain: a segment of a stage, or the evaluation."""

    job: Job
    ask: Ask
    segment: int = 1
    segments: int = 1
    when_stopped: WhenStopped = "requeue"

    @property
    def name(self) -> str:
        return self.job if self.segments == 1 else f"{self.job}-{self.segment}"


@dataclass(frozen=True)
class Shared:
    """What all jobs of a chain have in common."""

    name: str  # of the run
    recipe: str  # path of the recipe file that the job trains
    options: tuple[str, ...]  # of livt train, behind the recipe
    run_dir: str
    work_dir: str  # where relative paths of the recipe are seen from
    python: str
    code: str  # what the jobs import
    code_sha256: str  # of its SHA256SUMS; empty: it is not frozen
    slurm: Slurm
    site: Site | None
    data: tuple[str, ...] = ()  # local folders of shards, for containers
    evaluation_data: str | None = None


@dataclass(frozen=True)
class Array:
    """Runs that are submitted together: element k of each array job is the k-th one's."""

    runs: tuple[Shared, ...]
    max_parallel: int  # of the runs, in each stage


def render(template: str, job: JobPlan, shared: Shared, *, array: Array | None = None) -> str:
    """The batch script of `job`. Raises UsageError for a value that cannot stand where it has to.

    array: the same job for several runs; `shared` is the first of them, and the others differ in `own` alone.
    """
    lines = template.splitlines()
    try:
        first = next(i for i, line in enumerate(lines) if line.startswith(_FIRST))
        last = next(i for i, line in enumerate(lines) if line.startswith(_LAST))
    except StopIteration:
        raise ClusterError(
            f"the template of {job.job} has no settings to replace", remedy=f"between '{_FIRST}' and '{_LAST}'"
        ) from None
    head = [line for line in lines[1:first] if not line.startswith("#SBATCH")]
    script = [lines[0], *directives(job, shared, array=array), *head, "# --- settings of this run ---"]
    script += [*settings(job, shared), *_by_element(array)]
    return "\n".join([*script, *lines[last:]]) + "\n"


def directives(job: JobPlan, shared: Shared, *, array: Array | None = None) -> list[str]:
    """The #SBATCH lines."""
    ask, slurm = job.ask, shared.slurm
    wanted = {
        "job-name": f"livt-{re.sub(r'[^A-Za-z0-9._-]', '_', shared.name)[:60]}-{job.name}",
        "nodes": ask.nodes,
        "ntasks-per-node": ask.tasks_per_node,
        "gpus-per-node": ask.gpus_per_node or None,
        "cpus-per-task": ask.cpus_per_task,
        "mem": f"{slurm.memory_gib}G" if slurm.memory_gib else None,
        "time": ask.time_min,
        "partition": ask.partition,
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
    return [*lines, "#SBATCH --requeue" if job.when_stopped == "requeue" else "#SBATCH --no-requeue"]


def log_name(job: JobPlan, *, array: bool) -> str:
    """As Slurm takes it: %j the job's id, %A_%a those of an array and its element."""
    return f"{job.name}-{'%A_%a' if array else '%j'}.log"


def _word(name: str, value: str) -> str:
    """Nothing can be quoted reliably in an #SBATCH line, so what would need it is refused."""
    if not re.fullmatch(r"[A-Za-z0-9_.,:&|*()\[\]@/=+%-]+", value):
        raise UsageError(f"slurm.{name} is {value!r}: an #SBATCH line cannot hold that", remedy="give one plain word")
    return value


def settings(job: JobPlan, shared: Shared) -> list[str]:
    """The shell variables that the rest of the script works with."""
    site, slurm = shared.site, shared.slurm
    srun_options, container = in_container(job, shared)
    staged = (slurm.stage_in_dir or (site.stage_in_dir if site else None) or "") if slurm.stage_in else ""
    in_image = slurm.container.python if slurm.container else shared.python
    return [
        f"cd -- {shlex.quote(shared.work_dir)} || exit 1",
        f"stage={job.job}",
        *_own(shared),
        _array("options", shared.options),
        _array("python", (in_image,)),
        f"when_stopped={job.when_stopped}",
        f"segment={job.segment} segments={job.segments}",
        f"max_restarts_without_progress={slurm.max_restarts_without_progress}",
        _array("modules", (*(site.modules if site else ()), *slurm.modules)),
        "set_environment() {",
        "  :",
        *(f"  export {name}={shlex.quote(value)}" for name, value in environment(slurm, site).items()),
        "}",
        f"check_nodes={slurm.check_nodes}",
        f"check_min={slurm.check_min}",
        f"excluded={shlex.quote(slurm.exclude or '')}",
        _array("srun_options", srun_options),
        _array("container", container),
        f"stage_in_dir={shlex.quote(staged)}" if staged or not slurm.stage_in else "stage_in_dir=${TMPDIR:-/tmp}",
    ]


def _own(shared: Shared) -> list[str]:
    """What differs between the runs of an array."""
    return [
        f"recipe={shlex.quote(shared.recipe)}",
        f"run_dir={shlex.quote(shared.run_dir)}",
        f"code={shlex.quote(shared.code)}",
        f"code_sha256={shlex.quote(shared.code_sha256)}",
        f"evaluates={'yes' if shared.evaluation_data else 'no'}",
        f"evaluation_data={shlex.quote(shared.evaluation_data or '')}",
    ]


def _by_element(array: Array | None) -> list[str]:
    """The settings of the run that an element of an array is for, laid over those of the first one."""
    if array is None:
        return [""]
    cases = [
        line for k, run in enumerate(array.runs) for line in (f"  {k})", *(f"    {o}" for o in _own(run)), "    ;;")
    ]
    return ["case ${SLURM_ARRAY_TASK_ID:?} in", *cases, "esac", ""]


def environment(slurm: Slurm, site: Site | None) -> Mapping[str, str]:
    """What is exported in the job: the network by the profile, then the profile's own, then the recipe's."""
    network = site.interface if site else None
    named = {"NCCL_SOCKET_IFNAME": network, "GLOO_SOCKET_IFNAME": network} if network else {}
    return {**named, **(site.environment if site else {}), **slurm.environment}


def in_container(job: JobPlan, shared: Shared) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(options of srun, words before python). Raises UsageError for a path that a mount cannot name."""
    container = shared.slurm.container
    if container is None:
        return (), ()
    folders = dict.fromkeys((shared.run_dir, shared.code, *shared.data, *_staging(shared)))
    for folder in folders:
        if re.search(r"[,:\n\"'\\]", folder):
            raise UsageError(
                f"{folder!r} cannot be mounted in a container: a mount cannot name commas, colons, quotes, backslashes "
                "or newlines",
                remedy="rename the folder, or run without a container",
            )
    mounts = (*(f"{folder}:{folder}" for folder in folders), *container.mounts)
    return _pyxis(container, mounts) if container.by == "pyxis" else _apptainer(container, mounts, job.ask)


def _staging(shared: Shared) -> tuple[str, ...]:
    if not shared.slurm.stage_in:
        return ()
    return (shared.slurm.stage_in_dir or (shared.site and shared.site.stage_in_dir) or "/tmp",)  # noqa: S108 - by name


def _pyxis(container: Container, mounts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return (f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"), ()


def _apptainer(container: Container, mounts: tuple[str, ...], ask: Ask) -> tuple[tuple[str, ...], tuple[str, ...]]:
    gpus = ("--nv",) if ask.gpus_per_node else ()
    return (), ("apptainer", "exec", *gpus, *(word for m in mounts for word in ("--bind", m)), container.image)


def _array(name: str, words: Iterable[str]) -> str:
    return f"{name}=({' '.join(map(shlex.quote, words))})"
