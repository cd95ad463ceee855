"""Quick saves on the nodes' own disks, and whose folder it is there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from livt_scale.checkpoint.load import Position
from livt_scale.checkpoint.manager import Tiers
from livt_scale.config.runtime import Checkpoint
from livt_scale.util.errors import CheckpointError
from tests import warm

NODES = Path(__file__).with_name("nodes.py")


def run_ranks(script: Path, folder: Path, world_size: int, *more: str) -> None:
    """Run the script once for each rank; show its output if one of them fails."""
    each = [[script, folder, str(rank), str(world_size), *more] for rank in range(world_size)]
    warm.run_each(each, env={**os.environ, "OMP_NUM_THREADS": "1"}, log=folder / "log")


@pytest.mark.slow
def test_four_ranks_on_two_nodes_go_on_from_what_all_of_them_can_read(tmp_path):
    run_ranks(NODES, tmp_path, 4)


def open_tiers(tmp_path: Path, run: str = "run") -> Tiers:
    saving = Checkpoint(mode="sync", local_dir=str(tmp_path / "disk"), local_every_steps=1)
    return Tiers(tmp_path / run / "checkpoints", saving=saving)


def save_locally(tiers: Tiers, step: int) -> None:
    tiers.save_locally({"model.w": torch.full((3,), float(step))}, position=Position(0, step), facts={})


def test_two_runs_share_a_disk_without_touching_each_other(tmp_path):
    with open_tiers(tmp_path, "one") as one, open_tiers(tmp_path, "two") as two:
        for tiers, first in ((one, 10), (two, 20)):
            for step in range(first, first + 5):
                save_locally(tiers, step)
        assert one._place.own != two._place.own
        kept = {p.name for tiers in (one, two) for p in tiers._place.folder.iterdir()}
    assert kept == {"step-00000013", "step-00000014", "step-00000023", "step-00000024"}
    with open_tiers(tmp_path, "one") as one:
        into = {"model.w": torch.zeros(3)}
        found = one.newest(into)
        one.load(found, into)
        assert into["model.w"].tolist() == [14.0] * 3


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    with open_tiers(tmp_path) as tiers:
        own = tiers._place.own
    assert own.stat().st_mode & 0o777 == 0o700
    elsewhere = tmp_path / "elsewhere"
    own.rename(elsewhere)
    own.symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="belongs to another user, or is a link"):
        open_tiers(tmp_path)
    own.unlink()
    elsewhere.rename(own)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(CheckpointError, match=r"livt-4711-\w+ on .* belongs to another user"):
        open_tiers(tmp_path)  # a name of his own, but it was not he who made it


def test_a_disk_that_cannot_be_written_is_said_at_the_start(tmp_path):
    (tmp_path / "disk").write_text("a file")
    with pytest.raises(CheckpointError, match=r"cannot write quick checkpoints in .*disk on .*local_dir"):
        open_tiers(tmp_path)


def test_what_is_no_save_of_ours_stays(tmp_path):
    with open_tiers(tmp_path) as tiers:
        save_locally(tiers, 1)
        notes = tiers._place.folder / "notes.txt"
        notes.write_text("mine")
        save_locally(tiers, 2)
        save_locally(tiers, 3)
        save_locally(tiers, 4)
        assert notes.exists()
