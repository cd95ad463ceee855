"""A node's folder for quick saves: its location, its owner, and the saves from which all ranks can resume.

    LOCAL_DIR/livt-1000-4f1c…/     of one user and one folder of shared checkpoints; nothing outside is ever removed
      9b27…/                       of one run: if the shared checkpoints are removed and restarted, the mark differs
        node7/step-00000120/       what the ranks of node7 hold: a checkpoint of only their pieces

A node writes what its ranks need to resume: under ddp one full copy, under fsdp their shards. After a restart each rank
looks for saves that hold its pieces; the newest save that every rank can read is used. A replacement node, or a
different number of ranks, finds none: then the run resumes from the shared folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from livt_scale.checkpoint import io
from livt_scale.checkpoint.catalog import list_checkpoints
from livt_scale.checkpoint.dcp import not_covered
from livt_scale.checkpoint.dcp_metadata import read_index
from livt_scale.checkpoint.load import agreed_damages
from livt_scale.checkpoint.manifest import step_name
from livt_scale.distributed.collectives import Peers
from livt_scale.util.atomic import write_atomic
from livt_scale.util.errors import CheckpointDamaged, CheckpointError
from livt_scale.util.outside import read_text, real_path

MARK = ".local-mark"  # beside the shared checkpoints
SAVE = "local_save"  # the fact that identifies the save and the start of the run
_MARKED = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, order=True)
class LocalSave:
    """One save over all nodes: ranks that read equal ones read the state of one moment."""

    step: int
    start: str


@dataclass(frozen=True)
class Place:
    """This node's folder, and the ranks that share it."""

    own: Path  # removed when the stage is done
    folder: Path
    peers: Peers
    start: str


def open_place(root: Path, shared: Path, *, world: Peers, timeout_s: float) -> Place:
    """Make this node's folder in `root`, for the checkpoints of `shared`. A collective call of all ranks.

    Raises CheckpointError if it cannot be written, or belongs to another user.
    """
    mark, start = world.on_rank0(lambda: (_mark_of(shared), secrets.token_hex(8)))
    own = world.run_all(lambda: _own_folder(root, shared))
    folder = own / mark / (re.sub(r"[^\w.-]", "-", socket.gethostname()) or "node")
    world.run_all(lambda: folder.mkdir(parents=True, exist_ok=True))
    nodes = world.all_gather(_node(folder))
    parts = [[rank for rank, node in enumerate(nodes) if node == one] for one in dict.fromkeys(nodes)]
    peers = Peers.of_ranks(world.rank, parts, timeout_s=timeout_s, all_raise=CheckpointError)
    if peers.leads:
        for stale in own.iterdir():
            if _MARKED.fullmatch(stale.name) and stale.name != mark:
                shutil.rmtree(stale, ignore_errors=True)
    return Place(own, folder, peers, start)


def readable_by_all(place: Place, wanted: dict[str, Tensor], *, world: Peers) -> list[LocalSave]:
    """The saves of which every rank finds its part of `wanted` on its node, by size; oldest first."""
    mine = world.run_all(lambda: _readable(place.folder, wanted))
    return sorted(set.intersection(*(set(saves) for saves in world.all_gather(mine))))


def is_whole(place: Place, save: LocalSave, *, world: Peers) -> dict[Path, list[str]]:
    """What is damaged of it, on any node; empty: every byte is right. The ranks of a node share the reading."""
    path = place.folder / step_name(save.step)
    wrong = world.run_all(lambda: agreed_damages(path, place.peers))
    return {path: lines for path, lines in world.all_gather((path, wrong)) if lines}


def forget_all_but(place: Place, kept: LocalSave | None) -> None:
    """Remove the saves from which the run does not resume: their steps will be repeated."""
    if place.peers.leads:
        for info in list_checkpoints(place.folder, quick=True):
            if kept is None or info.path.name != step_name(kept.step):
                io.remove_folder(info.path)
    place.peers.all_gather(None)  # no rank saves before they are gone


def remove(place: Place) -> None:
    """Remove all that the run has on this node: the stage is done."""
    if place.peers.leads:
        shutil.rmtree(place.own, ignore_errors=True)


def _mark_of(shared: Path) -> str:
    file = shared / MARK
    if file.exists():
        mark = read_text(file, "note").strip()
        if _MARKED.fullmatch(mark):
            return mark
    mark = secrets.token_hex(16)
    write_atomic(file, f"{mark}\n".encode())
    return mark


def _own_folder(root: Path, shared: Path) -> Path:
    digest = hashlib.sha256(os.fsencode(real_path(shared))).hexdigest()[:20]
    own = root / f"livt-{os.geteuid()}-{digest}"
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = own.lstat()
    except OSError as error:
        raise CheckpointError(
            f"cannot write quick checkpoints in {root} on {socket.gethostname()}: {error.strerror}",
            remedy="give another checkpoint.local_dir, or leave it out",
        ) from error
    if own.is_symlink() or found.st_uid != os.geteuid():
        raise CheckpointError(
            f"{own} on {socket.gethostname()} belongs to another user, or is a link",
            remedy="give a checkpoint.local_dir that only you can write in",
        )
    return own


def _node(folder: Path) -> tuple[str, str, int, int]:
    """Alike for processes that see the same folder on the same machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    found = folder.stat()
    return socket.gethostname(), boot.read_text() if boot.exists() else "", found.st_dev, found.st_ino


def _readable(folder: Path, wanted: dict[str, Tensor]) -> list[LocalSave]:
    saves = []
    for info in list_checkpoints(folder, quick=True):
        if info.whole and info.manifest and info.position and isinstance(start := info.manifest.facts.get(SAVE), str):
            try:
                if not not_covered(wanted, read_index(info.path, info.manifest, partial=True)):
                    saves.append(LocalSave(info.position.step, start))
            except (CheckpointDamaged, ValueError):  # DCP's planner: another shape
                continue
    return saves
