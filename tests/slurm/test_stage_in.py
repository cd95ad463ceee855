"""Shards on a node's own disk: every byte as the manifest says, or nothing to train on."""

import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from livt_scale.config.load import to_yaml
from livt_scale.config.recipe import Recipe
from livt_scale.data.build.record import RECORD
from livt_scale.data.shard_set import ShardSet
from livt_scale.data.staged import STAGED
from livt_scale.posthoc.evaluate_path import evaluate_path
from livt_scale.slurm import commands
from livt_scale.slurm import stage_in as staging
from livt_scale.slurm.job import BatchJob, next_action
from livt_scale.slurm.stage_in import main, stage_in
from livt_scale.train.loop import Hook
from livt_scale.train.run import train
from livt_scale.util.errors import DataError, Preempted, ShardError, UsageError
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


class StopAfter(Hook):
    def __init__(self, step: int) -> None:
        self._step = step

    def after_backward(self, loop, step):
        step.wants_stop = step.number == self._step


def test_a_run_on_copies_resumes_on_others_and_is_evaluated_when_they_are_gone(tmp_path, recipe, monkeypatch):
    tree = recipe.model_dump(mode="json")
    tree["run_dir"] = str(tmp_path / "run")
    tree["log"]["tensorboard"], tree["slurm"]["stage_in"] = False, True
    tree["stages"]["finetune"] |= {"epochs": 4, "global_batch": 4, "micro_batch": 4, "warmup_epochs": 1}
    recipe = Recipe.model_validate(tree)
    with pytest.raises(Preempted), on_copies(recipe, tmp_path, monkeypatch, job="7"):
        train(recipe, hooks=[StopAfter(2)])
    with on_copies(recipe, tmp_path, monkeypatch, job="8"):
        train(recipe)
    records = [p for p in (tmp_path / "run").rglob("*") if p.suffix in (".json", ".jsonl", ".yaml", ".txt")]
    assert len(records) > 5
    assert not [p for p in records if "livt-shards-" in p.read_text()]
    assert evaluate_path(tmp_path / "run").report["num_samples"] == 7


@contextmanager
def on_copies(recipe, folder, monkeypatch, *, job):
    """As in a step of the batch job, where only the copies can be read."""
    batch = BatchJob(
        "finetune", recipe, "recipe.yaml", folder / "run", stage_in_dir=str(folder), environ={"SLURM_JOB_ID": job}
    )
    stage_in(recipe, Path(batch.srun.staged), stage="finetune")
    with monkeypatch.context() as step:
        step.setattr(commands, "query", lambda *_: commands.Answer(""))
        words = next_action(batch, [("stage-in", 0)], signalled=False).words
        (copies,) = [word for word in words if word.startswith(f"{STAGED}=")]
        step.setenv(STAGED, copies.removeprefix(f"{STAGED}="))
        shared = [folder / name for name in ("one", "two")]
        for each in shared:
            each.rename(f"{each} away")
        try:
            yield
        finally:
            for each in shared:
                Path(f"{each} away").rename(each)
    shutil.rmtree(batch.srun.staged)


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
