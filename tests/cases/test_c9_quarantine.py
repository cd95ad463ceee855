"""A sample turns bad in the middle of a run: it is put into quarantine, as the error advises, and the run ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from livt_scale.checkpoint.load import list_checkpoints
from livt_scale.checkpoint.manifest import read_manifest
from livt_scale.data.build.verify import verify
from livt_scale.data.reader import read_sample
from livt_scale.data.shard_set import ShardSet
from livt_scale.train.load_trained import load_trained
from livt_scale.train.resume_rules import check_allowable
from livt_scale.util.errors import CheckpointMismatch, SampleError
from tests.cases.test_a_runs import state_of


def damage(folder: Path, class_name: str) -> tuple[int, str]:
    """Overwrite the middle of the first image of a class. Returns the sample's number and its key."""
    shards = ShardSet.open(folder)
    number = int(np.flatnonzero(shards.index["label"] == shards.manifest.class_names.index(class_name))[0])
    row = shards.index[number]
    shard = int(shards.shard_of(np.array([number]))[0])
    with shards.shard_path(shard).open("r+b") as file:
        file.seek(int(row["start"]) + int(row["data_offset"]) + int(row["data_size"]) // 2)
        file.write(bytes(16))
    return number, shards.keys(np.array([number]))[0]


@pytest.fixture
def set_with_bad_samples(tiny_shards, tmp_path) -> tuple[Path, dict[int, tuple[str, str]]]:
    """A copy of the training set, one image of two classes damaged: (folder, key and class by number)."""
    folder = Path(shutil.copytree(tiny_shards / "train", tmp_path / "train"))
    bad = {}
    for name in ("cat", "eel"):
        number, key = damage(folder, name)
        bad[number] = (key, name)
    return folder, bad


def test_c9_a_run_resumes_after_a_quarantine_and_records_what_was_left_out(
    interrupted_run, copy_of, train_tiny, set_with_bad_samples
):
    run, (folder, bad) = copy_of(interrupted_run), set_with_bad_samples
    sets = {"data.train": folder}
    with pytest.raises(SampleError) as advice:
        read_sample(ShardSet.open(folder), min(bad))
    assert "--quarantine" in advice.value.remedy
    assert "--allow data.quarantine" in advice.value.remedy
    verify(folder, decode=True, quarantine=True, workers=1)

    before = state_of(run)
    with pytest.raises(CheckpointMismatch) as refused:
        train_tiny(run, sets)
    assert state_of(run) == before
    assert "2 samples are left out since" in str(refused.value)
    assert all(f"{key!r} ({name})" in str(refused.value) for key, name in bad.values())
    assert "--allow data.quarantine" in refused.value.remedy

    train_tiny(run, sets, allow=["data.quarantine"])
    final = list_checkpoints(run / "finetune" / "checkpoints")[-1]
    assert final.final
    assert final.whole
    facts = read_manifest(final.path).facts
    left_out = {"count": 2, "classes": {"cat": 1, "eel": 1}}
    left_out["samples"] = [{"number": n, "key": key, "class": name} for n, (key, name) in sorted(bad.items())]
    assert facts["data"]["left_out"] == left_out
    assert facts["allowed"][0]["after_step"] == 5
    assert facts["allowed"][0]["change"].startswith("data.quarantine: 2 samples are left out since")
    assert facts["class_counts"] == [39, 20, 9, 5]
    assert load_trained(run).weights["left_out"] == left_out
    assert json.loads((run / "finetune" / "eval.json").read_text())["weights"]["left_out"] == left_out

    done = state_of(run)
    train_tiny(run, sets)  # done: nothing is left to be allowed, or to be changed
    assert state_of(run) == done


def test_c9_another_manifest_is_not_a_quarantine(interrupted_run, copy_of, train_tiny, tiny_shards):
    run = copy_of(interrupted_run)
    with pytest.raises(CheckpointMismatch, match=r"data\.manifest"):
        train_tiny(run, {"data.train": tiny_shards / "val"}, allow=["data.quarantine"])


def test_c9_the_quarantine_is_a_field_that_can_be_allowed():
    assert check_allowable(["data.quarantine"]) == ("data.quarantine",)
