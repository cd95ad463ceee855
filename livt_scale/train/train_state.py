"""What a stage's checkpoint holds, and how a run resumes from the newest complete one.

Tensors: the model's parameters and AdamW's moments, by plain name, whatever the strategy. Facts, as JSON: the stage,
the recipe, the fields that decide what is learnt, the classes, the sums of the unfinished log interval, fp16's loss
scale, the skipped steps. No random state: everything random is a function of (seed, epoch, sample).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from livt_scale.checkpoint import load
from livt_scale.checkpoint.load import Position, agreed_damages
from livt_scale.checkpoint.manager import Found, Tiers
from livt_scale.checkpoint.manifest import step_name
from livt_scale.config.recipe import Recipe, Stage, digest, learnt_from
from livt_scale.data.classes import TrainingClasses
from livt_scale.data.shard_set import ShardSet
from livt_scale.distributed.strategy import Strategy
from livt_scale.train.anomalies import Anomalies
from livt_scale.train.resume_rules import TEACHER, check_same, data_facts, describe
from livt_scale.util.errors import LivtError, Preempted, SaveFailed

_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Model and optimizer, as a strategy holds them, and the number of steps taken in this stage.

    allow: fields of the recipe that may differ from the checkpoint's. score, is_final: of the newest checkpoint.
    """

    strategy: Strategy
    facts: dict[str, Any]
    step: int = 0
    score: float | None = None
    is_final: bool = False
    sums: dict[str, float] | None = None
    anomalies: Anomalies = field(default_factory=Anomalies)
    allow: tuple[str, ...] = ()

    def save(
        self, saver: Tiers, position: Position, *, score: float | None, final: bool, sums: dict[str, float]
    ) -> None:
        tensors, facts = self._saved(sums)
        saver.save(tensors, position=position, facts=facts, score=score, final=final)
        self.score, self.is_final = score, final

    def save_locally(self, saver: Tiers, position: Position, *, sums: dict[str, float]) -> None:
        tensors, facts = self._saved(sums)
        saver.save_locally(tensors, position=position, facts=facts)

    def resume(self, saver: Tiers) -> str | None:
        """Load the newest checkpoint that all ranks can read. Returns what to log about it; None without a checkpoint.

        A collective call. A damaged checkpoint is named in a warning and the one before it is used. Raises
        CheckpointMismatch if the recipe would learn something else than the checkpoint's, except in fields of `allow`.
        """
        found = saver.newest(self.strategy.state(), on_damage=_warn)
        if found is None:
            return None
        theirs = load.read_manifest(found.path).facts
        changed = saver.world.run_all(lambda: check_same(self.facts, theirs, found.path, allow=self.allow))
        manifest = self._take(found, saver)
        self.step = int(manifest["position"]["step"])
        self.score, self.is_final = manifest["score"], manifest["final"]
        self.sums = manifest["facts"].get("sums")
        self.anomalies.restore(manifest["facts"].get("anomalies"))
        self.facts["run"] = theirs.get("run", theirs["recipe_digest"])
        self._say_other_scores(theirs)
        lines = [describe(change) for change in changed]
        allowed = [*theirs.get("allowed", []), *({"after_step": self.step, "change": line} for line in lines)]
        if allowed:
            self.facts["allowed"] = allowed
        where = f" on the nodes ({found.path.parent})" if found.local else ""
        return f"{found.path.name}{where}" + (f", changed as allowed: {'; '.join(lines)}" if lines else "")

    def _say_other_scores(self, theirs: dict[str, Any]) -> None:
        ours, before = self.facts.get("scored_on"), theirs.get("scored_on")
        if ours and before and ours != before:
            _log.warning(
                "data.val has changed (manifest %s before, %s now): scores on the two sets are not compared; the best "
                "checkpoint is chosen among those from here on",
                before[:12],
                ours[:12],
            )

    def stopped(self, saver: Tiers, *, why: str, total: int) -> LivtError:
        """The error that ends a run that was asked to stop, after its last save: a collective call.

        If that save failed, the steps since the one before are lost, but the run can be requeued, provided that this
        start has saved anything. If it has not, another start would repeat the same steps and end here again.
        """
        saver.wait()
        stopped = f"stopped by {why} after step {self.step} of {total}"
        if saver.durable_step == self.step:
            return Preempted(f"{stopped}; all of it is saved")
        failed = saver.report().get("last_failed_save", "")
        if saver.durable_step is not None:
            return Preempted(
                f"{stopped}, which could not be saved: it will resume from step {saver.durable_step}. {failed}"
            )
        return SaveFailed(
            f"{stopped}, which could not be saved, nor anything since the start: {failed}",
            remedy="when the cause is gone, start the run again; it resumes from where this start began",
        )

    def roll_back(self, saver: Tiers) -> int | None:
        """Load weights, moments and loss scale of the last checkpoint that was due. Returns its number of steps.

        A collective call. If that checkpoint is missing or damaged, the newest complete one is loaded; None without
        one. The position does not change.
        """
        saver.wait()
        due, peers = self.anomalies.due_step, saver.shared.peers
        path = None if due is None else saver.folder / step_name(due)
        if path is None or agreed_damages(path, peers):
            path = load.newest_whole(saver.folder, on_damage=_warn, peers=peers)
        if path is None:
            return None
        manifest = self._take(Found(path, peers), saver)
        self.anomalies.restore_losses(manifest["facts"].get("anomalies"))
        return int(manifest["position"]["step"])

    def _saved(self, sums: dict[str, float]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        facts = {"sums": sums, "scaler": self.strategy.scaler(), "anomalies": self.anomalies.facts()}
        return self.strategy.state(), {**self.facts, **facts}

    def _take(self, found: Found, saver: Tiers) -> dict[str, Any]:
        """Load a checkpoint of which every byte has been verified into the strategy. Returns its manifest."""
        tensors = self.strategy.state()
        manifest = saver.load(found, tensors)
        self.strategy.restored(tensors)
        self.strategy.set_scaler(manifest["facts"].get("scaler"))
        return manifest


def run_facts(
    recipe: Recipe,
    stage: Stage,
    train: ShardSet,
    *,
    strategy: str,
    origin: dict[str, Any] | None,
    teacher: str | None = None,
    scored_on: str | None = None,
) -> dict[str, Any]:
    """What a checkpoint records of the run that wrote it.

    origin: the lineage of its initial weights. teacher: the digest of a teacher's weights. scored_on: the digest of the
    set that scores are of. `run` identifies the run: the digest of what it began to learn from, which later changes
    that are allowed leave as it is.
    """
    learnt = {**learnt_from(recipe, stage), "data.manifest": train.digest}
    if origin is not None:
        learnt["init"] = origin["recipe_digest"]
    if teacher is not None:
        learnt[TEACHER] = teacher
    recipe_digest = digest(learnt)
    return {
        "stage": stage,
        "strategy": strategy,
        "init": origin,
        "recipe": recipe.model_dump(mode="json"),
        "learnt_from": learnt,
        "recipe_digest": recipe_digest,
        "run": recipe_digest,
        "scored_on": scored_on,
        "data": data_facts(train),
        "class_names": list(train.manifest.class_names),
        "class_counts": train.class_counts.tolist(),
        "group_counts": None if stage == "pretrain" else TrainingClasses.of(train, recipe.data).group_counts,
    }


def _warn(path: Path, wrong: list[str]) -> None:
    _log.warning("%s is damaged and not used: %s", path, "; ".join(wrong))
