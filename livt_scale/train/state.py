"""What a stage's checkpoint holds, and how a run is taken up from the newest whole one.

Tensors: the model's parameters and AdamW's moments, by plain name, whatever the strategy. Facts, as JSON: the stage,
the recipe, the fields that decide what is learnt, the classes, the sums of the unfinished log interval, fp16's loss
scale, the steps that were not taken. Random state: none. All that is random is a function of (seed, epoch, sample).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from livt_scale.checkpoint import store
from livt_scale.checkpoint.folder import agreed_damages
from livt_scale.checkpoint.manifest import step_name
from livt_scale.checkpoint.store import Position, Saver
from livt_scale.data.manifest import ShardSet
from livt_scale.errors import CheckpointMismatch
from livt_scale.parallel.strategy import Strategy
from livt_scale.recipe import Recipe, Stage, digest, learnt_from
from livt_scale.train.anomalies import Anomalies


@dataclass
class TrainState:
    """Model and optimizer, as a strategy holds them, and how many steps of the stage they have behind them."""

    strategy: Strategy
    facts: dict[str, Any]
    step: int = 0
    sums: dict[str, float] | None = None
    anomalies: Anomalies = field(default_factory=Anomalies)

    def save(
        self, saver: Saver, position: Position, *, score: float | None, final: bool, sums: dict[str, float]
    ) -> None:
        saver.save(
            self.strategy.state(),
            position=position,
            facts={
                **self.facts,
                "sums": sums,
                "scaler": self.strategy.scaler(),
                "anomalies": self.anomalies.facts(),
            },
            score=score,
            final=final,
        )

    def resume(self, saver: Saver) -> str | None:
        """Go on from the newest whole checkpoint of `saver`'s folder: its name, or None where there is none.

        A collective call. A damaged one is named on stderr, and the one before it taken. Raises CheckpointMismatch
        where the recipe learns something else than the checkpoint's did.
        """
        path = store.newest_whole(saver.folder, on_damage=_warn, peers=saver.peers)
        if path is None:
            return None
        saver.peers.all_do(lambda: _check_same(self.facts, store.read_manifest(path).facts, path))
        manifest = self._take(path, saver)
        self.step = int(manifest["position"]["step"])
        self.sums = manifest["facts"]["sums"]
        self.anomalies.restore(manifest["facts"].get("anomalies"))
        return path.name

    def roll_back(self, saver: Saver) -> int | None:
        """Weights, moments and loss scale as the last checkpoint that was due has them, and how many steps that had.

        A collective call. Where that checkpoint is no longer there or is damaged, the newest whole one; None where
        there is none. The position stays.
        """
        saver.wait()
        due = self.anomalies.due_step
        path = None if due is None else saver.folder / step_name(due)
        if path is None or agreed_damages(path, saver.peers):
            path = store.newest_whole(saver.folder, on_damage=_warn, peers=saver.peers)
        if path is None:
            return None
        manifest = self._take(path, saver)
        self.anomalies.restore_losses(manifest["facts"].get("anomalies"))
        return int(manifest["position"]["step"])

    def _take(self, path: Path, saver: Saver) -> dict[str, Any]:
        """Fill the strategy from a checkpoint of which every byte has been read; its manifest."""
        tensors = self.strategy.state()
        manifest = store.load(path, tensors, check=False, peers=saver.peers)
        self.strategy.restored(tensors)
        self.strategy.set_scaler(manifest["facts"].get("scaler"))
        return manifest


def run_facts(
    recipe: Recipe, stage: Stage, train: ShardSet, *, strategy: str, origin: dict[str, Any] | None
) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it; `origin`: the lineage of the weights that it began with."""
    learnt = {**learnt_from(recipe, stage), "data.manifest": train.digest}
    if origin is not None:
        learnt["init"] = origin["recipe_digest"]
    return {
        "stage": stage,
        "strategy": strategy,
        "init": origin,
        "recipe": recipe.model_dump(mode="json"),
        "learnt_from": learnt,
        "recipe_digest": digest(learnt),
        "class_names": list(train.manifest.class_names),
        "class_counts": train.class_counts.tolist(),
    }


def _check_same(ours: dict[str, Any], theirs: dict[str, Any], path: Path) -> None:
    if ours["stage"] != theirs["stage"]:
        raise CheckpointMismatch(f"{path} is of stage {theirs['stage']}, not {ours['stage']}")
    changed = store.differences(theirs["learnt_from"], ours["learnt_from"])
    if changed:
        raise CheckpointMismatch(
            f"{path} was trained by another recipe: {'; '.join(changed)}",
            remedy="set these fields back, or give the changed run a run_dir of its own",
        )


def _warn(path: Path, wrong: list[str]) -> None:
    print(f"livt: warning: {path} is damaged and not used: {'; '.join(wrong)}", file=sys.stderr, flush=True)
