"""`livt recipe`: what scripts and editors get to see."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from livt_scale.cli.recipe import app, check_one
from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import Recipe
from livt_scale.util.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
VIT_B = str(ROOT / "recipes/imagenet_lt/vit_b16.yaml")


def livt_recipe(*args):
    return CliRunner().invoke(app, list(args))


def test_show_prints_a_recipe_that_reads_back_to_the_same_run(tmp_path):
    shown = livt_recipe("show", VIT_B, "--set", "seed=5", "--set", "stages.*.epochs=70")
    assert shown.exit_code == 0
    (tmp_path / "shown.yaml").write_text(shown.stdout)
    again = load_recipe(tmp_path / "shown.yaml")
    assert again == load_recipe(VIT_B, sets=["seed=5", "stages.*.epochs=70"])
    assert "# pretrain peak lr: 0.0024 = 0.00015 * 4096 / 256" in shown.stdout


def test_show_as_json_holds_every_field():
    shown = json.loads(livt_recipe("show", VIT_B, "--json").stdout)
    assert set(shown) == set(Recipe.model_fields)
    assert shown["stages"]["pretrain"]["epochs"] == 800


def test_a_wrong_recipe_is_an_error_of_usage_before_anything_is_printed():
    result = livt_recipe("show", VIT_B, "--set", "sed=5")
    assert isinstance(result.exception, RecipeError)  # the command line prints it and exits with 2
    assert result.stdout == ""


def test_check_tells_of_every_file_and_fails_if_one_is_wrong(tmp_path):
    wrong = tmp_path / "it's wrong\nhere.yaml"
    wrong.write_text("name: x\nepoch: 3\n")
    result = livt_recipe("check", VIT_B, str(wrong), "--json")
    sound, unsound = json.loads(result.stdout)
    assert (result.exit_code, sound["errors"], len(unsound["errors"])) == (2, [], 3)
    assert sound["summary"].startswith("vit_b 224 px; pretrain 800 epochs")


def test_check_notes_data_that_are_not_here_and_data_makes_it_an_error(tmp_path):
    sets = [f"data.train={tmp_path}/none", f"data.val={tmp_path}/none"]
    noted = check_one(Path(VIT_B), sets=sets, data=False)
    assert (noted["exit_code"], len(noted["notes"])) == (0, 2)
    needed = check_one(Path(VIT_B), sets=sets, data=True)
    assert needed["exit_code"] == 2
    assert [error.partition(":")[0] for error in needed["errors"]] == ["data.train", "data.val"]
    assert check_one(Path(VIT_B), sets=["data.train=s3://b/t", "data.val=null"], data=False)["notes"] == []


def test_check_prints_ok_and_notes_for_people(capsys):
    result = livt_recipe("check", VIT_B, "--set", "data.train=/no/such", "--set", "data.val=null")
    assert result.output.splitlines()[0].startswith("ok ")
    assert "note     data.train: no shards in /no/such" in result.output


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda p: p.name)
def test_the_schema_knows_every_field_that_the_shipped_recipes_use(path):
    from livt_scale.config.yaml import parse

    schema = json.loads(livt_recipe("schema").stdout)

    def walk(values, part):
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[-1]] if "$ref" in part else part
        for option in part.get("anyOf", []):
            if "$ref" in option:
                part = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
            elif option.get("properties", {}).get("name", {}).get("const") == values.get("name", "bal_bce"):
                part = option  # the loss of that name
        for name, value in values.items():
            assert name in part["properties"], name
            if isinstance(value, dict):
                walk(value, part["properties"][name])

    walk(parse(path.read_text(), path).values, schema)


@pytest.mark.parametrize("size", ["vit_b16", "vit_l16", "vit_h14"])
def test_the_resolved_paper_recipes_are_what_somebody_last_read(size, golden, monkeypatch):
    """A changed default changes runs that never mention it: this shows it."""
    monkeypatch.chdir(ROOT)
    shown = livt_recipe("show", str(ROOT / f"recipes/imagenet_lt/{size}.yaml")).stdout
    golden(f"recipes/imagenet_lt_{size}.yaml", shown.replace(str(ROOT), "ROOT"))
