"""How a run is submitted to Slurm: what each job requests, and how jobs are chained. Does not change what is learnt.

`livt submit` reads it (docs/slurm.md). None values come from the site's profile (slurm/sites/NAME.yaml), or else from
the defaults in `livt_scale.slurm.sites`. Text in an #SBATCH line, where nothing can be quoted, is limited to letters,
digits and a few signs; all other text is quoted and may contain anything.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from livt_scale.config.runtime import RecipePart

# one word of an #SBATCH line: no space, quote, #, backslash or control character
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:&|*()\[\]@/=+-]+$", max_length=200)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Value = Annotated[str, Field(pattern=r"^[^\x00]*$")]  # of anything but NUL, which no process can be given
OptionName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]+$", max_length=60)]  # a long option of sbatch, without --
Option = bool | int | Word  # true: the option has no value; false: leave out the one of the site's profile

# options of sbatch that the chain itself needs, and who decides them
CHAIN_OPTIONS = {
    "account": "slurm.account",
    "array": "livt submit RECIPE RECIPE …",
    "chdir": "run_dir",
    "clusters": "SLURM_CLUSTERS, which all commands of Slurm follow,",
    "comment": "the chain, whose jobs are found by it,",
    "constraint": "slurm.constraint",
    "container": "slurm.container",
    "cpus-per-gpu": "slurm.cpus_per_task",
    "cpus-per-task": "slurm.cpus_per_task",
    "dependency": "the chain, whose jobs wait for each other,",
    "error": "the chain, whose logs are in RUN/slurm/logs,",
    "exclude": "slurm.exclude",
    "export": "slurm.environment",
    "export-file": "slurm.environment",
    "gpus": "slurm.gpus_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "gpus-per-socket": "slurm.gpus_per_node",
    "gpus-per-task": "slurm.gpus_per_node",
    "job-name": "name",
    "kill-on-invalid-dep": "the chain, whose jobs wait for each other,",
    "mem": "slurm.memory_gib",
    "no-kill": "the chain, which restarts a job that lost a node,",
    "no-requeue": "slurm.mode",
    "nodes": "slurm.nodes",
    "ntasks": "slurm.tasks_per_node",
    "ntasks-per-core": "slurm.tasks_per_node",
    "ntasks-per-gpu": "slurm.tasks_per_node",
    "ntasks-per-node": "slurm.tasks_per_node",
    "ntasks-per-socket": "slurm.tasks_per_node",
    "open-mode": "the chain, whose logs are in RUN/slurm/logs,",
    "output": "the chain, whose logs are in RUN/slurm/logs,",
    "parsable": "the chain, which reads sbatch's answer,",
    "partition": "slurm.partition",
    "qos": "slurm.qos",
    "requeue": "slurm.mode",
    "signal": "slurm.signal_lead_s",
    "test-only": "livt submit --dry-run",
    "time": "slurm.time_min",
    "time-min": "slurm.time_min",
    "tres-per-task": "slurm.gpus_per_node",
    "wait": "livt submit --wait",
    "wrap": "the chain, which submits its own script,",
}
MEMORY_OPTIONS = ("mem-per-cpu", "mem-per-gpu")  # instead of slurm.memory_gib; sbatch takes one of the three


def leave_the_chain_its_options(options: dict[str, Option]) -> dict[str, Option]:
    """Raise ValueError, naming who decides, for an option that the chain needs, or a beginning, which sbatch takes."""
    for name in options:
        owned = name if name in CHAIN_OPTIONS else next((o for o in CHAIN_OPTIONS if o.startswith(name)), None)
        if owned is not None:
            short = "" if owned == name else f" (sbatch reads it as {owned})"
            raise ValueError(f"{name}{short} cannot be an option here: {CHAIN_OPTIONS[owned]} decides it")
    return options


class SlurmStage(RecipePart):
    """What one stage's jobs ask for, where it differs from the rest."""

    nodes: PositiveInt | None = Field(None, description="None: slurm.nodes")
    time_min: PositiveInt | None = Field(None, description="limit of one job, minutes. None: slurm.time_min")
    partition: Word | None = Field(None, description="None: slurm.partition")
    segments: PositiveInt | None = Field(
        None, description="numbered jobs, by mode segments; None: from the step time and what is left to train"
    )


class SlurmEvaluation(RecipePart):
    """The chain's last job: the evaluation on the data.val set, then the export, in one task."""

    time_min: PositiveInt = Field(60, description="limit of the job, minutes")
    partition: Word | None = Field(None, description="None: slurm.partition")


class Container(RecipePart):
    """Tasks run inside this image; the batch shell itself does not."""

    by: Literal["apptainer", "pyxis"] = Field(description="apptainer exec around each task, or srun --container-image")
    image: Value = Field(min_length=1, description="a .sif or .sqsh file, or what the runtime can pull")
    mounts: tuple[Value, ...] = Field((), description="FROM:TO; the run, the code and local shards come by themselves")
    python: Value = Field("python3", min_length=1, description="inside the image, with what livt_scale needs")


class Slurm(RecipePart):
    """What the jobs of a run request, and how they are chained."""

    site: str | None = Field(
        None, min_length=1, description="a profile: NAME of slurm/sites/NAME.yaml, or the path of one; None: none"
    )
    nodes: PositiveInt = Field(1, description="nodes of each training job")
    gpus_per_node: NonNegativeInt | None = Field(None, description="None: the partition's in the profile, else 0")
    tasks_per_node: PositiveInt | None = Field(None, description="processes a node; None: one a GPU; without GPUs 1")
    cpus_per_task: PositiveInt | None = Field(
        None, description="None: the partition's cores of a node, shared out; without a profile, Slurm's default"
    )
    memory_gib: PositiveInt | None = Field(None, description="of a node; None: the site's default")
    time_min: PositiveInt | None = Field(None, description="limit of one job, minutes; None: the partition's longest")
    partition: Word | None = Field(None, description="None: the profile's, else Slurm's default")
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    exclude: Word | None = Field(None, description="nodes that are not to be used, as Slurm writes them: gpu[03-05]")
    options: dict[OptionName, Option] = Field(
        {},
        description="further options of sbatch by their long names: {reservation: x, exclusive: true, mail-type: FAIL}",
    )
    mode: Literal["auto", "requeue", "segments"] = Field(
        "auto",
        description="requeue: a stage is one job, put back when it stopped early; segments: a stage is several jobs. "
        "auto: segments where the partition's PreemptMode is CANCEL or the profile forbids requeue, else requeue",
    )
    signal_lead_s: PositiveInt = Field(
        300, ge=10, le=65535, description="before its time limit a job gets the signal to save; Slurm may be 60 s early"
    )
    step_s: PositiveFloat | None = Field(None, description="planned seconds of a step; None: measured, else unknown")
    save_s: PositiveFloat | None = Field(None, description="planned seconds of a save; None: measured, else unknown")
    start_s: NonNegativeFloat = Field(120, description="planned seconds from a job's start to its first step")
    max_restarts_without_progress: PositiveInt = Field(
        3,
        description="restarts in a row that find no new checkpoint; one more, and the stage ends with its reason",
    )
    check_nodes: Literal["no", "report", "exclude"] = Field(
        "report",
        description="a quick look at each node before its tasks start. report: a bad one ends the job and is named; "
        "exclude: the job also continues without it",
    )
    check_min: PositiveInt = Field(5, description="a node that has not answered after this many minutes is bad")
    code: Literal["frozen", "checkout"] = Field(
        "frozen",
        description="frozen: package and recipe as they were submitted, kept in RUN/code; checkout: as they lie",
    )
    python: Value | None = Field(None, min_length=1, description="None: the one that runs `livt submit`")
    modules: tuple[Value, ...] = Field((), description="`module load` of each, after those of the profile")
    setup: tuple[Value, ...] = Field(
        (), description="bash commands of the batch script before its steps, after modules and environment"
    )
    environment: dict[Variable, Value] = Field({}, description="set in each job, over those of the profile")
    container: Container | None = Field(None, description="None: the tasks run on the node itself")
    stage_in: bool = Field(
        False, description="copy local shards to each node's own disk first, verified; removed when the job ends"
    )
    stage_in_dir: Value | None = Field(
        None, pattern="^/", description="on each node; None: the profile's, else the node's own $TMPDIR or /tmp"
    )
    pretrain: SlurmStage = SlurmStage()
    finetune: SlurmStage = SlurmStage()
    evaluate: SlurmEvaluation = SlurmEvaluation()

    _options = field_validator("options")(leave_the_chain_its_options)

    @model_validator(mode="after")
    def _each_has_an_effect(self) -> Self:
        if self.stage_in_dir and not self.stage_in:
            raise ValueError("stage_in_dir has no effect without stage_in: leave it out, or set stage_in: true")
        if self.container and self.python:
            raise ValueError("python has no effect beside a container: set container.python")
        if self.check_nodes == "no" and self.check_min != type(self).model_fields["check_min"].default:
            raise ValueError("check_min has no effect on check_nodes 'no': leave it out")
        memory = [name for name in MEMORY_OPTIONS if self.options.get(name)]
        if len(memory) + (self.memory_gib is not None) > 1:
            named = [*(["memory_gib"] if self.memory_gib else []), *(f"options.{name}" for name in memory)]
            raise ValueError(f"{' and '.join(named)} exclude each other: keep one of them")
        given = [name for name in ("pretrain", "finetune") if getattr(self, name).segments is not None]
        if given and self.mode == "requeue":
            raise ValueError(f"{given[0]}.segments has no effect on mode 'requeue': leave it out, or take segments")
        return self
