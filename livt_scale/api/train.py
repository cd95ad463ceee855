"""`livt.train`: a recipe from file to results, in this process; `livt train` is a client of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Stage
from livt_scale.util.errors import UsageError

if TYPE_CHECKING:
    from livt_scale.train.loop import Hook


def train(
    recipe: str | Path,
    *,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    stage: Stage | None = None,
    allow: Sequence[str] = (),
    hooks: Sequence[Hook] = (),
) -> Path:
    """Train `recipe`, or resume it where its run directory stopped. Returns the run directory.

    recipe: the path of a recipe file, or "livt:NAME" for one that ships. overrides: values by dotted name, as
    {"seed": 1, "stages.finetune.epochs": 5}, or texts "a.b=c" as of --set. stage: "pretrain" or "finetune"; None: every
    unfinished one. allow: fields that may have changed in mid-stage. hooks: objects of `livt_scale.train.loop.Hook`,
    called after the built-in ones.

    Under torchrun or srun every rank calls it. Progress goes to `logging` (loggers livt_scale.*). Raises RecipeError
    and UsageError before anything is allocated or written, Preempted if a signal stopped it (it is saved: call it
    again), else DataError, RunError or CheckpointError.
    """
    loaded = load_recipe(recipe, sets=overrides, to_start=True)
    import torch  # takes seconds: after the recipe is known to be valid

    from livt_scale.train import run

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise UsageError(
            "torch.distributed has a process group already, and training makes its own",
            remedy="call livt.train before init_process_group, or after destroy_process_group",
        )
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    products, trials = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    try:
        run.train(loaded, stage=stage, allow=allow, hooks=hooks)
    finally:  # the recipe sets these for the process (parallel.threads, deterministic, precision; a ResNet's kernels)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.benchmark = trials
    return run.run_dir_of(loaded)
