"""Which jobs a run needs, and in what order: decided by pure functions, before anything is submitted.

    requeue     pretrain ──afterok──> finetune ──afterok──> evaluate          one job a stage, put back on exit 85
    segments    pretrain-1 ──afterany──> pretrain-2 ──afterok──> finetune-1 …  a stopped stage continues in the next

A segment waits for the end of the one before it, however that ended: preempted by cancelling, a lost node and the time
limit are not "ok" to Slurm. Each segment of a stage also waits for the last one of the stage before (afterok). Whether
the stage continues is decided by the run's own record: where a segment has failed, the next ones end immediately and
later stages are never started. A stage that is done is not in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from livt_scale.config.recipe import Recipe, Stage
from livt_scale.config.slurm import Slurm
from livt_scale.slurm.facts import ClusterFacts, PartitionFacts, QosFacts
from livt_scale.slurm.planned_time import PlannedTime
from livt_scale.slurm.script import JobPlan
from livt_scale.slurm.sites import JobKind, Resources, Site, field_of_time, partition_of, resources_for
from livt_scale.slurm.step_times import Measured
from livt_scale.train.preempt import lead
from livt_scale.util.errors import UsageError, nearest

Mode = Literal["requeue", "segments"]
Planner = Callable[[Recipe, Stage, Resources], PlannedTime | None]
SIGNAL_EARLY_S = 60  # sbatch's --signal: "the signal may be sent up to 60 seconds earlier than specified"
MAX_SEGMENTS = 100  # more is a mistake in the step time or the limit, not a plan
SPARE_SEGMENTS = 1  # where their number is an estimate: one that finds nothing to do ends in seconds
MIN_SEGMENTS = 2  # of what is not given: one preemption must not end the chain


@dataclass
class ChainPlan:
    """The jobs in their order, and notes for the user before they are submitted."""

    mode: Mode
    why: str  # this mode
    jobs: list[JobPlan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def dependencies(jobs: Sequence[JobPlan], number: int) -> list[tuple[str, int]]:
    """(kind, number of the job) that job `number` waits for: all of them."""
    first = next(k for k, job in enumerate(jobs) if job.job == jobs[number].job)
    waits = [("afterok", first - 1)] if first else []
    return [*waits, ("afterany", number - 1)] if number > first else waits


def array_dependencies(jobs: Sequence[JobPlan], number: int) -> list[tuple[str, int]]:
    """The same for arrays: an element waits for its own one in the stage before, but for all of the segment before.

    Slurm has "aftercorr" for the elements of jobs that end well, and nothing of the kind for "afterany".
    """
    return [("aftercorr" if kind == "afterok" else kind, other) for kind, other in dependencies(jobs, number)]


def plan_chain(
    recipe: Recipe,
    site: Site | None,
    facts: ClusterFacts | None,
    measured: Mapping[Stage, Measured],
    *,
    exported: bool = False,
    planned: Planner | None = None,
) -> ChainPlan:
    """What to submit for `recipe`. Raises UsageError for what cannot run, or would make no progress.

    exported: the run's classifier is exported, and evaluated, already. planned: what is asked for the time of a stage
    that neither the recipe nor the run knows.
    """
    slurm = recipe.slurm
    stages = [stage for stage in recipe.stage_names if not measured[stage].done]
    evaluates = recipe.stages.finetune is not None and not (exported and not stages)
    jobs: list[JobKind] = [*stages, *(["evaluate"] if evaluates else [])]  # type: ignore[list-item]
    resources = {job: _resources(slurm, site, facts, job) for job in jobs}
    mode, why = choose_mode(slurm, site, facts, resources)
    plan = ChainPlan(mode, why)
    plan.notes += [f"{stage} is done already" for stage in recipe.stage_names if measured[stage].done]
    if site is None and slurm.gpus_per_node is None and not any(asked.gpus_per_node for asked in resources.values()):
        plan.notes.append(
            "no GPU is requested: there is no slurm.site that says how many a node has, and no slurm.gpus_per_node "
            "(0, if none is wanted)"
        )
    if facts is not None:
        plan.notes += check_cluster(slurm, site, facts, resources)
    if site and site.needs_account and not slurm.account:
        raise UsageError("slurm.account is not given, and this site needs one", remedy="--set slurm.account=NAME")
    for stage in stages:
        known = measured[stage]
        plan.notes += check_times(slurm, stage, resources[stage], known)
        guess = planned(recipe, stage, resources[stage]) if planned and not (slurm.step_s or known.step_s) else None
        if guess is not None:
            known = replace(known, total=known.total or guess.steps, planned_step_s=guess.step_s)
            plan.notes.append(f"{stage}: by livt plan {guess.about}")
        segments = 1
        if mode == "segments":
            segments, how = num_segments(slurm, stage, resources[stage], known)
            plan.notes.append(f"{stage}: {how}")
        elif getattr(slurm, stage).segments is not None:
            plan.notes.append(f"slurm.{stage}.segments has no effect in mode requeue, which is taken because {why}")
        plan.jobs += _jobs(stage, resources[stage], segments, mode)
    if evaluates:
        plan.jobs += _jobs("evaluate", resources["evaluate"], MIN_SEGMENTS, mode)
    return plan


def _resources(slurm: Slurm, site: Site | None, facts: ClusterFacts | None, job: JobKind) -> Resources:
    limit = facts.longest_min(partition_of(slurm, site, job), slurm.qos) if facts else None
    return resources_for(slurm, site, job, longest_min=limit)


def _jobs(job: JobKind, asked: Resources, segments: int, mode: Mode) -> list[JobPlan]:
    if mode == "requeue":
        return [JobPlan(job, asked)]
    made = [JobPlan(job, asked, k, segments, "next") for k in range(1, segments + 1)]
    return [*made[:-1], replace(made[-1], when_stopped="last")]


def choose_mode(
    slurm: Slurm, site: Site | None, facts: ClusterFacts | None, resources: Mapping[JobKind, Resources]
) -> tuple[Mode, str]:
    """How a stage that stopped early continues, and why."""
    if slurm.mode != "auto":
        return slurm.mode, "slurm.mode is set"
    if site is not None and not site.requeue:
        return "segments", "the site profile forbids requeue"
    if facts is not None and facts.preempts_by_qos:
        return _mode_by_qos(slurm, facts)
    by_profile = site.qos[slurm.qos].preempt if facts is None and site and slurm.qos in site.qos else None
    if by_profile == "cancel":
        return "segments", f"QOS {slurm.qos} cancels the jobs that it preempts, by the site profile"
    for asked in resources.values():
        known = facts.partition(asked.partition) if facts else None
        offered = site.partitions.get(str(asked.partition)) if site else None
        preempt = known.preempt if known else offered.preempt if offered else "off"
        if preempt == "cancel":
            name = known.name if known else asked.partition
            return "segments", f"partition {name} cancels the jobs that it preempts (PreemptMode=CANCEL)"
    return "requeue", "no partition of the chain cancels what it preempts"


def _mode_by_qos(slurm: Slurm, facts: ClusterFacts) -> tuple[Mode, str]:
    """With PreemptType=preempt/qos the job's QOS decides; where it has no mode, the cluster's PreemptMode."""
    qos = facts.qos.get(slurm.qos) if slurm.qos else None
    own = qos.preempt if qos else None
    of = f"QOS {slurm.qos}" if own else "this cluster, whose QOS decide,"
    if (own or facts.preempt) == "cancel":
        return "segments", f"{of} cancels the jobs that it preempts (PreemptMode=CANCEL)"
    return "requeue", f"{of} does not cancel what it preempts"


def check_cluster(
    slurm: Slurm, site: Site | None, facts: ClusterFacts, resources: Mapping[JobKind, Resources]
) -> list[str]:
    """Compare the request with what the controller reports. Raises UsageError; returns notes on what is unusual."""
    notes = []
    for job, asked in resources.items():
        if asked.partition is not None and asked.partition not in facts.partitions:
            raise UsageError(
                f"{job}: there is no partition {asked.partition!r} on this cluster",
                remedy=nearest(asked.partition, facts.partitions),
            )
        known = facts.partition(asked.partition)
        if known is None:
            raise UsageError(f"{job}: this cluster has no default partition", remedy="set slurm.partition")
        _check_limits(slurm, facts, job, asked, known)
        if not known.up:
            notes.append(f"partition {known.name} is not up: {job} will wait until it is")
    if slurm.account and facts.accounts is not None and slurm.account not in facts.accounts:
        raise UsageError(
            f"slurm.account is {slurm.account!r}, which you cannot charge here",
            remedy=nearest(slurm.account, facts.accounts),
        )
    if slurm.qos and facts.qos and slurm.qos not in facts.qos:
        raise UsageError(
            f"slurm.qos is {slurm.qos!r}, which this cluster does not have", remedy=nearest(slurm.qos, facts.qos)
        )
    if facts.preempts_by_qos and not slurm.qos and any(qos.preempt == "cancel" for qos in facts.qos.values()):
        notes.append("jobs are preempted by QOS here, some of which cancel, and slurm.qos does not say which is yours")
    return [*notes, *(profile_differs(site, facts) if site else [])]


def _check_limits(slurm: Slurm, facts: ClusterFacts, job: JobKind, asked: Resources, known: PartitionFacts) -> None:
    """Refuse what Slurm would take and never start: more nodes or time than partition and QOS have."""
    qos, of_qos = facts.qos.get(slurm.qos or "", QosFacts()), f"QOS {slurm.qos}"
    for longest, where in ((known.time_min, known.limits), (qos.time_min, of_qos)):
        if longest is not None and asked.time_min > longest:
            raise UsageError(
                f"{job}: {field_of_time(slurm, job)} is {asked.time_min}, and {longest:.0f} is allowed ({where})",
                remedy=f"--set {field_of_time(slurm, job)}={math.floor(longest)}",
            )
    for most, where in ((known.nodes, known.limits), (known.total_nodes, known.limits), (qos.nodes, of_qos)):
        if most is not None and asked.nodes > most:
            own = job != "evaluate" and getattr(slurm, job).nodes
            field = f"slurm.{job}.nodes" if own else "slurm.nodes"
            raise UsageError(
                f"{job}: {field} is {asked.nodes}, and {most} is the most ({where})", remedy=f"--set {field}={most}"
            )


def profile_differs(site: Site, facts: ClusterFacts) -> list[str]:
    """Notes where a site profile and the controller differ."""
    notes = []
    for name, offer in site.partitions.items():
        known = facts.partitions.get(name)
        if known is None:
            notes.append(f"the site profile has a partition {name}, and this cluster does not")
            continue
        for what, profile, cluster in (
            ("time_min", offer.time_min, None if known.time_min is None else math.floor(known.time_min)),
            ("preempt", offer.preempt, known.preempt),
            ("nodes", offer.nodes, known.nodes),
        ):
            if cluster is not None and profile is not None and profile != cluster:
                notes.append(f"partition {name}: the site profile has {what} {profile}, the cluster {cluster}")
    return notes


def check_times(slurm: Slurm, stage: Stage, asked: Resources, known: Measured) -> list[str]:
    """Is the lead long enough for a save, and a job for some progress? Raises UsageError; returns what is not known."""
    step_s = slurm.step_s or known.longest_step_s
    save_s = slurm.save_s or known.save_s
    needed = 2 * ((step_s or 0) + (save_s or 0))
    if slurm.signal_lead_s < needed:
        raise UsageError(
            f"slurm.signal_lead_s is {slurm.signal_lead_s}, less than twice a step of "
            f"{step_s or 0:.1f} s and a save of {save_s or 0:.1f} s of {stage}: a job could be "
            "ended in the middle of its last save",
            remedy=f"--set slurm.signal_lead_s={math.ceil(needed)}",
        )
    useful_s(slurm, stage, asked, known)
    unknown = [name for name, value in (("step", step_s), ("save", save_s)) if value is None]
    if unknown:
        return [
            f"{stage}: how long a {' and a '.join(unknown)} takes is not known yet, so it is not "
            f"checked against signal_lead_s = {slurm.signal_lead_s}; "
            f"{' and '.join(f'slurm.{name}_s' for name in unknown)} would say"
        ]
    return []


def end_s(slurm: Slurm, known: Measured) -> float:
    """How long before its time limit a job may stop training: by Slurm's signal, or by the run's own clock."""
    turn_s = slurm.step_s or known.longest_step_s or 0.0
    return max(slurm.signal_lead_s + SIGNAL_EARLY_S, lead(turn_s=turn_s, save_s=slurm.save_s or known.save_s))


def useful_s(slurm: Slurm, stage: Stage, asked: Resources, known: Measured) -> float:
    """How long each job trains. Raises UsageError where that is not a step and a save."""
    left_s = asked.time_min * 60 - slurm.start_s - end_s(slurm, known)
    step_s, save_s = slurm.step_s or known.longest_step_s or 0, slurm.save_s or known.save_s or 0
    if left_s <= step_s + save_s:
        least_s = slurm.start_s + end_s(slurm, known) + step_s + save_s
        raise UsageError(
            f"{stage}: a job of {asked.time_min} min makes no progress: {slurm.start_s:.0f} s to start, a step and a "
            f"save, and being stopped {end_s(slurm, known):.0f} s before its end take {least_s:.0f} s",
            remedy=f"ask for more than {math.ceil(least_s / 60)} min, or shorten slurm.signal_lead_s or slurm.start_s",
        )
    return left_s


def num_segments(slurm: Slurm, stage: Stage, asked: Resources, known: Measured) -> tuple[int, str]:
    """How many jobs the rest of a stage takes, and where the number is from."""
    given: int | None = getattr(slurm, stage).segments
    if given is not None:
        return given, f"{given} segments, by slurm.{stage}.segments"
    step_s = slurm.step_s or known.step_s or known.planned_step_s
    if step_s is None or known.total is None:
        what = "a step's time" if step_s is None else "the number of steps"
        how = f"{MIN_SEGMENTS} segments, because {what} is not known: set slurm.{stage}.segments, or slurm.step_s"
        return MIN_SEGMENTS, how
    measured = slurm.step_s is None and known.world_size is not None
    source = "slurm.step_s" if slurm.step_s else "measured" if known.step_s else "planned, at the high end"
    if measured and known.world_size is not None:
        step_s *= known.world_size / asked.world_size
    left = max(known.total - known.step, 0)
    trains_s = useful_s(slurm, stage, asked, known)
    count = max(math.ceil(left * step_s / trains_s) + SPARE_SEGMENTS, MIN_SEGMENTS)
    how = (
        f"{count} segments = {left} steps · {step_s:.3g} s ({source}) / "
        f"{trains_s:.0f} s that train in each job of {asked.time_min} min, and {SPARE_SEGMENTS} to spare"
    )
    if count > MAX_SEGMENTS:
        raise UsageError(f"{stage}: {how}: more than {MAX_SEGMENTS}", remedy="ask for longer jobs or more nodes")
    return count, how
