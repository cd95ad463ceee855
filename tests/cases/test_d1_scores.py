"""A score is of one evaluation set: scores on two sets are not compared, and results name what they are of."""

from __future__ import annotations

import json
import logging
import shutil
from hashlib import sha256
from pathlib import Path

import pytest

from livt_scale.checkpoint.catalog import Retention, best_of
from livt_scale.checkpoint.load import list_checkpoints
from livt_scale.checkpoint.manifest import CheckpointManifest, read_manifest
from livt_scale.data.build.builder import build
from livt_scale.data.build.spec import load_spec
from livt_scale.data.shard_set import ShardSet
from livt_scale.export.write_export import export_run
from livt_scale.train.export_info import read_info
from tests.cases.conftest import write_images


@pytest.fixture(scope="module")
def other_val(tmp_path_factory) -> Path:
    """Another evaluation set of the same classes."""
    folder = tmp_path_factory.mktemp("other")
    write_images(folder / "img", {"val": (3, 3, 3, 3)})
    spec = "name: other\nsources: {val: {folder: {root: img/val}}}\nsets: {val: {source: val}}\n"
    (folder / "spec.yaml").write_text(spec)
    build(load_spec(folder / "spec.yaml"), folder / "sh", workers=1)
    return folder / "sh" / "val"


def scored(manifest: CheckpointManifest, *, step: int, score: float, scored_on: str) -> CheckpointManifest:
    place = manifest.place.model_copy(update={"step": step})
    facts = {**manifest.facts, "scored_on": scored_on}
    return manifest.model_copy(update={"place": place, "score": score, "final": False, "facts": facts})


def test_d1_the_best_is_chosen_among_scores_on_the_newest_set(finished_run):
    one = read_manifest(finished_run / "finetune" / "checkpoints" / "step-00000008")
    old = [scored(one, step=1, score=0.9, scored_on="a"), scored(one, step=2, score=0.8, scored_on="a")]
    new = [scored(one, step=3, score=0.3, scored_on="b"), scored(one, step=4, score=0.2, scored_on="b")]
    assert best_of(old).step == 1
    assert best_of(old + new).step == 3
    assert {p.step for p in Retention(keep_last=1).kept(old + new)} == {3, 4}


def test_d1_best_starts_again_when_the_evaluation_set_changes_and_the_log_says_so(
    interrupted_run, copy_of, train_tiny, other_val, caplog
):
    run = copy_of(interrupted_run)
    with caplog.at_level(logging.WARNING, logger="livt_scale"):
        train_tiny(run)
        assert "data.val has changed" not in caplog.text
        shutil.rmtree(run)
        copy_of(interrupted_run)
        train_tiny(run, {"data.val": other_val})
    assert "data.val has changed" in caplog.text
    digest = ShardSet.open(other_val).digest
    kept = list_checkpoints(run / "finetune" / "checkpoints")
    best = [c for c in kept if c.best]
    assert [c.manifest.facts["scored_on"] for c in best] == [digest]


def test_d1_scores_and_exports_name_run_checkpoint_and_evaluation_set(finished_run, tiny_shards, tmp_path):
    checkpoint = finished_run / "finetune" / "checkpoints" / "step-00000008"
    manifest = read_manifest(checkpoint)
    sums = sorted(f"{sha256((checkpoint / f.name).read_bytes()).hexdigest()}  {f.name}\n" for f in manifest.files)
    digest = sha256("".join(sums).encode()).hexdigest()
    report = json.loads((finished_run / "finetune" / "eval.json").read_text())
    assert report["data"]["manifest_digest"] == ShardSet.open(tiny_shards / "val").digest
    assert report["weights"]["run"] == manifest.facts["run"]
    assert report["weights"]["checkpoint_digest"] == digest
    export_run(finished_run, tmp_path / "export")
    lineage = read_info(tmp_path / "export").lineage
    assert lineage["run"] == manifest.facts["run"]
    assert lineage["checkpoint_digest"] == digest
    assert lineage["scored_on"] == report["data"]["manifest_digest"]


def test_d1_the_run_is_the_same_after_an_allowed_change(interrupted_run, copy_of, train_tiny):
    run = copy_of(interrupted_run)
    before = read_manifest(run / "finetune" / "checkpoints" / "step-00000005").facts
    train_tiny(run, {"stages.finetune.epochs": 3}, allow=["stages.finetune.epochs"])
    after = read_manifest(run / "finetune" / "checkpoints" / "step-00000012").facts
    assert after["recipe_digest"] != before["recipe_digest"]
    assert after["run"] == before["run"]
