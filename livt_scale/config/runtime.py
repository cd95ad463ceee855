"""How a run's work is distributed, saved and logged. Nothing here changes what is learnt."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from livt_scale.config.capabilities import StrategyName, choices, supports

MAX_PROFILED_STEPS = 20


class RecipePart(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Parallel(RecipePart):
    """How the work is distributed. The launcher sets the number of processes, never the recipe."""

    strategy: Literal["auto", StrategyName] = Field(
        "auto", description="auto: ddp where weights, gradients and moments fit half of a device's memory, else fsdp"
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="of matrix products; weights and moments stay fp32. fp16: with a dynamic loss scale"
    )
    shard_within: Literal["all", "node"] = Field(
        "all", description="fsdp: shards over all ranks, or within each node with a copy on every node (hybrid)"
    )
    offload: Literal["none", "cpu"] = Field(
        "none", description="where sharded states are kept: on the device, or in its host's memory"
    )
    activation_checkpointing: bool = Field(
        False, description="keep each block's input alone and compute the block again in the backward pass"
    )
    compile: bool = Field(False, description="torch.compile, block by block; needs a C compiler on the nodes")
    adamw: Literal["fused", "foreach"] = Field("fused", description="which of torch's implementations")
    threads: PositiveInt | None = Field(
        None, description="CPU threads that a process computes with; None: torch's choice (OMP_NUM_THREADS)"
    )
    deterministic: bool = Field(
        False,
        description="only kernels that repeat bit for bit; on GPUs slower, on CPUs those of this project do anyway",
    )
    timeout_s: PositiveInt = Field(600, description="a collective that waits longer than this ends the run")

    @model_validator(mode="after")
    def _offload_has_an_effect(self) -> Self:
        if self.offload != "none" and not supports(self.strategy, "offload"):
            raise ValueError(
                f"offload has no effect on strategy {self.strategy!r}: "
                f"set strategy to {choices('offload')}, or remove offload"
            )
        if self.offload == "cpu" and self.strategy == "fsdp" and self.precision == "fp16":
            raise ValueError(
                "offload 'cpu' and precision 'fp16' do not go together under fsdp: gradients may still be on their "
                "way to the host when the loss scaler looks for infinities. Set precision to bf16, or strategy to zero2"
            )
        if self.shard_within == "node" and not supports(self.strategy, "hybrid"):
            raise ValueError(
                f"shard_within 'node' has no effect on strategy {self.strategy!r}: "
                f"set strategy to {choices('hybrid')}, or remove shard_within"
            )
        return self


class Checkpoint(RecipePart):
    """When to save, and what to keep. The end of a stage is always saved and never pruned."""

    every_steps: PositiveInt | None = Field(None, description="None: at the end of every epoch")
    mode: Literal["async", "sync"] = Field("async", description="async: written while training continues")
    keep_last: PositiveInt = 2
    keep_every_epochs: PositiveInt | None = Field(None, description="also keep each nth epoch's; None: none")
    keep_best: bool = Field(True, description="also keep the one with the best evaluation (fine-tuning)")
    retries: NonNegativeInt = Field(1, description="a failed save is tried again so often, from the copy in memory")
    max_failed_saves: PositiveInt = Field(
        3,
        description="failed saves in a row that end the run; fewer are logged. The last of a stage always does",
    )
    max_unsaved_min: PositiveFloat | None = Field(
        None, description="a failed save also ends the run if nothing was saved for this time; None: no limit"
    )
    local_dir: str | None = Field(
        None, pattern="^/", description="a folder on each node's own disk, for quick saves between the shared ones"
    )
    local_every_steps: PositiveInt | None = Field(None, description="steps a quick save on the nodes; with local_dir")

    @model_validator(mode="after")
    def _quick_saves_have_a_place(self) -> Self:
        if (self.local_dir is None) != (self.local_every_steps is None):
            raise ValueError("local_dir and local_every_steps go together: give both or neither")
        if self.local_every_steps and self.every_steps and self.local_every_steps >= self.every_steps:
            raise ValueError(
                f"local_every_steps is {self.local_every_steps}, not below every_steps = {self.every_steps}: "
                "the shared saves would leave it nothing to do"
            )
        return self


class Faults(RecipePart):
    """What a run does about faults. These settings do not change what a run without faults learns.

    So all of them may change when a run is resumed: a run that ended with a loss of nan can be restarted with `skip`.
    The skipped steps are in the facts of every later checkpoint.
    """

    on_non_finite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="loss or gradient is nan or infinite. skip: the step has no update; rollback: weights and moments "
        "become those of the last checkpoint again, and the steps since then are stepped over",
    )
    on_spike: Literal["none", "warn", "skip", "rollback"] = Field(
        "warn", description="the loss is far above those before it; decided before the update"
    )
    spike_window: int = Field(100, ge=10, description="losses before it that a loss is compared with; fewer: no spike")
    spike_deviations: PositiveFloat = Field(
        10, description="how far above their median: 1.4826 times the median distance from it, at least 1 % of it"
    )
    most_in_a_row: PositiveInt = Field(
        5, description="steps skipped one after the other, or rollbacks between two checkpoints; one more ends the run"
    )
    stall_timeout_s: PositiveFloat | None = Field(
        None,
        description="a rank that ends no step for this time writes its stacks and ends; six times that for the start, "
        "the first step, evaluation and saving. None: 0.9 · parallel.timeout_s",
    )
    heartbeat_s: PositiveFloat = Field(5, description="how often each rank writes how far it is")
    digest_every_steps: PositiveInt | None = Field(
        None, description="compare what all ranks hold alike (weights, moments) bit for bit; None: never"
    )


class Log(RecipePart):
    """What is written during a run."""

    every_steps: PositiveInt = Field(20, description="steps a line of metrics.jsonl")
    tensorboard: bool = True
    trackers: tuple[Literal["wandb", "mlflow"], ...] = Field(
        (), description="besides TensorBoard; each needs its package, as pip install wandb"
    )
    tracker_project: str = Field("livt", min_length=1, description="wandb's project, mlflow's experiment")
    layer_groups: bool = Field(
        False, description="in each line, norms of gradient, weights and update by layer; not with zero1 to zero3"
    )
    peak_tflops: PositiveFloat | None = Field(
        None, description="of one device, for mfu; None: a known GPU's data sheet, else mfu is null"
    )
    profile_steps: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="first and last step of a stage, from 1, that torch.profiler traces; None: none"
    )
    profile_ranks: Literal["main", "all"] = Field("main", description="which ranks write a trace")
    num_reconstructions: NonNegativeInt = Field(8, description="images in the pretraining's picture, each save")

    @model_validator(mode="after")
    def _profile_is_short(self) -> Self:
        if self.profile_steps is None:
            if self.profile_ranks != "main":
                raise ValueError("profile_ranks has no effect without profile_steps: leave it out")
            return self
        first, last = self.profile_steps
        if not first <= last < first + MAX_PROFILED_STEPS:
            raise ValueError(
                f"profile_steps is [{first}, {last}]: give the first and the last step, at most "
                f"{MAX_PROFILED_STEPS} of them; a trace of more is too large to open"
            )
        return self

    @model_validator(mode="after")
    def _trackers_have_an_effect(self) -> Self:
        if len(set(self.trackers)) < len(self.trackers):
            raise ValueError(f"trackers is {list(self.trackers)}: name each once")
        if self.tracker_project != "livt" and not self.trackers:
            raise ValueError("tracker_project has no effect without trackers: leave it out")
        return self
