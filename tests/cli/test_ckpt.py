from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime

import pytest
import torch
from typer.testing import CliRunner

from livt_scale.checkpoint import catalog
from livt_scale.checkpoint.load import Position, Retention, Saver, read_manifest
from livt_scale.cli.ckpt import app
from livt_scale.config.load import to_yaml
from livt_scale.config.recipe import Recipe
from livt_scale.models.classifier import build_classifier
from livt_scale.train.resume_rules import check_same
from livt_scale.train.train_state import run_facts
from livt_scale.util.errors import CheckpointError, UsageError
from tests.tiny_run import tiny_recipe, tiny_shards


def livt_ckpt(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def run(tmp_path):
    """A run with three checkpoints of pretraining, the middle one damaged, and a final one of fine-tuning."""
    run = tmp_path / 'my "run"'
    (run / "samples").mkdir(parents=True)
    (run / "recipe.yaml").write_text("name: x\n")
    for stage, saved in (("pretrain", (10, 20, 30)), ("finetune", (5,))):
        with Saver(run / stage / "checkpoints", mode="sync", retention=Retention(keep_last=9)) as saver:
            for step in saved:
                saver.save(
                    {"model.w": torch.full((9,), float(step))},
                    position=Position(step // 10, step),
                    facts={"stage": stage},
                    score=0.5 if stage == "finetune" else None,
                    final=stage == "finetune",
                )
    (run / "pretrain" / "checkpoints" / "step-00000020" / "__0_0.distcp").write_bytes(b"")
    return run


def test_a_checkpoint_that_the_run_removes_during_verify_is_not_damaged(run, monkeypatch):
    first = run / "pretrain" / "checkpoints" / "step-00000010"
    shutil.rmtree(first.with_name("step-00000020"))
    real = catalog.verify

    def during(path):
        shutil.rmtree(first, ignore_errors=True)
        return real(path)

    monkeypatch.setattr(catalog, "verify", during)
    result = livt_ckpt("verify", run)
    assert (result.exit_code, result.stdout.count(": complete"), result.stdout.count("step-")) == (0, 2, 2)
    assert livt_ckpt("verify", first).exit_code == 1  # it was asked for by name


def test_ls_tells_step_epoch_size_age_and_what_is_damaged(run, monkeypatch):
    started = datetime.fromtimestamp((run / "recipe.yaml").stat().st_mtime, UTC)  # before anything was saved

    class Stopped(datetime):
        @classmethod
        def now(cls, tz=None):
            return started.astimezone(tz)

    monkeypatch.setattr("datetime.datetime", Stopped)
    result = livt_ckpt("ls", run)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["pretrain", "10", "1"],
        ["pretrain", "20", "2"],
        ["pretrain", "30", "3"],
        ["finetune", "5", "0"],
    ]
    assert "damaged   __0_0.distcp has 0 bytes" in lines[2]
    assert lines[4].split()[5:] == ["now", "complete", "best,", "final,", "score", "0.5000"]


def test_ls_json_is_for_scripts(run):
    rows = json.loads(livt_ckpt("ls", run, "--json").stdout)["checkpoints"]
    assert [(r["stage"], r["step"], r["epoch"], r["whole"], r["best"], r["final"]) for r in rows] == [
        ("pretrain", 10, 1, True, False, False),
        ("pretrain", 20, 2, False, False, False),
        ("pretrain", 30, 3, True, False, False),
        ("finetune", 5, 0, True, True, True),
    ]
    assert "__0_0.distcp" in rows[1]["why"]
    assert all(r["bytes"] > 0 and r["age_s"] >= 0 and r["path"].startswith(str(run)) for r in rows)


@pytest.mark.parametrize(
    ("place", "steps"), [("pretrain", [10, 20, 30]), ("pretrain/checkpoints", [10, 20, 30]), ("finetune", [5])]
)
def test_ls_takes_a_stage_or_the_folder_itself(run, place, steps):
    rows = json.loads(livt_ckpt("ls", run / place, "--json").stdout)["checkpoints"]
    assert [row["step"] for row in rows] == steps


def test_quick_reads_sizes_alone(run):
    data = run / "pretrain" / "checkpoints" / "step-00000030" / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[50] ^= 1
    data.write_bytes(raw)
    assert "changed" in livt_ckpt("ls", run).stdout
    assert "changed" not in livt_ckpt("ls", run, "--quick").stdout


def test_verify_is_zero_for_complete_checkpoints_and_one_for_damage(run):
    checkpoints = run / "pretrain" / "checkpoints"
    assert livt_ckpt("verify", checkpoints / "step-00000010").exit_code == 0
    assert livt_ckpt("verify", run / "finetune").exit_code == 0
    result = livt_ckpt("verify", checkpoints / "step-00000020")
    assert result.exit_code == 1
    assert "__0_0.distcp has 0 bytes" in result.stdout
    result = livt_ckpt("verify", run, "--json")
    assert result.exit_code == 1
    assert [row["whole"] for row in json.loads(result.stdout)["checkpoints"]] == [True, False, True, True]


def test_verify_of_a_copy_under_another_name(run, tmp_path):
    copy = (run / "finetune" / "checkpoints" / "step-00000005").rename(tmp_path / "a copy")
    assert livt_ckpt("verify", copy).exit_code == 0


def test_what_is_no_run_is_said(run, tmp_path):
    for place in (tmp_path / "absent", run / "samples"):
        for command in ("ls", "verify"):
            assert isinstance(livt_ckpt(command, place).exception, UsageError)


def test_a_run_without_checkpoints_lists_none_and_cannot_be_verified(tmp_path):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    assert "No checkpoints" in livt_ckpt("ls", tmp_path).stdout
    assert json.loads(livt_ckpt("ls", tmp_path, "--json").stdout) == {"checkpoints": []}
    assert isinstance(livt_ckpt("verify", tmp_path).exception, CheckpointError)


def test_convert_there_and_back_and_what_it_says(run, tmp_path):
    path, file, back = run / "finetune" / "checkpoints" / "step-00000005", tmp_path / "a.safetensors", tmp_path / "b"
    result = livt_ckpt("convert", path, "--to", file)
    assert result.exit_code == 0
    said = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert said["from"] == "a checkpoint of livt, step-00000005, by 1 ranks"
    assert said["used"].startswith("1 tensors of the model, 0 of its AdamW")
    told = json.loads(livt_ckpt("convert", file, "--to", back, "--json").stdout)
    assert (told["left"], told["made"], told["to"]) == ([], [], str(back))
    assert livt_ckpt("verify", back).exit_code == 0
    assert isinstance(livt_ckpt("convert", file, "--to", back).exception, UsageError)


def test_convert_with_a_recipe_gives_what_train_asks_for(tmp_path):
    shards = tiny_shards(tmp_path, {"a": 9, "b": 7})
    recipe = tiny_recipe(train=tmp_path / "set")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    model = build_classifier(recipe.model, num_classes=2, drop_path=0.0)
    torch.save({"model": model.state_dict(), "epoch": 2}, tmp_path / "checkpoint.pth")
    words = ("convert", tmp_path / "checkpoint.pth", "--recipe", tmp_path / "recipe.yaml", "--stage", "finetune")
    assert "give --step" in livt_ckpt(*words, "--to", tmp_path / "x").exception.remedy
    result = livt_ckpt(*words, "--to", tmp_path / "step-00000004", "--step", "4")
    assert result.exit_code == 0, result.exception
    assert "left  epoch" in result.stdout
    manifest = read_manifest(tmp_path / "step-00000004")
    assert manifest.position == Position(2, 4)  # 16 images, 8 a batch
    facts = run_facts(recipe, "finetune", shards, strategy="ddp", origin=None)
    assert check_same(facts, manifest.facts, tmp_path) == []


def converted_pretraining(folder, **fields):
    """The result of a conversion of pretraining with a recipe of `fields`, and the recipe."""
    tiny_shards(folder, {"a": 9, "b": 7})
    recipe = tiny_recipe(train=folder / "set").model_dump(mode="json")
    recipe["stages"]["pretrain"] = {"epochs": 2, "warmup_epochs": 1, "global_batch": 8, "micro_batch": 8} | fields
    recipe = Recipe.model_validate(recipe)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    torch.save({"model": {"w": torch.ones(2)}}, folder / "x.pth")
    words = ("convert", folder / "x.pth", "--recipe", folder / "recipe.yaml", "--step", "2")
    return livt_ckpt(*words, "--to", folder / "step-00000002"), recipe


def test_convert_records_the_recipe_as_its_stage_sees_it(tmp_path):
    result, recipe = converted_pretraining(tmp_path, image_px=56)
    assert result.exit_code == 0, result.exception
    recorded = Recipe.model_validate(read_manifest(tmp_path / "step-00000002").facts["recipe"])
    assert recorded.model == recipe.at("pretrain").model != recipe.model


def test_convert_refuses_a_recipe_whose_weights_the_checkpoint_does_not_record(tmp_path):
    result, _ = converted_pretraining(tmp_path, weights="mae.pth")
    assert isinstance(result.exception, UsageError)
    assert "stages.pretrain.weights=null" in result.exception.remedy


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--step", "3"), "say more of a --recipe"),
        (("--stage", "finetune"), "say more of a --recipe"),
        (("--recipe", "RECIPE", "--stage", "pretrain"), "no stage pretrain"),
        (("--recipe", "RECIPE", "--stage", "finetune"), "says itself what it was trained by"),
    ],
)
def test_options_of_convert_that_cannot_be(run, tmp_path, words, says):
    (tmp_path / "recipe.yaml").write_text(to_yaml(tiny_recipe(train=tmp_path / "set")))
    path = run / "finetune" / "checkpoints" / "step-00000005"
    if says.startswith("no stage"):
        torch.save({"a": torch.ones(1)}, path := tmp_path / "x.pth")
    words = [str(tmp_path / "recipe.yaml") if word == "RECIPE" else word for word in words]
    error = livt_ckpt("convert", path, "--to", tmp_path / "out", *words).exception
    assert isinstance(error, UsageError)
    assert says in str(error)
    assert not (tmp_path / "out").exists()


def test_neither_command_imports_torch(run):
    program = (
        "import sys; from livt_scale.cli.ckpt import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    for command in ("ls", "verify"):
        subprocess.run([sys.executable, "-c", program, command, str(run / "finetune")], check=True, timeout=60)
