"""Reads the folder of a run's checkpoints: which exist, which are complete, which is the newest. Needs no torch.

    checkpoints/step-00000200/            complete; one damaged since is reported and skipped
    checkpoints/.step-00000400.partial/   being written, or left by a killed save
    checkpoints/.step-00000200.replaced/  the old one, while another of the same step replaces it
    checkpoints/.step-00000100.pruned/    being removed

There is no pointer to the latest: it is found by reading the folder, so no pointer can be stale.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from livt_scale.checkpoint.io import remove_folder, sha256_of_all
from livt_scale.checkpoint.manifest import CheckpointManifest, Position, read_manifest, step_name, step_of
from livt_scale.util.atomic import sync_folder
from livt_scale.util.errors import CheckpointDamaged
from livt_scale.util.text import escaped

LEFTOVER = re.compile(r"\.(step-\d{8,})\.(partial|replaced|pruned)")


@dataclass(frozen=True)
class CheckpointInfo:
    """One `step-*` folder. `manifest` is None if it cannot be read; `why` lists the damage, file by file."""

    path: Path
    position: Position | None
    bytes: int
    whole: bool
    why: str
    best: bool
    final: bool
    score: float | None
    manifest: CheckpointManifest | None


def temporary(folder: Path, step: int, kind: str) -> Path:
    return folder / f".{step_name(step)}.{kind}"


def list_checkpoints(folder: Path, *, quick: bool = False) -> list[CheckpointInfo]:
    """All checkpoints in `folder`, oldest first; an absent folder has none.

    Every byte is read and hashed; `quick` compares sizes only. `best` marks the complete one with the best score. One
    that is removed meanwhile, by the run that saves there, is left out.
    """
    found = []
    for path in step_folders(folder):
        why, num_bytes = damages(path, quick=quick), _folder_bytes(path)
        try:
            manifest = read_manifest(path)
        except CheckpointDamaged:
            manifest = None
        if path.is_dir():
            found.append((path, manifest, why, num_bytes))
    best = best_of([m for _, m, why, _ in found if m and not why])
    return [
        CheckpointInfo(
            path=path,
            position=manifest.position if manifest else None,
            bytes=num_bytes,
            whole=not why,
            why="; ".join(why),
            best=manifest is not None and not why and manifest.position == best,
            final=bool(manifest and manifest.final),
            score=manifest.score if manifest else None,
            manifest=manifest,
        )
        for path, manifest, why, num_bytes in found
    ]


def best_of(manifests: Sequence[CheckpointManifest]) -> Position | None:
    """The position with the highest score, the earliest where two are equal; None without scores.

    Scores on different evaluation sets are not compared: only those on the set of the newest score count.
    """
    scored = [(m.score, m.position, m.facts.get("scored_on")) for m in manifests if m.score is not None]
    if not scored:
        return None
    newest_set = max(scored, key=lambda each: each[1].step)[2]
    return min((each for each in scored if each[2] == newest_set), key=lambda each: (-each[0], each[1]))[1]


def verify(path: Path) -> list[str]:
    """Read every byte of the checkpoint `path` and return its problems, one line per file; empty if it is complete."""
    return damages(path)


def damages(path: Path, *, quick: bool = False, share: tuple[int, int] = (0, 1)) -> list[str]:
    """As `verify`; `quick`: sizes alone; `share` (k, n): of the files, hash only the k-th of every n."""
    if not path.is_dir():
        return [f"{path} is not a folder"]
    try:
        manifest = read_manifest(path)
    except CheckpointDamaged as error:
        return [error.message.removeprefix(f"{escaped(path)}: ")]
    wrong = []
    to_hash = []
    for number, entry in enumerate(manifest.files):
        try:
            found = (path / entry.name).stat()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            wrong.append(f"{entry.name} is missing" if missing else f"{entry.name} cannot be read ({error.strerror})")
            continue
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever
            wrong.append(f"{entry.name} is not a file")
        elif found.st_size != entry.bytes:
            wrong.append(f"{entry.name} has {found.st_size} bytes, not {entry.bytes}")
        elif number % share[1] == share[0] and not quick:
            to_hash.append(entry)
    for entry, digest in zip(to_hash, sha256_of_all(path / e.name for e in to_hash), strict=True):
        if isinstance(digest, OSError):
            wrong.append(f"{entry.name} cannot be read ({digest.strerror})")
        elif digest != entry.sha256:
            wrong.append(f"{entry.name} was changed (its SHA-256 does not match)")
    return wrong


def clean_leftovers(folder: Path) -> list[Path]:
    """Remove what killed saves left under temporary names, and return them. Only for the holder of the run's lock.

    A checkpoint that was set aside for a new one of the same step is restored if the new one is missing.
    """
    if not folder.is_dir():
        return []
    cleaned = []
    for path in sorted(folder.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        if match[2] == "replaced" and not (folder / match[1]).exists():
            path.rename(folder / match[1])
        else:
            remove_folder(path)
        cleaned.append(path)
    if cleaned:
        sync_folder(folder)
    return cleaned


def step_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    steps = [(step, path) for path in folder.iterdir() if (step := step_of(path.name)) is not None and path.is_dir()]
    return [path for _, path in sorted(steps)]


def _folder_bytes(path: Path) -> int:
    with suppress(FileNotFoundError):  # removed meanwhile
        return sum(file.stat().st_size for file in path.iterdir() if file.is_file())
    return 0


@dataclass(frozen=True)
class Retention:
    keep_last: int = 2
    keep_every_epochs: int | None = None
    keep_best: bool = True

    def __post_init__(self) -> None:
        assert self.keep_last >= 1, "the newest checkpoint always stays"
        assert self.keep_every_epochs is None or self.keep_every_epochs >= 1

    def kept(self, whole: Sequence[CheckpointManifest]) -> set[Position]:
        """The positions to keep, given the complete checkpoints in any order."""
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
