"""Shards on a node's own disk: every byte as the manifest says, or nothing to train on."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from livt_scale.config.load import to_yaml
from livt_scale.data.build.record import RECORD
from livt_scale.data.shard_set import ShardSet
from livt_scale.slurm import stage_in as staging
from livt_scale.slurm.stage_in import main, stage_in
from livt_scale.util.errors import DataError, ShardError, UsageError
from tests.tiny_run import tiny_recipe, tiny_shards


@pytest.fixture
def recipe(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tiny_shards(tmp_path / name, {"a": 4, "b": 3})
    return tiny_recipe(train=tmp_path / "one" / "set", val=tmp_path / "two" / "set")


def files(folder: Path) -> dict[str, bytes]:
    """What a set is read by: all but the record of what it was built from."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != RECORD}


def test_a_copy_is_the_set_to_the_byte_and_can_be_read(tmp_path, recipe):
    target = tmp_path / "node disk" / "livt-shards-7"
    stage_in(recipe, target, stage="finetune")
    assert files(target / "train") == files(tmp_path / "one" / "set")
    assert files(target / "val") == files(tmp_path / "two" / "set")
    assert ShardSet.open(target / "train").digest == ShardSet.open(recipe.data.train).digest


def test_pretraining_has_no_use_for_evaluation_shards(tmp_path, recipe):
    stage_in(recipe, tmp_path / "node", stage="pretrain")
    assert {p.name for p in (tmp_path / "node").iterdir()} == {"train", ".complete"}


def test_what_a_start_before_left_half_copied_is_taken_away(tmp_path, recipe):
    half = tmp_path / "node" / "train"
    half.mkdir(parents=True)
    (half / "stray.tar").write_bytes(b"half")
    stage_in(recipe, tmp_path / "node", stage="pretrain")
    assert not (half / "stray.tar").exists()


def test_two_nodes_that_share_the_folder_after_all_make_one_copy(tmp_path, recipe, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with ThreadPoolExecutor(2) as pool:
        copied = list(pool.map(lambda _: stage_in(recipe, tmp_path / "node", stage="pretrain"), range(2)))
    assert sorted(c > 0 for c in copied) == [False, True]
    assert files(tmp_path / "node" / "train") == files(tmp_path / "one" / "set")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert stage_in(recipe, tmp_path / "node", stage="pretrain") > 0  # another start trusts no old copy


def test_a_changed_byte_is_found_and_named_and_the_manifest_does_not_come(tmp_path, recipe):
    shard = sorted((tmp_path / "one" / "set").glob("*.tar"))[-1]
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{shard.name} is not what the manifest says"):
        stage_in(recipe, tmp_path / "node", stage="pretrain")
    assert not (tmp_path / "node" / "train" / "manifest.json").exists()
    assert not (tmp_path / "node" / "train" / shard.name).exists()


def test_a_disk_too_small_is_told_before_anything_is_copied(tmp_path, recipe, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"1,000 bytes free, and the shards take [\d,]+"):
        stage_in(recipe, tmp_path / "node", stage="pretrain")
    assert list((tmp_path / "node").iterdir()) == []


def test_as_the_batch_script_starts_it(tmp_path, recipe):
    path = tmp_path / "it's.yaml"
    path.write_text(to_yaml(recipe))
    words = [str(tmp_path / "node"), "pretrain", str(path), "--set", f"data.train={tmp_path / 'two' / 'set'}"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "livt_scale.slurm.stage_in", *words], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "of shards copied to" in done.stdout
    words[-1] = "data.train=/nowhere"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "livt_scale.slurm.stage_in", *words], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "there is no folder /nowhere" in done.stderr


def test_other_words_are_refused(tmp_path):
    with pytest.raises(UsageError, match="only --set"):
        main(["t", "pretrain", "r.yaml", "--stage", "x"])
