"""What a cluster offers, by its profile (slurm/sites/NAME.yaml), and the resources that each job of a run asks for.

    site = load_site("h100_infiniband")
    slurm = with_site(recipe.slurm, site)           QOS, options and container of the profile, where the recipe has none
    resources_for(slurm, site, "pretrain")          nodes 4, gpus_per_node 8, tasks_per_node 8, cpus_per_task 12, 24 h

A profile fills what a recipe leaves open; a recipe's own value always wins. Reading one runs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from livt_scale.config.recipe import STAGES
from livt_scale.config.runtime import RecipePart
from livt_scale.config.slurm import (
    Container,
    Option,
    OptionName,
    Slurm,
    Value,
    Variable,
    Word,
    leave_the_chain_its_options,
)
from livt_scale.config.yaml import read_file, validated
from livt_scale.util.errors import UsageError, nearest
from livt_scale.util.resources import shipped

UNLIMITED_MIN = 24 * 60  # of a job, if neither the recipe nor a profile sets it

Preempt = Literal["off", "requeue", "cancel"]
JobKind = Literal["pretrain", "finetune", "evaluate"]


class Partition(RecipePart):
    """One partition, as `scontrol show partition` describes it."""

    time_min: PositiveInt = Field(description="MaxTime, minutes")
    nodes: PositiveInt | None = Field(None, description="most of one job; None: no limit")
    gpus_per_node: NonNegativeInt = 0
    gpu_type: Word | None = Field(
        None, description="asked for with the GPUs: a100 of gpu:a100:4 (sinfo -o %G); None: any"
    )
    device: Word | None = Field(
        None, description="its GPUs' name in livt plan, such as h100; None: gpu_type, if livt plan knows it"
    )
    cpus_per_node: PositiveInt | None = Field(None, description="cores that jobs may have; None: Slurm's default")
    preempt: Preempt = Field("off", description="PreemptMode: what happens to its jobs when others need the nodes")


class Qos(RecipePart):
    """One QOS, as `sacctmgr show qos` describes it. None: no limit is set; the cluster's PreemptMode applies."""

    time_min: PositiveInt | None = Field(None, description="MaxWall, minutes")
    nodes: PositiveInt | None = Field(None, description="nodes of MaxTRES")
    preempt: Preempt | None = Field(None, description="PreemptMode")


class Site(RecipePart):
    """One cluster."""

    about: str = Field(min_length=1, description="which machine, and where its figures come from")
    partitions: dict[Word, Partition] = Field(min_length=1)
    default_partition: Word
    qos: dict[Word, Qos] = Field({}, description="where jobs choose a QOS rather than a partition")
    default_qos: Word | None = None
    constraint: Word | None = Field(None, description="for recipes without slurm.constraint")
    gpus_by: Literal["gpus-per-node", "gres"] = Field(
        "gpus-per-node", description="the option of sbatch that asks for GPUs"
    )
    options: dict[OptionName, Option] = Field({}, description="further options of sbatch, as slurm.options")
    requeue: bool = Field(True, description="false: jobs may not be put back into the queue; stages become segments")
    needs_account: bool = False
    interface: Value | None = Field(None, description="network that ranks meet over: NCCL_ and GLOO_SOCKET_IFNAME")
    stage_in_dir: Value | None = Field(None, pattern="^/", description="a folder on each node's own disk")
    modules: tuple[Value, ...] = ()
    setup: tuple[Value, ...] = Field((), description="bash commands of each job, before those of slurm.setup")
    environment: dict[Variable, Value] = Field({})
    container: Container | None = Field(None, description="for recipes without slurm.container")

    _options = field_validator("options")(leave_the_chain_its_options)

    @model_validator(mode="after")
    def _defaults_are_there(self) -> Self:
        if self.default_partition not in self.partitions:
            raise ValueError(
                f"default_partition is {self.default_partition!r}, which is not one of its partitions. "
                + nearest(self.default_partition, self.partitions)
            )
        if self.default_qos is not None and self.default_qos not in self.qos:
            raise ValueError(
                f"default_qos is {self.default_qos!r}, which is not one of its qos. "
                + nearest(self.default_qos, self.qos)
            )
        return self


@dataclass(frozen=True)
class Resources:
    """What one job requests. None: Slurm's default."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None
    time_min: int
    partition: str | None
    memory_gib: int | None = None  # of a node
    gpu_type: str | None = None
    device: str | None = None  # what `livt plan` calls its GPUs

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


def load_site(name: str, *, folder: Path | None = None) -> Site:
    """The profile NAME, or the one at a path (with a slash or .yaml). Raises UsageError: what is wrong and where."""
    folder = folder or shipped("slurm/sites")
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.exists():
        known = [p.stem for p in folder.glob("*.yaml")]
        raise UsageError(f"there is no site profile {path}", remedy=nearest(name, known) if known else "")
    return validated(read_file(path, "profile", what="site profile"), path, Site)


def with_site(slurm: Slurm, site: Site | None) -> Slurm:
    """`slurm` with what the profile has for a field that it leaves open. Raises UsageError where they do not fit."""
    if site is None:
        return slurm
    container = slurm.container or site.container
    if container and slurm.python:
        raise UsageError(
            "slurm.python has no effect: by the site profile, tasks run in a container",
            remedy="set slurm.container.python, with slurm.container.image",
        )
    qos = slurm.qos or site.default_qos
    if site.qos and qos not in site.qos:
        raise UsageError(
            f"slurm.qos is {qos!r}, which the site profile does not have", remedy=nearest(str(qos), site.qos)
        )
    options = {name: value for name, value in {**site.options, **slurm.options}.items() if value is not False}
    constraint = slurm.constraint or site.constraint
    filled = {"qos": qos, "constraint": constraint, "container": container, "options": options}
    return slurm.model_copy(update=filled)


def partition_of(slurm: Slurm, site: Site | None, job: JobKind) -> str | None:
    """The partition of a job: the stage's, the recipe's, the profile's; None: Slurm's own default."""
    own: str | None = getattr(slurm, job).partition
    return own or slurm.partition or (site.default_partition if site else None)


def resources_for(slurm: Slurm, site: Site | None, job: JobKind, *, longest_min: float | None = None) -> Resources:
    """What `job` requests. longest_min: the cluster's limit. Raises UsageError for what the profile does not offer.

    The evaluation has one task: one GPU, and the share of a node's memory that comes with it.
    """
    name = partition_of(slurm, site, job)
    if site and name not in site.partitions:
        raise UsageError(
            f"slurm.partition is {name!r}, which the site profile does not have",
            remedy=nearest(str(name), site.partitions),
        )
    offer = site.partitions[str(name)] if site else None
    qos = site.qos.get(slurm.qos) if site and slurm.qos else None
    gpu_type, gpus = _gpus_of_node(slurm, offer)
    tasks, cpus, memory = slurm.tasks_per_node or gpus or 1, slurm.cpus_per_task, slurm.memory_gib
    if cpus is None and offer and offer.cpus_per_node:
        cpus = max(_share(offer.cpus_per_node, gpus, offer.gpus_per_node) // tasks, 1)
    nodes = 1
    if job in STAGES:
        nodes = getattr(slurm, job).nodes or slurm.nodes
        time_min = getattr(slurm, job).time_min or slurm.time_min
    else:
        memory = math.ceil(memory / (gpus or tasks)) if memory else None
        gpus, tasks, time_min = min(gpus, 1), 1, slurm.evaluate.time_min
    limits = [limit for limit in (longest_min, offer and offer.time_min, qos and qos.time_min) if limit]
    time_min = time_min or math.floor(min(limits, default=UNLIMITED_MIN))
    device = (offer.device if offer else None) or gpu_type
    asked = Resources(nodes, tasks, gpus, cpus, time_min, name, memory, gpu_type, device)
    if offer:
        _check_offered(asked, offer, job, slurm, where=f"partition {name}")
    if qos:
        _check_offered(asked, qos, job, slurm, where=f"QOS {slurm.qos}")
    return asked


def _share(cpus: int, gpus: int, of: int) -> int:
    """The cores that come with some of a node's GPUs: the others may be another job's."""
    return cpus * gpus // of if 0 < gpus < of else cpus


def _gpus_of_node(slurm: Slurm, offer: Partition | None) -> tuple[str | None, int]:
    """(type, number) of a node's GPUs, by recipe, then slurm.options.gres, then profile."""
    kind, number = _gres(slurm.options)[0] or (None, None)
    if number is not None and slurm.gpus_per_node not in (None, number):
        raise UsageError(
            f"slurm.options.gres asks for {number} GPUs a node, and slurm.gpus_per_node is {slurm.gpus_per_node}",
            remedy="leave the number out of gres: gpu:TYPE",
        )
    offered = offer.gpus_per_node if offer else 0
    gpus = next((n for n in (slurm.gpus_per_node, number) if n is not None), offered)
    return kind or (offer.gpu_type if offer else None), gpus


def _gres(options: Mapping[str, Option]) -> tuple[tuple[str | None, int | None] | None, list[str]]:
    """The option gres, "gpu:a100:4,ssd:1": type and number of its GPUs, each None if not there; the other entries."""
    gpu, others = None, []
    for entry in filter(None, str(options.get("gres") or "").split(",")):
        name, *more = entry.split(":")
        if name == "gpu":
            number = int(more.pop()) if more and more[-1].isdecimal() else None
            gpu = (more[0] if more else None, number)
        else:
            others.append(entry)
    return gpu, others


def gpu_options(asked: Resources, options: Mapping[str, Option], site: Site | None) -> dict[str, str]:
    """The options of sbatch that ask for GPUs and other generic resources: gpus-per-node or gres."""
    gpu, gres = _gres(options)
    found = {}
    if asked.gpus_per_node:
        number = f"{asked.gpu_type}:{asked.gpus_per_node}" if asked.gpu_type else f"{asked.gpus_per_node}"
        if gpu is not None or (site is not None and site.gpus_by == "gres"):
            gres.append(f"gpu:{number}")
        else:
            found["gpus-per-node"] = number
    return {**found, **({"gres": ",".join(gres)} if gres else {})}


def field_of_time(slurm: Slurm, job: JobKind) -> str:
    """The field with the time limit of `job`."""
    own = job == "evaluate" or getattr(slurm, job).time_min
    return f"slurm.{job}.time_min" if own else "slurm.time_min"


def _check_offered(asked: Resources, offer: Partition | Qos, job: JobKind, slurm: Slurm, *, where: str) -> None:
    nodes = "nodes" if job == "evaluate" or not getattr(slurm, job).nodes else f"{job}.nodes"
    most = {name: getattr(offer, name, None) for name in ("time_min", "nodes", "gpus_per_node", "cpus_per_node")}
    for name, wanted, field in (
        ("time_min", asked.time_min, field_of_time(slurm, job)),
        ("nodes", asked.nodes, f"slurm.{nodes}"),
        ("gpus_per_node", asked.gpus_per_node, "slurm.gpus_per_node"),
        ("cpus_per_node", asked.tasks_per_node * (asked.cpus_per_task or 0), "slurm.cpus_per_task"),
    ):
        limit = most[name]
        if limit is not None and wanted > limit:
            what = "CPUs of a node" if name == "cpus_per_node" else name
            raise UsageError(
                f"{job}: {what} would be {wanted}; the site profile's {where} has at most {limit}",
                remedy=f"lower {field}, or take another partition",
            )
