"""A study from its YAML file to its table: what it consists of, what is shared, what counts, and mistakes."""

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from livt_scale.cli import main
from livt_scale.config.recipe import learnt_from
from livt_scale.data.shard_set import ShardSet
from livt_scale.study import local_runner, results_page
from livt_scale.study.collect import sets_read
from livt_scale.study.compare import compare_settings
from livt_scale.study.definition import FINETUNE_ONLY, load_study, points, points_named, runs
from livt_scale.study.local_runner import run_all
from livt_scale.study.reconstruction_loss import reconstruction_loss
from livt_scale.study.slurm_runner import ready, whole_recipe
from livt_scale.study.subsets import build_subsets, subset_counts, wanted_subsets
from livt_scale.study.table import as_csv, collect_study, state_of
from livt_scale.util.errors import DataError, UsageError
from tests import warm
from tests.study import synthetic
from tests.whole_runs import small_data

ROOT = Path(__file__).resolve().parents[2]
QUICK = ROOT / "recipes" / "fashion_mnist_lt" / "quickstart.yaml"
SMALL = {"model.width": 24, "model.depth": 1}
TINY = {
    "name": "tiny",
    "recipe": str(QUICK),
    "sizes": {"a": SMALL, "b": {"model.width": 48, "model.depth": 1}},
    "axes": {"size": ["a", "b"], "loss": ["bal_bce", "ce"], "seed": [3, 4]},
    "sets": {
        "model.decoder.width": 32, "model.decoder.depth": 1, "model.decoder.heads": 2, "stages.*.epochs": 1,
        "stages.*.warmup_epochs": 0, "log.tensorboard": False, "log.every_steps": 1, "data.workers": 0,
    },
}  # fmt: skip


def write(folder, **changes):
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


def loaded(folder, **changes):
    return load_study(write(folder, **changes), folder=folder / "runs")


# --- what it consists of ---


def test_every_combination_is_a_point_and_what_differs_in_fine_tuning_alone_shares_a_pretraining(tmp_path):
    study = loaded(tmp_path)
    every = points(study)
    assert len({p.name for p in every}) == len(every) == 8
    assert {p.pretraining for p in every} == {f"{size}-bal_bce-seed-{seed}" for size in "ab" for seed in (3, 4)}
    ordered = runs(study)
    assert [run.stage for run in ordered].count("pretrain") == 4
    by_name = {run.name: run for run in ordered}
    for run in ordered:
        if run.stage == "finetune":
            assert by_name[run.after].stage == "pretrain"
    owner = by_name["a-bal_bce-seed-3"]
    assert owner.at(study.folder) == by_name[owner.after].at(study.folder), "both stages in one run directory"


def test_single_points_are_trained_with_what_they_start_from(tmp_path):
    study = loaded(tmp_path)
    assert points_named(study, None) == points(study)
    assert {p.name for p in points_named(study, ["*-seed-4"])} == {p.name for p in points(study) if p.axes["seed"] == 4}
    second = next(p for p in points(study) if p.pretraining != p.name)
    chosen = points_named(study, [second.name])
    assert {p.name for p in chosen} == {second.name, second.pretraining}
    assert [run.stage for run in runs(study, chosen)] == ["pretrain", "finetune", "finetune"]
    assert all(run in runs(study) for run in runs(study, chosen))
    with pytest.raises(UsageError, match=f"no point of .* is called {second.name}0") as caught:
        points_named(study, ["*-seed-4", f"{second.name}0"])
    assert second.name in caught.value.remedy


def test_points_and_subsets_of_nearly_equal_numbers_have_names_of_their_own(tmp_path):
    spec = {"spec": str(ROOT / "shards" / "fashion-mnist-lt-full.yaml"), "set": "train-lt"}
    axes = {"data_fraction": [0.25, 0.3333333, 0.3333334], "seed": [20220101, 20220102]}
    study = loaded(tmp_path, axes=axes, shards=spec)
    every = points(study)
    assert len({p.name for p in every}) == len(every) == 6
    assert every[0].name == "fraction-0.25-seed-20220101"
    assert len({study.subset(p.axes) for p in every}) == 3


def test_a_loss_may_have_overrides_of_its_own(tmp_path):
    hard = {"stages.finetune.loss": {"name": "ldam", "scale": 10}, "stages.finetune.smoothing": 0}
    axes = {"loss": ["ldam", "ldam-10", "recipe"], "seed": [3]}
    study = loaded(tmp_path, axes=axes, losses={"ldam-10": hard, "recipe": {}})
    plain, ours, own = (study.load(p.sets).stage("finetune") for p in points(study))
    assert own == study.load(study.study.sets).stage("finetune")
    assert (plain.loss.name, plain.loss.scale) == ("ldam", 30)
    assert (ours.loss.name, ours.loss.scale, ours.smoothing) == ("ldam", 10, 0)


def test_an_axis_counts_over_an_override_of_both_stages(tmp_path):
    sizes = {"a": {**SMALL, "stages.finetune.base_lr": 1e-3}}
    axes = {"size": ["a"], "finetune_learning_rate": [2e-3, 4e-3], "seed": [3]}
    study = loaded(tmp_path, sizes=sizes, axes=axes, sets={**TINY["sets"], "stages.*.base_lr": 7e-3})
    rates = [[study.load(p.sets).stage(s).base_lr for s in ("pretrain", "finetune")] for p in points(study)]
    assert rates == [[7e-3, 2e-3], [7e-3, 4e-3]]


def test_the_shared_pretraining_is_what_each_of_those_points_would_have_trained(tmp_path):
    axes = {"loss": ["bal_bce", "ce"], "finetune_learning_rate": [1e-3, 2e-3], "train": ["all", "probe"]}
    axes["finetune_epochs"] = [2, 3]
    probe = {"stages.finetune.train": "head", "stages.finetune.layer_decay": 1, "stages.finetune.drop_path": 0}
    study = loaded(tmp_path, axes=axes, trains={"probe": probe})
    assert set(study.study.axes.given) == set(FINETUNE_ONLY) - {"start"}  # test_crossing.py
    each = [learnt_from(study.load(p.sets), "pretrain") for p in points(study)]
    assert len(each) == 16
    assert {study.load(p.sets).stage("finetune").epochs for p in points(study)} == {2, 3}
    assert {study.load(p.sets).stage("finetune").train.name for p in points(study)} == {"all", "head"}
    assert all(one == each[0] for one in each)
    assert {p.pretraining for p in points(study)} == {points(study)[0].name}


def test_whole_seeds_come_first(tmp_path):
    assert [p.axes["seed"] for p in points(loaded(tmp_path))] == [3] * 4 + [4] * 4


def test_rates_found_at_one_width_are_carried_over(tmp_path):
    study = loaded(tmp_path, width_rate={"at": 24}, axes={"size": ["a", "b"], "learning_rate": [1e-3, 4e-3]})
    rates = {p.name: study.load(p.sets).stage("pretrain").base_lr for p in points(study)}
    assert rates["a-lr-0.001"] == 1e-3
    assert rates["b-lr-0.004"] == 2e-3, "twice as wide: half the rate"
    own = study.load({}).stage("finetune").base_lr
    assert {study.load(p.sets).stage("finetune").base_lr for p in points(study)} == {own, own / 2}
    root = loaded(tmp_path, width_rate={"at": 24, "power": 0.5}, axes={"size": ["b"], "learning_rate": [1e-3]})
    assert root.load(points(root)[0].sets).stage("pretrain").base_lr == pytest.approx(1e-3 / 2**0.5, rel=1e-5)


# --- data ---


def test_counts_of_a_fraction_and_of_an_imbalance_factor():
    whole = np.array([1000, 100, 10, 3])
    assert subset_counts(whole, fraction=0.3, imbalance=None).tolist() == [300, 30, 3, 1]
    assert subset_counts(whole, fraction=1, imbalance=1000).tolist() == [1000, 100, 10, 1]
    assert subset_counts(whole, fraction=0.1, imbalance=8).tolist() == [100, 50, 25, 12]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/usr/share/datasets/fashion-mnist").is_dir(), reason="needs dataset-fashion-mnist")
def test_subsets_are_built_once_nest_and_are_what_the_recipes_read(tmp_path):
    spec = {"spec": str(ROOT / "shards" / "fashion-mnist-lt.yaml"), "set": "train-lt"}
    study = loaded(tmp_path, shards=spec, axes={"data_fraction": [0.5, 0.1], "imbalance_factor": [100]})
    (half, tenth) = build_subsets(study, points(study))
    before = (half / "manifest.json").stat().st_mtime_ns
    assert build_subsets(study, points(study)) == [half, tenth]
    assert (half / "manifest.json").stat().st_mtime_ns == before
    sets = {where: ShardSet.open(where) for where in (half, tenth)}
    assert sets[half].class_counts.tolist() == [500, 299, 179, 107, 64, 38, 23, 13, 8, 5]
    assert set(keys(sets[tenth])) < set(keys(sets[half]))
    recipes = [study.load(p.sets) for p in points(study)]
    assert [r.data.train for r in recipes] == [str(half), str(tenth)]
    own = study.load({}).data
    assert [r.data.many_over for r in recipes] == [round(own.many_over / 2), round(own.many_over / 10)]


def test_fraction_1_is_the_recipe_s_own_set(tmp_path):
    spec = {"spec": str(ROOT / "shards" / "fashion-mnist-lt.yaml"), "set": "train-lt"}
    study = loaded(tmp_path, shards=spec, axes={"data_fraction": [0.5, 1.0]})
    folders = {str(folder) for folder in wanted_subsets(study, points(study))}
    sets = [study.load(p.sets).data.train for p in points(study)]
    assert sets == [str(tmp_path / "runs" / "shards" / "fraction0p5"), study.load({}).data.train]
    assert folders == {sets[0]}
    both = loaded(tmp_path, shards=spec, axes={"data_fraction": [1.0], "imbalance_factor": [50]})
    assert [folder.name for folder in wanted_subsets(both, points(both))] == ["if50"]


def keys(shards):
    return shards.keys(np.arange(shards.num_samples))


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"axis": {}}, r"study.yaml, line \d+: there is no field axis: did you mean 'axes'"),
        ({"axes": {"sizes": ["a"]}}, r"line \d+: there is no field axes.sizes: did you mean 'size'"),
        ({"axes": {"size": ["c"]}}, r"line \d+: axes.size has 'c', which is not a size: did you mean 'a' or 'b'"),
        ({"axes": {"size": ["vit_x"]}}, "did you mean 'vit_"),
        ({"axes": {"loss": ["bal_bc"]}}, "did you mean 'bal_bce'"),
        ({"axes": {"seed": [1, 1]}}, "seed has a value twice"),
        ({"axes": {"epochs": [0]}}, r"axes.epochs.0 is 0: input should be greater than 0"),
        ({"axes": {"seed": ["1"]}}, "axes.seed.0 is '1'"),
        ({"axes": {"data_fraction": [0.5]}}, "axes.data_fraction needs `shards`"),
        ({"axes": {"loss": ["ce"]}, "stages": ["pretrain"]}, "axes.loss is about finetune"),
        ({"axes": {"finetune_learning_rate": [1e-3]}, "stages": ["pretrain"]}, "axes.finetune_learning_rate is about"),
        ({"stages": ["finetune", "pretrain"]}, "wrong order"),
        ({"sets": {"stages.pretrain.epoch": 3}}, "a-bal_bce-seed-3: .*stages.pretrain.epoch"),
        ({"sizes": {"a": {"model.width": 25}, "b": {}}}, "a-bal_bce-seed-3: .*does not divide"),
        ({"recipe": "nowhere.yaml"}, "there is no recipe"),
        ({"sets": {"run_dir": "runs/a"}}, "sets has run_dir"),
        ({"sets": {**TINY["sets"], **SMALL}}, "a-bal_bce-seed-3 and b-bal_bce-seed-3 would be the same run"),
        (
            {"losses": {"x": {"stages.pretrain.mask_ratio": 0.5}}, "axes": {"loss": ["ce", "x"]}},
            "x starts from the pretraining of ce, and has another stages.pretrain.mask_ratio",
        ),
        ({"axes": {"seed": list(range(60)), "epochs": list(range(1, 60))}}, "3540 combinations"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(tmp_path, changes, said):
    with pytest.raises(UsageError, match=said):
        loaded(tmp_path, **changes)


def test_a_study_that_is_not_there_names_its_neighbour(tmp_path):
    write(tmp_path)
    with pytest.raises(UsageError, match=r"(?s)cannot be read.*study.yaml"):
        load_study(tmp_path / "studies.yaml")


# --- runs, trained for real ---


def warm_popen(words, *, stdin, **options):
    """The same process without its imports, which take most of the time of runs as short as these."""
    assert (words[0], stdin) == (sys.executable, subprocess.DEVNULL)
    return warm.Popen(words[1:], **options)


AXES = {"size": ["a"], "loss": ["bal_bce", "ce"], "seed": [3]}


def on_images(folder, **sets):
    return loaded(folder, axes=AXES, sets={**TINY["sets"], **small_data(), **sets})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    study = on_images(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_runner.subprocess, "Popen", warm_popen)
        outcome = run_all(runs(study), study.folder, jobs=2)
    assert not outcome.failed
    assert not outcome.waited
    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """A study whose runs may be broken."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return on_images(tmp_path)


def by_name(study):
    return {run["name"]: run for run in collect_study(study)["runs"]}


def test_the_table_holds_what_the_runs_measured(trained):
    study = on_images(trained)
    table = collect_study(study)
    assert [run["state"] for run in table["runs"]] == ["done", "done"]
    for run in table["runs"]:
        told = json.loads((Path(run["folder"]) / "finetune" / "eval.json").read_text())
        assert run["measures"]["top1_all"] == told["top1"]["all"]
        assert run["measures"]["ece"] == told["calibration"]["ece"]
        assert run["num_images"] == 743
        assert run["curves"]["pretrain"][-1][0] == pytest.approx(1, abs=0.2)
        assert Path(run["picture"]).is_file()
        log = (Path(run["folder"]) / "log.txt").read_text()
        assert log.count(" finetune: peak lr ") == 1, "each line once, although the process prints them too"
        assert run["flops"] > 0
    first, second = table["runs"]
    assert first["measures"]["reconstruction_loss"] == second["measures"]["reconstruction_loss"], "one pretraining"
    rows = list(csv.DictReader(io.StringIO(as_csv(table))))
    assert [row["loss"] for row in rows] == ["bal_bce", "ce"]
    assert float(rows[0]["top1_all"]) == first["measures"]["top1_all"]


def test_without_the_training_images_on_this_machine_the_table_says_the_same(copied):
    there = collect_study(copied)["runs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("livt_scale.study.table.Sets.of", lambda *_: (None, None))
        assert collect_study(copied)["runs"] == there
    assert there[0]["num_weights"] > 0


@pytest.mark.parametrize("part", [("data", "manifest_digest"), ("weights", "trained_on")])
def test_a_run_that_read_other_images_than_are_there_now_is_named_and_not_counted(copied, part):
    last = runs(copied)[-1]
    file = last.at(copied.folder) / "finetune" / "eval.json"
    report = json.loads(file.read_text())
    report[part[0]][part[1]] = "of a set before it was rebuilt"
    file.write_text(json.dumps(report))
    row = by_name(copied)[last.name]
    assert row["state"] == "not counted"
    assert row["why"].startswith("it read other images than is there now, in ")
    assert row["measures"] == {}


def test_the_reconstruction_loss_is_of_the_images_that_are_there_now(copied, monkeypatch):
    [run, *_] = runs(copied)
    place, kept = run.at(copied.folder), run.at(copied.folder) / "pretrain" / "reconstruction.json"
    first, told = reconstruction_loss(place), json.loads(kept.read_text())
    kept.write_text(json.dumps({**told, "loss": 9.0}))
    assert reconstruction_loss(place).loss == 9.0, "it is not measured twice"
    kept.write_text(json.dumps({**told, "loss": 9.0, "data": "of a set before it was rebuilt"}))
    assert reconstruction_loss(place) == first
    data = run.load(copied.folder).data
    assert sets_read(run, place, train=data.train, val=data.val)[data.val] == first.data
    monkeypatch.setattr(ShardSet, "open", lambda *_, **__: (_ for _ in ()).throw(DataError("it is not here")))
    assert reconstruction_loss(place) == first
    kept.unlink()
    with pytest.raises(DataError, match="not here"):
        reconstruction_loss(place)


def test_what_is_done_is_not_trained_again(copied, caplog):
    caplog.set_level("INFO")
    outcome = run_all(runs(copied), copied.folder)
    assert len(outcome.done) == 3
    assert caplog.messages == []  # a line for each run that is trained


def test_half_done_failed_foreign_and_damaged_runs_are_named_and_not_counted(copied):
    status = copied.folder / "ce" / "finetune" / "status.json"
    told = json.loads(status.read_text())
    for state, why in (("failed", "it broke"), ("preempted", "stopped by SIGTERM")):
        status.write_text(json.dumps({**told, "state": state, "why": why}))
        row = by_name(copied)["ce"]
        assert (row["state"], row["why"], row["measures"]) == (state, why, {})
    status.write_text(json.dumps({**told, "state": "running"}))  # of a process that is gone
    assert by_name(copied)["ce"]["state"] == "stalled"
    status.write_text(json.dumps(told))
    other = on_images(copied.path.parent, **{"stages.finetune.base_lr": 1e-4})
    row = by_name(other)["ce"]
    assert row["state"] == "not counted"
    assert "of another recipe: stages.finetune.base_lr" in row["why"]
    shutil.rmtree(copied.folder / "bal_bce")
    assert by_name(copied)["bal_bce"]["state"] == "not run"
    (copied.folder / "ce" / "pretrain" / "metrics.jsonl").write_text("{")
    row = by_name(copied)["ce"]
    assert row["state"] == "not counted"
    assert "cannot be read" in row["why"]


def test_slurm_gets_whole_recipes_and_what_waits_for_a_pretraining_is_said(trained, copied, tmp_path):
    fresh = on_images(tmp_path)
    everything = ready(fresh, points(fresh))
    assert everything.done == [p.name for p in points(fresh)]
    shutil.rmtree(tmp_path / "runs")
    now = ready(fresh, points(fresh))
    assert [p.name for p in now.points] == ["bal_bce"]
    assert now.waits == ["ce"]
    recipe = whole_recipe(fresh, now.points[0])
    assert recipe.run_dir == str(tmp_path / "runs" / "bal_bce")
    assert recipe.stage_names == ("pretrain", "finetune")
    (tmp_path / "runs").mkdir()
    shutil.copytree(trained / "runs" / "bal_bce", tmp_path / "runs" / "bal_bce")
    now = ready(fresh, points(fresh))
    assert (now.done, [p.name for p in now.points]) == (["bal_bce"], ["ce"])
    assert state_of(fresh, points(fresh)[1]) == ("not run", "")


def test_the_commands(copied):
    where = [str(copied.path), "--out", str(copied.folder)]
    said = CliRunner().invoke(main.app, ["study", "status", *where], catch_exceptions=False)
    assert said.exit_code == 0
    assert said.stdout.splitlines()[-1] == "2 done"
    said = CliRunner().invoke(main.app, ["study", "submit", *where, "--dry-run", "--json"], catch_exceptions=False)
    summary = json.loads(said.stdout)
    assert [one["images"] for one in summary["runs"]] == [704, 704, 704]
    with pytest.raises(UsageError, match="--device is for the cost of runs"):
        CliRunner().invoke(main.app, ["study", "submit", *where, "--device", "a100"], catch_exceptions=False)
    few = ["--point", "bal_bce", "--dry-run", "--json"]
    said = CliRunner().invoke(main.app, ["study", "submit", *where, *few], catch_exceptions=False)
    assert [one["images"] for one in json.loads(said.stdout)["runs"]] == [704, 704]
    shutil.rmtree(copied.folder / "ce" / "finetune")
    said = CliRunner().invoke(main.app, ["study", "collect", *where], catch_exceptions=False)
    assert "not counted: ce: not run" in said.stdout
    assert json.loads((copied.folder / "table.json").read_text())["runs"][0]["state"] == "done"
    assert len((copied.folder / "table.csv").read_text().splitlines()) == 3


# --- livt study compare ---


def test_settings_are_compared_with_the_first_over_seeds():
    table = synthetic.study(sizes=("nano", "micro"), epochs=(6,), seeds=(0, 1, 2), losses=("ce", "bal_bce"))
    found = compare_settings(table)
    assert list(found["values"]) == ["nano, ce", "nano, bal_bce", "micro, ce", "micro, bal_bce"]
    better = found["verdicts"][0]  # the same jitter, and 0.02 above
    assert better["says"] == "nano, bal_bce above nano, ce in top1 all"
    assert better["mean"] == pytest.approx(0.02)
    assert (better["word"], better["num_seeds"]) == ("confirmed", 3)
    assert found["values"]["micro, ce"]["top1_all"].keys() == {"0", "1", "2"}
    assert all(line in results_page.page([], [found]).splitlines() for line in results_page.comparison_lines(found))
    lines = results_page.comparison_lines(found)
    assert lines[0].startswith("| setting | M weights | seeds | all |")
    assert sum(line.startswith("| nano, ") for line in lines) == 4  # two settings and two questions


def test_what_did_not_finish_is_named_and_not_compared():
    table = synthetic.study(sizes=("nano", "micro"), epochs=(6,), seeds=(0, 1, 2))
    synthetic.fail(table["runs"][0], why="it broke")
    found = compare_settings(table)
    assert found["missing"] == {table["runs"][0]["name"]: "it broke"}
    assert {verdict["num_seeds"] for verdict in found["verdicts"]} == {2}
    assert found["verdicts"][0]["says"] == "micro above nano in top1 all"
    for run in table["runs"]:
        synthetic.fail(run, why="it broke")
    found = compare_settings(table)
    assert {verdict["num_seeds"] for verdict in found["verdicts"]} == {0}
    assert results_page.comparison_lines(found)[-1].startswith("not counted: ")


@pytest.mark.parametrize(
    ("axes", "words"), [({"seed": [0, 1]}, "one setting"), ({"loss": ["ce", "bce"]}, "no axis seed")]
)
def test_a_study_without_two_settings_and_seeds_cannot_be_compared(axes, words):
    with pytest.raises(UsageError, match=words):
        compare_settings({**synthetic.study(), "axes": axes})
