"""Which checkpoints stay: a pure rule over the whole ones.

Kept are the last `keep_last`; of every `keep_every_epochs` epochs the first; the one with the best score; each final
one; and always the newest. A damaged one neither counts nor is removed: it is for a person to look at.

    keep_last=2, keep_every_epochs=2, one an epoch:  epochs 1 2 3 4 5 6 7  ->  2 4 6 7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from livt_scale.checkpoint.folder import best_of
from livt_scale.checkpoint.manifest import Manifest, Position


@dataclass(frozen=True)
class Retention:
    keep_last: int = 2
    keep_every_epochs: int | None = None
    keep_best: bool = True

    def __post_init__(self) -> None:
        assert self.keep_last >= 1, "the newest checkpoint always stays"
        assert self.keep_every_epochs is None or self.keep_every_epochs >= 1

    def kept(self, whole: Sequence[Manifest]) -> set[Position]:
        """The positions that stay, of the `whole` checkpoints in any order."""
        ordered = sorted(whole, key=lambda m: m.position.step)
        stay = {m.position for m in ordered[-self.keep_last :]} | {m.position for m in ordered if m.final}
        if self.keep_best and (best := best_of(ordered)) is not None:
            stay.add(best)
        if self.keep_every_epochs is not None:
            first: dict[int, Position] = {}
            for manifest in ordered:
                first.setdefault(manifest.position.epoch // self.keep_every_epochs, manifest.position)
            first.pop(0, None)  # before the nth epoch
            stay |= set(first.values())
        return stay
