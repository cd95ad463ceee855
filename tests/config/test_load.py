"""Recipes on disk: what is read is what was meant, and a mistake is told with field, file, line and the right name."""

import math
import os
from copy import deepcopy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from livt_scale.config.fields import all_fields
from livt_scale.config.load import load_recipe, to_yaml
from livt_scale.config.recipe import Recipe
from livt_scale.config.yaml import dump
from livt_scale.losses import LOSSES
from livt_scale.util.errors import LivtError, RecipeError, UsageError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(p for p in (ROOT / "recipes").rglob("*.yaml") if p.parent.name != "base")
BASE = "name: r\ndata: {train: t}\nstages:\n  pretrain:\n    epochs: 90\n"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="a.yaml"):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(text, *, sets=(), name="a.yaml"):
    with pytest.raises(LivtError) as caught:
        load_recipe(write(text, name), sets=sets)
    return str(caught.value)


# --- the recipes that ship ---


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_shipped_recipe_is_sound_and_says_what_it_is(path):
    recipe = load_recipe(path)
    starts_elsewhere = any(word in path.name for word in ("scratch", "linear_probe", "from_mae", "lift", "lora"))
    assert recipe.stage_names == (("finetune",) if starts_elsewhere else ("pretrain", "finetune"))
    head = path.read_text().split("extends:")[0]
    for line in ("# Reproduces:", "# Hardware:", "# Expect:", "# Command:"):
        assert line in head
    assert f"recipes/{path.parent.name}/{path.name}" in head  # the command is this recipe's own


def test_recipe_names_differ_so_that_run_folders_do():
    names = [load_recipe(path).name for path in RECIPES]
    assert len(set(names)) == len(names) >= 5


def test_the_paper_recipe_holds_the_papers_values_not_only_our_defaults():
    recipe = load_recipe(ROOT / "recipes/imagenet_lt/vit_b16.yaml")
    assert (recipe.stages.pretrain.epochs, recipe.stages.finetune.epochs) == (800, 100)
    assert (recipe.stages.pretrain.global_batch, recipe.stages.finetune.global_batch) == (4096, 1024)
    loss = recipe.stages.finetune.loss
    assert (loss.name, loss.tau) == ("bal_bce", 1)
    for size in ("vit_l16", "vit_h14"):
        assert load_recipe(ROOT / f"recipes/imagenet_lt/{size}.yaml").stages.pretrain.epochs == 1600


@pytest.mark.parametrize(
    ("folder", "classes", "epochs"), [("imagenet_lt", 1000, 10), ("places_lt", 365, 10), ("inat18", 8142, 20)]
)
def test_the_recipes_of_lift_hold_its_codes_values(folder, classes, epochs):
    part = load_recipe(ROOT / "recipes" / folder / "clip_b16_lift.yaml").stages.finetune
    assert part.train.bottleneck == 2 ** math.floor(math.log2(classes / 24))
    assert (part.epochs, part.peak_lr, part.optimizer.momentum, part.cosine_scale) == (epochs, 0.01, 0.9, 25)
    assert (part.loss.name, part.loss.tau) == ("bal_ce", 1)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_shipped_recipe_takes_another_loss_by_one_word(path):
    """Two, where it has a tau that is not the default."""
    sets = ["stages.finetune.loss.tau=null"] if getattr(load_recipe(path).stages.finetune.loss, "tau", 1) != 1 else []
    assert not sets or path.parent.name == "places_lt"
    for name in ("bal_ce", "ce", "bce", "cb_ce", "ldam", "focal"):  # the others need targets of their own
        recipe = load_recipe(path, sets=[*sets, f"stages.finetune.loss.name={name}"])
        assert recipe.stages.finetune.loss.name == name


# --- extends and --set ---


def test_what_stands_in_the_file_wins_part_by_part_and_later_bases_win_over_earlier_ones():
    write("seed: 1\nstages:\n  pretrain: {epochs: 50, flip: false, mask_ratio: 0.5}\n", "bases/one.yaml")
    write("seed: 2\nstages:\n  pretrain: {mask_ratio: 0.6}\n", "bases/two.yaml")
    recipe = load_recipe(write(f"extends: [bases/one.yaml, bases/two.yaml]\n{BASE}"))
    assert recipe.seed == 2
    pretrain = recipe.stages.pretrain
    assert (pretrain.epochs, pretrain.flip, pretrain.mask_ratio) == (90, False, 0.6)


def test_null_takes_a_stage_away_and_a_part_of_it_brings_it_back():
    write(f"{BASE}  finetune: {{epochs: 20}}\n", "base.yaml")
    path = write("extends: base.yaml\nstages: {finetune: null}\n")
    assert load_recipe(path).stage_names == ("pretrain",)
    assert load_recipe(path, sets=["stages.finetune.epochs=30"]).stages.finetune.epochs == 30


def test_a_base_used_twice_is_no_circle_but_a_circle_is_told_with_its_files():
    write("seed: 3\n", "root.yaml")
    write("extends: root.yaml\n", "left.yaml")
    assert load_recipe(write(f"extends: [left.yaml, root.yaml]\n{BASE}")).seed == 3
    write("extends: c.yaml\n", "b.yaml")
    write("extends: b.yaml\n", "c.yaml")
    assert "b.yaml -> c.yaml -> b.yaml" in refusal(f"extends: b.yaml\n{BASE}")
    assert "circle" in refusal("extends: self.yaml\n", name="self.yaml")


@pytest.mark.parametrize("bases", ["7", "{a: b}", "[1]", "['']", "null"])
def test_extends_that_is_no_path_is_refused_with_its_line(bases):
    assert "a.yaml, line 2: extends is" in refusal(f"seed: 1\nextends: {bases}\n{BASE}")


def test_text_that_can_be_no_name_is_refused_with_its_line():
    assert "a.yaml, line 2: extends contains a NUL" in refusal(f'seed: 1\nextends: "a\\0b"\n{BASE}')
    assert "a.yaml, line 1: seed contains a NUL or half a character" in refusal(f'seed: "\\ud800"\n{BASE}')


def test_a_missing_base_is_told_where_it_is_named_with_the_nearest_file():
    write("seed: 1\n", "bases/livt.yaml")
    said = refusal(f"# head\nextends: bases/livd.yaml\n{BASE}")
    assert "a.yaml, line 2" in said
    assert "Did you mean 'bases/livt.yaml'?" in said


def test_a_mistake_in_a_base_is_told_at_its_own_line():
    write("stages:\n  pretrain:\n    epochs: many\n", "base.yaml")
    text = "extends: base.yaml\nname: r\ndata: {train: t}\n"
    assert "base.yaml, line 3: stages.pretrain.epochs is 'many'" in refusal(text)


@pytest.mark.parametrize("value", ["mean=[128, 0.5, 0.5]", "std=[60, 0.5, 0.5]"])
def test_statistics_of_pixels_up_to_255_are_told_to_be_divided(value):
    said = refusal(BASE, sets=[f"data.{value}"])
    assert f"data.{value[: value.index('=')]}.0" in said
    assert "divide by 255" in said


def test_a_value_laid_over_a_wrong_one_is_blamed_itself():
    write(BASE + "model: {channels: 1}\n", "base.yaml")
    said = refusal("extends: base.yaml\ndata:\n  mean: [a]\n")
    assert "a.yaml, line 3: data.mean.0" in said
    said = refusal(BASE.replace("train: t", "train: t, mean: [0, 0, a]"), sets=["data.mean=[b, 0, 0]"])
    assert said.startswith("--set data.mean: data.mean.0 is 'b'")


def test_set_reaches_every_part_and_one_stage_or_all():
    text = BASE + "  finetune: {}\n"
    sets = [
        "seed=4",
        "stages.*.epochs=77",
        "stages.finetune.loss.name=ce",
        "data.mean=[0.1, 0.2, 0.3]",
        "model.size=vit_s",
    ]
    recipe = load_recipe(write(text), sets=sets)
    assert (recipe.seed, recipe.stages.pretrain.epochs, recipe.stages.finetune.epochs) == (4, 77, 77)
    assert (recipe.stages.finetune.loss.name, recipe.data.mean, recipe.model.size) == ("ce", (0.1, 0.2, 0.3), "vit_s")
    assert load_recipe(write(BASE), sets=["stages.*.epochs=41"]).stage_names == ("pretrain",)  # makes no stage


@pytest.mark.parametrize(
    "folder", ["a: b #c", "2026", "1e-3", "true", "with space", "quo'te\"s", "[x]", "a=b", "ünï", "- x"]
)
def test_a_set_on_a_text_field_takes_the_text_as_it_stands(folder):
    sets = [f"run_dir={folder}", f"slurm.environment.SAID={folder}"]
    recipe = load_recipe(write(BASE), sets=sets)
    assert recipe.run_dir == str(Path.cwd() / folder)
    assert recipe.slurm.environment == {"SAID": folder}


def test_a_set_on_what_may_be_text_or_another_value_is_read():
    sets = ["slurm.options.exclusive=true", "slurm.options.nice=5", "data.workers=3"]
    recipe = load_recipe(write(BASE), sets=sets)
    assert (recipe.slurm.options, recipe.data.workers) == ({"exclusive": True, "nice": 5}, 3)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("seed", "not of the form a.b=value"),
        ("=3", "not of the form"),
        ("a..b=3", "not of the form"),
        ("seed=", "has no value"),
        ("seed=[1", "not YAML"),
        ("seed=!!python/object/apply:os.getcwd []", "refused"),
        ("seed=.nan", "finite"),
        ("name.part=3", "it has no parts"),
        ("extends=x.yaml", "only a file can extend"),
        ("sed=3", "--set sed: there is no field sed: did you mean 'seed'?"),
        ("stage.pretrain.epochs=3", "did you mean 'stages'?"),
        ("epochs=3", "did you mean 'stages.pretrain.epochs' or 'stages.finetune.epochs'?"),
        ("stages.*.mixup=0", "there is no field stages.pretrain.mixup: did you mean 'stages.finetune.mixup'?"),
        ("stages.pretrain.epochs=0", "--set stages.pretrain.epochs"),
        ("name=\udcff", "not UTF-8"),
    ],
)
def test_a_wrong_set_is_told_and_counts_as_wrong_usage(wrong, said):
    with pytest.raises(UsageError) as caught:
        load_recipe(write(BASE), sets=[wrong])
    assert said in str(caught.value)
    assert caught.value.exit_code == 2


def test_set_for_every_stage_needs_one():
    assert "no stage" in refusal("name: r\n", sets=["stages.*.epochs=3"])
    assert "no stage" in refusal("name: r\nstages: 3\n", sets=["stages.*.epochs=3"])


# --- mistakes ---


def test_every_mistake_is_told_at_once_each_on_a_line():
    said = refusal(BASE + "    epoch: 3\n    flip: 7\nsed: 1\n").splitlines()
    assert len(said) == 3
    assert all(line.startswith("a.yaml, line ") for line in said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a.yaml is empty"),
        ("# only a comment\n", "a.yaml is empty"),
        ("- a\n- b\n", "line 1: the file is not a mapping"),
        ("just text", "line 1: the file is not a mapping"),
        ("name: [r\n", "not YAML"),
        ("a: b: c\n", "line 1: not YAML"),
        ("name: a\x01b\n", "not YAML"),
        (f"{BASE}---\n{BASE}", "not YAML"),
        ("[" * 3000, "more than 32 deep"),
        (BASE + "seed: 1\nseed: 2\n", "line 7: seed is given twice"),
        (BASE + "    epochs: 91\n", "line 6: stages.pretrain.epochs is given twice"),
        (BASE + "[1]: x\n", "line 6: the file has a list or a part for a name"),
        (BASE + "seed: {a: 1}\n", "line 6: seed is {'a': 1}"),
        (BASE + "model: 3\n", "line 6: model is 3, but it is a part that has fields: size"),
        (BASE + "model: null\n", "line 6: model is null"),
        (BASE + "model: {size: vit_x}\n", "line 6: model.size is 'vit_x': did you mean 'vit_"),
        (BASE + "seed: true\n", "seed is true"),
        (BASE + "seed: '7'\n", "seed is '7'"),
        (BASE + "seed: 7.5\n", "seed is 7.5"),
        (BASE + "seed: -1\n", "seed is -1"),
        (BASE + "seed: .inf\n", "seed is .inf"),
        (BASE + "seed: 1e999\n", "seed is 1e999"),
        (BASE + f"seed: {'9' * 5000}\n", "finite number"),
        (BASE + "log: {tensorboard: yes}\n", "should be true or false"),
        (BASE.replace("name: r", "name: 7"), "line 1: name is 7"),
        (BASE.replace("name: r", "name: ''"), "line 1: name is ''"),
        (BASE.replace("train: t", "train: ''"), "data.train is ''"),
        (BASE.replace("{train: t}", "t"), "data is 't', but it is a part"),
        (BASE.replace("90", "[90]"), "stages.pretrain.epochs is [90]"),
        (BASE + "    warmup_epochs: 95\n", "line 6: stages.pretrain.warmup_epochs is 95, more than epochs = 90"),
        ("name: r\nstages: {pretrain: {}}\n", "data is missing and has no default"),
    ],
)
def test_a_mistake_is_told_by_field_file_and_line(text, said):
    assert said in refusal(text)


def test_a_file_that_is_no_text_or_not_there_is_told():
    Path("b.yaml").write_bytes(b"\x80\x81")
    for path, said in [("b.yaml", "not text in UTF-8"), ("a.yml", "there is no recipe"), (".", "cannot be read")]:
        with pytest.raises(RecipeError, match=said):
            load_recipe(path)
    with pytest.raises(RecipeError, match=r"Did you mean 'b\.yaml'"):
        load_recipe("bb.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe("a\0b.yaml")


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [pwned]",
        "!!python/object/new:os.mkdir [pwned]",
        "!!python/name:os.mkdir ''",
        "!!python/tuple [1]",
        "!!binary aGk=",
        "!!set {a, b}",
        "!!timestamp 2026-01-01",
        "!!int x",
        "!mine {a: 1}",
    ],
)
def test_a_tag_from_a_stranger_runs_nothing_and_is_refused(value):
    assert "refused" in refusal(BASE + f"model: {value}\n")
    assert not Path("pwned").exists()


def test_a_value_that_holds_itself_or_unfolds_without_end_is_refused():
    assert "line 6: model.decoder holds itself" in refusal(BASE + "model: &m {decoder: *m}\n")
    assert "holds itself" in refusal(BASE + "model: &m {<<: *m}\n")
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    assert "more than 10000 values" in refusal(bomb)


# --- what plain values mean ---


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5e-4", 1.5e-4), ("2E+1", 20.0), (".5", 0.5), ("1", 1.0), ("1_0.5", 10.5)]
)
def test_numbers_in_every_usual_spelling_are_numbers(text, value):
    assert load_recipe(write(BASE + f"    base_lr: {text}\n")).stages.pretrain.base_lr == value


@pytest.mark.parametrize("text", ["no", "on", "y", "12:30", "2026-01-01", "1.2.3", "0x10", "=", "e5", "1e"])
def test_text_that_older_yaml_takes_for_something_else_stays_text(text):
    assert load_recipe(write(BASE.replace("name: r", f"name: {text}"))).name == text


def test_merge_keys_bring_in_what_a_part_has_not():
    text = "name: r\ndata: {train: t}\nstages:\n  pretrain: &p {epochs: 90, flip: false}\n"
    recipe = load_recipe(write(text + "  finetune:\n    <<: *p\n    epochs: 60\n"))
    assert (recipe.stages.finetune.epochs, recipe.stages.finetune.flip) == (60, False)
    assert "line 4: stages.finetune.mask_ratio" not in refusal(text + "  finetune: {<<: *p, mask_ratio: 1}\n")
    assert "neither a part" in refusal(text + "  finetune: {<<: 3}\n")
    assert "line 4: there is no field stages.pretrain.fold" in refusal(text.replace("flip", "fold"))


# --- out and in again ---


@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1, max_size=100).filter(
        lambda s: s.isprintable() and s not in (".", "..")
    ),
    lr=st.floats(1e-30, 1e30),
    seed=st.integers(0, 10**18),
    ratio=st.floats(0.01, 0.99),
)
@settings(max_examples=20, deadline=None)
def test_a_saved_recipe_reads_back_to_the_same_recipe(tmp_path_factory, name, lr, seed, ratio):
    stages = {"pretrain": {"base_lr": lr, "mask_ratio": ratio}, "finetune": {"loss": {"name": "ce"}}}
    recipe = Recipe.model_validate(
        {"name": name, "seed": seed, "data": {"train": "/t"}, "run_dir": f"/{name}", "stages": stages}
    )
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert load_recipe(path) == recipe
    assert to_yaml(load_recipe(path)) == to_yaml(recipe)


@pytest.mark.parametrize(
    "name", ["1e-3", "010", "089", "1_0", "~", "", "null", "<<", "yes", ".nan", "a: b", "'", '"', "\n x"]
)
def test_text_that_looks_like_something_else_survives_saving(name):
    data = {"train": f"/x{name}", "val": name or "/v"}
    recipe = Recipe.model_validate({"name": name or "-", "data": data, "run_dir": "r", "stages": {"pretrain": {}}})
    Path("saved.yaml").write_text(to_yaml(recipe))
    loaded = load_recipe("saved.yaml")
    assert (loaded.name, loaded.data.train) == (recipe.name, recipe.data.train)


INSIDE = {"container": {"by": "pyxis", "image": "i"}}
UNMIXED = {"smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0}
VARIANTS = [  # of the fields that are chosen by a name
    *({"loss": {"name": name}} for name in LOSSES),
    *({"train": {"name": name}} for name in ("lora", "adaptformer", "vpt")),
    {"optimizer": {"name": "sgd"}},
    {"distill": {"teacher": "/t"}, "loss": {"name": "ce"}},
    {"sampling": {"policy": "progressive", "from": "instance", "to": "sqrt"}},
]


def full_recipes():
    """Recipes, as trees, that between them write every field."""
    for changed in VARIANTS:
        finetune = {"loss": {"name": "bal_bce"}, "ema": {}, **UNMIXED, **changed}
        pretrain = {"sampling": changed["sampling"]} if "sampling" in changed else {}
        stages = {"pretrain": pretrain, "finetune": finetune}
        recipe = {"name": "r", "data": {"train": "/t"}, "run_dir": "r", "stages": stages, "slurm": INSIDE}
        recipe["model"] = {"distillation_token": "distill" in changed}
        yield Recipe.model_validate(recipe).model_dump(mode="json")


def holds(tree, path):
    for key in path:
        if not isinstance(tree, dict) or key not in tree:
            return False
        tree = tree[key]
    return True


FULL = list(full_recipes())


def test_the_full_recipes_write_every_field():
    assert [path for path in all_fields() if not any(holds(tree, path) for tree in FULL)] == []


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_misspelt_field_anywhere_is_refused(tmp_path_factory, data):
    """Pain 36 of the neighbours: a misspelt key is ignored and the default used."""
    where = data.draw(st.sampled_from(list(all_fields())))
    tree = deepcopy(data.draw(st.sampled_from([tree for tree in FULL if holds(tree, where)])))
    part = tree
    for key in where[:-1]:
        part = part[key]
    at, letter = data.draw(st.integers(0, len(where[-1]))), data.draw(st.sampled_from("abeostz_0-"))
    edits = [where[-1][:at] + letter + where[-1][at:], where[-1][:at] + where[-1][at + 1 :], where[-1].swapcase()]
    wrong = data.draw(st.sampled_from([e for e in edits if e and e not in part]))
    part[wrong] = part.pop(where[-1])
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    path.write_text(dump(tree))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert f"there is no field {'.'.join((*where[:-1], wrong))}" in str(caught.value)
    assert f"{path}, line " in str(caught.value)


# --- where the data are ---


def test_a_relative_folder_is_looked_for_here_then_above_the_recipe():
    Path("project/shards/set").mkdir(parents=True)
    path = write(BASE.replace("train: t", "train: shards/set"), "project/recipes/x/a.yaml")
    assert load_recipe(path).data.train == os.path.realpath("project/shards/set")
    Path("shards/set").mkdir(parents=True)
    assert load_recipe(path).data.train == os.path.realpath("shards/set")
    assert load_recipe(path, sets=["data.train=s3://bucket/set"]).data.train == "s3://bucket/set"
    assert load_recipe(path, sets=["data.train=/no/such"]).data.train == "/no/such"


def test_files_of_weights_and_vectors_are_looked_for_above_the_recipe_too():
    Path("project/recipes").mkdir(parents=True)
    sets = ["stages={finetune: {init: weights, weights: w, head_init: file, head_file: v}}"]
    for name in "wv":
        Path("project", name).touch()
    part = load_recipe(write(BASE, "project/recipes/a.yaml"), sets=sets).stages.finetune
    assert [part.weights, part.head_file] == [os.path.realpath(f"project/{name}") for name in "wv"]


def test_the_run_directory_follows_from_the_name_unless_given():
    assert load_recipe(write(BASE)).run_dir == str(Path("runs/r").absolute())
    assert load_recipe(write(BASE), sets=["run_dir=elsewhere/x"]).run_dir == str(Path("elsewhere/x").absolute())


@pytest.mark.parametrize("group", ["imagenet_lt", "imagenet_bal", "inat18", "places_lt"])
def test_the_recipes_for_gpus_compile_their_vits_alone(group):
    for path in sorted((ROOT / "recipes" / group).glob("*.yaml")):
        recipe = load_recipe(path)
        assert recipe.parallel.compile == recipe.model.is_vit, path
