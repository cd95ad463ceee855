"""The claims as grids of runs: what is shared is trained once, and arms differ in what their claim is about."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from livt_scale.cli import main
from livt_scale.config.load import load_recipe
from livt_scale.config.recipe import learnt_from
from livt_scale.longtail import class_counts_exponential
from livt_scale.losses import LOSSES
from livt_scale.plan.assumptions import accelerator
from livt_scale.plan.flops import classifier_flops, mae_flops
from livt_scale.plan.task import DataSet
from livt_scale.study import claims
from livt_scale.study.claims import CLAIMS, SETTINGS, epochs_of_equal_compute, loss_sets, runs_of
from livt_scale.study.cost import cost_of
from livt_scale.study.runs import Run, in_order
from livt_scale.util.choices import choose
from livt_scale.util.errors import UsageError
from livt_scale.util.resources import shipped

ALL = [(claim, on) for claim in CLAIMS for on in SETTINGS]


def runs(claim, on, seeds=(0, 1)):
    return [run for of in runs_of(CLAIMS[claim], SETTINGS[on], seeds=seeds, sets={}).values() for run in of]


def equal_compute(setting):
    return epochs_of_equal_compute(setting.load(), num_classes=setting.num_classes)


@pytest.mark.parametrize(("claim", "on"), ALL)
def test_every_run_of_every_claim_is_a_recipe_that_can_be_and_every_question_is_about_its_arms(claim, on, tmp_path):
    for run in in_order(runs(claim, on, seeds=(0,))):
        assert run.stage in run.load(tmp_path).stage_names
    arms = {arm.name for arm in CLAIMS[claim].arms(SETTINGS[on])}
    questions = CLAIMS[claim].questions(SETTINGS[on])
    assert questions
    assert set().union(*(ask.arms for ask in questions)) <= arms


@pytest.mark.parametrize("on", SETTINGS)
def test_what_two_claims_have_in_common_is_trained_once(on):
    every = [run for claim in CLAIMS for run in runs(claim, on)]
    ordered = in_order(every)
    assert len({run.name for run in ordered}) == len(ordered) < len(every)
    at = {run.name: k for k, run in enumerate(ordered)}
    assert all(run.after is None or at[run.after] < at[run.name] for run in ordered)


def test_the_arms_of_the_losses_differ_in_the_loss_and_in_what_it_cannot_take_alone(tmp_path):
    (first, *others) = [r for r in runs("losses", "fashion_mnist_lt", seeds=(0,)) if r.stage == "finetune"]
    base = learnt_from(first.load(tmp_path), "finetune")
    for run in others:
        own = learnt_from(run.load(tmp_path), "finetune")
        differs = {
            path.removeprefix("stages.finetune.")
            for path in base.keys() | own.keys()
            if base.get(path) != own.get(path)
        }
        assert all(path.startswith("loss.") or path in ("mixup", "cutmix", "smoothing") for path in differs), differs
        assert run.after == first.after, "one pretraining for all"


@pytest.mark.parametrize("on", SETTINGS)
def test_the_arms_of_balance_differ_in_network_and_set_alone(on, tmp_path):
    by_arm = {run.name.partition("/")[0]: run for run in runs("balance", on, seeds=(0,))}
    assert set(by_arm) == {"vit-lt", "vit-balanced", "resnet-lt", "resnet-balanced"}
    loaded = {name: run.load(tmp_path) for name, run in by_arm.items()}
    learnt = {name: learnt_from(recipe, "finetune") for name, recipe in loaded.items()}
    assert learnt["vit-lt"] == learnt["vit-balanced"], "the set's folder is no part of what is learnt from"
    assert learnt["resnet-lt"] == learnt["resnet-balanced"]
    differs = {path for path, value in learnt["vit-lt"].items() if learnt["resnet-lt"].get(path) != value}
    assert {path for path in differs if not path.startswith("model.")} == set()
    assert loaded["vit-lt"].data.train == loaded["resnet-lt"].data.train != loaded["vit-balanced"].data.train
    assert loaded["vit-balanced"].data.train == loaded["resnet-balanced"].data.train
    assert all(run.after is None for run in by_arm.values())
    assert all(recipe.stages.pretrain is None for recipe in loaded.values())


def test_balance_at_the_size_of_imagenet_is_as_the_recipes_from_scratch_have_it(tmp_path):
    by_arm = {run.name.partition("/")[0]: run.load(tmp_path) for run in runs("balance", "imagenet_lt", seeds=(0,))}
    assert by_arm["vit-lt"].model.size == "vit_b"
    assert by_arm["resnet-lt"].model.size == "resnet50"
    ours = by_arm["vit-lt"].stages.finetune.model_dump()
    recipe = load_recipe(shipped("recipes/imagenet_lt/vit_b16_scratch.yaml")).stages.finetune.model_dump()
    assert {name for name in ours if ours[name] != recipe[name]} <= {"loss", "micro_batch", "eval_every_epochs"}


def test_every_loss_of_the_paper_is_an_arm():
    paper = {"bal_bce", "bce", "ce", "bal_ce", "cb_ce", "cb_bce", "ldam", "mislas", "lade", "focal"}
    assert set(claims.LOSSES) == paper <= LOSSES.keys()
    for setting in SETTINGS.values():  # so `ce` is `ls_ce` too: test_smoothing_is_the_same_…
        assert setting.load().stage("finetune").smoothing == choose(LOSSES, {"name": "ls_ce"}).smoothing
    assert loss_sets("bal_bce") == {}


def test_tuned_losses_are_arms_of_their_own_and_meet_each_other(tmp_path):
    tuned = {"bal_ce": {"stages.finetune.loss.tau": 0.5}, "mislas": {"stages.finetune.loss.head_smoothing": 0.1}}
    setting = replace(SETTINGS["fashion_mnist_lt"], tuned=tuned)
    by_arm = {arm: runs for (arm, _), runs in runs_of(CLAIMS["losses"], setting, seeds=[0], sets={}).items()}
    assert list(by_arm) == [*claims.LOSSES, "bal_bce-hard", "bal_ce-hard", "bal_ce-tuned", "mislas-tuned"]
    loss = by_arm["bal_ce-tuned"][-1].load(tmp_path).stage("finetune").loss
    assert (loss.name, loss.tau) == ("bal_ce", 0.5)
    stage = by_arm["mislas-tuned"][-1].load(tmp_path).stage("finetune")
    assert (stage.loss.head_smoothing, stage.smoothing) == (0.1, 0)
    asked = [(ask.better, ask.worse) for ask in CLAIMS["losses"].questions(setting)]
    hard = [("bal_bce-hard", "lade"), ("bal_bce-hard", "bal_ce-hard")]
    assert asked[:9] == [("bal_bce", name) for name in claims.LOSSES[1:]]
    assert asked[9:-1] == [*hard, ("bal_bce", "bal_ce-tuned"), ("bal_bce", "mislas-tuned")]
    ours = replace(setting, tuned={"bal_bce": {"stages.finetune.loss.tau": 1.5}, **tuned})
    asked = [(ask.better, ask.worse) for ask in CLAIMS["losses"].questions(ours)]
    assert {("bal_bce", "bal_ce"), ("bal_bce-tuned", "bal_ce-tuned"), ("bal_bce-tuned", "bce")} <= set(asked)
    assert ("bal_bce", "bal_ce-tuned") not in asked


def test_equal_compute_from_scratch_is_no_less_than_both_stages():
    setting = SETTINGS["fashion_mnist_lt"]
    recipe = Run("x", setting.recipe).load(Path("/nowhere"))
    first = mae_flops(recipe.model, mask_ratio=recipe.stages.pretrain.mask_ratio).train
    second = classifier_flops(recipe.model, num_classes=10).train
    both = recipe.stages.pretrain.epochs * first + recipe.stages.finetune.epochs * second
    assert both <= equal_compute(setting) * second < both + second


def test_what_arms_derive_from_the_recipe_follows_the_overrides_of_the_command(tmp_path):
    """--set lays the length over the recipe; shares of it, multiples of it and equal compute are of that length."""
    sets = {"stages.pretrain.epochs": "30", "stages.finetune.epochs": "4"}
    setting = SETTINGS["fashion_mnist_lt"]

    def epochs(claim, stage):
        every = runs_of(CLAIMS[claim], setting, seeds=[0], sets=sets)
        return {arm: runs[-1].load(tmp_path).stage(stage).epochs for (arm, _), runs in every.items()}

    two_stages = epochs("two-stages", "finetune")
    assert two_stages["bal_bce"] == two_stages["scratch"] == 4
    assert two_stages["resnet-bal_ce"] == 8
    longer = equal_compute(setting.with_sets(sets))
    assert epochs("equal-compute", "finetune")["scratch-equal-compute"] == two_stages["deit-lt"] == longer
    assert 4 < longer < equal_compute(setting)
    assert set(epochs("balance", "finetune").values()) == {8}
    reconstruction = epochs("reconstruction", "pretrain")
    assert reconstruction["lt"] == reconstruction["balanced-vit_mini"] == 30
    assert reconstruction["lt-10-epochs"] == reconstruction["balanced-10-epochs"] == 10


@pytest.mark.parametrize("on", SETTINGS)
def test_labels_alone_for_longer_than_fine_tuning_have_their_own_schedule(on, tmp_path):
    setting = SETTINGS[on]
    claims_ = (CLAIMS["two-stages"], CLAIMS["equal-compute"])
    every = [of for claim in claims_ for of in runs_of(claim, setting, seeds=[0], sets={}).items()]
    stage = {arm: runs[-1].load(tmp_path).stage("finetune") for (arm, _), runs in every}
    rate = setting.from_scratch["stages.finetune.base_lr"]
    assert stage["bal_bce"].base_lr == stage["scratch"].base_lr != rate
    assert {stage[arm].base_lr for arm in ("scratch-equal-compute", "resnet-bal_ce", "deit-lt")} == {rate}


def test_an_override_does_not_take_away_what_makes_an_arm(tmp_path):
    sets = {"data.train": "/elsewhere/lt", "model.width": "72"}
    every = runs_of(CLAIMS["reconstruction"], SETTINGS["fashion_mnist_lt"], seeds=[0], sets=sets)
    loaded = {arm: runs[-1].load(tmp_path) for (arm, _), runs in every.items()}
    assert {arm: recipe.model.dims.width for arm, recipe in loaded.items() if arm.startswith("lt")} == {
        "lt": 72, "lt-40-epochs": 72, "lt-vit_nano": 48, "lt-vit_mini": 144,
    }  # fmt: skip
    assert loaded["lt"].data.train == "/elsewhere/lt"
    assert loaded["balanced"].data.train.endswith("train-balanced")
    setting, both = SETTINGS["fashion_mnist_lt"], {"stages.finetune.epochs": 9, "stages.*.epochs": 8}
    alone = runs_of(CLAIMS["balance"], setting, seeds=[0], sets=both)["vit-lt", 0][-1]
    assert alone.load(tmp_path).stage("finetune").epochs == 8 * setting.scratch_factor


def test_two_runs_of_one_name_that_differ_are_refused():
    with pytest.raises(UsageError, match="two different runs"):
        in_order([Run("a", Path("r"), {"seed": 0}), Run("a", Path("r"), {"seed": 1})])
    with pytest.raises(UsageError, match="not one of the runs"):
        in_order([Run("a", Path("r"), after="b")])


def test_whole_seeds_come_first_and_a_pretraining_just_before_the_first_that_needs_it():
    names = [run.name for run in in_order(runs("two-stages", "fashion_mnist_lt"))]
    one = ["pretrain-lt", "bal_bce", "scratch", "resnet-bal_ce", "deit-lt"]
    assert names == [f"{name}/seed-{seed}" for seed in (0, 1) for name in one]


@pytest.mark.parametrize(
    ("on", "largest", "classes", "imbalance"),
    [("fashion_mnist_lt", 6000, 10, 100), ("fashion_mnist_lt_if10", 6000, 10, 10), ("photographs_lt", 300, 60, 100)],
)
def test_the_cost_counts_the_images_that_the_sets_will_have(on, largest, classes, imbalance):
    images = int(class_counts_exponential(largest, classes, imbalance).sum())
    assert SETTINGS[on].num_images == SETTINGS[on].num_balanced == images


def test_the_cost_of_a_run_is_its_images_times_the_operations_of_one(tmp_path):
    setting = SETTINGS["imagenet_lt"]

    def cost(run):
        images, classes = setting.size_of(run)
        data = DataSet(images, classes, 110 * 1024, "the setting's size")
        return cost_of(run.load(tmp_path), run.stage, data=data, device=accelerator("h100"))

    long_tailed, balanced = (
        cost(Run("x", setting.recipe, {**sets, "stages.pretrain.epochs": 50}, "pretrain"))
        for sets in ({}, {"data.train": setting.balanced})
    )
    assert long_tailed.images == 115_846 // 4096 * 4096 * 50
    assert balanced.images == 160_000 // 4096 * 4096 * 50
    assert long_tailed.flops / long_tailed.images == pytest.approx(57e9, rel=0.02)  # plan.flops: 57 GFLOP an image
    low, likely, high = balanced.hours
    assert low < likely < high
    assert likely > balanced.flops / 989.5e12 / 3600  # no faster than the peak
    assert likely / long_tailed.hours[1] == pytest.approx(balanced.images / long_tailed.images, rel=0.02)
    resnet = cost(Run("x", Path(setting.recipe).with_name("resnet50_scratch.yaml")))
    assert 0 < resnet.hours[0] < resnet.hours[1] < resnet.hours[2]


@pytest.mark.parametrize("px", [28, 64, 224, 384])
def test_likely_hours_are_between_low_and_high_ones_whatever_the_size_of_the_images(px):
    stored = 0.75 * 3 * px**2
    recipe = SETTINGS["imagenet_lt"].load({"model.image_px": px, "model.patch_px": 4 if px == 28 else 16})
    cost = cost_of(recipe, "finetune", data=DataSet(14_886, 10, stored, "here"), device=accelerator("h100"))
    low, likely, high = cost.hours
    assert low < likely < high


def livt(monkeypatch, capsys, *words):
    monkeypatch.setattr("sys.argv", ["livt", "reproduce", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    return ended.value.code, capsys.readouterr()


def test_one_word_takes_a_claim_to_imagenet_and_dry_run_tells_its_cost(monkeypatch, capsys, tmp_path):
    for on in SETTINGS:
        code, said = livt(monkeypatch, capsys, "losses", "--on", on, "--dry-run", "--seeds=1", f"--out={tmp_path}")
        lines = said.out.splitlines()
        assert not code
        number = len([line for line in lines if line.startswith("livt train ")])
        assert number == 1 + len(CLAIMS["losses"].arms(SETTINGS[on]))  # with the pretraining
        assert "device hours" in lines[1]
        assert lines[2].startswith(f"livt train {SETTINGS[on].recipe}")
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_the_price_is_the_hours_at_that_of_one(monkeypatch, capsys):
    words = ("size", "--on", "imagenet_lt", "--dry-run", "--price-per-gpu-hour", "0.5")
    code, said = livt(monkeypatch, capsys, *words, "--json")
    assert not code
    summary = json.loads(said.out)
    low, likely, high = (
        f"{summary[hours] / 2:,.0f}" for hours in ("device_hours_low", "device_hours", "device_hours_high")
    )
    code, said = livt(monkeypatch, capsys, *words)
    assert said.out.splitlines()[2] == f"{low} to {high} at 0.5 an hour, likely {likely}"


@pytest.mark.parametrize(
    ("arms", "trained"),
    [
        (["scratch"], ["scratch"]),
        (["bal_bce", "scratch"], ["pretrain-lt", "bal_bce", "scratch"]),
        (["deit-lt"], ["resnet-bal_ce", "deit-lt"]),
    ],
)
def test_an_arm_alone_is_trained_with_what_it_needs(monkeypatch, capsys, tmp_path, arms, trained):
    chosen = [f"--arm={arm}" for arm in arms]
    words = ("two-stages", "--dry-run", "--json", "--seeds=2", f"--out={tmp_path}")
    code, said = livt(monkeypatch, capsys, *words, *chosen)
    assert not code
    names = [run["name"] for run in json.loads(said.out)["runs"]]
    assert names == [f"{name}/seed-{seed}" for seed in (0, 1) for name in trained]


def test_wrong_words_are_told_before_anything_is_started(monkeypatch, capsys):
    for words, said in {
        ("looses",): "did you mean 'losses'?",
        ("losses", "--on", "imagenet"): "did you mean 'imagenet_lt'?",
        ("losses", "--device", "a100"): "add --dry-run",
        ("losses", "--price-per-gpu-hour", "2"): "add --dry-run",
        ("losses", "--dry-run", "--device", "h10"): "did you mean 'h100'?",
        ("losses", "--on", "imagenet_lt", "--dry-run", "--device", "v100"): "has no bf16",
        ("losses", "--set", "seed"): "write --set a.b=c",
        ("losses", "--set", "sed=1"): "did you mean 'seed'?",
        ("losses", "--set", "seed=1"): "give --seeds",
        ("losses", "--set", "run_dir=runs/a"): "give --out",
        ("losses", "--arm", "bal_bec"): "did you mean 'bal_bce'?",
    }.items():
        code, captured = livt(monkeypatch, capsys, *words)
        assert code == 2, words
        assert said in captured.err.lower(), words


def test_shards_that_are_not_there_are_told_once_with_the_command_that_makes_them(monkeypatch, capsys, tmp_path):
    spec = tmp_path / "my-set.yaml"
    spec.write_text("name: my-set\n")
    train, out = tmp_path / "my-set" / "train", tmp_path / "out"
    words = ("losses", f"--out={out}", f"--set=data.train={train}", "--set=data.val=shards/fashion-mnist-lt/val")
    code, captured = livt(monkeypatch, capsys, *words)
    assert code
    assert captured.err.count("there is no folder") == 1
    assert f"there is no folder {train}. Build it: livt shards build {spec}" in captured.err
    assert not out.exists(), "nothing was started"
    spec.unlink()
    _, captured = livt(monkeypatch, capsys, *words)
    assert "Give the folder that contains manifest.json" in captured.err


def test_each_setting_evaluates_on_shards_that_its_own_build_makes():
    for on, setting in SETTINGS.items():
        data = setting.load().data
        specs = {Path(folder).parent for folder in (data.train, data.val, setting.balanced) if folder}
        assert all(folder.with_suffix(".yaml").is_file() for folder in map(Path.absolute, specs)), on
        assert Path(data.train).parent == Path(data.val).parent, on
