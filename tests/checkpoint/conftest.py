"""Small checkpoints to break: saved by the real store, and a way to sign what a test has tampered with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from livt_scale.checkpoint.load import Position, Retention, Saver
from livt_scale.checkpoint.manifest import MANIFEST, FileEntry, read_manifest

Save = Callable[..., Path]


@pytest.fixture
def state() -> Callable[[float], dict[str, Tensor]]:
    """Tensors of several types and shapes, all values decided by one number; the same ones each time."""

    def make(value: float) -> dict[str, Tensor]:
        return {
            "model.weight": torch.full((3, 5), float(value)),
            "model.half": torch.full((7,), float(value), dtype=torch.bfloat16),
            "model.count": torch.tensor(int(value)),
            "model.none": torch.empty(0, 4),
            "optim.weight.step": torch.tensor(float(value)),
        }

    return make


@pytest.fixture
def save(tmp_path: Path, state: Callable[[float], dict[str, Tensor]]) -> Save:
    """save(step) -> path of a published checkpoint whose values are `step`; folder names are hostile."""
    folder = tmp_path / 'a run\'s "check\npoints"'

    def save_one(step: int, *, keep: int = 99, **options: object) -> Path:
        with Saver(folder, mode="sync", retention=Retention(keep_last=keep)) as saver:
            saver.save(state(step), position=Position(step // 10, step), facts={"stage": "pretrain"}, **options)
        return folder / f"step-{step:08d}"

    return save_one


@pytest.fixture
def sign() -> Callable[[Path], None]:
    """Make the manifest of a tampered checkpoint match its files again, as an attacker would."""

    def sign_again(path: Path) -> None:
        old = read_manifest(path)
        entries = tuple(
            FileEntry(
                name=entry.name,
                bytes=(path / entry.name).stat().st_size,
                sha256=hashlib.sha256((path / entry.name).read_bytes()).hexdigest(),
                rank=entry.rank,
            )
            for entry in old.files
        )
        (path / MANIFEST).write_bytes(old.model_copy(update={"files": entries}).to_bytes())

    return sign_again
