"""A run's checkpoints as the loop sees them: in the shared folder and, if enabled, quick ones on each node's disk.

    with Tiers(run / "pretrain" / "checkpoints", saving=recipe.checkpoint, world=world.peers) as tiers:
        found = tiers.newest(strategy.state())        # the newest that every rank can read
        tiers.save(state, position=…, facts=…)        # durable: all ranks, one shared folder
        tiers.save_locally(state, position=…, facts=…)

A quick save that fails is reported and never ends the run: the shared ones bound how much work a failure can lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from livt_scale.checkpoint import load as store
from livt_scale.checkpoint import node_local as local
from livt_scale.checkpoint.catalog import Retention
from livt_scale.checkpoint.manifest import Position, step_name
from livt_scale.checkpoint.saver import Failures, Saver, also_raising
from livt_scale.config.runtime import Checkpoint
from livt_scale.distributed.collectives import Peers

KEPT_LOCALLY = 2  # a node may have finished the newest while another has not
_NO_STEP = 10**18


@dataclass(frozen=True)
class Found:
    """A complete checkpoint to resume from; `peers` are the ranks that read it together."""

    path: Path
    peers: Peers
    local: local.LocalSave | None = None


class Tiers:
    """Built on all ranks by the holder of the run's lock. `world`: all ranks, over the process group of the training.

    local_dir: replaces the recipe's, to give each simulated node a separate folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        saving: Checkpoint,
        world: Peers | None = None,
        timeout_s: float = 1800,
        local_dir: Path | None = None,
    ) -> None:
        self.world = world or Peers()
        self.shared = Saver(
            folder,
            mode=saving.mode,
            retention=Retention(saving.keep_last, saving.keep_every_epochs, saving.keep_best),
            rank=self.world.rank,
            world_size=self.world.world_size,
            timeout_s=timeout_s,
            failures=Failures(saving.max_failed_saves, saving.max_unsaved_min and saving.max_unsaved_min * 60),
            retries=saving.retries,
        )
        self._place: local.Place | None = None
        self._quick: Saver | None = None
        root = local_dir or (Path(saving.local_dir) if saving.local_dir else None)
        if root is not None:
            self._place = local.open_place(root, folder, world=self.world, timeout_s=timeout_s)
            self._quick = Saver(
                self._place.folder,
                mode=saving.mode,
                retention=Retention(keep_last=KEPT_LOCALLY, keep_best=False),
                failures=Failures(limit=None),
                peers=self._place.peers,
                partial=True,
            )

    @property
    def folder(self) -> Path:
        return self.shared.folder

    @property
    def longest_save_s(self) -> float | None:
        """Of a shared one, from the call to its name; None: none has ended yet."""
        return self.shared.longest_save_s

    @property
    def durable_step(self) -> int | None:
        """Of the newest shared checkpoint that was saved since the start; None: none was."""
        return self.shared.failures.durable_step

    def report(self) -> dict[str, Any]:
        """The text about failed saves; empty if none has failed."""
        quick = self._quick.failures.total if self._quick else 0
        return self.shared.failures.report() | ({"failed_local_saves": quick} if quick else {})

    def save(
        self,
        state: dict[str, Tensor],
        *,
        position: Position,
        facts: dict[str, Any],
        score: float | None = None,
        final: bool = False,
    ) -> None:
        """As `Saver.save`, in the shared folder."""
        self.shared.save(state, position=position, facts=facts, score=score, final=final)

    def save_locally(self, state: dict[str, Tensor], *, position: Position, facts: dict[str, Any]) -> None:
        """As `save`, each node in its own folder. Does not wait for a shared save in flight."""
        assert self._quick is not None
        assert self._place is not None
        self.world.run_all(self._quick.wait)  # else a node could prune what another has not followed yet
        self._quick.save(state, position=position, facts=facts | {local.SAVE: self._place.start})

    def newest(
        self, wanted: dict[str, Tensor], *, on_damage: Callable[[Path, list[str]], None] | None = None
    ) -> Found | None:
        """The newest checkpoint, shared or on the nodes, from which every rank can fill its part of `wanted`.

        A collective call; every byte is read. `on_damage` is called on rank 0 with each damaged one that is skipped.
        Quick ones that are not used are removed: the run repeats their steps.
        """
        found = self._newest(wanted, on_damage)
        if self._place is not None:
            local.forget_all_but(self._place, found.local if found else None)
        return found

    def _newest(self, wanted: dict[str, Tensor], on_damage: Callable[[Path, list[str]], None] | None) -> Found | None:
        above = _NO_STEP  # shared ones of this step and later were looked at
        saves = local.readable_by_all(self._place, wanted, world=self.world) if self._place else []
        for save in reversed(saves):
            assert self._place is not None
            if path := self._newest_shared(range(save.step, above), on_damage):
                return Found(path, self.shared.peers)
            above = save.step
            wrong = local.is_whole(self._place, save, world=self.world)
            if not wrong:
                return Found(self._place.folder / step_name(save.step), self._place.peers, save)
            for place, lines in wrong.items():
                if on_damage is not None and self.world.leads:
                    on_damage(place, lines)
        path = self._newest_shared(range(above), on_damage)
        return Found(path, self.shared.peers) if path else None

    def _newest_shared(self, steps: range, on_damage: Callable[[Path, list[str]], None] | None) -> Path | None:
        return store.newest_whole(self.folder, on_damage=on_damage, peers=self.shared.peers, steps=steps)

    def load(self, found: Found, into: dict[str, Tensor]) -> dict[str, Any]:
        """Fill this rank's tensors from what `newest` has found (and read); its manifest. A collective call."""
        is_local = found.local is not None
        return self.world.run_all(
            lambda: store.load(found.path, into, check=False, peers=found.peers, partial=is_local)
        )

    def wait(self) -> None:
        """Return when nothing is being written; CheckpointError if a failed save ends the run."""
        try:
            self.shared.wait()
        finally:
            if self._quick is not None:
                self._quick.wait()

    def close(self) -> None:
        """Wait, and give threads and process groups back. When the stage's last is saved, what is on the nodes goes."""
        try:
            self.shared.close()
        finally:
            if self._quick is not None and self._place is not None:
                self._quick.close()
                if self.shared.saved_final:
                    local.remove(self._place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with also_raising(error):
            self.close()
