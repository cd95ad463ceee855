"""What a cluster's controller reports: partitions, QOS, accounts, PreemptMode. Read from text by pure functions.

facts = read_facts(config, partitions, accounts, qos=qos)     the outputs of scontrol and sacctmgr
facts.partition("gpu").time_min                               2880.0; None: no limit
facts.longest_min("gpu", "short")                             240.0: the QOS allows less than the partition
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from livt_scale.slurm.sites import Preempt


@dataclass(frozen=True)
class PartitionFacts:
    """One partition, as the controller describes it."""

    name: str
    is_default: bool
    time_min: float | None  # None: no limit
    preempt: Preempt
    nodes: int | None = None  # most of one job; None: no limit
    total_nodes: int | None = None  # that it has; None: not known
    up: bool = True

    @property
    def limits(self) -> str:
        """For a person: "partition gpu: 4 nodes, at most 2 a job, 1440 min"."""
        words = [f"{self.total_nodes} nodes"] if self.total_nodes is not None else []
        words += [f"at most {self.nodes} a job"] if self.nodes is not None else []
        words += ["no time limit" if self.time_min is None else f"{self.time_min:.0f} min"]
        return f"partition {self.name}: {', '.join(words)}"


@dataclass(frozen=True)
class QosFacts:
    """One QOS, as accounting describes it. None: the QOS does not set the limit or the PreemptMode."""

    preempt: Preempt | None = None
    time_min: float | None = None
    nodes: int | None = None


@dataclass(frozen=True)
class ClusterFacts:
    """A cluster, as its controller describes it."""

    partitions: dict[str, PartitionFacts]
    accounts: frozenset[str] | None = None  # that this user may charge; None: not known
    preempts_by_qos: bool = False  # PreemptType=preempt/qos: the partition's PreemptMode is not looked at
    preempt: Preempt = "off"  # the cluster's PreemptMode, for a QOS that does not set one
    qos: dict[str, QosFacts] = field(default_factory=dict)

    def partition(self, name: str | None) -> PartitionFacts | None:
        """The one called `name`, or the default one; None if there is no such partition."""
        if name is not None:
            return self.partitions.get(name)
        return next((p for p in self.partitions.values() if p.is_default), None)

    def longest_min(self, partition: str | None, qos: str | None) -> float | None:
        """What a job may take at most there; None: no limit, or it is not known."""
        known, of_qos = self.partition(partition), self.qos.get(qos) if qos else None
        limits = [limit for each in (known, of_qos) if each is not None and (limit := each.time_min) is not None]
        return min(limits, default=None)


def read_facts(config: str, partitions: str, accounts: frozenset[str] | None, *, qos: str = "") -> ClusterFacts:
    """The facts in the output of `scontrol show config`, `scontrol --oneliner show partition`, `sacctmgr show qos`."""
    found = [_partition(line) for line in partitions.splitlines() if line.startswith("PartitionName=")]
    cluster_wide = re.search(r"^PreemptMode\s*=\s*(\S+)", config, re.MULTILINE)
    return ClusterFacts(
        {p.name: p for p in found},
        accounts=accounts,
        preempts_by_qos=re.search(r"^PreemptType\s*=\s*preempt/qos\b", config, re.MULTILINE) is not None,
        preempt=_preempt(cluster_wide[1]) if cluster_wide else "off",
        qos=dict(_qos(line) for line in qos.splitlines() if "|" in line),
    )


def _preempt(words: str) -> Preempt:
    """What a PreemptMode, "REQUEUE" or "GANG,CANCEL", does to a job that it ends."""
    modes = words.upper().split(",")
    return "cancel" if "CANCEL" in modes else "requeue" if "REQUEUE" in modes else "off"


def _partition(line: str) -> PartitionFacts:
    values = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return PartitionFacts(
        values["PartitionName"],
        is_default=values.get("Default") == "YES",
        time_min=minutes(values.get("MaxTime", "UNLIMITED")),
        preempt=_preempt(values.get("PreemptMode", "OFF")),
        nodes=_whole(values.get("MaxNodes", "")),
        total_nodes=_whole(values.get("TotalNodes", "")),
        up=values.get("State", "UP") == "UP",
    )


def _qos(line: str) -> tuple[str, QosFacts]:
    """A row of QOS_FORMAT; sacctmgr's "cluster" marks a QOS that does not set a PreemptMode."""
    name, mode, wall, tres = [*line.split("|"), "", "", ""][:4]
    nodes = re.search(r"(?:^|,)node=(\d+)", tres)
    preempt = None if mode in ("", "cluster") else _preempt(mode)
    return name, QosFacts(preempt, minutes(wall), int(nodes[1]) if nodes else None)


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def minutes(text: str) -> float | None:
    """A time limit as Slurm writes it, "1-12:00:00" -> 2160; None for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, mins, seconds = (int(group or 0) for group in match.groups())
    return (days * 24 + hours) * 60 + mins + seconds / 60
