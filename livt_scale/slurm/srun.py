"""The command of each step of a batch job, as a list of words: srun, a container where the recipe has one, and `livt`.

    srun --kill-on-bad-exit=1 python -P -m livt_scale train RECIPE --stage pretrain

check      `livt doctor --node`, once on each node         stage-in   a copy of the shards, once on each node
train      one task per GPU                                export, eval   one task
clean-up   the copy is removed from each node
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from livt_scale.config.recipe import Recipe
from livt_scale.util.errors import UsageError
from livt_scale.util.urls import is_url

MARK_THEN_EXEC = 'echo started >"$0/${SLURMD_NODENAME:-$(hostname)}.started"; exec "$@"'
GPU_VARIABLES = ("SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_GPUS_PER_NODE")  # set where the job was given GPUs


@dataclass(frozen=True)
class Srun:
    """The commands of one job. code: the folder that its tasks import. Raises UsageError for paths without a mount."""

    recipe: Recipe
    run_dir: Path
    code: Path
    environ: Mapping[str, str]
    stage_in_dir: str | None = None  # where shards are copied to; None: they are read where they are

    @property
    def staged(self) -> str | None:
        """The folder of this job's copy of the shards on each node."""
        return f"{self.stage_in_dir}/livt-shards-{self.environ.get('SLURM_JOB_ID', '0')}" if self.stage_in_dir else None

    def check(self, folder: Path) -> list[str]:
        """Each node writes its finding to folder/NODE; one bad node does not end the check of the others.

        Before that its shell writes folder/NODE.started: where no node has, srun failed, and no node is bad.
        """
        options, container = self._container()
        bounds = ["--kill-on-bad-exit=0", f"--time={self.recipe.slurm.check_min}"]
        mark = ("sh", "-c", MARK_THEN_EXEC, str(folder))
        return [
            *self._on_each_node(),
            *bounds,
            *options,
            *mark,
            *container,
            *self._command("doctor", "--node", str(folder)),
        ]

    def stage_in(self, stage: str, recipe_path: str, sets: Iterable[str]) -> list[str]:
        options, container = self._container()
        command = (*self._python(), "-m", "livt_scale.slurm.stage_in")
        words = (str(self.staged), stage, recipe_path, *set_options(sets))
        return [*self._on_each_node(), *options, *container, *command, *words]

    def train(self, stage: str, recipe_path: str, sets: Iterable[str], *, allow: Iterable[str] = ()) -> list[str]:
        options = [*set_options(sets), *(f"--allow={field}" for field in allow)]
        return [*self._srun(), *self._livt("train", recipe_path, "--stage", stage, *options)]

    def export(self) -> list[str]:
        return [*self._srun("--nodes=1", "--ntasks=1", "--ntasks-per-node=1"), *self._livt("export", str(self.run_dir))]

    def evaluate(self) -> list[str]:
        exported = self.run_dir / "export"
        words = ("eval", str(exported), "--data", str(self.recipe.data.val), "--out", str(exported / "eval.json"))
        return [*self._srun("--nodes=1", "--ntasks=1", "--ntasks-per-node=1"), *self._livt(*words)]

    def clean_up(self) -> list[str]:
        return [*self._on_each_node(), "rm", "-rf", "--", f"{self.staged}", f"{self.staged}.lock"]

    def _srun(self, *options: str) -> list[str]:
        cpus = self.environ.get("SLURM_CPUS_PER_TASK")  # since Slurm 22.05 srun does not take it from the job
        return ["srun", "--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else []), *options]

    def _on_each_node(self) -> list[str]:
        nodes = self.environ.get("SLURM_JOB_NUM_NODES", "1")
        return self._srun(f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1")

    def _livt(self, *words: str) -> list[str]:
        options, container = self._container()
        return [*options, *container, *self._command(*words)]

    def _command(self, *words: str) -> list[str]:
        return [*self._python(), "-m", "livt_scale", *words]

    def _python(self) -> list[str]:
        """The interpreter, and the code that it has to import (`code_snapshot.check_running_code`)."""
        slurm, code = self.recipe.slurm, self.environ.get("LIVT_CODE")
        python = slurm.container.python if slurm.container else slurm.python or sys.executable
        return [*(["env", f"LIVT_CODE={code}"] if code else []), python, "-P"]  # -P: not the current folder

    def _container(self) -> tuple[list[str], list[str]]:
        """(options of srun, words before python)."""
        container = self.recipe.slurm.container
        if container is None:
            return [], []
        wanted = mounts(self.recipe, self.run_dir, self.code, stage_in_dir=self.stage_in_dir)
        if container.by == "pyxis":
            return [f"--container-image={container.image}", f"--container-mounts={','.join(wanted)}"], []
        gpus = ["--nv"] if any(self.environ.get(name) for name in GPU_VARIABLES) else []
        return [], ["apptainer", "exec", *gpus, *(w for m in wanted for w in ("--bind", m)), container.image]


def set_options(sets: Iterable[str]) -> list[str]:
    return [word for value in sets for word in ("--set", value)]


def mounts(recipe: Recipe, run_dir: Path, code: Path, *, stage_in_dir: str | None) -> list[str]:
    """FROM:TO for each folder that a container needs. Raises UsageError for a path that a mount cannot name."""
    if recipe.slurm.container is None:
        return []
    data = (place for place in (recipe.data.train, recipe.data.val) if place and not is_url(place))
    folders = dict.fromkeys((str(run_dir), str(code), *data, *([stage_in_dir] if stage_in_dir else [])))
    for folder in folders:
        if re.search(r"[,:\n\"'\\]", folder):
            raise UsageError(
                f"{folder!r} cannot be mounted in a container: a mount cannot name commas, colons, quotes, backslashes "
                "or newlines",
                remedy="rename the folder, or run without a container",
            )
    return [*(f"{folder}:{folder}" for folder in folders), *recipe.slurm.container.mounts]
