"""The checkpoint store: saves are atomic, retention follows a rule, loading is strict. All ranks make the same calls.

    saver = Saver(run / "checkpoints", mode="async", retention=Retention(keep_last=2), rank=0, world_size=1)
    saver.save(collect(model, optimizer), position=Position(epoch=3, step=1234), facts={"stage": "pretrain"})
    …                                 # training continues; the values at the time of the call are saved
    saver.close()                     # waits; a failed save raises here, or at the next save
    path = newest_whole(run / "checkpoints")
    manifest = load(path, into=collect(model, optimizer))

The order on disk: every rank's file synced, `.metadata` synced, `manifest.json` synced, the temporary folder synced,
the rename, the parent synced. A kill between any two leaves either no new checkpoint or a complete one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Container, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from livt_scale.checkpoint.catalog import (
    CheckpointInfo,
    Retention,
    clean_leftovers,
    damages,
    list_checkpoints,
    step_folders,
    verify,
)
from livt_scale.checkpoint.dcp import not_covered, read_into
from livt_scale.checkpoint.dcp_metadata import SavedTensor, TensorIndex, read_index
from livt_scale.checkpoint.manifest import MANIFEST, CheckpointManifest, Position, differences, read_manifest, step_of
from livt_scale.checkpoint.saver import Saver
from livt_scale.distributed.collectives import Peers
from livt_scale.util.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from livt_scale.util.outside import read_checked

__all__ = [
    "CheckpointInfo",
    "CheckpointManifest",
    "Peers",
    "Position",
    "Retention",
    "Saver",
    "clean_leftovers",
    "differences",
    "list_checkpoints",
    "load",
    "newest_whole",
    "read_manifest",
    "read_tensors",
    "verify",
]
MAX_NAMES = 8  # listed in one error


def load(
    path: Path,
    into: dict[str, Tensor],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
    check: bool = True,
    peers: Peers | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """Fill the tensors of `into` from the checkpoint `path` and return its manifest.

    Strict: names, shapes and dtypes must be the checkpoint's (CheckpointMismatch lists what differs), except names that
    match a pattern (`fnmatch`) of `allow_missing` (absent in the checkpoint, left as they are) or of
    `allow_unexpected` (absent in `into`). Nothing loaded is an error too. Any world size; DTensors fill their own part.
    `check` reads and hashes every byte first (CheckpointDamaged names the file), the ranks of `peers` sharing the work:
    leave it out right after `newest_whole`. `partial`: the checkpoint of one node, of which this rank needs its part.
    With `peers` a collective call: the ranks must agree on the manifest first.
    """
    peers = peers or Peers(all_raise=CheckpointError)
    path = Path(path)
    manifest = peers.run_all(lambda: read_manifest(path))
    _agree(manifest, peers)
    if check and (wrong := agreed_damages(path, peers)):
        raise CheckpointDamaged(
            f"{path}: {'; '.join(wrong)}", remedy="Remove this checkpoint to continue from the one before it"
        )
    may_miss, may_exceed = tuple(allow_missing), tuple(allow_unexpected)
    index = peers.run_all(
        lambda: _match(path, manifest, into, may_miss, may_exceed, partial=partial)
    )  # on all ranks before any loads
    peers.run_all(lambda: _read(path, into, index))
    return manifest.as_dict()


def read_tensors(path: Path, *, choose: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """The tensors of `path` (only those whose name `choose` accepts): unsharded, on the CPU, every byte checked."""
    path = Path(path)
    if wrong := verify(path):
        raise CheckpointDamaged(f"{path}: {'; '.join(wrong)}")
    index = read_index(path, read_manifest(path))
    into = {
        name: torch.empty(t.shape, dtype=t.dtype) for name, t in index.tensors.items() if choose is None or choose(name)
    }
    if into:
        read_into(path, into, index)
    return into


def newest_whole(
    folder: Path,
    *,
    on_damage: Callable[[Path, list[str]], None] | None = None,
    peers: Peers | None = None,
    steps: Container[int] | None = None,
) -> Path | None:
    """The newest checkpoint of which every byte is right, or None; each damaged one on the way goes to `on_damage`.

    steps: of these steps alone. With several `peers` it is a collective call: rank 0 picks, the ranks share the
    hashing, all get the same answer; `on_damage` is called on rank 0 alone.
    """
    peers = peers or Peers(all_raise=CheckpointError)
    for name in reversed(peers.on_rank0(lambda: [path.name for path in step_folders(folder)])):
        path = folder / name
        if steps is not None and step_of(name) not in steps:
            continue
        wrong = agreed_damages(path, peers)
        if not wrong:
            return path
        if on_damage is not None and peers.leads:
            on_damage(path, wrong)
    return None


def agreed_damages(path: Path, peers: Peers) -> list[str]:
    """What any rank finds wrong with `path`, the hashing shared; CheckpointError where they read different ones."""

    def look() -> tuple[str, list[str]]:
        raw = b""
        with suppress(OSError):  # `damages` reports it
            raw = read_checked(path / MANIFEST, "checkpoint manifest")
        return raw[:80].decode(errors="replace"), damages(path, share=(peers.rank, peers.world_size))

    looks = peers.all_gather(peers.run_all(look))
    different = [rank for rank, (seen, _) in enumerate(looks) if seen != looks[0][0]]
    if different:
        raise CheckpointError(
            f"rank {different[0]} reads another {path.name} in {path.parent} than rank 0",
            remedy="The run directory must be one shared folder, seen alike by all nodes",
        )
    return list(dict.fromkeys(line for _, wrong in looks for line in wrong))


def _agree(manifest: CheckpointManifest, peers: Peers) -> None:
    seen = peers.all_gather((manifest.position.step, manifest.to_bytes()[:80]))
    for rank, theirs in enumerate(seen):
        if theirs != seen[0]:
            raise CheckpointError(
                f"rank {rank} would load step {theirs[0]} and rank 0 step {seen[0][0]}, or another {MANIFEST} of it",
                remedy="The run directory must be one shared folder, seen alike by all nodes",
            )


def _match(
    path: Path,
    manifest: CheckpointManifest,
    into: dict[str, Tensor],
    may_miss: tuple[str, ...],
    may_exceed: tuple[str, ...],
    *,
    partial: bool,
) -> TensorIndex:
    index = read_index(path, manifest, partial=partial)
    missing = not_covered(into, index) if partial else [name for name in into if name not in index.tensors]
    unexpected = [name for name in index.tensors if name not in into]
    wrong = _list("missing in the checkpoint", [n for n in missing if not _matches(n, may_miss)])
    wrong += _list("in the checkpoint alone", [n for n in unexpected if not _matches(n, may_exceed)])
    wrong += _list("of another form", [_form(n, into[n], index.tensors[n]) for n in into if n in index.tensors])
    if wrong or not index.tensors.keys() & into.keys():
        what = "; ".join(wrong) or "none of the wanted tensors is in it"
        raise CheckpointMismatch(f"{path} is not a checkpoint of this model: {what}")
    return index


def _read(path: Path, into: dict[str, Tensor], index: TensorIndex) -> None:
    try:
        read_into(path, {name: tensor for name, tensor in into.items() if name in index.tensors}, index)
    except OSError as error:
        raise CheckpointDamaged(f"{path}: {error}") from error


def _form(name: str, here: Tensor, saved: SavedTensor) -> str:
    if tuple(here.shape) == saved.shape and here.dtype == saved.dtype:
        return ""
    return f"{name} ({list(saved.shape)} {saved.dtype} in the checkpoint, {list(here.shape)} {here.dtype} here)"


def _list(what: str, names: list[str]) -> list[str]:
    names = [name for name in names if name]
    if not names:
        return []
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return [f"{what}: {', '.join(names[:MAX_NAMES])}{more}"]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
