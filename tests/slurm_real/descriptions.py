"""What a test cluster is like: its nodes, its partitions, and the settings in which real clusters differ.

    UNEVEN.slurm_conf(folder, host, ports)     the text of its slurm.conf

TWO_NODES   two equal nodes with accounting; partitions that requeue, that cancel, and that are not preempted
UNEVEN      three nodes of 8, 4 and 2 CPUs; what is preempted is cancelled, nothing is requeued; no accounting
LIMITED     what is preempted is requeued; memory is allocated; its partition has a node limit and a time limit

All tests run on TWO_NODES; UNEVEN and LIMITED have tests of their own. Two more have its partitions by name, so that
all tests can run on either of them instead (`LIVT_TEST_CLUSTER`):

UNACCOUNTED   three nodes of two sizes, no accounting, nothing is requeued by default, a long KillWait
CANCELLING    what is preempted is cancelled, on the default partition too; memory is allocated
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

GPUS = 2  # of each node, as it reports
REQUEUE_S = 6  # cred_expire: how long a requeued job waits, and how long a credential holds: enough to start a step

SLURM_CONF = """\
ClusterName=livt
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={requeue_s}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
SlurmctldParameters=preempt_send_user_signal
MinJobAge=3600
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
"""
ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={dbd_port}
AccountingStoragePass={folder}/munge.socket
AccountingStorageEnforce=associations,limits,qos
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=8000 "
    "Gres=gpu:{gpus} Feature=little State=UNKNOWN\n"
)


@dataclass(frozen=True)
class Partition:
    """A partition over all nodes. grace_s: from the first signal of a preemption to its SIGTERM."""

    name: str
    preempt: Literal["OFF", "REQUEUE", "CANCEL"] = "OFF"
    tier: int = 1
    max_time: str = "1-00:00:00"
    max_nodes: int | None = None
    grace_s: int = 0

    @property
    def line(self) -> str:
        words = [f"PartitionName={self.name} Nodes=ALL MaxTime={self.max_time} PriorityTier={self.tier}"]
        words += [f"PreemptMode={self.preempt}"]
        words += [f"GraceTime={self.grace_s}"] if self.grace_s else []
        words += [f"MaxNodes={self.max_nodes}"] if self.max_nodes is not None else []
        return " ".join(words)


@dataclass(frozen=True)
class Description:
    """A cluster. CPUs are those that the nodes report: more than there are, since the steps of most jobs sleep."""

    cpus: tuple[int, ...]  # of each node
    partitions: tuple[Partition, ...]  # the first one is the default
    preempt: Literal["REQUEUE", "CANCEL"]  # PreemptMode of the cluster
    job_requeue: Literal[0, 1]
    kill_wait_s: int  # from SIGTERM to SIGKILL
    accounting: bool
    mem_per_cpu_mb: int | None = None  # DefMemPerCPU; None: memory is not allocated
    first_job: int = 1  # clusters run at the same time, and ranks meet at a port that follows from their job's number

    @property
    def default(self) -> Partition:
        return self.partitions[0]

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(f"livt-n{number}" for number in range(1, len(self.cpus) + 1))

    def slurm_conf(self, folder: Path, host: str, ports: Mapping[str, int]) -> str:
        """The text of slurm.conf. ports: of each node by its name, and of `ctld` and `dbd`."""
        text = SLURM_CONF + (ACCOUNTING if self.accounting else "AccountingStorageType=accounting_storage/none\n")
        fixed = {"folder": folder, "host": host, "requeue_s": REQUEUE_S}
        lines = [text.format(**fixed, ctld_port=ports["ctld"], dbd_port=ports["dbd"]).rstrip("\n")]
        lines += [f"PreemptMode={self.preempt}", f"JobRequeue={self.job_requeue}", f"KillWait={self.kill_wait_s}"]
        lines.append(f"SelectTypeParameters={'CR_CPU' if self.mem_per_cpu_mb is None else 'CR_CPU_Memory'}")
        lines += [f"DefMemPerCPU={self.mem_per_cpu_mb}"] if self.mem_per_cpu_mb is not None else []
        lines.append(f"FirstJobId={self.first_job}")
        nodes = "".join(
            NODE.format(name=name, host=host, port=ports[name], cpus=cpus, gpus=GPUS)
            for name, cpus in zip(self.nodes, self.cpus, strict=True)
        )
        first, *others = self.partitions
        lines += [nodes.rstrip("\n"), f"{first.line} Default=YES", *(partition.line for partition in others)]
        return "\n".join(lines) + "\n"


TWO_NODES = Description(
    cpus=(16, 16),
    partitions=(
        Partition("normal"),
        Partition("spare", preempt="REQUEUE", grace_s=30),
        Partition("scrap", preempt="CANCEL", grace_s=30),
        Partition("urgent", tier=10, max_time="1:00:00"),
    ),
    preempt="REQUEUE",
    job_requeue=1,
    kill_wait_s=5,
    accounting=True,
)
UNEVEN = Description(
    cpus=(8, 4, 2),
    partitions=(Partition("all", preempt="CANCEL"), Partition("urgent", tier=10)),
    preempt="CANCEL",
    job_requeue=0,
    kill_wait_s=5,
    accounting=False,
    first_job=1001,
)
LIMITED = Description(
    cpus=(8, 8),
    partitions=(
        Partition("short", preempt="REQUEUE", max_time="0:20:00", max_nodes=1),
        Partition("urgent", tier=10, max_time="0:10:00", max_nodes=2),
    ),
    preempt="REQUEUE",
    job_requeue=1,
    kill_wait_s=15,
    accounting=True,
    mem_per_cpu_mb=300,
    first_job=2001,
)
UNACCOUNTED = replace(TWO_NODES, cpus=(16, 16, 12), accounting=False, job_requeue=0, kill_wait_s=15, first_job=3001)
CANCELLING = replace(
    TWO_NODES,
    partitions=(Partition("normal", preempt="CANCEL"), *TWO_NODES.partitions[1:]),
    preempt="CANCEL",
    mem_per_cpu_mb=300,
    first_job=4001,
)
FOR_ALL_TESTS = {"two_nodes": TWO_NODES, "unaccounted": UNACCOUNTED, "cancelling": CANCELLING}
CLUSTERS = {**FOR_ALL_TESTS, "uneven": UNEVEN, "limited": LIMITED}
