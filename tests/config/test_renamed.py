"""Old names of recipe fields and options: an error gives the new one; what a run saved under them is still read."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from livt_scale.cli import main as cli
from livt_scale.config.fields import all_fields
from livt_scale.config.load import from_saved, load_recipe, load_saved
from livt_scale.config.renamed import REMOVED, RENAMED, Removed, translate
from livt_scale.train.resume_rules import check_same
from livt_scale.util.errors import CheckpointMismatch, RecipeError

# what `livt train` wrote at commit 7d37c38, before fields were renamed: RUN/recipe.yaml and the facts of a checkpoint
SAVED = Path(__file__).parents[1] / "golden" / "saved-7d37c38"
BASE = "name: r\ndata: {train: t}\nstages: {pretrain: {epochs: 90}}\n"


def with_field(path: str, value: str = "7") -> str:
    part, name = path.split(".")
    return f"{BASE}{part}:\n  {name}: {value}\n"


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_refused_with_the_new_one_where_it_was_written(tmp_path, old, new):
    recipe = tmp_path / "a.yaml"
    recipe.write_text(with_field(old))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert caught.value.exit_code == 2
    assert caught.value.message == f"{recipe}, line 5: there is no field {old}: it is now called {new}"
    recipe.write_text(BASE)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, sets=[f"{old}=7"])
    assert caught.value.message == f"--set {old}: there is no field {old}: it is now called {new}"


def test_the_tables_name_fields_that_are_gone_and_fields_that_exist():
    fields = {".".join(path) for path in all_fields()}
    assert set(RENAMED.values()) <= fields
    assert not fields & (RENAMED.keys() | REMOVED.keys())


def test_a_removed_field_is_dropped_from_a_saved_recipe_only_where_it_had_no_effect(tmp_path, monkeypatch):
    monkeypatch.setitem(REMOVED, "log.colour", Removed(default="none", reason="nobody used it"))
    saved = tmp_path / "recipe.yaml"
    saved.write_text(with_field("log.colour", "none"))
    assert load_saved(saved) == load_recipe(tmp_path / "recipe.yaml", sets=["log={}"])
    saved.write_text(with_field("log.colour", "red"))
    for load in (load_saved, load_recipe):
        with pytest.raises(RecipeError, match=r"line 5: there is no field log\.colour: it was removed: nobody used it"):
            load(saved)


def test_translating_changes_neither_its_argument_nor_what_it_does_not_know():
    saved = {"faults": {"hang_s": 60, "heartbeat_s": 5}, "slurm": None, "log": 3, "x": [1]}
    assert translate(saved) == {"faults": {"stall_timeout_s": 60, "heartbeat_s": 5}, "slurm": None, "log": 3, "x": [1]}
    assert saved["faults"] == {"hang_s": 60, "heartbeat_s": 5}
    assert translate({"faults": {"hang_s": 1, "stall_timeout_s": 2}}) == {"faults": {"stall_timeout_s": 2}}


# --- what commit 7d37c38 saved ---


def facts(stage: str) -> dict:
    return json.loads((SAVED / f"{stage}-facts.json").read_text())


def test_the_recipe_of_an_old_run_directory_is_read():
    saved = load_saved(SAVED / "recipe.yaml")
    assert (saved.faults.stall_timeout_s, saved.slurm.signal_lead_s) == (540, 600)
    assert from_saved(facts("finetune")["recipe"], where=Path("x")).slurm.signal_lead_s == 300


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_an_old_checkpoint_is_resumed_by_the_same_recipe_and_by_no_other(stage):
    theirs, path = facts(stage), Path("step-00000005")
    recipe = load_saved(SAVED / "recipe.yaml")
    learnt = {**theirs["learnt_from"]}  # of which the digests of data and first weights count
    for seed, differs in ((0, False), (1, True)):
        ours = {"stage": stage, "recipe": {**recipe.model_dump(mode="json"), "seed": seed}, "learnt_from": learnt}
        if differs:
            with pytest.raises(CheckpointMismatch, match=r"seed: 0 in the checkpoint, 1 here"):
                check_same(ours, theirs, path)
        else:
            assert check_same(ours, theirs, path) == []


@pytest.mark.parametrize("words", [["submit", "a.yaml", "--at-once", "4"], ["export", "runs/x", "--from=best"]])
def test_an_old_option_is_wrong_usage_that_names_the_new_one(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["livt", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    old = words[-1].partition("=")[0] if "=" in words[-1] else words[-2]
    assert f"has no option {old}. It is now called {cli.RENAMED_OPTIONS[old]}" in capsys.readouterr().err


RESOLVED = json.loads((SAVED / "resolved.json").read_text())  # what losses and optimizers got, and margins for COUNTS
COUNTS = [500, 120, 60, 9, 1]
# Changed on purpose since (CHANGELOG.md): with what it had then, it still is the same.
CHANGED = {
    "recipes/fashion_mnist_lt/claims.yaml": [
        "stages.pretrain.epochs=15", "stages.finetune.epochs=3", "stages.*.warmup_epochs=1",
        "stages.finetune.base_lr=4e-3",
    ]
}  # fmt: skip


@pytest.mark.parametrize("name", RESOLVED)
def test_a_shipped_recipe_resolves_to_the_numbers_that_it_had(name):
    recipe = load_recipe(Path(__file__).parents[2] / name, sets=CHANGED.get(name, []))
    assert list(recipe.stage_names) == list(RESOLVED[name])
    for stage, numbers in RESOLVED[name].items():
        part = recipe.stage(stage)
        loss, by_class = numbers.pop("loss", None), numbers.pop("by_class", None)
        numbers["betas"] = tuple(numbers["betas"])
        assert part.trained_by.name == numbers.pop("optimizer", "adamw")
        assert {field: getattr(part, field) for field in numbers} == numbers
        if stage == "finetune":
            assert part.loss.model_dump() == loss
            made = part.loss.criterion(COUNTS).by_class
            assert (None if made is None else made.tolist()) == by_class
