"""`livt shards bench` as people type it: rates, what GPUs would need, and whether it suffices."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from livt_scale.cli.main import app
from livt_scale.cli.shards_bench import told
from livt_scale.doctor.decode import bench, endless, needed
from livt_scale.util.errors import UsageError
from tests.data.tiny_sets import HOSTILE, tiny_recipe, tiny_set

FACTS = {
    "set": "s",
    "stage": "pretrain",
    "image_px": 224,
    "cores": 4,
    "images_per_s": {"core": 1000.0, "machine": 3600.0},
}


def run(*arguments: object):
    return CliRunner().invoke(app, ["shards", "bench", *map(str, arguments), "--seconds", "0.2"])


def test_a_folder_is_measured_and_what_gpus_need_is_told(tmp_path):
    tiny_set(tmp_path / HOSTILE)
    done = run(tmp_path / HOSTILE, "--image-px", 32, "--gpus", 8, "--images-per-s-per-gpu", 1e9, "--json")
    assert done.exit_code == 0, done.output
    (facts,) = json.loads(done.stdout)["stages"]
    assert facts["images_per_s"]["core"] > 10
    assert facts["images_per_s"]["machine"] > 10
    assert facts["needed"]["images_per_s"] == 8e9
    assert facts["needed"]["suffices"] is False


def test_both_stages_of_a_recipe_are_measured_and_two_samples_are_enough(tmp_path):
    shards = tiny_set(tmp_path / "set", num_samples=3, num_classes=2)
    for stage in ("pretrain", "finetune"):
        facts = bench(shards, tiny_recipe(tmp_path / "set"), stage, seconds=0.1, cores=1)
        assert facts["stage"] == stage
        assert min(facts["images_per_s"].values()) > 1


def test_the_recipe_s_transform_is_kept_and_its_batch_made_to_fit(tmp_path):
    recipe = tiny_recipe(tmp_path)
    changed = endless(recipe, "finetune", num_samples=5, workers=3)
    assert changed.stages.finetune.global_batch == 4
    assert changed.data.workers == 3
    assert changed.stages.finetune.rand_augment == recipe.stages.finetune.rand_augment
    assert changed.model == recipe.model


def test_a_recipe_with_several_views_or_lane_groups_is_measured_too(tmp_path):
    shards = tiny_set(tmp_path / "set", num_samples=30, num_classes=2)
    views = {f"stages__{stage}__repeats": 3 for stage in ("pretrain", "finetune")}
    sizes = {f"stages__{s}__{b}": 768 for s in ("pretrain", "finetune") for b in ("global_batch", "micro_batch")}
    recipe = tiny_recipe(tmp_path / "set", data__lane_groups=128, **views, **sizes)
    for stage in ("pretrain", "finetune"):
        assert min(bench(shards, recipe, stage, seconds=0.1, cores=1)["images_per_s"].values()) > 1


@pytest.mark.parametrize(("each", "suffices"), [(450.0, True), (451.0, False)])
def test_it_suffices_exactly_when_the_machine_s_rate_reaches_the_need(each, suffices):
    facts = needed(FACTS, gpus=8, images_per_s_per_gpu=each)
    assert facts["needed"]["suffices"] is suffices
    assert facts["needed"]["cores"] == pytest.approx(8 * each / 900, abs=0.05)
    lines = told(facts)
    assert "one core decodes 1,000 images/s, 4 cores 3,600" in lines[0]
    assert ("does not suffice" in lines[1]) is not suffices


def test_no_channels_are_not_three(tmp_path):
    tiny_set(tmp_path / "set", num_samples=4)
    assert run(tmp_path / "set", "--channels", 0).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "8"], "belong together"),
        (["--channels", "2"], "--channels is 2"),
        (["--set", "seed=1"], "overrides a recipe value"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, arguments, said):
    tiny_set(tmp_path / "set", num_samples=4)
    done = run(tmp_path / "set", *arguments)
    assert isinstance(done.exception, UsageError)
    assert said in str(done.exception)
