"""What a cluster offers, by its profile (slurm/sites/NAME.yaml), and the resources that each job of a run asks for.

    site = load_site("h100_infiniband")
    resources_for(recipe.slurm, site, "pretrain")   nodes 4, gpus_per_node 8, tasks_per_node 8, cpus_per_task 12, 24 h

A profile fills what a recipe leaves open; a recipe's own value always wins. Reading one runs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from livt_scale.config.recipe import STAGES, Stage
from livt_scale.config.runtime import RecipePart
from livt_scale.config.slurm import Slurm, Value, Variable, Word
from livt_scale.config.yaml import parse, shown, validated
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
    cpus_per_node: PositiveInt | None = Field(None, description="cores that jobs may have; None: Slurm's default")
    preempt: Preempt = Field("off", description="PreemptMode: what happens to its jobs when others need the nodes")


class Site(RecipePart):
    """One cluster."""

    about: str = Field(min_length=1, description="which machine, and where its figures come from")
    partitions: dict[Word, Partition] = Field(min_length=1)
    default_partition: Word
    requeue: bool = Field(True, description="false: jobs may not be put back into the queue; stages become segments")
    needs_account: bool = False
    interface: Value | None = Field(None, description="network that ranks meet over: NCCL_ and GLOO_SOCKET_IFNAME")
    stage_in_dir: Value | None = Field(None, pattern="^/", description="a folder on each node's own disk")
    modules: tuple[Value, ...] = ()
    environment: dict[Variable, Value] = Field({})


@dataclass(frozen=True)
class Resources:
    """What one job asks for. None: Slurm's default."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int | None
    time_min: int
    partition: str | None

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


def load_site(name: str, *, folder: Path | None = None) -> Site:
    """The profile NAME, or the one at a path (with a slash or .yaml). Raises UsageError: what is wrong and where."""
    folder = folder or shipped("slurm/sites")
    path = Path(name) if "/" in name or name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        known = [p.stem for p in folder.glob("*.yaml")]
        raise UsageError(f"there is no site profile {shown(path)}", remedy=nearest(name, known) if known else "")
    site = validated(parse(path.read_text(encoding="utf-8"), path), path, Site)
    if site.default_partition not in site.partitions:
        raise UsageError(
            f"{shown(path)}: default_partition is {site.default_partition!r}, which is not one of its partitions",
            remedy=nearest(site.default_partition, site.partitions),
        )
    return site


def partition_of(slurm: Slurm, site: Site | None, job: JobKind) -> str | None:
    """The partition of a job: the stage's, the recipe's, the profile's; None: Slurm's own default."""
    own: str | None = getattr(slurm, job).partition
    return own or slurm.partition or (site.default_partition if site else None)


def resources_for(slurm: Slurm, site: Site | None, job: JobKind) -> Resources:
    """What `job` asks for. Raises UsageError for what the profile does not offer."""
    name = partition_of(slurm, site, job)
    if site and name not in site.partitions:
        raise UsageError(
            f"slurm.partition is {name!r}, which the site profile does not have",
            remedy=nearest(str(name), site.partitions),
        )
    offer = site.partitions[str(name)] if site else None
    gpus = slurm.gpus_per_node if slurm.gpus_per_node is not None else offer.gpus_per_node if offer else 0
    tasks = slurm.tasks_per_node or gpus or 1
    cpus = slurm.cpus_per_task
    if cpus is None and offer and offer.cpus_per_node:
        cpus = max(offer.cpus_per_node // tasks, 1)
    nodes = 1
    own_time = slurm.evaluate.time_min if job == "evaluate" else getattr(slurm, job).time_min or slurm.time_min
    if job in STAGES:
        nodes = getattr(slurm, job).nodes or slurm.nodes
    else:
        gpus, tasks = min(gpus, 1), 1
    asked = Resources(nodes, tasks, gpus, cpus, own_time or (offer.time_min if offer else UNLIMITED_MIN), name)
    if offer:
        _check_offered(asked, offer, job)
    return asked


def _check_offered(asked: Resources, offer: Partition, job: Stage | JobKind) -> None:
    for what, wanted, most in (
        ("time_min", asked.time_min, offer.time_min),
        ("nodes", asked.nodes, offer.nodes),
        ("gpus_per_node", asked.gpus_per_node, offer.gpus_per_node),
        ("CPUs of a node", asked.tasks_per_node * (asked.cpus_per_task or 0), offer.cpus_per_node),
    ):
        if most is not None and wanted > most:
            raise UsageError(
                f"{job}: {what} would be {wanted}; the site profile's partition {asked.partition} has at most {most}",
                remedy="ask for less, or take another partition",
            )
